"""From similarity to the probability that a proposal is accepted, and the two ways of deciding (paper section 4).

q = g(s) is monotone and piecewise linear in the cosine similarity s, constant beyond its knots. One knob θ gives the
default map: g(s) = clip((s - η) / (1 - η), 0, q_max) with η = 2θ - 1, so that g(θ) = 1/2; a fitted one is read from a
file. The policy `threshold` accepts a proposal iff s >= θ, or with a fitted map iff g(s) >= 1/2; `bernoulli` accepts
with probability g(s).

Beyond the paper, the LM may have a say: a chunk is accepted only where the LM gives its first token c₁ a probability
p(c₁) >= δ · max p. The logits are there anyway when a chunk is proposed. And a chunk may be rejected with which the text
would end in the same tokens twice in a row: an LM that has begun to repeat itself finds the next repetition likely. Both
depend on the text so far and the proposal alone, as q does, so that the probability of a text stays an exact sum.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.files import InputError
from utils.json_io import read_json, write_json

Policy = Literal["threshold", "bernoulli"]
SHORTEST_REPEAT, LONGEST_REPEAT = 2, 32  # tokens; two newlines are no repeat, four are


@dataclass(frozen=True)
class AcceptanceMap:
    """g: probabilities at knots of similarity, both ascending, linear between them. `origin`: what it was fitted to."""

    similarities: tuple[float, ...]
    probabilities: tuple[float, ...]
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_threshold(cls, similarity_threshold: float, q_max: float) -> "AcceptanceMap":
        """The default map of θ < 1."""
        lowest = 2 * similarity_threshold - 1
        return cls((lowest, lowest + (1 - lowest) * q_max), (0.0, q_max))

    def __call__(self, similarity: np.ndarray | float) -> np.ndarray:
        """g(s), float64, of any shape; NaN (no proposal) gives 0."""
        probability = np.interp(np.asarray(similarity, dtype=np.float64), self.similarities, self.probabilities)
        return np.nan_to_num(probability, nan=0.0)


def save_map(path: Path, acceptance_map: AcceptanceMap) -> None:
    write_json(path, asdict(acceptance_map), indent=2)


def read_map(path: Path) -> AcceptanceMap:
    """A fitted map; raises InputError where the file is missing, damaged, or its knots are no monotone map."""
    found = read_json(path)
    try:
        similarities, probabilities = (
            np.array(found[key], dtype=np.float64) for key in ("similarities", "probabilities")
        )
        is_map = (
            similarities.shape == probabilities.shape == (len(found["similarities"]),)
            and len(similarities) > 0
            and bool((np.diff(similarities) > 0).all() and (np.diff(probabilities) >= 0).all())
            and bool(np.isfinite(similarities).all())
            and 0 <= probabilities[0] <= probabilities[-1] < 1
        )
        origin = dict(found["origin"])
    except (KeyError, TypeError, ValueError, OverflowError):
        is_map = False
    if not is_map:
        raise InputError(
            f"{path}: is not an acceptance map of ascending knots in [0, 1); fit one with --fit_acceptance"
        )
    return AcceptanceMap(tuple(similarities.tolist()), tuple(probabilities.tolist()), origin)


def ends_in_repeat(tails: np.ndarray) -> np.ndarray:
    """(n,) bool: whether a text ends in the same SHORTEST_REPEAT to LONGEST_REPEAT tokens twice in a row.

    tails (n, 2 * LONGEST_REPEAT): the last token ids of each text, -1 on the left where it is shorter.
    """
    found = np.zeros(len(tails), dtype=bool)
    for length in range(SHORTEST_REPEAT, LONGEST_REPEAT + 1):
        last, before = tails[:, -length:], tails[:, -2 * length : tails.shape[1] - length]
        found |= (last == before).all(axis=1) & (before[:, 0] >= 0)
    return found


def tail_of(token_ids: Sequence[int]) -> np.ndarray:
    """(1, 2 * LONGEST_REPEAT): the end of a text, as `ends_in_repeat` takes it."""
    last = token_ids[-2 * LONGEST_REPEAT :]
    return np.array([[-1] * (2 * LONGEST_REPEAT - len(last)) + list(last)])


@dataclass(frozen=True)
class Acceptance:
    """Which proposals become text.

    similarity_threshold θ in [-1, 1], where 1 disables retrieval; q_max in (0, 1) caps the default map, and under
    `threshold` is the acceptance probability from θ on; fitted: a map that takes the place of θ's; min_first_token_prob
    δ in [0, 1]: the least probability of a chunk's first token, relative to the LM's likeliest, 0 for the paper's rule;
    reject_repeats: whether chunks are rejected with which the text `ends_in_repeat`.
    """

    similarity_threshold: float
    policy: Policy = "threshold"
    q_max: float = 0.999
    fitted: AcceptanceMap | None = None
    min_first_token_prob: float = 0.0
    reject_repeats: bool = False

    @property
    def asks_lm(self) -> bool:
        """Whether acceptance depends on what the LM gives to a chunk's first token."""
        return self.min_first_token_prob > 0

    @property
    def never(self) -> bool:
        """Whether no proposal can be accepted, so that none need be looked for."""
        return self.fitted is None and self.similarity_threshold >= 1

    def map(self, similarity: np.ndarray | float) -> np.ndarray:
        """g(s) of the fitted map or of θ's."""
        if self.never:
            return np.zeros_like(np.asarray(similarity, dtype=np.float64))
        return self.acceptance_map(similarity)

    @property
    def acceptance_map(self) -> AcceptanceMap:
        """The fitted map, or that of θ < 1."""
        return self.fitted or AcceptanceMap.from_threshold(self.similarity_threshold, self.q_max)

    def probability(self, similarity: np.ndarray | float) -> np.ndarray:
        """The probability q that a proposal is accepted, float64 of any shape, 0 for NaN (no proposal).

        `threshold` counts as accepting with q_max, since what it rejects by the text would otherwise be impossible.
        """
        if self.policy == "bernoulli":
            return self.map(similarity)
        return np.where(self._is_above(np.asarray(similarity, dtype=np.float64)), self.q_max, 0.0)

    def accepts(self, similarity: float, uniform: float) -> bool:
        """Whether the similarity lets a proposal through: uniform in [0, 1) decides under `bernoulli`."""
        if self.never:
            return False
        if self.policy == "threshold":
            return bool(self._is_above(np.float64(similarity)))
        return uniform < float(self.map(similarity))

    def _is_above(self, similarity: np.ndarray | np.float64) -> np.ndarray:
        if self.never:
            return np.zeros_like(similarity, dtype=bool)
        if self.fitted is not None:
            return np.asarray(self.fitted(similarity) >= 0.5)
        return np.asarray(similarity >= self.similarity_threshold)
