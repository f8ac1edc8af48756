"""Shares of stage 2's work: which windows this process computes, as the only one, a rank of several or a shard.

The windows are planned, and put into batches, by the text and the flags alone. Ranks and shards are given whole batches
of that plan, so that what they write together is what one process writes.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.extraction_job import N_PLACES, Earlier, Job, alone_for_a_moment
from utils.extraction_output import keeps_hidden_states, windows_to_do
from utils.files import InputError
from utils.hidden_states import UnfinishedH5, h5_is_whole
from utils.progress import ProgressBar
from utils.ranks import Ranks
from utils.windows import WindowPlan, place_batches, plan_batches, share_of

if TYPE_CHECKING:
    from utils.extraction import Extraction, Sinks
    from utils.models import CausalLM


@dataclass(frozen=True)
class Outcome:
    """What a run, all its ranks together, made of the windows."""

    results: dict[str, Any]  # the stage's; empty for a shard, and for all ranks but the first
    n_windows: int = 0  # computed
    speed: str = ""  # how fast, in words


def extract_missing(job: Job, plan: WindowPlan, earlier: Earlier, ranks: Ranks) -> Outcome:
    """Compute the windows of this process's share that lack something.

    Raises InputError where the output is of another text, a window lacks something with --merge_only, or as `extract`.
    """
    _require_same_windows(job, plan, earlier, ranks)
    to_do = ranks.share(
        "to_do", lambda: windows_to_do(job.files, plan.lengths, earlier.hidden_size, earlier.results, job.wanted)
    )
    if job.args.merge_only and to_do.any():
        raise InputError(_what_is_missing(job, plan, earlier, to_do))
    if earlier.results and not to_do.any():
        return Outcome(earlier.results | job.mark(plan) if ranks.is_first else {})
    args, batch_size = job.args, job.arguments["batch_size"]
    if args.shard is not None and batch_size and not _batches_to_do(job, plan, batch_size, to_do):
        return Outcome({})
    if not to_do.any() and earlier.hidden_size is not None:
        found = _share_and_extract(job, plan, [], None, earlier, ranks)
        return _outcome(job, plan, found, earlier.hidden_size, job.mark(plan) if ranks.is_first else {}, "")
    from utils.models import load_lm

    device = ranks.device(args.device) if args.device_map is None else args.device
    lm = load_lm(args.model_path, device, args.dtype, args.cache_dir, args.device_map)
    with alone_for_a_moment(args, ranks):
        settled = ranks.share("settled", lambda: job.settle(lm, plan))
    batches = _batches_to_do(job, plan, settled.batch_size, to_do)
    found = _share_and_extract(job, plan, batches, lm, earlier, ranks)
    where = f"{str(lm.dtype).removeprefix('torch.')} on {lm.device}"
    where += f", {ranks.n_ranks} processes" if ranks.n_ranks > 1 else ""
    return _outcome(job, plan, found, lm.hidden_size, settled.marked, where)


def _require_same_windows(job: Job, plan: WindowPlan, earlier: Earlier, ranks: Ranks) -> None:
    why = "the tokenizer cuts the text otherwise than {}, perhaps another version of its library"
    if earlier.results and earlier.results["windows_fingerprint"] != plan.fingerprint:
        got = why.format("in the run before")
        raise InputError(f"{job.manifest_path}: {got}; use another folder or delete the output")
    if ranks.share("windows", lambda: plan.fingerprint) != plan.fingerprint:
        raise InputError(f"rank {ranks.rank}: {why.format('on rank 0')}; install the same on all machines")


def _batches_to_do(job: Job, plan: WindowPlan, batch_size: int, to_do: np.ndarray) -> list[np.ndarray]:
    """The batches of all ranks, or of this shard, in which a window lacks something."""
    batches = plan_batches(plan.lengths, batch_size)
    if job.args.shard is not None:
        # Of all the work, whatever is done of it: shards start at different times.
        batches = _within(batches, plan, share_of(job.args.shard, job.args.num_shards, N_PLACES))
    return [windows for windows in batches if to_do[windows].any()]


def _within(batches: list[np.ndarray], plan: WindowPlan, places: range) -> list[np.ndarray]:
    where = place_batches(plan.lengths, batches, N_PLACES)
    return [windows for windows, place in zip(batches, where.tolist(), strict=True) if place in places]


def _share_and_extract(
    job: Job, plan: WindowPlan, batches: list[np.ndarray], lm: "CausalLM | None", earlier: Earlier, ranks: Ranks
) -> "list[Extraction]":
    """Compute this rank's share of the batches, and read its share of what is there; what all found, for the first."""
    from utils.extraction import WindowWriter, extract, read_extracted

    folder, n_tokens = job.files.folder, sum(int(plan.lengths[windows].sum()) for windows in batches)
    found = []
    if job.args.shard is None:
        others = np.setdiff1d(np.arange(plan.n_windows), np.concatenate([np.zeros(0, dtype=np.int64), *batches]))
        found.append(read_extracted(plan, folder, others[ranks.rank :: ranks.n_ranks], show_bar=ranks.is_first))
    if lm is not None:
        mine = _within(batches, plan, share_of(ranks.rank, ranks.n_ranks, N_PLACES))
        with ExitStack() as stack:
            bar = ProgressBar(
                total=n_tokens,
                desc="extracting",
                unit="tok",
                unit_scale=True,
                disable=not ranks.is_first or not batches,
            )
            stack.enter_context(bar)
            sinks = _sinks(job, plan, lm, earlier, stack)
            writer = WindowWriter(folder, job.tokenizer, plan.largest_id + 1, sinks)

            def show(n_more: int) -> None:
                bar.update(ranks.add("tokens", n_more) - bar.n)

            found.append(extract(lm, writer, plan, mine, job.wanted.dtype if sinks.takes_any else None, show))
            return _gathered(ranks, found, lambda: show(0))
    return _gathered(ranks, found, lambda: None)


