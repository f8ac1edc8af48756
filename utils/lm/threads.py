"""How many threads torch computes with on a CPU: on cores that other work keeps busy, one is faster than several."""

import logging
import os
import time
from statistics import median

import torch

from utils.lm.model import CausalLM

LOGGER = logging.getLogger(__name__)
N_ROUNDS = 3


def use_threads(lm: CausalLM, n_threads: int | None, earlier: int | None, n_tokens: int) -> int:
    """Set how many threads torch computes with, and return it.

    n_threads: what the user wants. earlier: those of a run that this one continues, whose bytes may depend on them; no
    more than torch's default here. Where neither is given: torch's default, or one where a pass over `n_tokens` tokens
    on the CPU is faster so; not timed where OMP_NUM_THREADS is set, as torchrun does.
    """
    default = torch.get_num_threads()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    elif earlier is not None:
        torch.set_num_threads(min(earlier, default))
    elif lm.device.type == "cpu" and default > 1 and "OMP_NUM_THREADS" not in os.environ:
        with_default, with_one = _time_passes(lm, n_tokens, (default, 1))
        torch.set_num_threads(1 if with_one < with_default else default)
        if with_one < with_default:
            times = f"{with_default * 1e3:.3g} ms with {default} threads and {with_one * 1e3:.3g} ms with one"
            LOGGER.warning("a forward pass takes %s, so one computes; --threads %d decides otherwise", times, default)
    return torch.get_num_threads()


def _time_passes(lm: CausalLM, n_tokens: int, candidates: tuple[int, ...]) -> list[float]:
    """Seconds of a forward pass with each number of threads: the median of a few, taken in turns after one to warm up."""
    token_ids = torch.zeros(1, n_tokens, dtype=torch.int64)
    seconds: dict[int, list[float]] = {n: [] for n in candidates}
    with torch.inference_mode():
        for _ in range(N_ROUNDS + 1):
            for n in candidates:
                torch.set_num_threads(n)
                start = time.perf_counter()
                lm.forward(token_ids)
                seconds[n].append(time.perf_counter() - start)
    return [median(seconds[n][1:]) for n in candidates]
