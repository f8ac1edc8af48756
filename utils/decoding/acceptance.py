"""From similarity to the probability that a proposal is accepted, and the two ways of deciding (paper section 4).

q = g(s) is monotone and piecewise linear in the cosine similarity s, constant beyond its knots. One knob θ gives the
default map: g(s) = clip((s - η) / (1 - η), 0, q_max) with η = 2θ - 1, so that g(θ) = 1/2; a fitted one is read from a
file. The policy `threshold` accepts a proposal iff s >= θ, or with a fitted map iff g(s) >= 1/2; `bernoulli` accepts
with probability g(s).

Beyond the paper, the LM may have a say: only rows propose to whose chunk's first token c₁ the LM gives a probability
p(c₁) >= δ · max p. The logits are there anyway when a chunk is proposed. And a chunk may be rejected that the text holds
already, after the same token, or with which it would end in the same tokens twice in a row: an LM that has begun to repeat
itself finds the next repetition likely. Both depend on the text so far alone, as q does, so that the probability of a text
stays an exact sum.
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
class NeighborMixture:
    """What is proposed where the K most similar rows propose: one of them, drawn, and its chunk or a prefix of it.

    Row k is drawn with a probability in proportion to exp(similarity / temperature) · p_k^lm_power, where p_k is what the LM
    gives to the first token of its chunk. Of the chunk's L tokens the first is proposed, and after the j-th the next with
    probability ρ_j; the whole chunk so with ρ_1 … ρ_{L-1}. continuation: the ρ, the last of which holds for all beyond;
    (1.0,) proposes whole chunks.
    """

    n_neighbors: int
    temperature: float = 0.02
    continuation: tuple[float, ...] = (1.0,)
    lm_power: float = 0.0

    def weights(self, similarities: np.ndarray, first_log_probs: np.ndarray | None) -> np.ndarray:
        """(N, K) the probability of each row; similarities (N, K), NaN where there are fewer rows, which get 0.

        first_log_probs (N, K): log p_k, up to a constant of each position; None where lm_power is 0.
        """
        logits = similarities / self.temperature
        if self.lm_power:
            assert first_log_probs is not None
            logits = logits + self.lm_power * first_log_probs
        logits = np.where(np.isnan(similarities), -np.inf, logits)
        highest = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(highest), highest, 0.0))
        return np.asarray(weights / np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(float).tiny))

    def continuations(self, n_tokens: int) -> np.ndarray:
        """(n_tokens,) ρ of each."""
        return np.array([self.continuation[min(i, len(self.continuation) - 1)] for i in range(n_tokens)])

    def draw(
        self, similarities: np.ndarray, first_log_probs: np.ndarray | None, chunk_lengths: np.ndarray, uniform: float
    ) -> tuple[int, int]:
        """Which row is proposed and how many tokens of its chunk; uniform in [0, 1), the arrays (K,) as of `weights`."""
        of_one = None if first_log_probs is None else first_log_probs[None]
        row, rest = _inverse(self.weights(similarities[None], of_one)[0], uniform)
        length = int(chunk_lengths[row])
        reached = np.concatenate([[1.0], np.cumprod(self.continuations(length - 1)), [0.0]])
        return row, 1 + _inverse(reached[:-1] - reached[1:], rest)[0]


def _inverse(probabilities: np.ndarray, uniform: float) -> tuple[int, float]:
    """The first whose cumulative probability is above uniform in [0, 1), and where in its own share uniform lies."""
    upper = np.cumsum(probabilities)
    # Rounding may lead past the last that has a probability.
    last = int(np.flatnonzero(probabilities)[-1])
    chosen = min(int(np.searchsorted(upper, uniform * upper[-1], side="right")), last)
    lower = upper[chosen] - probabilities[chosen]
    return chosen, float(np.clip((uniform * upper[-1] - lower) / probabilities[chosen], 0.0, 1 - 1e-16))


@dataclass(frozen=True)
class AcceptanceMap:
    """g: probabilities at knots of similarity, both ascending, linear between them. `origin`: what it was fitted to.

    mixture: of the K rows that it was fitted with; None: the most similar one proposes its whole chunk.
    """

    similarities: tuple[float, ...]
    probabilities: tuple[float, ...]
    origin: dict[str, Any] = field(default_factory=dict)
    mixture: NeighborMixture | None = None

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
        origin, mixture = dict(found["origin"]), _mixture_of(found.get("mixture"))
    except (KeyError, TypeError, ValueError, OverflowError):
        is_map = False
    if not is_map:
        raise InputError(
            f"{path}: is not an acceptance map of ascending knots in [0, 1); fit one with --fit_acceptance"
        )
    return AcceptanceMap(tuple(similarities.tolist()), tuple(probabilities.tolist()), origin, mixture)


def _mixture_of(found: dict[str, Any] | None) -> NeighborMixture | None:
    """Raises ValueError, KeyError or TypeError where it is none."""
    if found is None:
        return None
    n_neighbors, temperature, lm_power = (float(found[name]) for name in ("n_neighbors", "temperature", "lm_power"))
    continuation = tuple(float(each) for each in found["continuation"])
    is_mixture = n_neighbors >= 1 and 0 < temperature < np.inf and 0 <= lm_power < np.inf
    if not (is_mixture and continuation and all(0 <= each <= 1 for each in continuation)):
        raise ValueError("no mixture of neighbours")
    return NeighborMixture(int(n_neighbors), temperature, continuation, lm_power)


def ends_in_repeat(token_ids: Sequence[int]) -> bool:
    """Whether a text ends in the same SHORTEST_REPEAT to LONGEST_REPEAT tokens twice in a row."""
    lengths = range(SHORTEST_REPEAT, min(LONGEST_REPEAT, len(token_ids) // 2) + 1)
    return any(token_ids[-n:] == token_ids[-2 * n : -n] for n in lengths)


def would_repeat(token_ids: Sequence[int], chunk: Sequence[int]) -> bool:
    """Whether a chunk repeats the text that ends in its entry token.

    So it does where it has two tokens or more and the text holds it already, after the same token; or where the text
    would end in the same SHORTEST_REPEAT to LONGEST_REPEAT tokens twice in a row.
    """
    end = [*token_ids[-2 * LONGEST_REPEAT :], *chunk]
    return ends_in_repeat(end) or (len(chunk) > 1 and holds(token_ids, [token_ids[-1], *chunk]))


def holds(token_ids: Sequence[int], run: Sequence[int]) -> bool:
    """Whether a run of tokens stands somewhere in a text."""
    text, wanted = np.array(token_ids, dtype=np.int32).tobytes(), np.array(run, dtype=np.int32).tobytes()
    at = text.find(wanted)
    while at % 4 > 0:  # not at the start of a token; -1 % 4 is 3, so it is looked at below
        if at < 0:
            return False
        at = text.find(wanted, at + 1)
    return True


@dataclass(frozen=True)
class Acceptance:
    """Which proposals become text.

    similarity_threshold θ in [-1, 1], where 1 disables retrieval; q_max in (0, 1) caps the default map, and under
    `threshold` is the acceptance probability from θ on; fitted: a map that takes the place of θ's; min_first_token_prob
    δ in [0, 1]: the least probability of the first token of a chunk that may be proposed, relative to the LM's likeliest,
    0 for the paper's rule; reject_repeats: whether chunks are rejected that repeat the text (`would_repeat`); neighbors:
    how K > 1 rows propose where no fitted map says, None for one. Raises ValueError where a mixture is to reject repeats:
    a prefix would have to be asked as the chunk is.
    """

    similarity_threshold: float
    policy: Policy = "threshold"
    q_max: float = 0.999
    fitted: AcceptanceMap | None = None
    min_first_token_prob: float = 0.0
    reject_repeats: bool = False
    neighbors: NeighborMixture | None = None

    def __post_init__(self) -> None:
        if self.reject_repeats and self.mixture is not None:
            raise ValueError("repeats are rejected where one row proposes its whole chunk, not where several do")

    @property
    def mixture(self) -> NeighborMixture | None:
        """How K rows propose; None: the most similar one proposes its whole chunk."""
        return self.neighbors if self.fitted is None else self.fitted.mixture

    @property
    def n_neighbors(self) -> int:
        return 1 if self.mixture is None else self.mixture.n_neighbors

    @property
    def asks_lm(self) -> bool:
        """Whether which row proposes depends on what the LM gives to the first tokens of their chunks."""
        return self.min_first_token_prob > 0 or (self.mixture is not None and self.mixture.lm_power > 0)

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
