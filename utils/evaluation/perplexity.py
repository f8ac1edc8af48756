"""Perplexity: of a text under the LM, and under CD-LM with the proposals of a datastore (paper section 5).

The LM reads every window once. The proposals of all positions are found together, by one matrix product for each entry
token; any number of acceptance settings is then evaluated from them (`marginal.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.acceptance import Acceptance, AcceptanceMap, save_map, would_repeat
from utils.evaluation.marginal import (
    Neighbors,
    Proposals,
    expected_chunk_tokens,
    fit_map,
    fit_map_of,
    log_likelihoods,
)
from utils.files import InputError, file_fingerprint
from utils.json_io import write_json
from utils.lm.model import CausalLM, require_known_ids
from utils.lm.scoring import relative_log_probs, require_finite, score_windows
from utils.progress import ProgressBar
from utils.tables import align, format_number
from utils.text.corpora import read_passages
from utils.text.windows import WindowPlan, WindowShape, plan_batches, plan_windows

FITTED_MAP = "acceptance_map.json"
PERPLEXITY = "perplexity.json"
# Hidden states kept until their proposals are looked up together: 512 MB.
HIDDEN_NUMBERS_AT_ONCE = 2**27
# Rows whose first tokens the LM is asked about together, at all positions: 64 MB.
FIRST_TOKENS_AT_ONCE = 2**24
# Chunks that are compared with the text together: 64 MB where they have 64 tokens.
AGREEING_AT_ONCE = 2**16
N_RESAMPLES = 2000
# Counts of windows drawn at a time: 32 MB.
RESAMPLED_NUMBERS = 2**22


# What gives each proposal its probability.
Setting = Acceptance | AcceptanceMap


# ---- A text file


@dataclass(frozen=True)
class TextSize:
    """What a text's likelihood is divided by: tokens that were predicted, and their bytes in UTF-8."""

    n_tokens: int
    n_bytes: int


@dataclass(frozen=True)
class TextReader:
    """Turns a file of passages into proposals.

    datastore: None for no proposals; folder: for temporary files; acceptance: as of `find_proposals`.
    """

    lm: CausalLM
    tokenizer: PreTrainedTokenizerBase
    datastore: Datastore | None
    shape: WindowShape
    max_windows: int | None
    batch_size: int
    folder: Path
    acceptance: Acceptance | None = None

    def read(self, path: Path) -> tuple[Proposals, TextSize]:
        """Raises InputError where the file holds no passages, none is long enough, or the model has no such ids."""
        plan, size = plan_text(path, self.tokenizer, self.shape, self.max_windows, self.folder)
        require_known_ids(self.lm.model.config, self.lm.name, plan.largest_id)
        return find_proposals(self.lm, self.datastore, plan, self.batch_size, self.acceptance), size


def plan_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, shape: WindowShape, max_windows: int | None, folder: Path
) -> tuple[WindowPlan, TextSize]:
    """The windows of a file of passages that predict something, the first of them where there is a bound, and their size.

    folder: for a temporary file. Raises InputError where the file holds no passages or none is long enough.
    """
    plan = plan_windows(read_passages(path), tokenizer, shape, folder, counts_bytes=True)
    assert plan.n_bytes is not None
    # A window of one token predicts nothing.
    kept = np.flatnonzero(plan.lengths > 1)[:max_windows]
    n_bytes = plan.n_bytes[kept]
    plan = replace(plan, starts=plan.starts[kept], lengths=plan.lengths[kept], n_bytes=n_bytes)
    return plan, TextSize(plan.n_tokens - plan.n_windows, max(int(n_bytes.sum()), 1))


