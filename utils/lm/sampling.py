"""Drawing the next token: greedy, or from the LM's distribution after temperature, top-k and top-p.

A draw is the inverse of the cumulative distribution at a uniform number that belongs to the sequence and to the place
of the token in it (`uniforms`). So the text of a seed depends neither on the batch a prompt is in nor on how many
tokens a step brings, and verified decoding draws what plain decoding would have drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.lm.model import upload

# Streams of uniform numbers of one sequence.
TOKEN_STREAM, ACCEPTANCE_STREAM = 0, 1


@dataclass(frozen=True)
class Sampler:
    """How logits become tokens. `processors` that read the text so far need `prefixes` at every call."""

    processors: LogitsProcessorList
    greedy: bool
    reads_text: bool = False

    @classmethod
    def from_settings(cls, temperature: float, top_k: int | None, top_p: float | None) -> "Sampler":
        """temperature >= 0, where 0 is greedy; top_k and top_p None: no cut."""
        if temperature == 0:
            return cls(LogitsProcessorList(), greedy=True)
        warpers = LogitsProcessorList()
        if temperature != 1:
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        return cls(warpers, greedy=False)

    def tokens(self, logits: Tensor, uniforms: list[float], prefixes: Callable[[int], list[int]]) -> Tensor:
        """One token (N,) int64 for each row of logits (N, V), at the uniform numbers in [0, 1), on the logits' device.

        prefixes(i): the ids before row i's token.
        """
        if self.processors:
            logits = self._process(logits.float(), prefixes)
        if self.greedy:
            return logits.argmax(dim=-1)
        cumulative = logits.float().softmax(dim=-1).double().cumsum(dim=-1)
        points = upload(np.array(uniforms)[:, None], logits.device) * cumulative[:, -1:]
        # Right of equal values: a token of probability 0 adds nothing to the sum and is never the one.
        return torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)[:, 0]

    def _process(self, logits: Tensor, prefixes: Callable[[int], list[int]]) -> Tensor:
        if not self.reads_text:
            return self._run(logits.new_zeros(len(logits), 1, dtype=torch.long), logits)
        rows = []
        for i, row in enumerate(logits):
            text = upload([prefixes(i)], logits.device)
            rows.append(self._run(text, row[None]))
        return torch.cat(rows)

    def _run(self, input_ids: Any, logits: Any) -> Tensor:
        # The library's annotations name tensor classes that no tensor is of.
        return self.processors(input_ids, logits)


def uniforms(seed: int, sequence: int, stream: int, n: int) -> np.ndarray:
    """(n,) float64 in [0, 1): the first n numbers of a sequence's stream, whatever n is."""
    return np.random.default_rng([seed, sequence, stream]).random(n)
