"""Extraction: what the LM gives to each token of each window, written to disk while the LM goes on.

Per window i: `token_probs_{i}.json`, and `hidden_states_{i}.npy` where wanted. Batches come from a plan that knows
nothing of what is on disk; one is skipped where all its windows are whole, else computed whole, so that a run that
goes on where another was cut off writes the same bytes.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from utils.files import InputError
from utils.hidden_states import write_hidden_states
from utils.models import CausalLM
from utils.progress import ProgressBar
from utils.token_probs import read_token_probs, token_probs_path, write_token_probs
from utils.windows import WindowPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
# Logits are made float32 for so many values at a time: 64 MiB, beside the model's own logits.
SLICE_VALUES = 1 << 24
# Batches that wait for the writer, in memory; more would not help a disk that is slower than the model.
MAX_PENDING_BATCHES = 4


@dataclass(frozen=True)
class WindowScores:
    """What the LM gave to the windows of one batch, on the host."""

    log_probs: np.ndarray  # (B, L) float32, natural log, the first column 0
    hidden_states: np.ndarray | None  # (B, L, D) float32 or float16; None: not wanted
    is_finite: np.ndarray  # (B,) bool: neither NaN nor infinity in the model's hidden states


@torch.inference_mode()
def score_windows(lm: CausalLM, token_ids: np.ndarray, hidden_dtype: np.dtype | None = None) -> WindowScores:
    """One forward pass over equally long windows; token_ids (B, L) integer. hidden_dtype None: no hidden states."""
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device=lm.device)
    try:
        hidden_states, logits = lm.forward(ids, use_cache=False)
        log_probs = _log_probs_of_next(logits, ids)
    except torch.OutOfMemoryError as error:
        message = f"{lm.name}: {len(ids)} windows of {ids.shape[1]} tokens do not fit into the memory of {lm.device}"
        raise InputError(f"{message}; give a smaller --batch_size") from error
    is_finite = hidden_states.isfinite().flatten(1).all(dim=1)
    kept = None if hidden_dtype is None else hidden_states.to(getattr(torch, hidden_dtype.name)).cpu().numpy()
    return WindowScores(log_probs.cpu().numpy(), kept, is_finite.cpu().numpy())


def _log_probs_of_next(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, L) float32: what each token got at the position before it, 0 for the first.

    logits (B, L, V) of any dtype, ids (B, L). Batch times length times vocabulary is the largest array of a run by
    far, so its float32 copy exists for a few positions at a time only.
    """
    n_windows, n_positions, n_vocabulary = logits.shape
    log_probs = torch.zeros((n_windows, n_positions), device=logits.device)
    step = max(SLICE_VALUES // (n_windows * n_vocabulary), 1)
    for first in range(0, n_positions - 1, step):
        end = min(first + step, n_positions - 1)
        part = logits[:, first:end].float()  # (B, S, V)
        targets = ids[:, first + 1 : end + 1, None]
        of_targets = part.gather(2, targets).squeeze(2)  # (B, S)
        # Rounding can lift a certain token a little above probability 1.
        log_probs[:, first + 1 : end + 1] = (of_targets - part.logsumexp(dim=2)).clamp(max=0)
    return log_probs


def probabilities_of(log_probs: np.ndarray) -> np.ndarray:
    """(B, L) float64 in [0, 1], the first column 0: before a window's first token stands nothing that predicts it.

    float64, since a float32 would be 0 from a log-probability of -104 down.
    """
    probabilities = np.exp(log_probs.astype(np.float64))
    probabilities[:, 0] = 0
    return probabilities


def window_nll(probabilities: np.ndarray) -> float:
    """Negative log-likelihood, in nats, of a window's tokens from the second on; probabilities (L,) as on disk."""
    return float(-np.log(np.maximum(probabilities[1:], np.finfo(np.float64).tiny)).sum())


def read_nll(plan: WindowPlan, folder: Path, windows: np.ndarray) -> np.ndarray:
    """The same of each of the windows (M,) from an earlier run's files.

    Raises InputError where a file is damaged or holds other tokens than the plan.
    """
    nll = np.zeros(len(windows))
    bar = ProgressBar(windows.tolist(), desc="reading what is there", unit="window", disable=not len(windows))
    for row, window in enumerate(bar):
        _, token_ids, probabilities = read_token_probs(folder, window)
        if not np.array_equal(token_ids, plan.token_ids(window)):
            path = token_probs_path(folder, window)
            raise InputError(f"{path}: holds other tokens than window {window} of the text; delete it and run again")
        nll[row] = window_nll(probabilities)
    return nll


class WindowWriter:
    """Writes the files of scored windows; the texts of tokens are looked up once per distinct token."""

    def __init__(self, folder: Path, tokenizer: "PreTrainedTokenizerBase", n_token_ids: int) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._texts = np.full(n_token_ids, "", dtype=object)
        self._is_known = np.zeros(n_token_ids, dtype=bool)

    def write(self, windows: np.ndarray, token_ids: np.ndarray, scores: WindowScores) -> np.ndarray:
        """Write a batch: windows (B,) numbers, token_ids (B, L). Returns each window's negative log-likelihood (B,).

        Raises InputError where the model computed NaN or infinity, or --hidden_dtype does not hold a hidden state.
        """
        texts = self._texts_of(token_ids)
        probabilities = probabilities_of(scores.log_probs)
        for row, window in enumerate(windows.tolist()):
            require_sound(window, row, scores)
            if scores.hidden_states is not None:
                write_hidden_states(self._folder, window, scores.hidden_states[row])
            write_token_probs(self._folder, window, token_ids[row], probabilities[row], texts[row].tolist())
        return np.array([window_nll(row) for row in probabilities])

    def _texts_of(self, token_ids: np.ndarray) -> np.ndarray:
        """(B, L) strings."""
        distinct = np.unique(token_ids)
        unknown = distinct[~self._is_known[distinct]]
        self._is_known[unknown] = True
        for token in unknown.tolist():
            self._texts[token] = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self._texts[token_ids]


def require_sound(window: int, row: int, scores: WindowScores) -> None:
    if not scores.is_finite[row] or np.isnan(scores.log_probs[row]).any():
        raise InputError(f"window {window}: the model computed NaN or infinity; use another --dtype, such as float32")
    if scores.hidden_states is not None and not np.isfinite(scores.hidden_states[row]).all():
        reach = f"exceeds the {np.finfo(scores.hidden_states.dtype).max:.0f} that {scores.hidden_states.dtype} holds"
        raise InputError(f"window {window}: a hidden state {reach}; use --hidden_dtype float32")


@dataclass(frozen=True)
class Extraction:
    """What a run found out: each window's negative log-likelihood (N,) in nats; tokens that it computed, in which time."""

    nll: np.ndarray
    n_computed: int
    seconds: float

    def results(self, lm: CausalLM, plan: WindowPlan) -> dict[str, Any]:
        """What the stage's manifest says of its output, the same however many runs it took."""
        n_scored = plan.n_tokens - plan.n_windows  # the first token of a window has nothing before it
        return {
            "n_passages": plan.n_passages,
            "n_short_passages": plan.n_short_passages,
            "n_windows": plan.n_windows,
            "n_tokens": plan.n_tokens,
            "hidden_size": lm.hidden_size,
            "windows_fingerprint": plan.fingerprint,
            "perplexity": math.exp(self.nll.sum() / n_scored) if n_scored else None,
        }


def extract(
    lm: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    plan: WindowPlan,
    folder: Path,
    batches: list[np.ndarray],
    hidden_dtype: np.dtype | None,
) -> Extraction:
    """Score these batches of the plan and write their files; the other windows' files are read.

    hidden_dtype None: no hidden states are written. Raises InputError where a file cannot be written, one that is
    there is damaged or of another text, or the model computes NaN.
    """
    computed = np.concatenate([np.zeros(0, dtype=np.int64), *batches])
    others = np.setdiff1d(np.arange(plan.n_windows), computed)
    nll = np.zeros(plan.n_windows)
    nll[others] = read_nll(plan, folder, others)
    LOGGER.debug("%s of %s windows are to be read by %s", len(computed), plan.n_windows, lm.name)
    start = time.perf_counter()
    writer = WindowWriter(folder, tokenizer, plan.largest_id + 1)
    nll[computed] = np.concatenate([np.zeros(0), *_run_batches(lm, writer, plan, batches, hidden_dtype)])
    return Extraction(nll, int(plan.lengths[computed].sum()), time.perf_counter() - start)


def _run_batches(
    lm: CausalLM,
    writer: WindowWriter,
    plan: WindowPlan,
    batches: list[np.ndarray],
    hidden_dtype: np.dtype | None,
) -> Iterator[np.ndarray]:
    """Each batch's negative log-likelihoods, once its files are written: in a thread, while the model goes on."""
    n_tokens = sum(int(plan.lengths[windows].sum()) for windows in batches)
    bar = ProgressBar(total=n_tokens, desc="extracting", unit="tok", unit_scale=True, disable=not batches)
    pending: deque[Future[np.ndarray]] = deque()
    with bar, ThreadPoolExecutor(max_workers=1) as thread:
        try:
            for windows in batches:
                token_ids = plan.batch_token_ids(windows)
                scores = score_windows(lm, token_ids, hidden_dtype)
                pending.append(thread.submit(writer.write, windows, token_ids, scores))
                bar.update(token_ids.size)
                if len(pending) > MAX_PENDING_BATCHES:
                    yield pending.popleft().result()  # raises here what the writer raised
            while pending:
                yield pending.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)
