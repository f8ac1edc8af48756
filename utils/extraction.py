"""Extraction: what the LM gives to each token of each window, written to disk while the LM goes on.

Per window i: `token_probs_{i}.json`, and where wanted `hidden_states_{i}.npy` and its rows of the `.h5`. Batches come from a plan that knows
nothing of what is on disk; one is skipped where all its windows are whole, else computed whole, so that a run that
goes on where another was cut off writes the same bytes.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from utils.files import InputError
from utils.hidden_states import UnfinishedH5, write_hidden_states
from utils.models import CausalLM
from utils.progress import ProgressBar
from utils.token_probs import read_token_probs, token_probs_path, write_token_probs
from utils.windows import WindowPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
# Logits are made float32, and summed over, for so many values at a time. On a CPU 1 MiB, which stays in the cache: three
# times as fast as 64 MiB for 8 windows of a small model. On a GPU enough to keep it busy.
SLICE_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}
# Batches that wait for the writer, in memory; more would not help a disk that is slower than the model.
MAX_PENDING_BATCHES = 4
# Batches that are found without a --batch_size. A CPU gains nothing by more tokens; a GPU is given as many as fit.
CPU_BATCH_TOKENS = 1 << 11
GPU_BATCH_TOKENS = 1 << 15


@dataclass(frozen=True)
class WindowScores:
    """What the LM gave to the windows of one batch, on the host."""

    log_probs: np.ndarray  # (B, L) float32, natural log, the first column 0
    hidden_states: np.ndarray | None  # (B, L, D) float32 or float16; None: not wanted
    is_finite: np.ndarray  # (B,) bool: neither NaN nor infinity in the model's hidden states


class PendingScores:
    """Scores on their way from the device: a GPU may still be computing them."""

    def __init__(self, log_probs: Tensor, hidden_states: Tensor | None, is_finite: Tensor) -> None:
        tensors = (log_probs, hidden_states, is_finite)
        # From a GPU this goes into pinned memory, behind the kernels, and returns at once.
        self._tensors = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]
        devices = {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def get(self) -> WindowScores:
        """Wait for them; from any thread."""
        for event in self._copied:
            event.synchronize()
        log_probs, hidden_states, is_finite = (None if x is None else x.numpy() for x in self._tensors)
        assert log_probs is not None
        assert is_finite is not None
        return WindowScores(log_probs, hidden_states, is_finite)


def score_windows(lm: CausalLM, token_ids: np.ndarray, hidden_dtype: np.dtype | None = None) -> WindowScores:
    """One forward pass over equally long windows; token_ids (B, L) integer. hidden_dtype None: no hidden states.

    Raises InputError where the device has too little memory.
    """
    try:
        return begin_scoring(lm, token_ids, hidden_dtype).get()
    except torch.OutOfMemoryError as error:
        raise _too_large(lm, token_ids) from error


def _too_large(lm: CausalLM, token_ids: np.ndarray) -> InputError:
    n_windows, n_tokens = token_ids.shape
    message = f"{lm.name}: {n_windows} windows of {n_tokens} tokens do not fit into the memory of {lm.device}"
    return InputError(f"{message}; give a smaller --batch_size, or let no other program use it")


@torch.inference_mode()
def begin_scoring(lm: CausalLM, token_ids: np.ndarray, hidden_dtype: np.dtype | None = None) -> PendingScores:
    """As `score_windows`, but a GPU is only told what to do. Raises torch.OutOfMemoryError."""
    ids = torch.from_numpy(token_ids.astype(np.int64))
    if lm.device.type == "cuda":
        ids = ids.pin_memory().to(lm.device, non_blocking=True)  # from other memory it would wait for all before it
    hidden_states, logits = lm.forward(ids, use_cache=False)
    log_probs = _log_probs_of_next(logits, ids.to(logits.device))
    is_finite = hidden_states.isfinite().flatten(1).all(dim=1)
    kept = None if hidden_dtype is None else hidden_states.to(getattr(torch, hidden_dtype.name))
    return PendingScores(log_probs, kept, is_finite)


def find_batch_size(lm: CausalLM, n_tokens: int) -> int:
    """How many windows of `n_tokens` tokens to read in one forward pass.

    On a GPU: as many as fit, halved until they do. Raises InputError where not even one does.
    """
    if lm.device.type == "cpu":
        return max(CPU_BATCH_TOKENS // n_tokens, 1)
    return largest_that_fits(lm, max(GPU_BATCH_TOKENS // n_tokens, 1), n_tokens)


def largest_that_fits(lm: CausalLM, n_windows: int, n_tokens: int) -> int:
    """`n_windows`, or what is left of it once it was halved until the device's memory does for such a forward pass."""
    while True:
        token_ids = np.zeros((n_windows, n_tokens), dtype=np.int64)
        try:
            # Two at a time, as in a run: what one leaves to be copied is there while the next is computed.
            for pending in [begin_scoring(lm, token_ids, np.dtype(np.float32)) for _ in range(2)]:
                pending.get()
        except torch.OutOfMemoryError as error:
            if n_windows == 1:
                raise _too_large(lm, token_ids) from error
        else:
            return n_windows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        LOGGER.warning(
            "%d windows of %d tokens do not fit into %s; reading %d at a time",
            *(n_windows, n_tokens, lm.device, n_windows // 2),
        )
        n_windows //= 2


def _log_probs_of_next(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, L) float32: what each token got at the position before it, 0 for the first.

    logits (B, L, V) of any dtype, ids (B, L). Batch times length times vocabulary is the largest array of a run by
    far, so its float32 copy exists for a few positions at a time only.
    """
    n_windows, n_positions, n_vocabulary = logits.shape
    log_probs = torch.zeros((n_windows, n_positions), device=logits.device)
    step = max(SLICE_VALUES[logits.device.type] // (n_windows * n_vocabulary), 1)
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


def read_nll(plan: WindowPlan, folder: Path, windows: np.ndarray, *, show_bar: bool = True) -> np.ndarray:
    """The same of each of the windows (M,) from an earlier run's files.

    Raises InputError where a file is damaged or holds other tokens than the plan.
    """
    nll = np.zeros(len(windows))
    bar = ProgressBar(
        windows.tolist(), desc="reading what is there", unit="window", disable=not len(windows) or not show_bar
    )
    for row, window in enumerate(bar):
        _, token_ids, probabilities = read_token_probs(folder, window)
        if not np.array_equal(token_ids, plan.token_ids(window)):
            path = token_probs_path(folder, window)
            raise InputError(f"{path}: holds other tokens than window {window} of the text; delete it and run again")
        nll[row] = window_nll(probabilities)
    return nll


@dataclass(frozen=True)
class Sinks:
    """Where a window's hidden states go."""

    npy_folder: Path | None = None  # for a `.npy` per window; None: for none
    h5: UnfinishedH5 | None = None
    first_rows: np.ndarray = field(
        default_factory=lambda: np.zeros(0, dtype=np.int64)
    )  # (N,) of each window in the .h5

    @property
    def takes_any(self) -> bool:
        return self.npy_folder is not None or self.h5 is not None

    def write(self, window: int, hidden_states: np.ndarray) -> None:
        """hidden_states (L, D) of the dtype on disk."""
        if self.npy_folder is not None:
            write_hidden_states(self.npy_folder, window, hidden_states)
        if self.h5 is not None:
            self.h5.write(window, int(self.first_rows[window]), hidden_states)


class WindowWriter:
    """Writes the files of scored windows; the texts of tokens are looked up once per distinct token."""

    def __init__(
        self, folder: Path, tokenizer: "PreTrainedTokenizerBase", n_token_ids: int, sinks: Sinks | None = None
    ) -> None:
        self._folder, self._tokenizer, self._sinks = folder, tokenizer, sinks or Sinks(folder)
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
                self._sinks.write(window, scores.hidden_states[row])
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
    """What a run found out: each window's negative log-likelihood (N,) in nats, 0 for those of other ranks; the windows
    and tokens that it computed, in which time."""

    nll: np.ndarray
    n_windows: int
    n_computed: int
    seconds: float

    @staticmethod
    def of_all(found: list["Extraction"]) -> "Extraction":
        """What all ranks found out together."""
        return Extraction(
            np.sum([one.nll for one in found], axis=0),
            sum(one.n_windows for one in found),
            sum(one.n_computed for one in found),
            max(one.seconds for one in found),
        )

    def results(self, hidden_size: int, plan: WindowPlan) -> dict[str, Any]:
        """What the stage's manifest says of its output, the same however many runs or processes it took."""
        n_scored = plan.n_tokens - plan.n_windows  # the first token of a window has nothing before it
        return {
            "n_passages": plan.n_passages,
            "n_short_passages": plan.n_short_passages,
            "n_windows": plan.n_windows,
            "n_tokens": plan.n_tokens,
            "hidden_size": hidden_size,
            "windows_fingerprint": plan.fingerprint,
            "perplexity": math.exp(self.nll.sum() / n_scored) if n_scored else None,
        }


def read_extracted(plan: WindowPlan, folder: Path, windows: np.ndarray, *, show_bar: bool) -> Extraction:
    """What the files of an earlier run say of these windows; raises InputError where one is damaged or of another text."""
    nll = np.zeros(plan.n_windows)
    nll[windows] = read_nll(plan, folder, windows, show_bar=show_bar)
    return Extraction(nll, 0, 0, 0.0)


def extract(
    lm: CausalLM,
    writer: WindowWriter,
    plan: WindowPlan,
    batches: list[np.ndarray],
    hidden_dtype: np.dtype | None,
    show: Callable[[int], object],
) -> Extraction:
    """Score these batches of the plan and write their files.

    hidden_dtype None: no hidden states are written. show: told how many tokens each batch had, once the model has read
    them. Raises InputError where a file cannot be written or the model computes NaN.
    """
    computed = np.concatenate([np.zeros(0, dtype=np.int64), *batches])
    LOGGER.debug("%s of %s windows are to be read by %s", len(computed), plan.n_windows, lm.name)
    nll = np.zeros(plan.n_windows)
    start = time.perf_counter()
    nll[computed] = np.concatenate([np.zeros(0), *_run_batches(lm, writer, plan, batches, hidden_dtype, show)])
    return Extraction(nll, len(computed), int(plan.lengths[computed].sum()), time.perf_counter() - start)


def _run_batches(
    lm: CausalLM,
    writer: WindowWriter,
    plan: WindowPlan,
    batches: list[np.ndarray],
    hidden_dtype: np.dtype | None,
    show: Callable[[int], object],
) -> Iterator[np.ndarray]:
    """Each batch's negative log-likelihoods, once its files are written: in a thread, while the model goes on."""
    pending: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            for windows in batches:
                token_ids = plan.batch_token_ids(windows)
                try:
                    scores = begin_scoring(lm, token_ids, hidden_dtype)
                except torch.OutOfMemoryError as error:
                    raise _too_large(lm, token_ids) from error
                pending.append(thread.submit(_write, writer, windows, token_ids, scores))
                show(token_ids.size)
                if len(pending) > MAX_PENDING_BATCHES:
                    yield pending.popleft().result()  # raises here what the writer raised
            while pending:
                yield pending.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


def _write(writer: WindowWriter, windows: np.ndarray, token_ids: np.ndarray, scores: PendingScores) -> np.ndarray:
    return writer.write(windows, token_ids, scores.get())
