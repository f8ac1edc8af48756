"""Choosing θ and δ: the most forward passes saved at no more than a bounded cost (`--similarity_threshold auto`).

The cost of a chunk is by how much less likely the LM finds its tokens than those that it would draw in their places: with p
the LM's distribution and p_T what is drawn from, the sum over its tokens of -log p(c) - H(p_T, p), where H(p_T, p) is the
expectation of -log p under p_T. What is lost a token is so by how much the logarithm of the text's perplexity grows.

Both, what is saved and what it costs, are estimated on a text that the datastore does not hold: the LM reads it once, the
proposals of every position are found and read too, and each window is walked through as chunk mode would, for every θ and
δ of a grid. A text that is the datastore's own is read with the rows of each window's passage left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.datastore.provenance import find_windows, read_windows
from utils.datastore.store import Datastore, TokenTrie, reads_bos
from utils.datastore.trie_files import MANIFEST, STAGE
from utils.decoding.acceptance import Acceptance
from utils.evaluation.perplexity import plan_text
from utils.files import InputError
from utils.json_io import read_json
from utils.lm.kv_cache import Block, make_kv_cache
from utils.lm.model import CausalLM
from utils.lm.scoring import relative_probs, require_finite, score_windows
from utils.manifest import read_finished
from utils.progress import ProgressBar
from utils.text.prompts import added_tokens
from utils.text.windows import WindowShape

CHOSEN_THRESHOLD = "threshold.json"
# Two thousand positions tell savings apart by a point; windows so long that most context is there.
MAX_TOKENS, WINDOW_TOKENS = 2048, 256
# Nodes of chunks that are read with their window in one pass.
NODES_AT_ONCE = 256
MIN_FIRST_TOKEN_PROBS = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0)
N_THRESHOLDS = 24
NEAR = 32  # windows on each side that may be of the same passage


@dataclass(frozen=True)
class CalibrationWindow:
    """Token ids (L,) of a text, and the numbers of the datastore's windows whose rows must not propose in it."""

    token_ids: np.ndarray
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Choice:
    """θ and δ, and what they are expected to bring: the share of forward passes saved, and nats lost a token."""

    similarity_threshold: float
    min_first_token_prob: float
    saved: float
    cost: float

    def applied_to(self, acceptance: Acceptance) -> Acceptance:
        """The rule with this θ and δ, and without repeats."""
        theta, least = self.similarity_threshold, self.min_first_token_prob
        return replace(acceptance, similarity_threshold=theta, min_first_token_prob=least, reject_repeats=True)


@dataclass(frozen=True)
class Candidates:
    """The proposals at the N positions of some windows, one after the other, for each δ of the grid; arrays (J, N)."""

    lengths: list[int]  # positions of each window
    similarities: np.ndarray  # NaN: nothing is proposed
    chunk_lengths: np.ndarray  # cut at the window's end
    costs: np.ndarray  # of the chunk, nats

    def walk(self, similarity_threshold: float, min_first_token_prob: float) -> tuple[float, float]:
        """The share of forward passes saved and the nats lost a token, at a θ and a δ of the grid."""
        column = MIN_FIRST_TOKEN_PROBS.index(min_first_token_prob)
        accepted = self.similarities[column] >= similarity_threshold
        steps = np.where(accepted, self.chunk_lengths[column], 1).astype(int).tolist()
        costs = np.where(accepted, self.costs[column], 0.0).tolist()
        n_passes, cost, first = 0, 0.0, 0
        for length in self.lengths:
            at, end = first, first + length
            while at < end:
                n_passes += 1
                cost += costs[at]
                at += steps[at]
            first = end
        n_tokens = sum(self.lengths)
        return 1 - n_passes / n_tokens, cost / n_tokens


def choose(candidates: Candidates, max_cost: float) -> Choice:
    """The θ and δ that save most at no more than max_cost nats a token; θ 1, which accepts nothing, where none saves."""
    best = Choice(1.0, 1.0, 0.0, 0.0)
    for least, similarities in zip(MIN_FIRST_TOKEN_PROBS, candidates.similarities, strict=True):
        found = similarities[~np.isnan(similarities)]
        if not len(found):
            continue
        # Rounded down, so that the proposals at the quantile are accepted.
        quantiles = np.floor(np.clip(np.quantile(found, np.linspace(0, 1, N_THRESHOLDS)), -1, 1) * 1000) / 1000
        for theta in np.unique(quantiles).tolist():
            saved, cost = candidates.walk(theta, least)
            if cost <= max_cost and (saved, -cost) > (best.saved, -best.cost):
                best = Choice(theta, least, saved, cost)
    return best


def read_choice(path: Path, inputs: dict[str, Any]) -> Choice | None:
    """What an earlier command chose and saved; None where there is none, or it chose by something else."""
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        return Choice(**found["choice"]) if found["inputs"] == inputs else None
    except (KeyError, TypeError):
        raise InputError(f"{path}: holds no choice of θ; delete it") from None


