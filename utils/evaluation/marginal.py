"""The probability of a text under CD-LM: the sum over all its segmentations into chunks and tokens (paper section 5).

With the proposal c_n of length τ at position n, accepted with probability q_n, backwards over a window in log space:

    β(n) = log[ q_n · 1{c_n = x_n … x_{n+τ-1}} · exp β(n+τ) + (1 - q_n) · p(x_n) · exp β(n+1) ],   β(L+1) = 0

A chunk that runs past the end is compared with what is left. α is the same sum from the front; together they give the
posterior of each z_n, and EM the acceptance map under which a text is likeliest.

Beyond the paper, K rows may propose at a position, and prefixes of their chunks (`NeighborMixture`). The first term then
is a sum over lengths: q_n · Σ_τ J(n, τ) · exp β(n+τ), where J(n, τ) is the probability that an accepted proposal is the
next τ tokens of the text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from utils.decoding.acceptance import AcceptanceMap, NeighborMixture

# Windows that are summed over together: 512 positions, 10 settings and this many windows are 40 MB.
WINDOWS_AT_ONCE = 1000
MAX_EM_STEPS = 500
# EM ends when a step brings less than this many nats a position.
EM_TOLERANCE = 1e-8
FIRST_PROBABILITY = 0.1
N_KNOTS = 17
# What EM starts from where prefixes of chunks are accepted, and up to which token each has a probability of its own.
FIRST_CONTINUATION, N_CONTINUATIONS = 0.7, 16
# Temperatures of K proposals that are tried, in cosine similarity, and powers of what the LM gives to their first tokens;
# and the steps of EM after which the likeliest are chosen.
NEIGHBOR_TEMPERATURES, LM_POWERS, TRIAL_STEPS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16), (0.0, 0.25, 0.5), 12


@dataclass(frozen=True)
class Neighbors:
    """The K most similar rows at each of N positions, most similar first; NaN and 0 where there are fewer. All (N, K)."""

    similarities: np.ndarray  # float64
    chunk_lengths: np.ndarray  # int64: cut at the window's end
    agreeing: np.ndarray  # int64: how many tokens of the chunk, from its first on, are what the text says
    first_log_probs: np.ndarray  # float32: log of what the LM gives to its first token, relative to its likeliest

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Neighbors":
        return Neighbors(*(change(getattr(self, each.name)) for each in fields(self)))


@dataclass(frozen=True)
class Proposals:
    """The LM's probabilities and the datastore's proposals at the N predicted positions, window after window.

    A window of L tokens has L - 1 positions, its second token to its last. What is said of one proposal is said of the
    most similar row.
    """

    lengths: np.ndarray  # (W,) int64: positions of each window
    log_probs: np.ndarray  # (N,) float64: log p(x_n)
    similarities: np.ndarray  # (N,) float64: of the proposal, NaN where there is none
    chunk_lengths: np.ndarray  # (N,) int64: τ, cut at the window's end; 0 where there is no proposal
    agreeing: np.ndarray  # (N,) int64: how many tokens of the chunk, from its first on, are what the text says
    neighbors: Neighbors | None = None  # where more than one row proposes

    @property
    def matches(self) -> np.ndarray:
        """(N,) bool: the whole proposal is what the text says."""
        return np.asarray((self.agreeing == self.chunk_lengths) & (self.chunk_lengths > 0))

    def cut(self, n_tokens: int) -> "Proposals":
        """The same proposals with chunks of at most n_tokens."""
        lengths, agreeing = (np.minimum(values, n_tokens) for values in (self.chunk_lengths, self.agreeing))
        found = replace(self, chunk_lengths=lengths, agreeing=agreeing)
        if self.neighbors is None:
            return found
        lengths, agreeing = (np.minimum(x, n_tokens) for x in (self.neighbors.chunk_lengths, self.neighbors.agreeing))
        return replace(found, neighbors=replace(self.neighbors, chunk_lengths=lengths, agreeing=agreeing))

    def nearest(self, n_neighbors: int) -> "Proposals":
        """The same with the most similar n_neighbors rows alone."""
        if self.neighbors is None:
            return self
        return replace(self, neighbors=self.neighbors.map(lambda values: values[:, :n_neighbors]))

    def windows(self) -> list[slice]:
        ends = np.cumsum(self.lengths).tolist()
        return [slice(end - n, end) for end, n in zip(ends, self.lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Branches:
    """What an accepted proposal may be of what the text says: the next `lengths` tokens at `positions`.

    E of them, by position and then length, each pair once.
    """

    positions: np.ndarray  # (E,) int64
    lengths: np.ndarray  # (E,) int64
    stops: np.ndarray  # (E,) float64: weight of the rows whose chunk goes on after that length
    ends: np.ndarray  # (E,) float64: weight of the rows whose chunk ends there

    @classmethod
    def of(cls, proposals: Proposals, mixture: NeighborMixture | None) -> "Branches":
        """mixture None: the whole chunk of the most similar row."""
        if mixture is None:
            positions = np.flatnonzero(proposals.matches)
            n = len(positions)
            return cls(positions, proposals.chunk_lengths[positions], np.zeros(n), np.ones(n))
        found = proposals.nearest(mixture.n_neighbors).neighbors
        if found is None:
            of_nearest = (proposals.similarities, proposals.chunk_lengths, proposals.agreeing)
            found = Neighbors(*(values[:, None] for values in (*of_nearest, np.zeros(len(proposals.log_probs)))))
        weights = mixture.weights(found.similarities, found.first_log_probs)
        rows, columns = np.nonzero(found.agreeing)
        n_each = found.agreeing[rows, columns]
        # One entry for each prefix of each row's chunk that is what the text says.
        lengths = np.arange(n_each.sum()) - np.repeat(np.cumsum(n_each) - n_each, n_each) + 1
        ends = lengths == np.repeat(found.chunk_lengths[rows, columns], n_each)
        of_row = np.repeat(weights[rows, columns], n_each)
        width = int(lengths.max(initial=0)) + 1
        keys, inverse = np.unique(np.repeat(rows, n_each) * width + lengths, return_inverse=True)
        sums = (np.bincount(inverse, np.where(chosen, of_row, 0.0), len(keys)) for chosen in (~ends, ends))
        return cls(keys // width, keys % width, *sums)

    def probabilities(self, continuation: np.ndarray) -> np.ndarray:
        """(E,) J: that an accepted proposal is that; continuation (M,): ρ of each length, M at least the longest."""
        reached = np.concatenate([[1.0], np.cumprod(continuation)])[self.lengths - 1]
        return np.asarray(reached * ((1 - continuation[self.lengths - 1]) * self.stops + self.ends))

    def part(self, columns: slice) -> slice:
        """Which of them are of some positions."""
        first, last = np.searchsorted(self.positions, [columns.start, columns.stop])
        return slice(int(first), int(last))

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=1))


@dataclass(frozen=True)
class Posteriors:
    """Of each position, the probability given the whole text that its proposal was accepted, and that it was not.

    They add up to the probability that a chunk or token begins there. accepted, rejected (N,) float64; of_branches (E,):
    that the accepted proposal was that branch.
    """

    log_likelihood: float
    accepted: np.ndarray
    rejected: np.ndarray
    of_branches: np.ndarray


def log_likelihoods(
    proposals: Proposals, probabilities: np.ndarray, mixture: NeighborMixture | None = None
) -> np.ndarray:
    """log p of each window (S, W) under S settings; probabilities (S, N): the q_n of each."""
    lattices = _lattices(proposals, probabilities, *_weighted(proposals, mixture))
    return np.concatenate([lattice.backward()[0] for lattice in lattices], axis=1)


def posteriors(proposals: Proposals, probabilities: np.ndarray, mixture: NeighborMixture | None = None) -> Posteriors:
    """The posterior of every z under one setting, probabilities (N,): the q_n."""
    return _posteriors(proposals, probabilities, *_weighted(proposals, mixture))


def expected_chunk_tokens(
    proposals: Proposals, probabilities: np.ndarray, mixture: NeighborMixture | None = None
) -> float:
    """How many tokens of the text chunks brought, in expectation given the text; probabilities (N,): the q_n."""
    branches, weights = _weighted(proposals, mixture)
    return float(_posteriors(proposals, probabilities, branches, weights).of_branches @ branches.lengths)


def gains(proposals: Proposals, probabilities: np.ndarray, mixture: NeighborMixture | None = None) -> np.ndarray:
    """(N,) what each position's proposal adds to the log-likelihood, in nats, under one setting, probabilities (N,).

    β(n) - log p(x_n) - β(n+1): by what the text from n on becomes likelier where something begins at n. They add up to
    the log-likelihood's distance from the base LM's, exactly, since β telescopes.
    """
    lattices = _lattices(proposals, probabilities[None], *_weighted(proposals, mixture))
    return np.concatenate([lattice.gains() for lattice in lattices])


def _weighted(proposals: Proposals, mixture: NeighborMixture | None) -> tuple[Branches, np.ndarray]:
    """The branches of the proposals, and the probability of each given that the proposal is accepted."""
    branches = Branches.of(proposals, mixture)
    return branches, branches.probabilities(_continuations(mixture, branches.longest))


def _continuations(mixture: NeighborMixture | None, n_tokens: int) -> np.ndarray:
    return np.ones(n_tokens) if mixture is None else mixture.continuations(n_tokens)


def _posteriors(proposals: Proposals, probabilities: np.ndarray, branches: Branches, weights: np.ndarray) -> Posteriors:
    found = [lattice.posteriors() for lattice in _lattices(proposals, probabilities[None], branches, weights)]
    columns = ([getattr(each, name) for each in found] for name in ("accepted", "rejected", "of_branches"))
    return Posteriors(sum(each.log_likelihood for each in found), *map(np.concatenate, columns))


def _lattices(
    proposals: Proposals, probabilities: np.ndarray, branches: Branches, weights: np.ndarray
) -> Iterator["_Lattice"]:
    """The lattices of some windows at a time; probabilities (S, N), weights (E,)."""
    ends = np.concatenate([[0], np.cumsum(proposals.lengths)])
    for first in range(0, len(proposals.lengths), WINDOWS_AT_ONCE):
        last = min(first + WINDOWS_AT_ONCE, len(proposals.lengths))
        columns = slice(int(ends[first]), int(ends[last]))
        part = branches.part(columns)
        positions = branches.positions[part] - columns.start
        yield _Lattice(
            proposals.lengths[first:last],
            proposals.log_probs[columns],
            probabilities[:, columns],
            positions,
            branches.lengths[part],
            weights[part],
        )


class _Lattice:
    """The sums over windows side by side: arrays (T, S, W), all windows ending in the last row.

    Rows before a window's first position have log probability 0 and no chunk, so that the sum passes through unchanged.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        log_probs: np.ndarray,
        probabilities: np.ndarray,
        positions: np.ndarray,
        branch_lengths: np.ndarray,
        weights: np.ndarray,
    ) -> None:
        """lengths (W,) positions of each window, log_probs (N,), probabilities (S, N); of each branch, (E,): its
        position, how many tokens it is, and its probability given that the proposal is accepted."""
        n_windows, self.n_rows = len(lengths), int(lengths.max())
        windows = np.repeat(np.arange(n_windows), lengths)
        last = np.repeat(np.cumsum(lengths), lengths)
        self.place = self.n_rows - (last - np.arange(len(windows))), windows
        self.log_probs = self._table(log_probs, n_windows)
        rows, of_branch = self.place[0][positions], windows[positions]
        self.by_row = np.lexsort((branch_lengths, of_branch, rows))
        rows, self.windows = rows[self.by_row], of_branch[self.by_row]
        self.target = rows + branch_lengths[self.by_row]
        with np.errstate(divide="ignore"):
            stay = np.log1p(-probabilities)
            self.stay = np.stack([self._table(row, n_windows) for row in stay], axis=1) + self.log_probs[:, None]
            self.jump = (np.log(probabilities[:, positions]) + np.log(weights))[:, self.by_row]  # (S, E)
        self.rows = rows
        self.borders = np.searchsorted(rows, np.arange(self.n_rows + 1))

    def _branches(self, row: int) -> slice:
        return slice(int(self.borders[row]), int(self.borders[row + 1]))

    def backward(self) -> np.ndarray:
        """β (T + 1, S, W)."""
        beta = np.zeros((self.n_rows + 1, *self.stay.shape[1:]))
        for row in range(self.n_rows - 1, -1, -1):
            beta[row] = self.stay[row] + beta[row + 1]
            part = self._branches(row)
            if part.start < part.stop:
                windows = self.windows[part]
                firsts = np.flatnonzero(np.diff(windows, prepend=-1))
                after = self.jump[:, part] + beta[self.target[part], :, windows].T
                into = row, slice(None), windows[firsts]
                beta[into] = np.logaddexp(np.logaddexp.reduceat(after, firsts, axis=1).T, beta[into])
        return beta

    def forward(self) -> np.ndarray:
        """α (T + 1, S, W): log of the sum over segmentations of what stands before a row, where one begins there."""
        alpha = np.full((self.n_rows + 1, *self.stay.shape[1:]), -np.inf)
        alpha[0] = 0.0
        for row in range(self.n_rows):
            alpha[row + 1] = np.logaddexp(alpha[row + 1], alpha[row] + self.stay[row])
            part = self._branches(row)
            # Those of one window have different lengths, so that no two go to the same place.
            into = self.target[part], slice(None), self.windows[part]
            alpha[into] = np.logaddexp(alpha[into], alpha[row, :, self.windows[part]] + self.jump[:, part].T)
        return alpha

    def posteriors(self) -> Posteriors:
        alpha, beta = self.forward()[:, 0], self.backward()[:, 0]
        total = beta[0]
        before, after = alpha[self.rows, self.windows], beta[self.target, self.windows]
        found = np.empty(len(self.rows))
        found[self.by_row] = np.exp(before + self.jump[0] + after - total[self.windows])
        accepted = np.zeros_like(self.log_probs)
        np.add.at(accepted, (self.rows, self.windows), found[self.by_row])
        rejected = np.exp(alpha[:-1] + self.stay[:, 0] + beta[1:] - total)
        return Posteriors(float(total.sum()), accepted[self.place], rejected[self.place], found)

    def gains(self) -> np.ndarray:
        beta = self.backward()[:, 0]
        return np.asarray((beta[:-1] - beta[1:] - self.log_probs)[self.place])

    def _table(self, values: np.ndarray, n_windows: int) -> np.ndarray:
        """(N,) as (T, W)."""
        table = np.zeros((self.n_rows, n_windows))
        table[self.place] = values
        return table


