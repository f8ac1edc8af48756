"""From similarity to the probability that a proposal is accepted, and the two ways of deciding (paper section 4).

q = g(s) is monotone and piecewise linear. By default one knob θ gives it: g(s) = clip((s - η) / (1 - η), 0, q_max) with
η = 2θ - 1, so that g(θ) = 1/2. The policy `threshold` accepts a proposal iff s >= θ, `bernoulli` with probability g(s).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Policy = Literal["threshold", "bernoulli"]


@dataclass(frozen=True)
class Acceptance:
    """Which proposals become text. similarity_threshold θ in [-1, 1], where 1 disables retrieval; q_max in (0, 1)."""

    similarity_threshold: float
    policy: Policy = "threshold"
    q_max: float = 0.999

    @property
    def never(self) -> bool:
        """Whether no proposal can be accepted, so that none need be looked for."""
        return self.similarity_threshold >= 1

    def probability(self, similarity: np.ndarray | float) -> np.ndarray:
        """g(s), float64 in [0, q_max], of any shape."""
        if self.never:
            return np.zeros_like(np.asarray(similarity, dtype=np.float64))
        lowest = 2 * self.similarity_threshold - 1
        return np.clip((np.asarray(similarity, dtype=np.float64) - lowest) / (1 - lowest), 0, self.q_max)

    def accepts(self, similarity: float, uniform: float) -> bool:
        """uniform in [0, 1) decides under `bernoulli`; under `threshold` the similarity alone does."""
        if self.never:
            return False
        if self.policy == "threshold":
            return similarity >= self.similarity_threshold
        return uniform < float(self.probability(similarity))