def fit_maps(
    path: Path, proposals: Proposals, q_max: float, n_neighbors: int = 1
) -> tuple[AcceptanceMap, AcceptanceMap]:
    """The map under which a text, the file's, is likeliest, and the best constant q; the map's origin says how likely.

    n_neighbors > 1: with the mixture of so many rows, prefixes of chunks among them, which both share. Raises InputError
    where the datastore proposes nothing in that text.
    """
    try:
        fitted, history = fit_map(proposals, q_max, n_neighbors=n_neighbors, prefixes=n_neighbors > 1)
        constant, of_constant = fit_map_of(proposals, q_max, 1, fitted.mixture)
    except ValueError as error:
        raise InputError(f"{path}: {error}; give a text of the datastore's domain") from error
    origin = {
        "text": file_fingerprint(path),
        "file": path.name,
        "tokens": len(proposals.log_probs),
        "steps": len(history),
        "log_likelihood_base": float(proposals.log_probs.sum()),
        "log_likelihood_constant": of_constant[-1],
        "log_likelihood_fitted": history[-1],
        "constant": constant.probabilities[0],
    }
    return replace(fitted, origin=origin), replace(constant, similarities=(0.0,))


def fit_acceptance(reader: TextReader, path: Path, save_dir: Path, acceptance: Acceptance) -> AcceptanceMap:
    """Fit g to a text, save it in save_dir with the text's fingerprint and the likelihoods, and return it.

    acceptance: its q_max and how many rows propose.
    """
    proposals, _ = reader.read(path)
    fitted, _ = fit_maps(path, proposals, acceptance.q_max, acceptance.n_neighbors)
    save_map(save_dir / FITTED_MAP, fitted)
    return fitted


def evaluate_perplexity(
    reader: TextReader, path: Path, save_dir: Path, thresholds: list[float], acceptance: Acceptance
) -> dict[str, Any]:
    """Perplexity of the text under the base LM and, for each setting, under CD-LM; saved as perplexity.json.

    Raises InputError where the acceptance map was fitted to this very text.
    """
    fitted, fingerprint = acceptance.fitted, file_fingerprint(path)
    if fitted is not None and fitted.origin.get("text") == fingerprint:
        raise InputError(f"{path}: the acceptance map was fitted to this text; evaluate on another one")
    proposals, size = reader.read(path)
    constant = None if fitted is None else fitted.origin.get("constant")
    settings = table_settings(thresholds, acceptance, constant)
    figures = cdlm_figures(proposals, list(settings.values()), size) if settings else []
    found = proposals.similarities[~np.isnan(proposals.similarities)]
    quantiles = np.percentile(found, [5, 25, 50, 75, 95]).tolist() if len(found) else None
    report = {
        "text": {"file": path.name, "sha256": fingerprint, "windows": len(proposals.lengths)},
        "acceptance": acceptance.policy,
        "q_max": acceptance.q_max,
        "min_first_token_prob": acceptance.min_first_token_prob,
        "reject_repeats": acceptance.reject_repeats,
        "mixture": None if acceptance.mixture is None else asdict(acceptance.mixture),
        "similarity_quantiles": quantiles,
        "base": base_figures(proposals, size),
        "cdlm": dict(zip(settings, figures, strict=True)),
    }
    write_json(save_dir / PERPLEXITY, report, indent=2)
    return report


# ---- Proposals


def find_proposals(
    lm: CausalLM,
    datastore: Datastore | None,
    plan: WindowPlan,
    batch_size: int,
    acceptance: Acceptance | None = None,
) -> Proposals:
    """The LM's probability and the proposal at every position from a window's second token on; datastore None: no proposals.

    acceptance: how many rows propose, of those that the LM lets; chunks that it rejects as repeats are left out, which is
    as if their q was 0; None: one row of all. Raises InputError where the model computes
    NaN or infinity.
    """
    lengths = plan.lengths - 1
    n = int(lengths.sum())
    neighbors = None
    if acceptance is not None and acceptance.n_neighbors > 1:
        shape = n, acceptance.n_neighbors
        lengths_of, agreeing_of = np.zeros((2, *shape), dtype=np.int64)
        neighbors = Neighbors(np.full(shape, np.nan), lengths_of, agreeing_of, np.zeros(shape, dtype=np.float32))
    chunk_lengths, agreeing = np.zeros((2, n), dtype=np.int64)
    found = Proposals(lengths, np.zeros(n), np.full(n, np.nan), chunk_lengths, agreeing, neighbors)
    # What the LM gives to the first tokens of several rows is kept for a mixture that is to be fitted.
    asks_lm = datastore is not None and acceptance is not None and (acceptance.asks_lm or acceptance.n_neighbors > 1)
    batches = read_positions(lm, plan, batch_size, keep_logits=asks_lm)
    # Logits are too large to be kept beyond their batch.
    for positions in batches if asks_lm else grouped(batches):
        found.log_probs[positions.places] = positions.log_probs
        if datastore is not None:
            fill_in_nearest(found, datastore, positions, acceptance)
    return found