# ---- Proposals and their costs


def candidates_for(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    datastore: Datastore,
    trie_folder: Path,
    temperature: float,
    text: Path | None,
    folder: Path,
) -> Candidates:
    """The proposals of a datastore, that of the trie folder, in a text; None: in its own.

    temperature: at which the LM's tokens are drawn; folder: for a temporary file. Raises InputError where the text has no
    passages, stage 3's list of windows is missing, or the model computes NaN or infinity.
    """
    prefix_ids = added_tokens(tokenizer)[0] if reads_bos(trie_folder) else []
    n_tokens = WINDOW_TOKENS if lm.n_positions is None else min(WINDOW_TOKENS, lm.n_positions - len(prefix_ids))
    if text is None:
        windows = windows_of_datastore(trie_folder, n_tokens)
    else:
        windows = windows_of_text(text, tokenizer, n_tokens, folder)
    return find_candidates(lm, datastore, windows, temperature, prefix_ids)


@torch.inference_mode()
def find_candidates(
    lm: CausalLM,
    datastore: Datastore,
    windows: Sequence[CalibrationWindow],
    temperature: float,
    prefix_ids: Sequence[int] = (),
) -> Candidates:
    """The proposals at every position of the windows.

    temperature: at which the LM's tokens are drawn; prefix_ids: read before each window, such as BOS. Raises InputError
    where the model computes NaN or infinity.
    """
    parts = [
        _of_window(lm, datastore, window, temperature, list(prefix_ids))
        for window in ProgressBar(windows, desc="choosing θ", unit="window")
    ]
    return Candidates([part.shape[2] for part in parts], *np.concatenate(parts, axis=2))


def _of_window(
    lm: CausalLM, datastore: Datastore, window: CalibrationWindow, temperature: float, prefix_ids: list[int]
) -> np.ndarray:
    """(3, J, L - 1): similarities, chunk lengths and costs."""
    scores = score_windows(lm, window.token_ids[None], np.dtype(np.float32), prefix_ids, keep_logits=True)
    require_finite(0, 0, scores)
    assert scores.hidden_states is not None
    assert scores.logits is not None
    n_positions = len(window.token_ids) - 1
    found = np.full((3, len(MIN_FIRST_TOKEN_PROBS), n_positions), np.nan)
    chunks: dict[tuple[int, int], list[int]] = {}  # by position and row
    proposed: list[tuple[int, int, int, float]] = []  # position, row, number of the δ, similarity
    for at in range(n_positions):
        trie = datastore.trie(int(window.token_ids[at]))
        if trie is None:
            continue
        query, logits = torch.from_numpy(scores.hidden_states[0, at]), scores.logits[0, at]
        for column, row, similarity in _nearest_rows(trie, query, logits, window.left_out):
            proposed.append((at, row, column, similarity))
            chunks[at, row] = trie.chunk(row)[: n_positions - at]
    text = [*prefix_ids, *window.token_ids.tolist()]
    ends = [len(prefix_ids) + at + 1 for at, _ in chunks]
    costs = dict(zip(chunks, chunk_costs(lm, text, ends, list(chunks.values()), temperature), strict=True))
    for at, row, column, similarity in proposed:
        found[:, column, at] = similarity, len(chunks[at, row]), costs[at, row]
    return found


def _nearest_rows(
    trie: TokenTrie, query: Tensor, logits: Tensor, left_out: frozenset[int]
) -> Iterator[tuple[int, int, float]]:
    """For each δ that leaves a row: its number, the most similar row that is of none of these windows, and its similarity."""
    probs = relative_probs(logits[None], trie.first_ids[None].to(logits.device))[0].to(trie.first_ids.device)
    others = torch.from_numpy(~np.isin(trie.windows, list(left_out))).to(probs.device)
    # By how many rows are allowed: those of a greater δ are of a smaller one's.
    found: dict[int, tuple[int, float]] = {}
    for column, least in enumerate(MIN_FIRST_TOKEN_PROBS):
        allowed = others & (probs >= least)
        n_allowed = int(allowed.sum())
        if n_allowed not in found:
            search = trie.index.search(query, allowed)
            found[n_allowed] = search.result(None if search.pending is None else search.pending.tolist())
        row, similarity = found[n_allowed]
        if row >= 0:
            yield column, row, similarity


