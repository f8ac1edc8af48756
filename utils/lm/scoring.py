"""Scoring: log p of each token of a text under the LM, with the hidden states that gave it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.files import InputError
from utils.lm.model import CausalLM

LOGGER = logging.getLogger(__name__)
# Logits are made float32 for so many values at a time. On a CPU 1 MiB, which stays in the cache: three times as fast as
# 64 MiB for 8 windows of a small model (benchmarks/extraction_speed.py). On a GPU enough to keep it busy.
SLICE_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}
# Tokens of one forward pass without a --batch_size. A CPU gains nothing by more; on a GPU it is a start, halved until
# it fits.
CPU_BATCH_TOKENS = 1 << 11
GPU_BATCH_TOKENS = 1 << 15


def log_probs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of the targets under the logits, natural log, at most 0: (B, L) float32.

    logits (B, L, V) of any dtype, targets (B, L) int64. Batch times length times vocabulary is by far the largest array
    of a forward pass, so its float32 copy exists for a few positions at a time only.
    """
    n_windows, n_positions, n_vocabulary = logits.shape
    log_probs = torch.zeros((n_windows, n_positions), device=logits.device)
    step = max(SLICE_VALUES.get(logits.device.type, SLICE_VALUES["cpu"]) // (n_windows * n_vocabulary), 1)
    for first in range(0, n_positions, step):
        positions = slice(first, min(first + step, n_positions))
        part = logits[:, positions].float()  # (B, S, V)
        of_targets = part.gather(2, targets[:, positions, None]).squeeze(2)  # (B, S)
        # Rounding can lift a certain token a little above probability 1.
        log_probs[:, positions] = (of_targets - part.logsumexp(dim=2)).clamp(max=0)
    return log_probs


@torch.inference_mode()
def negative_log_likelihood(lm: CausalLM, prompt_ids: list[int], new_token_ids: list[int]) -> float:
    """-log p(new tokens | prompt) in nats, by one pass over the whole text; the prompt must hold a token."""
    token_ids = torch.tensor([prompt_ids + new_token_ids], device=lm.device)
    _, logits = lm.forward(token_ids[:, :-1], logits_to_keep=len(new_token_ids))
    return -float(log_probs_of(logits, token_ids[:, -len(new_token_ids) :]).double().sum())


# ---- Windows


@dataclass(frozen=True)
class WindowScores:
    """What the LM gave to the windows of one batch, on the host but for the logits."""

    log_probs: np.ndarray  # (B, L) float32, natural log, the first column 0
    hidden_states: np.ndarray | None  # (B, L, D) float32 or float16; None: not wanted
    is_finite: np.ndarray  # (B,) bool: neither NaN nor infinity in the model's hidden states
    logits: Tensor | None = None  # (B, L, V), on the model's device; None: not wanted


def relative_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """(N, K) float32, at most 0: log of the probability of K tokens for each row, relative to the row's likeliest token.

    logits (N, V) of any float dtype, token_ids (N, K) int64 on the same device.
    """
    return logits.gather(1, token_ids).float() - logits.amax(dim=1, keepdim=True).float()


def relative_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """(N, K) float32 in [0, 1]: the same without the logarithm."""
    return relative_log_probs(logits, token_ids).exp()


class PendingScores:
    """Scores that a GPU may still be computing, on their way to the host."""

    def __init__(
        self, log_probs: Tensor, hidden_states: Tensor | None, is_finite: Tensor, logits: Tensor | None = None
    ) -> None:
        tensors = (log_probs, hidden_states, is_finite)
        self._logits = logits  # stay on the device
        # From a GPU this goes into pinned memory, behind the kernels, and returns at once.
        self._tensors = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]
        devices = {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def get(self) -> WindowScores:
        """Wait for them; may be called from any thread."""
        for event in self._copied:
            event.synchronize()
        log_probs, hidden_states, is_finite = (None if x is None else x.numpy() for x in self._tensors)
        assert log_probs is not None
        assert is_finite is not None
        return WindowScores(log_probs, hidden_states, is_finite, self._logits)


def score_windows(
    lm: CausalLM,
    token_ids: np.ndarray,
    hidden_dtype: np.dtype | None = None,
    prefix_ids: Sequence[int] = (),
    keep_logits: bool = False,
) -> WindowScores:
    """One forward pass over equally long windows; token_ids (B, L) integer. hidden_dtype None: no hidden states.

    prefix_ids: read before each window, such as BOS; nothing of theirs is returned. Raises InputError where the device
    has too little memory.
    """
    return start_scoring(lm, token_ids, hidden_dtype, prefix_ids, keep_logits).get()


def start_scoring(
    lm: CausalLM,
    token_ids: np.ndarray,
    hidden_dtype: np.dtype | None = None,
    prefix_ids: Sequence[int] = (),
    keep_logits: bool = False,
) -> PendingScores:
    """As `score_windows`, without waiting for a GPU."""
    try:
        return _start(lm, token_ids, hidden_dtype, prefix_ids, keep_logits)
    except torch.OutOfMemoryError as error:
        raise _too_large(lm, *token_ids.shape) from error


@torch.inference_mode()
def _start(
    lm: CausalLM,
    token_ids: np.ndarray,
    hidden_dtype: np.dtype | None,
    prefix_ids: Sequence[int] = (),
    keep_logits: bool = False,
) -> PendingScores:
    prefix = np.tile(np.array(prefix_ids, dtype=np.int64), (len(token_ids), 1))  # (B, number of prefix ids)
    ids = torch.from_numpy(np.concatenate([prefix, token_ids.astype(np.int64)], axis=1))
    if lm.device.type == "cuda":
        ids = ids.pin_memory().to(lm.device, non_blocking=True)  # from other memory it would wait for all before it
    hidden_states, logits = (found[:, len(prefix_ids) :] for found in lm.forward(ids))
    ids = ids[:, len(prefix_ids) :]
    log_probs = torch.zeros(ids.shape, device=logits.device)
    log_probs[:, 1:] = log_probs_of(logits[:, :-1], ids[:, 1:].to(logits.device))
    is_finite = hidden_states.isfinite().flatten(1).all(dim=1)
    kept = None if hidden_dtype is None else hidden_states.to(getattr(torch, hidden_dtype.name))
    return PendingScores(log_probs, kept, is_finite, logits if keep_logits else None)


def require_finite(window: int, row: int, scores: WindowScores) -> None:
    """Raise InputError where the model computed NaN or infinity for a window, or its dtype on disk overflows."""
    if not scores.is_finite[row] or np.isnan(scores.log_probs[row]).any():
        raise InputError(f"window {window}: the model computed NaN or infinity; use another --dtype, such as float32")
    if scores.hidden_states is not None and not np.isfinite(scores.hidden_states[row]).all():
        reach = f"exceeds the {np.finfo(scores.hidden_states.dtype).max:.0f} that {scores.hidden_states.dtype} holds"
        raise InputError(f"window {window}: a hidden state {reach}; use --hidden_dtype float32")


# ---- The size of a batch


def find_batch_size(lm: CausalLM, n_tokens: int) -> int:
    """How many windows of `n_tokens` tokens to read in one forward pass; on a GPU as many as fit, halved until they do.

    Raises InputError where not even one does.
    """
    if lm.device.type == "cpu":
        return max(CPU_BATCH_TOKENS // n_tokens, 1)
    return largest_that_fits(lm, max(GPU_BATCH_TOKENS // n_tokens, 1), n_tokens)


def largest_that_fits(lm: CausalLM, n_windows: int, n_tokens: int) -> int:
    """`n_windows`, halved until the device has the memory for forward passes over so many windows."""
    while True:
        token_ids = np.zeros((n_windows, n_tokens), dtype=np.int64)
        try:
            # Two at a time, as in a run: the results of one are still there while the next is computed.
            for pending in [_start(lm, token_ids, np.dtype(np.float32)) for _ in range(2)]:
                pending.get()
        except torch.OutOfMemoryError as error:
            if n_windows == 1:
                raise _too_large(lm, *token_ids.shape) from error
        else:
            return n_windows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        LOGGER.warning(
            "%d windows of %d tokens do not fit into %s; reading %d at a time",
            *(n_windows, n_tokens, lm.device, n_windows // 2),
        )
        n_windows //= 2


def _too_large(lm: CausalLM, n_windows: int, n_tokens: int) -> InputError:
    message = f"{lm.name}: {n_windows} windows of {n_tokens} tokens do not fit into the memory of {lm.device}"
    return InputError(f"{message}; give a smaller --batch_size, or let no other program use it")
