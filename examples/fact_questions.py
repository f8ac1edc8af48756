"""Expert facts: how often a language model gives the fact that a person marked, in three ways of asking.

A directory is a passage file of stage 1 whose entries also say whom they are about and how to ask for what is marked:
`[{"text", "spans", "name", "fact", "questions": {kind: prompt}}, …]`, one fact an entry. A question is a prompt that
the fact would go on from. The ways: the LM alone, the LM with all entries of the person before the question, and the
LM with a datastore of the spans in chunk mode (paper: 0, 46.4 and 75.7% with GPT-2-XL and its authors' data).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Retriever
from utils.decoding.types import Generation, Request
from utils.files import InputError
from utils.json_io import iter_json_list
from utils.lm.model import CausalLM, eos_token_ids
from utils.lm.sampling import Sampler

ALONE, WITH_PROFILE, WITH_CHUNKS = WAYS = ("LM", "LM with the profile", "LM with expert chunks")
N_THRESHOLDS = 11
BATCH_SIZE = 32


@dataclass(frozen=True)
class Question:
    """One prompt, what would be right, and all that the directory says of the person."""

    name: str
    fact: str
    kind: str
    prompt: str
    profile: str


@dataclass(frozen=True)
class Count:
    """Of n answers, how many held the fact, and how many held other facts of the directory instead."""

    n: int
    right: int
    false: int

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.n)


def read_questions(path: Path) -> list[Question]:
    """The questions of a directory in its order; raises InputError where an entry lacks something."""
    entries = list(iter_json_list(path))
    for n, entry in enumerate(entries, 1):
        if not _is_entry(entry):
            keys = "text, spans, name, fact and questions (a prompt by its kind), none of them empty"
            raise InputError(f"{path}: entry {n} is none of a directory; expected an object with {keys}")
    profiles: dict[str, list[str]] = {}
    for entry in entries:
        profiles.setdefault(entry["name"], []).append(entry["text"])
    return [
        Question(entry["name"], entry["fact"], kind, prompt, "\n".join(profiles[entry["name"]]))
        for entry in entries
        for kind, prompt in entry["questions"].items()
    ]


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("questions"), dict) or not entry.get("spans"):
        return False
    texts = [entry.get(key) for key in ("text", "name", "fact")] + list(entry["questions"].values())
    return len(texts) > 3 and all(isinstance(text, str) and text for text in texts)


class Asker:
    """Generates answers of so many tokens, drawn with a seed at a temperature, 0 for greedy ones.

    min_first_token_prob: δ, by which the LM lets a chunk propose.
    """

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        datastore: Datastore,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        min_first_token_prob: float = 0.0,
    ) -> None:
        self._lm, self._tokenizer, self._datastore = lm, tokenizer, datastore
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._min_first_token_prob = min_first_token_prob

    def ask(self, questions: Sequence[Question], way: str, threshold: float = 1.0) -> list[str]:
        """The new text after each prompt. threshold: θ of the chunks.

        Raises InputError where a prompt and its answer exceed the model's positions.
        """
        retriever = self._retriever(threshold) if way == WITH_CHUNKS else None
        texts = {each.index: each.new_token_ids for each in self._generate(questions, way, retriever)}
        return [str(self._tokenizer.decode(texts[n])) for n in range(len(questions))]

    def _retriever(self, threshold: float) -> Retriever:
        return Retriever(self._datastore, Acceptance(threshold, min_first_token_prob=self._min_first_token_prob))

    def thresholds(self, questions: Sequence[Question]) -> list[float]:
        """Quantiles of the similarities that the questions' chunks have: what θ means differs from model to model."""
        generations = self._generate(questions, WITH_CHUNKS, self._retriever(-1))
        similarities = [proposal.similarity for each in generations if each.trace for proposal in each.trace.proposals]
        if not similarities:
            raise InputError("no question or answer ends with an entry token of the datastore; mark what follows names")
        quantiles = np.quantile(similarities, np.linspace(0, 1, N_THRESHOLDS))
        return sorted({floor(similarity * 1000) / 1000 for similarity in quantiles.tolist()})

    def _generate(self, questions: Sequence[Question], way: str, retriever: Retriever | None) -> Iterator[Generation]:
        requests = [
            Request(n, self._prompt_ids(question, way), self._max_new_tokens, self._seed)
            for n, question in enumerate(questions)
        ]
        ends = eos_token_ids(self._lm.model.generation_config, self._tokenizer)
        decoding = Decoding(Sampler.from_settings(self._temperature, None, None), ends, retriever, BATCH_SIZE)
        return decode(self._lm, requests, decoding)

    def _prompt_ids(self, question: Question, way: str) -> list[int]:
        prompt = f"{question.profile}\n{question.prompt}" if way == WITH_PROFILE else question.prompt
        token_ids = list(self._tokenizer(prompt, verbose=False)["input_ids"])
        n_tokens, n_positions = len(token_ids) + self._max_new_tokens, self._lm.n_positions
        if n_positions is not None and n_tokens > n_positions:
            got = f"the question {question.prompt!r} and its answer are {n_tokens} tokens"
            raise InputError(f"{got}, {self._lm.name} reads {n_positions}; shorten the profile of {question.name}")
        return token_ids


def best_threshold(by_threshold: dict[float, Count]) -> float:
    """The θ with the most right answers, the highest of equals: what it rejects is not needed."""
    return max(by_threshold, key=lambda threshold: (by_threshold[threshold].right, threshold))


def count(pairs: Iterable[tuple[Question, str]], facts: Iterable[str]) -> Count:
    """pairs of questions and answers; facts: all of the directory."""
    facts = set(facts)
    right = false = n = 0
    for question, answer in pairs:
        is_right = holds(answer, question.fact)
        n, right = n + 1, right + is_right
        false += not is_right and any(holds(answer, fact) for fact in facts)
    return Count(n, right, false)


def holds(text: str, fact: str) -> bool:
    """Whether a fact stands in a text, not as a part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text) is not None


def wilson_interval(n_right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share by Wilson's score; n >= 1."""
    centre, spread = n_right + z * z / 2, z * sqrt(n_right * (n - n_right) / n + z * z / 4)
    return max((centre - spread) / (n + z * z), 0.0), min((centre + spread) / (n + z * z), 1.0)