@torch.inference_mode()
def chunk_costs(
    lm: CausalLM, text: list[int], ends: Sequence[int], chunks: Sequence[list[int]], temperature: float
) -> list[float]:
    """The cost in nats of each chunk after the first `end` tokens of a text; many in one pass where the model takes trees.

    temperature: of what is drawn from, 0 for the likeliest token.
    """
    costs: list[float] = []
    cache = make_kv_cache(lm, 1, len(text) + NODES_AT_ONCE) if chunks else None
    for first, last in _groups([len(chunk) for chunk in chunks]):
        group = list(zip(ends[first:last], chunks[first:last], strict=True))
        if cache is None or not cache.takes_trees:
            for end, chunk in group:
                ids = torch.tensor([[*text[:end], *chunk[:-1]]], device=lm.device)
                _, logits = lm.forward(ids, logits_to_keep=len(chunk))
                costs.append(float(_excess_surprise(logits[0], chunk, temperature).sum()))
            continue
        token_ids, parents = list(text), list(range(-1, len(text) - 1))
        for end, chunk in group:
            parents += [end - 1, *range(len(token_ids), len(token_ids) + len(chunk) - 1)]
            token_ids += chunk
        cache.lengths[0] = 0
        _, (logits,) = cache.forward([Block(token_ids, parents)], keep_all=True)
        # The logits at a node's parent are those of the node.
        excess = _excess_surprise(logits[parents[len(text) :]], token_ids[len(text) :], temperature)
        borders = np.cumsum([0, *(len(chunk) for _, chunk in group)])
        costs += np.add.reduceat(excess, borders[:-1]).tolist()
    return costs


def _excess_surprise(logits: Tensor, token_ids: list[int], temperature: float) -> np.ndarray:
    """(n,) -log p(x) - H(p_T, p) of each token, float64; logits (n, V)."""
    log_p = logits.float().log_softmax(dim=-1)
    surprise = -log_p.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0]
    if temperature == 0:
        expected = -log_p.amax(dim=-1)
    else:
        # A token that the model rules out adds nothing, where 0 times infinity would add NaN.
        expected = -((log_p / temperature).softmax(dim=-1) * log_p.clamp_min(-1e4)).sum(dim=-1)
    return (surprise - expected).double().cpu().numpy()


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive chunks of at most NODES_AT_ONCE tokens together, one chunk at least."""
    first, n_nodes = 0, 0
    for i, length in enumerate(lengths):
        if i > first and n_nodes + length > NODES_AT_ONCE:
            yield first, i
            first, n_nodes = i, 0
        n_nodes += length
    if first < len(lengths):
        yield first, len(lengths)


# ---- The text


def windows_of_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, n_tokens: int, folder: Path
) -> list[CalibrationWindow]:
    """Windows of a file of passages, evenly spread; folder: for a temporary file. Raises InputError where it has none."""
    plan, _ = plan_text(path, tokenizer, WindowShape(n_tokens, n_tokens, 2), None, folder)
    chosen = _evenly_spread(plan.n_windows, plan.n_tokens / plan.n_windows)
    return [CalibrationWindow(plan.token_ids(window)) for window in chosen]


def windows_of_datastore(trie_folder: Path, n_tokens: int) -> list[CalibrationWindow]:
    """The middle of some windows of the datastore's own text, evenly spread, with the windows of their passages left out.

    Raises InputError where stage 3's list of windows is missing or damaged.
    """
    tries = read_finished(trie_folder / MANIFEST, STAGE)
    shape, results = tries.inputs["extraction"], tries.results
    n_windows, chunk_size = int(results["windows"]), int(shape["chunk_size"])
    chosen = _evenly_spread(n_windows, min(results["tokens"] / n_windows, n_tokens))
    near = sorted({n for i in chosen for n in range(max(i - NEAR, 0), min(i + NEAR + 1, n_windows))})
    token_ids = {number: window.token_ids for number, window in read_windows(find_windows(trie_folder), near).items()}
    n_shared = max(chunk_size - int(shape["stride"]), 0)

    def goes_on(window: int) -> bool:
        """Whether the next window is of the same passage: this one is full, and they share what windows share."""
        before, after = token_ids.get(window), token_ids.get(window + 1)
        if before is None or after is None or len(before) < chunk_size:
            return False
        return bool(np.array_equal(before[chunk_size - n_shared :], after[:n_shared]))

    found = []
    for window in chosen:
        first = last = window
        while goes_on(first - 1):
            first -= 1
        while goes_on(last):
            last += 1
        own = frozenset(range(first, last + 1))
        ids = token_ids[window]
        start = max((len(ids) - n_tokens) // 2, 0)
        found.append(CalibrationWindow(ids[start : start + n_tokens], own))
    return [window for window in found if len(window.token_ids) > 1]


def _evenly_spread(n_windows: int, mean_tokens: float) -> list[int]:
    """Numbers of windows of so many tokens, MAX_TOKENS together."""
    n_wanted = min(max(int(MAX_TOKENS / mean_tokens), 1), n_windows)
    return np.unique(np.linspace(0, n_windows - 1, n_wanted).round().astype(int)).tolist()