@dataclass(frozen=True)
class Positions:
    """Some positions, those of a window together and in order, and what the LM gives there; arrays of length n."""

    entries: np.ndarray  # token ids
    places: np.ndarray  # in the proposals' arrays
    hidden_states: np.ndarray  # (n, D) float32: the entry tokens'
    following: np.ndarray  # the next tokens
    log_probs: np.ndarray  # what the LM gives to these
    left: np.ndarray  # tokens left in the window
    before: np.ndarray  # tokens of the window before the entry token
    logits: Tensor | None = None  # (n, V) at the entry tokens, on the model's device; None: not kept


def read_positions(lm: CausalLM, plan: WindowPlan, batch_size: int, keep_logits: bool = False) -> Iterator[Positions]:
    """Read every window once, in batches of equally long ones; yields the positions of each batch.

    Raises InputError where the model computes NaN or infinity.
    """
    firsts = np.cumsum(plan.lengths - 1) - (plan.lengths - 1)
    with ProgressBar(total=plan.n_tokens, desc="reading windows", unit="tok", unit_scale=True) as bar:
        for windows in plan_batches(plan.lengths, batch_size):
            token_ids = plan.batch_token_ids(windows)
            scores = score_windows(lm, token_ids, np.dtype(np.float32), plan.prefix_ids, keep_logits)
            for row, window in enumerate(windows.tolist()):
                require_finite(window, row, scores)
            assert scores.hidden_states is not None
            n = token_ids.shape[1] - 1
            yield Positions(
                token_ids[:, :-1].ravel(),
                (firsts[windows][:, None] + np.arange(n)).ravel(),
                scores.hidden_states[:, :-1].reshape(-1, lm.hidden_size),
                token_ids[:, 1:].ravel(),
                scores.log_probs[:, 1:].ravel(),
                np.tile(np.arange(n, 0, -1), len(windows)),
                np.tile(np.arange(n), len(windows)),
                None if scores.logits is None else scores.logits[:, :-1].flatten(0, 1),
            )
            bar.update(token_ids.size)


def grouped(parts: Iterable[Positions]) -> Iterator[Positions]:
    """Join batches up to HIDDEN_NUMBERS_AT_ONCE, so that one search covers all positions of an entry token."""
    group: list[Positions] = []
    n_numbers = 0
    for part in parts:
        if group and n_numbers + part.hidden_states.size > HIDDEN_NUMBERS_AT_ONCE:
            yield _joined(group)
            group, n_numbers = [], 0
        group.append(part)
        n_numbers += part.hidden_states.size
    if group:
        yield _joined(group)


def _joined(group: list[Positions]) -> Positions:
    names = [each.name for each in fields(Positions) if each.name != "logits"]
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in group]) for name in names}
    return Positions(**joined)


def fill_in_nearest(
    found: Proposals, datastore: Datastore, queries: Positions, acceptance: Acceptance | None = None
) -> None:
    """Fill in the proposals of some positions, by one search for all those of an entry token.

    acceptance: as of `find_proposals`; where it asks the LM, the queries have logits.
    """
    order = np.argsort(queries.entries, kind="stable")
    borders = np.flatnonzero(np.diff(queries.entries[order])) + 1
    for positions in np.split(order, borders):
        trie = datastore.trie(int(queries.entries[positions[0]]))
        if trie is None:
            continue
        rows, similarities, log_probs = _nearest(trie, queries, positions, found.neighbors, acceptance)
        if acceptance is not None and acceptance.reject_repeats:
            similarities[_would_repeat(trie, rows, queries, positions)] = np.nan
        there = ~np.isnan(similarities)
        lengths = np.where(there, trie.chunk_lengths(rows), 0)
        lengths = np.minimum(lengths, queries.left[positions, None])
        agreeing = np.zeros_like(lengths)
        agreeing[there] = _agreeing(trie, rows[there], lengths[there], queries.following, positions[there.nonzero()[0]])
        at, n_rows = queries.places[positions], rows.shape[1]
        columns = (found.similarities, similarities), (found.chunk_lengths, lengths), (found.agreeing, agreeing)
        for of_nearest, values in columns:
            of_nearest[at] = values[:, 0]
        if found.neighbors is not None:
            found.neighbors.similarities[at, :n_rows] = similarities
            found.neighbors.chunk_lengths[at, :n_rows] = lengths
            found.neighbors.agreeing[at, :n_rows] = agreeing
            found.neighbors.first_log_probs[at, :n_rows] = log_probs