# ---- EM


def fit_map(
    proposals: Proposals, q_max: float, n_knots: int = N_KNOTS, n_neighbors: int = 1, prefixes: bool = False
) -> tuple[AcceptanceMap, list[float]]:
    """The monotone map under which the text is likeliest, by EM, and the log-likelihood before each step and at last.

    The knots lie at quantiles of the similarities; n_knots 1 is a constant. Linear interpolation is a choice between
    the two knots around s, so the E step shares each posterior out between them, and the M step, which pools adjacent
    knots until their probabilities ascend, is exact: no step lowers the likelihood. q_max < 1 caps it.

    n_neighbors > 1: the map's mixture of so many rows is fitted with it, its temperature and power on a grid, by the
    likelihood after a few steps; prefixes: also its continuation. Raises ValueError where there is no proposal to fit to.
    """
    if n_neighbors == 1:
        return fit_map_of(proposals, q_max, n_knots, NeighborMixture(1) if prefixes else None, prefixes)
    grid = [NeighborMixture(n_neighbors, t, lm_power=power) for t in NEIGHBOR_TEMPERATURES for power in LM_POWERS]
    tried = [fit_map_of(proposals, q_max, n_knots, each, prefixes, TRIAL_STEPS)[1][-1] for each in grid]
    return fit_map_of(proposals, q_max, n_knots, grid[int(np.argmax(tried))], prefixes)


