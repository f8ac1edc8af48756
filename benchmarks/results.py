"""What a comparison of decoders came to: figures of each peer, ratios to the baseline and to `generate`, and whether
the texts are the baseline's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import Spread
from benchmarks.peers import Peer, Tally
from utils.decoding.loop import Request
from utils.lm.model import CausalLM
from utils.lm.sampling import TOKEN_STREAM, uniforms

HEADER = (
    "peer",
    "tokens/s",
    "/ generate",
    "TTS %",
    "FPS %",
    "MAT",
    "LM s",
    "retrieval s",
    "rest s",
    "overhead %",
    "drafted",
    "accepted",
    "same text",
)


@dataclass(frozen=True)
class Difference:
    """A text that is not the baseline's. at: the first new token that differs, from 0.

    margin: how near it was, by a forward pass without a cache. Greedy: how far the logit of the baseline's token lies
    above the other's. Sampled: how far the uniform number that is drawn with lies from the border of two tokens in the
    cumulative distribution. Some 1e-5 and some 1e-7 are rounding, which passes over more tokens have other than passes
    over one: near-ties.
    """

    prompt: int
    at: int
    margin: float


def differences(
    lm: CausalLM, requests: Sequence[Request], plain: dict[int, list[int]], tallies: list[Tally], temperature: float
) -> list[Difference]:
    """Of each prompt whose text differs from the plain one in any repeat, the first such difference."""
    found: dict[int, Difference] = {}
    for tally in tallies:
        for request in requests:
            new, wanted = tally.new_token_ids[request.index], plain[request.index]
            if new != wanted and request.index not in found:
                at = next(i for i, (a, b) in enumerate(zip(new, wanted, strict=True)) if a != b)
                margin = _margin(lm, request, wanted[:at], wanted[at], new[at], temperature)
                found[request.index] = Difference(request.index, at, margin)
    return list(found.values())


@torch.inference_mode()
def _margin(lm: CausalLM, request: Request, before: list[int], wanted: int, got: int, temperature: float) -> float:
    text = torch.tensor([request.prompt_ids + before], device=lm.device)
    _, logits = lm.forward(text, logits_to_keep=1)
    if temperature == 0:
        return float(logits[0, -1, wanted] - logits[0, -1, got])
    borders = (logits[0, -1].float() / temperature).softmax(-1).double().cumsum(-1).cpu()
    uniform = uniforms(request.seed, request.index, TOKEN_STREAM, len(before) + 1)[-1]
    return float((borders - uniform * borders[-1]).abs().min())


@dataclass(frozen=True)
class Result:
    """A peer's repeats. different: None where its text need not be the baseline's."""

    peer: Peer
    batch_size: int
    temperature: float
    tallies: list[Tally]
    different: list[Difference] | None

    @property
    def tokens_per_second(self) -> Spread:
        return Spread(tuple(tally.n_tokens / tally.seconds for tally in self.tallies))

    @property
    def tokens_per_forward(self) -> Spread:
        return Spread(tuple(tally.n_tokens / tally.forward_passes for tally in self.tallies))

    def seconds(self, account: str) -> Spread:
        return Spread(tuple(getattr(tally, account) for tally in self.tallies))

    def speed_over(self, other: "Result | None") -> Spread | None:
        return None if other is None else self.tokens_per_second.over(other.tokens_per_second)

    def time_saved(self, baseline: "Result") -> Spread:
        """TTS: 1 - seconds per token over the baseline's, repeat by repeat."""
        ratio = baseline.tokens_per_second.over(self.tokens_per_second)
        return Spread(tuple(1 - value for value in ratio.values))

    def as_json(self, results: Sequence["Result"]) -> dict[str, Any]:
        by_name = {result.peer.name: result for result in results}
        generate = self.speed_over(by_name.get("generate"))
        tally = self.tallies[0]
        drafts = None
        if tally.drafts is not None:
            drafts = {
                "drafts": tally.drafts.n_drafts,
                "draft_tokens": tally.drafts.draft_tokens,
                "accepted_tokens": tally.drafts.accepted_tokens,
                "drafted_by_position": tally.drafts.drafted,
                "accepted_by_position": tally.drafts.accepted,
            }
        return {
            "peer": self.peer.name,
            "batch_size": self.batch_size,
            "temperature": self.temperature,
            "tokens": tally.n_tokens,
            "forward_passes": [one.forward_passes for one in self.tallies],
            "tokens_per_second": self.tokens_per_second.as_json(),
            "speed_over_generate": None if generate is None else generate.as_json(),
            "tts": self.time_saved(by_name["baseline"]).as_json(),
            "fps": self._fps().as_json(),
            "tokens_per_forward": self.tokens_per_forward.as_json(),
            **{
                f"{name}seconds": self.seconds(f"{name}seconds").as_json()
                for name in ("", "lm_", "retrieval_", "rest_")
            },
            "retrieval_and_rest_over_lm": self.overhead().as_json(),
            "tokens_from_chunks": tally.tokens_from_chunks,
            "drafts_of_first_repeat": drafts,
            "texts_unlike_the_baselines": None if self.different is None else [vars(d) for d in self.different],
        }

    def overhead(self) -> Spread:
        """Retrieval and bookkeeping over the LM's seconds."""
        return Spread(tuple((tally.seconds - tally.lm_seconds) / tally.lm_seconds for tally in self.tallies))

    def row(self, results: Sequence["Result"]) -> list[str]:
        """As HEADER names the columns; medians, with quartiles where there is noise."""
        by_name = {result.peer.name: result for result in results}
        over_generate, drafts = self.speed_over(by_name.get("generate")), self.tallies[0].drafts
        n_passes = self.tallies[0].forward_passes - len(self.tallies[0].new_token_ids)
        same = (
            ""
            if self.different is None
            else f"{len(by_name['baseline'].tallies[0].new_token_ids) - len(self.different)}"
        )
        return [
            self.peer.name,
            self.tokens_per_second.text(),
            "" if over_generate is None else over_generate.text(),
            f"{100 * self.time_saved(by_name['baseline']).median:.1f}",
            f"{100 * self._fps().median:.1f}",
            f"{self.tokens_per_forward.median:.2f}",
            *(f"{self.seconds(name).median:.2f}" for name in ("lm_seconds", "retrieval_seconds", "rest_seconds")),
            f"{100 * self.overhead().median:.1f}",
            f"{drafts.draft_tokens / n_passes:.1f}" if drafts is not None and n_passes else "",
            f"{drafts.accepted_tokens / max(drafts.draft_tokens, 1):.0%}" if drafts is not None else "",
            f"{same} of {len(self.tallies[0].new_token_ids)}" if same else "",
        ]

    def _fps(self) -> Spread:
        return Spread(tuple(1 - 1 / value for value in self.tokens_per_forward.values))