def _nearest(
    trie: TokenTrie,
    queries: Positions,
    positions: np.ndarray,
    neighbors: Neighbors | None,
    acceptance: Acceptance | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, similarities and logs of what the LM gives to their first tokens, (n, K) each, at some of the positions.

    K: as many neighbours as the trie has; where fewer may propose, their similarities are NaN. The last is 0 without logits.
    """
    k = 1 if neighbors is None else neighbors.similarities.shape[1]
    states = torch.from_numpy(queries.hidden_states[positions])
    if acceptance is not None and acceptance.min_first_token_prob:
        return _nearest_likely(trie, queries, positions, k, acceptance.min_first_token_prob)
    if k == 1:
        rows, similarities = (each[:, None] for each in trie.index.nearest_batch(states))
    else:
        rows, similarities = trie.index.nearest_k(states, k, None)
    log_probs = torch.zeros(rows.shape)
    if queries.logits is not None:
        logits = queries.logits[torch.from_numpy(positions).to(queries.logits.device)]
        log_probs = relative_log_probs(logits, trie.first_ids[rows].to(logits.device))
    return rows.cpu().numpy(), similarities.cpu().numpy(), log_probs.cpu().numpy()


def _nearest_likely(
    trie: TokenTrie, queries: Positions, positions: np.ndarray, k: int, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, of the rows to whose chunk's first token the LM gives `least` of what it gives its likeliest."""
    assert queries.logits is not None
    logits, device = queries.logits, queries.logits.device
    first_ids = trie.first_ids.to(device)
    found = []
    for some in np.array_split(positions, len(positions) * len(first_ids) // FIRST_TOKENS_AT_ONCE + 1):
        if len(some):
            log_probs = relative_log_probs(logits[torch.from_numpy(some).to(device)], first_ids.expand(len(some), -1))
            log_probs = log_probs.to(trie.first_ids.device)
            states = torch.from_numpy(queries.hidden_states[some])
            rows, similarities = trie.index.nearest_k(states, k, log_probs.exp() >= least)
            found.append([each.cpu().numpy() for each in (rows, similarities, log_probs.gather(1, rows))])
    rows_of, similarities_of, log_probs_of = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows_of, similarities_of, log_probs_of


def _would_repeat(trie: TokenTrie, rows: np.ndarray, queries: Positions, positions: np.ndarray) -> np.ndarray:
    """(n, 1) bool: whether the chunk of the one row (n, 1) at each position (n,) would repeat the text before it."""
    found = [
        would_repeat(queries.entries[at - n_before : at + 1].tolist(), trie.chunk(row))
        for row, at, n_before in zip(rows[:, 0], positions, queries.before[positions], strict=True)
    ]
    return np.array(found)[:, None]


def _agreeing(
    trie: TokenTrie, rows: np.ndarray, lengths: np.ndarray, following: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """(n,) int64: how many tokens of each row's chunk, cut to its length, stand in the text after its position."""
    agreeing = np.zeros(len(rows), dtype=np.int64)
    # Most differ in the first token, and few are read any further.
    left = np.flatnonzero(trie.continuations(rows, 1, first=0)[:, 0] == following[positions])
    for some in np.array_split(left, len(left) // AGREEING_AT_ONCE + 1):
        if not len(some):
            continue
        longest = int(lengths[some].max())
        chunks = trie.continuations(rows[some], longest, first=0)
        ahead = np.arange(longest)
        text = following[np.minimum(positions[some, None] + ahead, len(following) - 1)]
        differs = (chunks != text) | (ahead >= lengths[some, None])
        agreeing[some] = np.where(differs.any(axis=1), differs.argmax(axis=1), longest)
    return agreeing


# ---- Figures


def base_figures(proposals: Proposals, size: TextSize) -> dict[str, float]:
    """Perplexity of the base LM."""
    return _figures(-base_log_likelihoods(proposals)[None], proposals.lengths, size)[0]


def base_log_likelihoods(proposals: Proposals) -> np.ndarray:
    """(W,) log p of each window under the base LM alone."""
    return np.array([proposals.log_probs[part].sum() for part in proposals.windows()])


def compared_figures(log_p: np.ndarray, proposals: Proposals, size: TextSize) -> dict[str, float]:
    """As `all_compared_figures`, of one way to predict, log_p (W,)."""
    return all_compared_figures(log_p[None], proposals, size)[0]


def all_compared_figures(log_p: np.ndarray, proposals: Proposals, size: TextSize) -> list[dict[str, float]]:
    """Perplexity under S ways to predict, of which the windows have log-likelihoods log_p (S, W).

    ratio: to the base LM's perplexity, its interval over the same windows of both.
    """
    gained = base_log_likelihoods(proposals) - log_p  # (S, W)
    figures = _figures(np.concatenate([-log_p, gained]), proposals.lengths, size)
    found = []
    for own, ratio in zip(figures[: len(log_p)], figures[len(log_p) :], strict=True):
        names = {"ratio": "perplexity", "ratio_lower": "perplexity_lower", "ratio_upper": "perplexity_upper"}
        found.append(own | {name: ratio[of] for name, of in names.items()})
    return found


def cdlm_figures(proposals: Proposals, settings: Sequence[Setting], size: TextSize) -> list[dict[str, float]]:
    """Perplexity of CD-LM under each setting, compared with the base LM's.

    coverage and accepted: shares of positions with a proposal, and with one of q >= 1/2; matched: share of the most
    similar proposals that are what the text says; from_chunks: expected share of the tokens that chunks brought.
    """
    found = ~np.isnan(proposals.similarities)
    shares = {
        "coverage": float(found.mean()),
        "matched": float(proposals.matches[found].mean()) if found.any() else 0.0,
    }
    compared = all_compared_figures(setting_log_likelihoods(settings, proposals), proposals, size)
    figures = []
    for setting, of_setting in zip(settings, compared, strict=True):
        q = setting_probabilities(setting, proposals)
        brought = expected_chunk_tokens(proposals, q, setting.mixture)
        extra = {"accepted": float((q >= 0.5).mean()), "from_chunks": brought / size.n_tokens}
        figures.append(of_setting | shares | extra)
    return figures


def _figures(nll: np.ndarray, n_tokens: np.ndarray, size: TextSize) -> list[dict[str, float]]:
    """One for each row of nll (F, W) in nats; n_tokens (W,) of each window."""
    return [
        {
            "perplexity": float(np.exp(of_windows.sum() / n_tokens.sum())),
            "perplexity_lower": lower,
            "perplexity_upper": upper,
            "mean_window_perplexity": float(np.exp(of_windows / n_tokens).mean()),
            "bits_per_byte": float(of_windows.sum() / np.log(2) / size.n_bytes),
            "nll": float(of_windows.sum()),
            "tokens": int(n_tokens.sum()),
        }
        for of_windows, (lower, upper) in zip(nll, _intervals(nll, n_tokens), strict=True)
    ]


def _intervals(nll: np.ndarray, n_tokens: np.ndarray) -> list[list[float]]:
    """Bootstrap 95% interval of each row's perplexity, nll (F, W), over windows drawn with replacement, the same for all.

    The draws are made in blocks, which are the same whatever the size of a block: all together are many numbers.
    """
    rng, n_windows = np.random.default_rng(0), len(n_tokens)
    share, n_block = np.full(n_windows, 1 / n_windows), max(RESAMPLED_NUMBERS // n_windows, 1)
    resampled = []
    for first in range(0, N_RESAMPLES, n_block):
        counts = rng.multinomial(n_windows, share, size=min(n_block, N_RESAMPLES - first))  # (R, W)
        resampled.append(np.exp(counts @ nll.T / (counts @ n_tokens)[:, None]))
    return np.percentile(np.concatenate(resampled), [2.5, 97.5], axis=0).T.tolist()


def table_settings(thresholds: list[float], acceptance: Acceptance, constant: float | None) -> dict[str, Setting]:
    """The settings of a table by name: each θ, and where a map was fitted, that and the best constant q beside it."""
    settings: dict[str, Setting] = {
        str(float(theta) + 0.0): replace(acceptance, similarity_threshold=theta, fitted=None) for theta in thresholds
    }
    if constant is not None:
        settings["constant"] = AcceptanceMap((0.0,), (constant,), mixture=acceptance.mixture)
    if acceptance.fitted is not None:
        settings["fitted"] = acceptance.fitted
    return settings


def setting_probabilities(setting: Setting, proposals: Proposals) -> np.ndarray:
    """(N,) q at each position, 0 where nothing is proposed."""
    q = setting.probability if isinstance(setting, Acceptance) else setting
    return np.where(np.isnan(proposals.similarities), 0.0, q(proposals.similarities))


def setting_log_likelihoods(settings: Sequence[Setting], proposals: Proposals) -> np.ndarray:
    """(S, W) log p of each window under each setting; those that propose alike are summed over together."""
    probabilities = np.stack([setting_probabilities(setting, proposals) for setting in settings])
    found = np.empty((len(settings), len(proposals.lengths)))
    for mixture in {setting.mixture for setting in settings}:
        alike = [i for i, setting in enumerate(settings) if setting.mixture == mixture]
        found[alike] = log_likelihoods(proposals, probabilities[alike], mixture)
    return found


# ---- The table


COLUMNS = (
    ("perplexity", "perplexity", 1, 3),
    ("95% from", "perplexity_lower", 1, 3),
    ("to", "perplexity_upper", 1, 3),
    ("to base LM", "ratio", 1, 4),
    ("95% from", "ratio_lower", 1, 4),
    ("to", "ratio_upper", 1, 4),
    ("mean per window", "mean_window_perplexity", 1, 3),
    ("bits/byte", "bits_per_byte", 1, 4),
    ("accepted %", "accepted", 100, 1),
    ("from chunks %", "from_chunks", 100, 1),
)


def format_perplexity(report: dict[str, Any]) -> str:
    """The table: a row for the base LM and one for each setting, and what the proposals were like."""
    named = {"base LM": report["base"]} | {_label(name): found for name, found in report["cdlm"].items()}
    rows = [["", *(heading for heading, *_ in COLUMNS)]]
    for name, figures in named.items():
        cells = (format_number(figures.get(key), scale, decimals) for _, key, scale, decimals in COLUMNS)
        rows.append([name, *cells])
    lines = align(rows)
    text = report["text"]
    lines.append(f"{report['base']['tokens']:,} tokens in {text['windows']:,} windows of {text['file']}")
    if not report["cdlm"]:
        return "\n".join(lines)
    first = next(iter(report["cdlm"].values()))
    lines.append(
        f"proposals at {first['coverage']:.1%} of them, {first['matched']:.1%} of which are what the text says"
    )
    if report["similarity_quantiles"]:
        shown = zip((5, 25, 50, 75, 95), report["similarity_quantiles"], strict=True)
        lines.append("best similarity, quantiles: " + ", ".join(f"{share}% {value:.3f}" for share, value in shown))
    if mixture := report["mixture"]:
        going_on = " ".join(f"{each:.2f}" for each in mixture["continuation"])
        lines.append(
            f"{mixture['n_neighbors']} rows propose, at temperature {mixture['temperature']:g}, the LM's say to the power"
            f" {mixture['lm_power']:g}; a chunk goes on after each token with probability {going_on}"
        )
    if report["acceptance"] == "threshold":
        lines.append(
            f"θ accepts with probability {report['q_max']} (--q_max), since with 1 a wrong chunk is impossible"
        )
    return "\n".join(lines)


def _label(name: str) -> str:
    return {"constant": "CD-LM, best constant q", "fitted": "CD-LM, fitted map"}.get(name, f"CD-LM, θ {name}")
