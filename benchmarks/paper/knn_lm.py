"""kNN-LM on the hidden states of stage 2: the next tokens of the k nearest context vectors, mixed into the LM.

    p(x) = λ p_kNN(x) + (1 - λ) p_LM(x),    p_kNN(x) ∝ sum over the k nearest keys followed by x of exp(-distance² / T)

Distances are Euclidean, in float32. k, T and λ are those under which another text, the validation split, is likeliest:
one search gives p_kNN for all k and T of a grid, and EM the best λ of each, since the likelihood is concave in it. λ is a
constant, as in its paper, or a falling function of the distance of the nearest key, fitted by EM as CD-LM's acceptance is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.decoding.acceptance import AcceptanceMap
from utils.evaluation.marginal import N_KNOTS, knot_weights, pool_adjacent_violators
from utils.evaluation.perplexity import Positions
from utils.extraction.hidden_states import map_all_hidden_states
from utils.files import InputError, make_folder
from utils.manifest import Manifest
from utils.progress import ProgressBar
from utils.text.corpora import read_passages
from utils.text.windows import WindowPlan, WindowShape, plan_windows

NEIGHBORS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Temperatures that are tried: these times the mean squared distance of neighbours.
TEMPERATURES = tuple(2.0**power for power in range(-8, 3))
WEIGHT_STEPS = 300
# Keys and queries that are compared at a time: 16 MB of scores.
KEYS_AT_ONCE, QUERIES_AT_ONCE = 8192, 512


@dataclass(frozen=True)
class Keys:
    """Context vectors and the token after each; vectors (T, D), of which `kept` (N,) count, may lie on disk."""

    vectors: np.ndarray
    kept: np.ndarray  # (N,) int64 rows, ascending
    next_ids: np.ndarray  # (N,) int64

    @classmethod
    def of_windows(cls, plan: WindowPlan, vectors: np.ndarray) -> "Keys":
        """Every token of the text once, but the last of each passage; vectors: those of all windows, one after the other.

        What two windows share counts where it has more text before it, which is in the first of them; only of the last
        token of a window does the next one know what follows.
        """
        rows, next_ids = [], []
        firsts = np.cumsum(plan.lengths) - plan.lengths
        ends = plan.starts + plan.lengths
        # Tokens that are keys of the window before already; passages share none.
        shared = np.concatenate([[0], np.maximum(ends[:-1] - plan.starts[1:] - 1, 0)])
        for window in range(plan.n_windows):
            token_ids = plan.token_ids(window)
            positions = np.arange(shared[window], len(token_ids) - 1)
            rows.append(firsts[window] + positions)
            next_ids.append(token_ids[positions + 1])
        return cls(vectors, np.concatenate(rows), np.concatenate(next_ids).astype(np.int64))

    def blocks(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Some keys at a time, (B, D) float32, and the tokens after them (B,)."""
        for first in range(0, len(self.kept), KEYS_AT_ONCE):
            part = slice(first, first + KEYS_AT_ONCE)
            vectors = torch.from_numpy(self.vectors[self.kept[part]].astype(np.float32)).to(device)
            yield vectors, torch.from_numpy(self.next_ids[part]).to(device)