def fit_map_of(
    proposals: Proposals,
    q_max: float,
    n_knots: int,
    mixture: NeighborMixture | None,
    prefixes: bool = False,
    max_steps: int = MAX_EM_STEPS,
) -> tuple[AcceptanceMap, list[float]]:
    """As `fit_map`, with a mixture that is given but, where prefixes are fitted, for its continuation."""
    known = ~np.isnan(proposals.similarities)
    if not known.any():
        raise ValueError("the datastore proposes nothing in this text, so there is nothing to fit")
    quantiles = np.linspace(0, 1, n_knots) if n_knots > 1 else [0.5]
    knots = np.unique(np.quantile(proposals.similarities[known], quantiles))
    weights = knot_weights(proposals.similarities[known], knots)  # (n, K)
    values = np.full(len(knots), min(FIRST_PROBABILITY, q_max))
    branches = Branches.of(proposals, mixture)
    continuation = np.full(branches.longest, FIRST_CONTINUATION)
    if not prefixes:
        continuation = _continuations(mixture, branches.longest)
    history: list[float] = []
    for _ in range(max_steps):
        probabilities = np.zeros(len(known))
        probabilities[known] = weights @ values
        found = _posteriors(proposals, probabilities, branches, branches.probabilities(continuation))
        history.append(found.log_likelihood)
        if len(history) > 1 and history[-1] - history[-2] < EM_TOLERANCE * len(known):
            break
        q = probabilities[known, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            yes = np.nan_to_num(weights * values / q) * found.accepted[known, None]
            no = np.nan_to_num(weights * (1 - values) / (1 - q)) * found.rejected[known, None]
        values = np.minimum(pool_adjacent_violators(yes.sum(axis=0), no.sum(axis=0)), q_max)
        if prefixes:
            continuation = _next_continuation(branches, continuation, found.of_branches)
    if mixture is not None and prefixes:
        mixture = replace(mixture, continuation=tuple(continuation[:N_CONTINUATIONS].tolist()))
    return AcceptanceMap(tuple(knots.tolist()), tuple(values.tolist()), mixture=mixture), history


def _next_continuation(branches: Branches, continuation: np.ndarray, posterior: np.ndarray) -> np.ndarray:
    """The M step of ρ: how often a chunk went on after its j-th token, of how often it could; posterior (E,)."""
    places = np.minimum(branches.lengths, N_CONTINUATIONS) - 1  # those beyond share the last one's
    stopping = (1 - continuation[branches.lengths - 1]) * branches.stops
    with np.errstate(invalid="ignore"):
        stopped = np.nan_to_num(posterior * stopping / (stopping + branches.ends))
    of_stops = np.bincount(places, stopped, len(continuation))
    # A chunk of τ tokens went on τ - 1 times.
    by_length = np.bincount(branches.lengths, posterior, len(continuation) + 1)[1:]
    went_on = np.concatenate([by_length[::-1].cumsum()[::-1][1:], [0.0]])
    n_own = min(N_CONTINUATIONS, len(continuation))
    went_on[n_own - 1] = went_on[n_own - 1 :].sum()
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(went_on[:n_own] / (went_on[:n_own] + of_stops[:n_own]), nan=1.0)
    return np.concatenate([shares, np.full(len(continuation) - n_own, shares[-1])])


def knot_weights(similarities: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """(n, K): how much each knot counts in linear interpolation; rows add up to 1."""
    unit = np.eye(len(knots))
    return np.stack([np.interp(similarities, knots, row) for row in unit], axis=1)


def pool_adjacent_violators(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """Ascending shares yes / (yes + no) of greatest likelihood: adjacent ones that descend become one."""
    groups: list[list[float]] = []  # yes, total, members
    for a, b in zip(yes.tolist(), (yes + no).tolist(), strict=True):
        groups.append([a, b, 1])
        while len(groups) > 1 and groups[-2][0] * groups[-1][1] >= groups[-1][0] * groups[-2][1]:
            a, b, n = groups.pop()
            groups[-1] = [groups[-1][0] + a, groups[-1][1] + b, groups[-1][2] + n]
    return np.concatenate([np.full(int(n), a / b if b else 0.0) for a, b, n in groups])
