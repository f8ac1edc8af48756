"""The probability of a text under CD-LM: the sum over all its segmentations into chunks and tokens (paper section 5).

With the proposal c_n of length τ at position n, accepted with probability q_n, backwards over a window in log space:

    β(n) = log[ q_n · 1{c_n = x_n … x_{n+τ-1}} · exp β(n+τ) + (1 - q_n) · p(x_n) · exp β(n+1) ],   β(L+1) = 0

A chunk that runs past the end is compared with what is left. α is the same sum from the front; together they give the
posterior of each z_n, and EM the acceptance map under which a text is likeliest.
"""

from dataclasses import dataclass, replace

import numpy as np

from utils.decoding.acceptance import AcceptanceMap

# Windows that are summed over together: 512 positions, 10 settings and this many windows are 40 MB.
WINDOWS_AT_ONCE = 1000
MAX_EM_STEPS = 500
# EM ends when a step brings less than this many nats a position.
EM_TOLERANCE = 1e-8
FIRST_PROBABILITY = 0.1
N_KNOTS = 17


@dataclass(frozen=True)
class Proposals:
    """The LM's probabilities and the datastore's proposals at the N predicted positions, window after window.

    A window of L tokens has L - 1 positions, its second token to its last.
    """

    lengths: np.ndarray  # (W,) int64: positions of each window
    log_probs: np.ndarray  # (N,) float64: log p(x_n)
    similarities: np.ndarray  # (N,) float64: of the proposal, NaN where there is none
    chunk_lengths: np.ndarray  # (N,) int64: τ, cut at the window's end; 0 where there is no proposal
    agreeing: np.ndarray  # (N,) int64: how many tokens of the chunk, from its first on, are what the text says

    @property
    def matches(self) -> np.ndarray:
        """(N,) bool: the whole proposal is what the text says."""
        return np.asarray((self.agreeing == self.chunk_lengths) & (self.chunk_lengths > 0))

    def cut(self, n_tokens: int) -> "Proposals":
        """The same proposals with chunks of at most n_tokens."""
        lengths, agreeing = (np.minimum(values, n_tokens) for values in (self.chunk_lengths, self.agreeing))
        return replace(self, chunk_lengths=lengths, agreeing=agreeing)

    def windows(self) -> list[slice]:
        ends = np.cumsum(self.lengths).tolist()
        return [slice(end - n, end) for end, n in zip(ends, self.lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Posteriors:
    """Of each position, the probability given the whole text that its proposal was accepted, and that it was not.

    They add up to the probability that a chunk or token begins there. accepted, rejected (N,) float64.
    """

    log_likelihood: float
    accepted: np.ndarray
    rejected: np.ndarray


def log_likelihoods(proposals: Proposals, probabilities: np.ndarray) -> np.ndarray:
    """log p of each window (S, W) under S settings; probabilities (S, N): the q_n of each."""
    parts = []
    for block, columns in _blocks(proposals):
        parts.append(_Lattice(block, probabilities[:, columns]).backward()[0])
    return np.concatenate(parts, axis=1)


def posteriors(proposals: Proposals, probabilities: np.ndarray) -> Posteriors:
    """The posterior of every z under one setting, probabilities (N,): the q_n."""
    total, accepted, rejected = 0.0, [], []
    for block, columns in _blocks(proposals):
        lattice = _Lattice(block, probabilities[None, columns])
        found = lattice.posteriors()
        total += found.log_likelihood
        accepted.append(found.accepted)
        rejected.append(found.rejected)
    return Posteriors(total, np.concatenate(accepted), np.concatenate(rejected))


def gains(proposals: Proposals, probabilities: np.ndarray) -> np.ndarray:
    """(N,) what each position's proposal adds to the log-likelihood, in nats, under one setting, probabilities (N,).

    β(n) - log p(x_n) - β(n+1): by what the text from n on becomes likelier where something begins at n. They add up to
    the log-likelihood's distance from the base LM's, exactly, since β telescopes.
    """
    return np.concatenate(
        [_Lattice(block, probabilities[None, columns]).gains() for block, columns in _blocks(proposals)]
    )


def _blocks(proposals: Proposals) -> list[tuple[Proposals, slice]]:
    """The proposals of some windows at a time, and which positions they are."""
    ends = np.concatenate([[0], np.cumsum(proposals.lengths)])
    blocks = []
    for first in range(0, len(proposals.lengths), WINDOWS_AT_ONCE):
        last = min(first + WINDOWS_AT_ONCE, len(proposals.lengths))
        columns = slice(int(ends[first]), int(ends[last]))
        per_position = (proposals.log_probs, proposals.similarities, proposals.chunk_lengths, proposals.agreeing)
        block = Proposals(proposals.lengths[first:last], *(values[columns] for values in per_position))
        blocks.append((block, columns))
    return blocks


class _Lattice:
    """The sums over windows side by side: arrays (T, S, W), all windows ending in the last row.

    Rows before a window's first position have log probability 0 and no chunk, so that the sum passes through unchanged.
    """

    def __init__(self, proposals: Proposals, probabilities: np.ndarray) -> None:
        n_windows, self.n_rows = len(proposals.lengths), int(proposals.lengths.max())
        self.columns = np.arange(n_windows)
        windows = np.repeat(self.columns, proposals.lengths)
        last = np.repeat(np.cumsum(proposals.lengths), proposals.lengths)
        self.place = self.n_rows - (last - np.arange(len(windows))), windows
        self.log_probs = self._table(proposals.log_probs)
        matched = np.where(proposals.matches[None], probabilities, 0.0)
        with np.errstate(divide="ignore"):
            self.stay = self._tables(np.log1p(-probabilities)) + self.log_probs[:, None]
            self.jump = self._tables(np.log(matched), empty=-np.inf)
        self.target = np.arange(self.n_rows)[:, None] + np.maximum(self._table(proposals.chunk_lengths), 1).astype(int)

    def backward(self) -> np.ndarray:
        """β (T + 1, S, W)."""
        beta = np.zeros((self.n_rows + 1, *self.stay.shape[1:]))
        for row in range(self.n_rows - 1, -1, -1):
            after_chunk = beta[self.target[row], :, self.columns].T
            beta[row] = np.logaddexp(self.jump[row] + after_chunk, self.stay[row] + beta[row + 1])
        return beta

    def forward(self) -> np.ndarray:
        """α (T + 1, S, W): log of the sum over segmentations of what stands before a row, where one begins there."""
        alpha = np.full((self.n_rows + 1, *self.stay.shape[1:]), -np.inf)
        alpha[0] = 0.0
        for row in range(self.n_rows):
            alpha[row + 1] = np.logaddexp(alpha[row + 1], alpha[row] + self.stay[row])
            into = self.target[row], slice(None), self.columns
            alpha[into] = np.logaddexp(alpha[into], (alpha[row] + self.jump[row]).T)
        return alpha

    def posteriors(self) -> Posteriors:
        alpha, beta = self.forward(), self.backward()
        after_chunk = beta[self.target, :, self.columns].transpose(0, 2, 1)
        accepted = np.exp(alpha[:-1] + self.jump + after_chunk - beta[0])
        rejected = np.exp(alpha[:-1] + self.stay + beta[1:] - beta[0])
        of_position = self.place[0], 0, self.place[1]
        return Posteriors(float(beta[0].sum()), accepted[of_position], rejected[of_position])

    def gains(self) -> np.ndarray:
        beta = self.backward()[:, 0]
        return np.asarray((beta[:-1] - beta[1:] - self.log_probs)[self.place])

    def _table(self, values: np.ndarray, empty: float = 0.0) -> np.ndarray:
        """(N,) as (T, W)."""
        table = np.full((self.n_rows, len(self.columns)), empty)
        table[self.place] = values
        return table

    def _tables(self, values: np.ndarray, empty: float = 0.0) -> np.ndarray:
        """(S, N) as (T, S, W)."""
        return np.stack([self._table(row, empty) for row in values], axis=1)


# ---- EM


def fit_map(proposals: Proposals, q_max: float, n_knots: int = N_KNOTS) -> tuple[AcceptanceMap, list[float]]:
    """The monotone map under which the text is likeliest, by EM, and the log-likelihood before each step and at last.

    The knots lie at quantiles of the similarities; n_knots 1 is a constant. Linear interpolation is a choice between
    the two knots around s, so the E step shares each posterior out between them, and the M step, which pools adjacent
    knots until their probabilities ascend, is exact: no step lowers the likelihood. q_max < 1 caps it. Raises
    ValueError where there is no proposal to fit to.
    """
    known = ~np.isnan(proposals.similarities)
    if not known.any():
        raise ValueError("the datastore proposes nothing in this text, so there is nothing to fit")
    quantiles = np.linspace(0, 1, n_knots) if n_knots > 1 else [0.5]
    knots = np.unique(np.quantile(proposals.similarities[known], quantiles))
    weights = _knot_weights(proposals.similarities[known], knots)  # (n, K)
    values = np.full(len(knots), min(FIRST_PROBABILITY, q_max))
    history: list[float] = []
    for _ in range(MAX_EM_STEPS):
        probabilities = np.zeros(len(known))
        probabilities[known] = weights @ values
        found = posteriors(proposals, probabilities)
        history.append(found.log_likelihood)
        if len(history) > 1 and history[-1] - history[-2] < EM_TOLERANCE * len(known):
            break
        q = probabilities[known, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            yes = np.nan_to_num(weights * values / q) * found.accepted[known, None]
            no = np.nan_to_num(weights * (1 - values) / (1 - q)) * found.rejected[known, None]
        values = np.minimum(_pool_adjacent_violators(yes.sum(axis=0), no.sum(axis=0)), q_max)
    return AcceptanceMap(tuple(knots.tolist()), tuple(values.tolist())), history


def _knot_weights(similarities: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """(n, K): how much each knot counts in linear interpolation; rows add up to 1."""
    unit = np.eye(len(knots))
    return np.stack([np.interp(similarities, knots, row) for row in unit], axis=1)


def _pool_adjacent_violators(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """Ascending shares yes / (yes + no) of greatest likelihood: adjacent ones that descend become one."""
    groups: list[list[float]] = []  # yes, total, members
    for a, b in zip(yes.tolist(), (yes + no).tolist(), strict=True):
        groups.append([a, b, 1])
        while len(groups) > 1 and groups[-2][0] * groups[-1][1] >= groups[-1][0] * groups[-2][1]:
            a, b, n = groups.pop()
            groups[-1] = [groups[-1][0] + a, groups[-1][1] + b, groups[-1][2] + n]
    return np.concatenate([np.full(int(n), a / b if b else 0.0) for a, b, n in groups])
