"""The decoders that `decoding.py` compares: our loop with this and that, and what others decode with.

Every peer goes on from the same prompts for the same number of tokens; none stops at an end of text. Its seconds are a
wall clock's, the prompts' forward passes in them; what it needs to know before (a datastore, a suffix tree of the
corpus) is there when the clock starts.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from utils.decoding.draft import NOTHING, Drafter, DraftTree
from utils.decoding.draft_policy import DraftPolicy
from utils.decoding.loop import Decoding, Request, decode
from utils.decoding.types import DraftCounts
from utils.lm.kv_cache import KVCache
from utils.lm.model import CausalLM
from utils.lm.sampling import Sampler


@dataclass
class Tally:
    """What decoding some prompts cost: seconds by a wall clock, and those of them in the LM and in retrieval."""

    seconds: float = 0.0
    lm_seconds: float = 0.0
    retrieval_seconds: float = 0.0
    forward_passes: int = 0
    new_token_ids: dict[int, list[int]] = field(default_factory=dict)  # by the prompt's index
    drafts: DraftCounts | None = None
    tokens_from_chunks: int = 0

    @property
    def rest_seconds(self) -> float:
        return self.seconds - self.lm_seconds - self.retrieval_seconds

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.new_token_ids.values()))

    def add(self, other: "Tally") -> None:
        self.seconds += other.seconds
        self.lm_seconds += other.lm_seconds
        self.retrieval_seconds += other.retrieval_seconds
        self.forward_passes += other.forward_passes
        self.tokens_from_chunks += other.tokens_from_chunks
        self.new_token_ids |= other.new_token_ids
        if other.drafts is not None:
            self.drafts = self.drafts or DraftCounts()
            add_counts(self.drafts, other.drafts)


def add_counts(total: DraftCounts, counts: DraftCounts) -> None:
    total.n_drafts += counts.n_drafts
    total.draft_tokens += counts.draft_tokens
    for mine, theirs in ((total.drafted, counts.drafted), (total.accepted, counts.accepted)):
        mine += [0] * (len(theirs) - len(mine))
        for ahead, n in enumerate(theirs):
            mine[ahead] += n


class Peer(Protocol):
    """A way to decode. `begin` forgets what earlier prompts left behind, outside the clock."""

    name: str
    is_exact: bool  # its text must be the baseline's
    compiles: bool  # it warms up on as many tokens as count

    def begin(self) -> None: ...

    def run(self, requests: Sequence[Request]) -> Tally:
        """Go on from these prompts together."""
        ...


# ---- Our loop


Make = Callable[[], dict[str, Any]]


class OurLoop:
    """Our decode loop; `make` gives what goes into a Decoding beyond the sampler, anew for each repeat."""

    compiles = False

    def __init__(
        self,
        name: str,
        lm: CausalLM,
        sampler: Sampler,
        batch_size: int,
        make: Make,
        is_exact: bool = True,
        cache: KVCache | None = None,
    ) -> None:
        self.name, self.is_exact = name, is_exact
        self._lm, self._sampler, self._batch_size, self._make, self._cache = lm, sampler, batch_size, make, cache
        self.begin()

    def begin(self) -> None:
        self._decoding = Decoding(
            self._sampler, frozenset(), batch_size=self._batch_size, cache=self._cache, **self._make()
        )

    def run(self, requests: Sequence[Request]) -> Tally:
        started = time.perf_counter()
        generations = list(decode(self._lm, requests, self._decoding))
        tally = Tally(time.perf_counter() - started)
        for generation in generations:
            stats = generation.stats
            chunk_tokens = sum(len(chunk.token_ids) for chunk in generation.chunks)
            tally.add(
                Tally(
                    lm_seconds=stats.lm_seconds,
                    retrieval_seconds=stats.retrieval_seconds,
                    forward_passes=stats.forward_passes,
                    new_token_ids={generation.index: generation.new_token_ids},
                    drafts=stats.drafts,
                    tokens_from_chunks=chunk_tokens,
                )
            )
        return tally


def verify_mode(drafter: Drafter, growth: str) -> dict[str, Any]:
    return {"drafter": drafter, "draft_policy": DraftPolicy() if growth == "paying" else None}


# ---- model.generate


class Generate:
    """`model.generate` on its own KV cache; prompts of a batch are padded on the left.

    The LM's seconds are those inside the model's forward; drawing tokens is among the rest, where our loop counts it
    to the LM.
    """

    def __init__(self, name: str, lm: CausalLM, temperature: float, compiles: bool = False, **settings: Any) -> None:
        self.name, self.compiles, self._lm = name, compiles, lm
        self.is_exact = temperature == 0  # its random numbers are other ones
        # In force even where the model's own generation config says otherwise.
        lm.model.generation_config.eos_token_id = None
        lm.model.generation_config.pad_token_id = 0
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self._settings = (drawing if temperature else {"do_sample": False}) | settings

    def begin(self) -> None:
        pass

    def run(self, requests: Sequence[Request]) -> Tally:
        longest = max(len(request.prompt_ids) for request in requests)
        padding = [longest - len(request.prompt_ids) for request in requests]
        rows = [[0] * n + request.prompt_ids for n, request in zip(padding, requests, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        torch.manual_seed(requests[0].seed + requests[0].index)
        model: Any = self._lm.model  # `generate` is not part of its type
        clock = _ForwardClock(model)
        started = time.perf_counter()
        with torch.inference_mode(), clock:
            generated = model.generate(
                torch.tensor(rows, device=self._lm.device),
                attention_mask=torch.tensor(mask, device=self._lm.device),
                max_new_tokens=requests[0].max_new_tokens,
                **self._settings,
            )
            new = generated[:, longest:].tolist()
        seconds = time.perf_counter() - started
        tokens = {request.index: row for request, row in zip(requests, new, strict=True)}
        return Tally(seconds, clock.seconds, 0.0, clock.n_calls * len(requests), tokens)


class _ForwardClock:
    """Counts and times a model's forward passes while it is entered."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.n_calls, self.seconds, self._started = 0, 0.0, 0.0
        self._model = model

    def __enter__(self) -> None:
        self._handles = (
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end),
        )

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.n_calls += 1
        self.seconds += time.perf_counter() - self._started