def read_keys(h5: Path, text: Path, manifest: Manifest, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Keys:
    """The keys of stage 2's hidden states, its windows cut anew from its text; folder: for a temporary file.

    Raises InputError where these are other windows.
    """
    shape = WindowShape(*(manifest.arguments[name] for name in ("chunk_size", "stride", "min_length")))
    plan = plan_windows(read_passages(text), tokenizer, shape, make_folder(folder))
    if plan.fingerprint != manifest.results["windows_fingerprint"]:
        raise InputError(f"{h5}: is of other windows than {text} now gives; run stage 2 again")
    return Keys.of_windows(plan, map_all_hidden_states(h5))


# ---- Search


def nearest_keys(keys: Keys, queries: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
    """Squared distances (Q, K) ascending and the tokens after the K nearest keys, K <= n_neighbors; queries (Q, D)."""
    queries = queries.float()
    n_neighbors = min(n_neighbors, len(keys.kept))
    best = queries.new_full((len(queries), n_neighbors), float("inf"))
    best_ids = torch.full_like(best, -1, dtype=torch.int64)
    # |x|² - 2 x·q as one product: less by the query's square than the distance, which is the same for all keys.
    asked = torch.cat([-2 * queries, torch.ones_like(queries[:, :1])], dim=1)
    buffer = queries.new_empty(len(queries), min(KEYS_AT_ONCE, len(keys.kept)))
    for vectors, next_ids in keys.blocks(queries.device):
        answers = torch.cat([vectors, (vectors * vectors).sum(dim=1, keepdim=True)], dim=1)
        scores = torch.mm(asked, answers.T, out=buffer) if len(vectors) == buffer.shape[1] else asked @ answers.T
        closer, ids = _columns_where(scores < best.amax(dim=1, keepdim=True), scores, next_ids)
        chosen = torch.topk(torch.cat([best, closer], dim=1), n_neighbors, dim=1, largest=False, sorted=False)
        best, best_ids = chosen.values, torch.cat([best_ids, ids], dim=1).gather(1, chosen.indices)
    best, order = best.sort(dim=1)
    squares = (queries * queries).sum(dim=1, keepdim=True)
    return (best + squares).clamp_min(0), best_ids.gather(1, order)


def _columns_where(wanted: Tensor, scores: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The wanted scores of each row and their ids, packed to the left, infinity behind them.

    After some blocks few keys are closer than those found, and choosing among few is several times faster.
    """
    rows, columns = wanted.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(scores))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    packed = scores.new_full((len(scores), int(counts.max())), float("inf"))
    ids = torch.full_like(packed, -1, dtype=torch.int64)
    packed[rows, places] = scores[rows, columns]
    ids[rows, places] = next_ids[columns]
    return packed, ids


def knn_probabilities(
    distances: Tensor, ids: Tensor, targets: Tensor, n_neighbors: Sequence[int], temperatures: Sequence[float]
) -> Tensor:
    """p_kNN of each target (Q,) for each k and temperature: (len(n_neighbors), len(temperatures), Q) float64."""
    hits = ids == targets[:, None]
    last = torch.tensor([min(k, ids.shape[1]) - 1 for k in n_neighbors], device=ids.device)
    found = []
    for temperature in temperatures:
        weights = torch.exp((distances[:, :1] - distances).double() / temperature)
        total, of_target = weights.cumsum(dim=1), (weights * hits).cumsum(dim=1)
        found.append((of_target / total)[:, last].T)
    return torch.stack(found, dim=1)


# ---- The model


@dataclass(frozen=True)
class Choice:
    """What validation chose."""

    n_neighbors: int
    temperature: float
    weight: float  # λ
    weight_map: AcceptanceMap | None = (
        None  # λ by minus the squared distance of the nearest key, in the place of the constant
    )

    def log_probs(self, of_knn: np.ndarray, of_lm: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """log p of the mixture; of_knn (N,) probabilities, of_lm (N,) log-probabilities, nearest (N,) squared distances."""
        weights = np.full(len(of_lm), self.weight) if self.weight_map is None else self.weight_map(-nearest)
        with np.errstate(divide="ignore"):
            return np.logaddexp(np.log(weights) + np.log(of_knn), np.log1p(-weights) + of_lm)


def _blocks_of_queries(
    keys: Keys, parts: Iterable[Positions], n_neighbors: int, device: torch.device, n_positions: int
) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
    """Of some positions at a time: where they are, squared distances, tokens of the neighbours, and the right tokens."""
    with ProgressBar(total=n_positions, desc="searching neighbours", unit="tok", unit_scale=True) as bar:
        for part in parts:
            for first in range(0, len(part.places), QUERIES_AT_ONCE):
                block = slice(first, first + QUERIES_AT_ONCE)
                queries = torch.from_numpy(part.hidden_states[block]).to(device)
                distances, ids = nearest_keys(keys, queries, n_neighbors)
                targets = torch.from_numpy(part.following[block].astype(np.int64)).to(device)
                yield part.places[block], distances, ids, targets
                bar.update(len(targets))


def tune(keys: Keys, parts: Iterable[Positions], of_lm: np.ndarray, device: torch.device) -> tuple[Choice, Choice]:
    """k, T and λ under which a text is likeliest, with λ constant and with λ of the distance.

    of_lm (N,): the LM's log-probabilities at all its positions. λ of the distance is tried for each k, at the T that is
    best for the constant one.
    """
    temperatures: list[float] = []
    found = np.zeros((len(NEIGHBORS), len(TEMPERATURES), len(of_lm)), dtype=np.float32)
    nearest = np.zeros(len(of_lm))
    for places, distances, ids, targets in _blocks_of_queries(keys, parts, NEIGHBORS[-1], device, len(of_lm)):
        if not temperatures:
            scale = float((distances - distances[:, :1]).mean()) or 1.0
            temperatures = [scale * factor for factor in TEMPERATURES]
        found[:, :, places] = knn_probabilities(distances, ids, targets, NEIGHBORS, temperatures).cpu().numpy()
        nearest[places] = distances[:, 0].double().cpu().numpy()

    def likeliest(choices: Iterable[tuple[Choice, np.ndarray]]) -> Choice:
        return max(choices, key=lambda choice: float(choice[0].log_probs(choice[1], of_lm, nearest).sum()))[0]

    constant = likeliest(
        (Choice(k, temperature, best_weight(of_knn.astype(np.float64), of_lm)), of_knn)
        for k, of_temperatures in zip(NEIGHBORS, found, strict=True)
        for temperature, of_knn in zip(temperatures, of_temperatures, strict=True)
    )
    at = temperatures.index(constant.temperature)
    by_distance = likeliest(
        (replace(constant, n_neighbors=k, weight_map=best_weight_map(of_knn, of_lm, nearest)), of_knn)
        for k, of_knn in zip(NEIGHBORS, found[:, at].astype(np.float64), strict=True)
    )
    return constant, by_distance


def best_weight_map(of_knn: np.ndarray, of_lm: np.ndarray, nearest: np.ndarray) -> AcceptanceMap:
    """λ as a falling function of the squared distance nearest (N,), under which the text is likeliest, by EM."""
    closeness, p = -nearest, np.exp(of_lm)
    knots = np.unique(np.quantile(closeness, np.linspace(0, 1, N_KNOTS)))
    shares = knot_weights(closeness, knots)
    values = np.full(len(knots), 0.1)
    for _ in range(WEIGHT_STEPS):
        weight = shares @ values
        mixed = np.maximum(weight * of_knn + (1 - weight) * p, np.finfo(float).tiny)
        yes, no = shares.T @ (of_knn / mixed) * values, shares.T @ (p / mixed) * (1 - values)
        values, before = np.clip(pool_adjacent_violators(yes, no), 0, 1 - 1e-6), values
        if np.abs(values - before).max() < 1e-6:
            break
    return AcceptanceMap(tuple(knots.tolist()), tuple(values.tolist()))


def best_weight(of_knn: np.ndarray, of_lm: np.ndarray) -> float:
    """λ in [0, 1) under which the text is likeliest, by EM; of_knn (N,) probabilities, of_lm (N,) log-probabilities."""
    p, weight = np.exp(of_lm), 0.5
    for _ in range(WEIGHT_STEPS):
        mixed = weight * of_knn + (1 - weight) * p
        weight, before = float((weight * of_knn / np.maximum(mixed, np.finfo(float).tiny)).mean()), weight
        if abs(weight - before) < 1e-6:
            break
    return min(weight, 1 - 1e-6)


def log_probs(
    keys: Keys, parts: Iterable[Positions], of_lm: np.ndarray, choices: Sequence[Choice], device: torch.device
) -> list[np.ndarray]:
    """(N,) log p of each token under kNN-LM, for each choice, by one search."""
    of_knn, nearest = np.zeros((len(choices), len(of_lm))), np.zeros(len(of_lm))
    n_neighbors = max(choice.n_neighbors for choice in choices)
    for places, distances, ids, targets in _blocks_of_queries(keys, parts, n_neighbors, device, len(of_lm)):
        nearest[places] = distances[:, 0].double().cpu().numpy()
        for choice, of_choice in zip(choices, of_knn, strict=True):
            k, temperature = [choice.n_neighbors], [choice.temperature]
            of_choice[places] = knn_probabilities(distances, ids, targets, k, temperature).cpu().numpy()[0, 0]
    return [choice.log_probs(of_choice, of_lm, nearest) for choice, of_choice in zip(choices, of_knn, strict=True)]