def _gathered(ranks: Ranks, found: "list[Extraction]", meanwhile: Callable[[], object]) -> "list[Extraction]":
    from utils.extraction import Extraction

    return ranks.gather("found", Extraction.of_all(found), meanwhile)


def _sinks(job: Job, plan: WindowPlan, lm: "CausalLM", earlier: Earlier, stack: ExitStack) -> "Sinks":
    """Where hidden states go; what is opened for that is closed with the stack."""
    from utils.extraction import Sinks

    keeps_npy = keeps_hidden_states(job.files, earlier.results, job.wanted)
    shape = job.shape(plan, lm.hidden_size)
    h5 = None
    if job.wanted.memmap and not h5_is_whole(job.files, shape):
        h5 = stack.enter_context(UnfinishedH5(job.files, shape))
    return Sinks(job.files.folder if keeps_npy else None, h5, np.cumsum(plan.lengths) - plan.lengths)


def _outcome(
    job: Job, plan: WindowPlan, found: "list[Extraction]", hidden_size: int, marked: dict[str, Any], where: str
) -> Outcome:
    """where: what computed, in words."""
    from utils.extraction import Extraction

    if not found:
        return Outcome({})
    total = Extraction.of_all(found)
    speed = f", {total.n_computed / total.seconds:,.0f} tokens/s ({where})" if total.n_computed else ""
    results = total.results(hidden_size, plan) | marked if job.args.shard is None else {}
    return Outcome(results, total.n_windows, speed)


def _what_is_missing(job: Job, plan: WindowPlan, earlier: Earlier, to_do: np.ndarray) -> str:
    """What --merge_only lacks, in words."""
    counts = f"{int(to_do.sum()):,} of {plan.n_windows:,} windows are not there yet"
    n_shards, batch_size = job.args.num_shards or earlier.n_shards, job.arguments["batch_size"]
    if not n_shards or not batch_size:
        return f"{job.files.folder}: {counts}; run the shards first, with the same flags"
    batches = plan_batches(plan.lengths, batch_size)
    places = place_batches(plan.lengths, batches, N_PLACES)
    lacking = [place for windows, place in zip(batches, places.tolist(), strict=True) if to_do[windows].any()]
    shards = [i for i in range(n_shards) if any(place in share_of(i, n_shards, N_PLACES) for place in lacking)]
    names = ", ".join(map(str, shards))
    return f"{job.files.folder}: {counts}; run --shard {names} of --num_shards {n_shards} first, with the same flags"