# ---- SuffixDecoding


@dataclass(frozen=True)
class SuffixSettings:
    """The arguments of `speculate` of the same names; max_tokens is its max_spec_tokens, which it also comes to.

    With its defaults (1 and 0.1) it drafts 4 tokens; these gave the most tokens per forward pass on prompts of the
    example's validation split.
    """

    shape: Literal["tree", "line"] = "tree"
    max_tokens: int = 16
    max_spec_factor: float = 16.0
    min_token_prob: float = 0.01


class SuffixCorpus:
    """SuffixDecodingCache over a corpus, which drafters use one after the other."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache: Any = SuffixDecodingCache(max_tree_depth=64)
        for i, text in enumerate(texts):
            name = ("corpus", i)
            self.cache.start_request(name, [])
            self.cache.add_active_response(name, np.array(text, dtype=np.int32))
            self.cache.stop_request(name)

    @staticmethod
    def is_available() -> bool:
        return importlib.util.find_spec("arctic_inference") is not None

    def forget_responses(self) -> None:
        for name in [name for name in self.cache.cached_requests if name[0] != "corpus"]:
            self.cache.evict_cached_response(name)


class SuffixDrafter:
    """SuffixDecoding as a drafter of our loop: the corpus in its global tree, the prompt and response in a local one.

    cross_request: responses stay in the global tree for the prompts that follow, as that library has it. Without it they
    never go there.
    """

    def __init__(self, corpus: SuffixCorpus, settings: SuffixSettings, cross_request: bool) -> None:
        self._cache, self._settings, self._cross_request = corpus.cache, settings, cross_request
        self._n_added: dict[int, int] = {}
        self._n_read: dict[int, int] = {}
        corpus.forget_responses()

    def hint(self, token_ids: list[int]) -> float:
        return 0.0  # it has none: its searches are judged all alike

    def draft(self, key: int, token_ids: list[int], hidden_state: torch.Tensor, max_depth: int) -> DraftTree:
        self._add(key, token_ids[self._n_added[key] :])
        if max_depth < 1:
            return NOTHING
        settings = self._settings
        found = self._cache.speculate(
            ("prompt", key),
            np.array(token_ids[-64:], dtype=np.int32),
            max_spec_tokens=settings.max_tokens,
            max_spec_factor=settings.max_spec_factor,
            min_token_prob=settings.min_token_prob,
            use_tree_spec=settings.shape == "tree",
        )
        return _cut(DraftTree(found.token_ids, found.parents, found.probs), max_depth)

    def observe(self, key: int, token_ids: list[int], hidden_states: torch.Tensor) -> None:
        if key not in self._n_added:
            self._cache.start_request(("prompt", key), np.array(token_ids, dtype=np.int32))
            if not self._cross_request:
                self._cache.evict_cached_response(("prompt", key))
            self._n_added[key] = self._n_read[key] = len(token_ids)
            return
        self._n_read[key] += len(token_ids)
        # The token that a draft was asked for was added then.
        self._add(key, token_ids[len(token_ids) - (self._n_read[key] - self._n_added[key]) :])

    def end(self, key: int) -> None:
        self._cache.stop_request(("prompt", key))
        del self._n_added[key], self._n_read[key]

    def _add(self, key: int, token_ids: list[int]) -> None:
        if token_ids:
            self._cache.add_active_response(("prompt", key), np.array(token_ids, dtype=np.int32))
            self._n_added[key] += len(token_ids)


def _cut(tree: DraftTree, max_depth: int) -> DraftTree:
    """The tree without the nodes that are deeper."""
    return tree.part([node for node, depth in enumerate(tree.depths()) if depth <= max_depth])
