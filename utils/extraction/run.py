"""A run of stage 2: plan the windows of a text, let the LM score those that are left, write what it gives to each token.

The windows are planned, and put into batches, from the text and the flags alone. Ranks and shards are given whole
batches of that plan; a batch is skipped where the files of all its windows are there, else computed as a whole. So what
several processes write together, or several runs one after the other, is what one undisturbed process writes.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.extraction.distributed import Ranks
from utils.extraction.hidden_states import (
    HiddenStateShape,
    PartialH5,
    hidden_states_path,
    windows_with_hidden_states,
    write_dat,
    write_hidden_states,
    write_index_maps,
)
from utils.extraction.state import ExtractionFiles, ExtractionState, RequestedOutputs
from utils.extraction.token_probs import STAGE, read_token_probs, token_probs_path, write_token_probs
from utils.files import InputError, exclusive_lock, file_fingerprint, make_folder
from utils.lm.fingerprint import model_fingerprint, tokenizer_fingerprint
from utils.lm.model import (
    CausalLM,
    dtype_name,
    load_config,
    load_lm,
    load_tokenizer,
    pick_device,
    require_known_ids,
    require_windows_fit,
)
from utils.lm.scoring import PendingScores, WindowScores, find_batch_size, require_finite, start_scoring
from utils.lm.threads import use_threads
from utils.manifest import (
    Manifest,
    begin_stage,
    finish_stage,
    list_files,
    read_manifest,
    require_as_written,
    require_untouched,
    save_manifest,
)
from utils.progress import ProgressBar
from utils.text.corpora import read_passages, split_path
from utils.text.expert_spans import write_expert_spans
from utils.text.prompts import added_tokens
from utils.text.windows import WindowPlan, WindowShape, load_plan, plan_batches, plan_windows, save_plan

LOGGER = logging.getLogger(__name__)
# Batches that may wait for the writer, in memory; more would not help a disk that is slower than the model.
MAX_PENDING_BATCHES = 4
# The work is cut into so many places, of which each rank or shard takes a range: shares differ by a batch at most.
N_PLACES = 1 << 40
# Keys of an unfinished run's results, for the runs that continue it.
HIDDEN_SIZE, N_SHARDS, N_THREADS = "hidden_size", "num_shards", "threads"


@dataclass(frozen=True)
class ExtractionSettings:
    """What a run of stage 2 is asked for: the script's flags."""

    model_path: str
    cache_dir: Path | None
    device: str
    dtype: str
    n_threads: int | None  # None: that of an earlier run, else what is fastest
    device_map: str | None
    data_dir: Path
    partition: str
    output_dir: Path
    windows: WindowShape
    batch_size: int | None  # None: that of an earlier run, else found
    requested: RequestedOutputs
    discard_intermediates: bool
    shard: int | None  # None: all windows
    num_shards: int | None
    merge_only: bool


@dataclass(frozen=True)
class PreviousRun:
    """What earlier runs left. results: of one that finished, else empty; the others: noted by one that did not."""

    results: dict[str, Any] = field(default_factory=dict)
    hidden_size: int | None = None
    n_shards: int | None = None
    n_threads: int | None = None
    batch_size: int | None = None
    is_complete: bool = False  # all that is asked for is there


@dataclass(frozen=True)
class RunPlan:
    """What all ranks must agree on before they begin: the windows of a batch, torch's threads, and the results about expert spans."""

    batch_size: int
    n_threads: int | None  # None: nothing is computed
    span_results: dict[str, Any]


@dataclass(frozen=True)
class Computed:
    """What a rank found out: each window's negative log-likelihood (N,) in nats, 0 for other ranks' windows; how many
    windows and tokens it computed, in which time."""

    nll: np.ndarray
    n_windows: int = 0
    n_tokens: int = 0
    seconds: float = 0.0

    @staticmethod
    def total(parts: list["Computed"]) -> "Computed":
        return Computed(
            np.sum([part.nll for part in parts], axis=0),
            sum(part.n_windows for part in parts),
            sum(part.n_tokens for part in parts),
            max(part.seconds for part in parts),
        )


@dataclass(frozen=True)
class Outcome:
    """What came of a run, all ranks together. results: those of the manifest; empty for a shard and for ranks but 0."""

    results: dict[str, Any]
    n_windows: int = 0  # computed
    speed: str = ""  # in words
    was_complete: bool = False  # before the run


def run_extraction(settings: ExtractionSettings, ranks: Ranks) -> Outcome:
    """Do what the settings ask for, as far as it is left; raises InputError where they or what is there do not allow it."""
    with ExitStack() as stack:
        return _Run(settings, ranks).run(stack)


class _Run:
    """One run as one of its ranks sees it. What rank 0 finds out for all is in methods that `broadcast` calls."""

    def __init__(self, settings: ExtractionSettings, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self.files = ExtractionFiles(settings.output_dir, settings.partition)

    def run(self, stack: ExitStack) -> Outcome:
        previous = self.ranks.broadcast(lambda: self._read_previous(stack))
        if previous.is_complete:
            return Outcome(self._conclude(previous.results) if self.ranks.is_first else {}, was_complete=True)
        plan = self._plan()
        is_left = self.ranks.broadcast(lambda: self._windows_left(plan, previous))
        lm, run_plan = self._prepare(plan, previous, is_left)
        batches = self._batches_left(plan, run_plan.batch_size, is_left) if lm else []
        found = self.ranks.gather(self._compute(lm, plan, batches, previous))
        if not found:
            return Outcome({})
        total, speed = Computed.total(found), ""
        if lm and total.n_tokens:
            processes = f", {self.ranks.n_ranks} processes" if self.ranks.n_ranks > 1 else ""
            speed = f", {total.n_tokens / total.seconds:,.0f} tokens/s ({dtype_name(lm)} on {lm.device}{processes})"
        results: dict[str, Any] = {}
        if self.settings.shard is None:
            hidden_size = lm.hidden_size if lm else previous.hidden_size
            results = previous.results or _results(plan, total.nll, hidden_size)
            if run_plan.n_threads:
                results = {N_THREADS: run_plan.n_threads} | results
            results = self._conclude(results | run_plan.span_results, plan)
        return Outcome(results, total.n_windows, speed)

    # ---- What is there

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.model_path, self.settings.cache_dir)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The flags that decide the output's bytes; not those that say which outputs to make, of which there may be more."""
        windows = self.settings.windows
        return {
            "partition": self.settings.partition,
            "chunk_size": windows.chunk_size,
            "stride": windows.stride,
            "min_length": windows.min_length,
            "batch_size": self.settings.batch_size,
            "dtype": self.settings.dtype,
            "hidden_dtype": self.settings.requested.dtype.name,
            "device": pick_device(self.settings.device).type,
        } | ({"no_bos": not windows.with_bos} if added_tokens(self.tokenizer)[0] else {})

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the output is made from."""
        return {
            "text": file_fingerprint(self._text_path),
            "model": model_fingerprint(self.settings.model_path, self.settings.cache_dir),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    @property
    def _text_path(self) -> Path:
        return split_path(self.settings.data_dir, self.settings.partition)

    def _read_previous(self, stack: ExitStack) -> PreviousRun:
        """Lock the output, and read what earlier runs left; the lock ends with the stack.

        Raises InputError where the text, the model or the output folder cannot be used, another run writes the same
        windows, or earlier runs had other flags or inputs.
        """
        settings = self.settings
        self._passages = read_passages(self._text_path)
        make_folder(self.files.folder)
        # Other shards may run at the same time, another run of all windows may not.
        places = range(N_PLACES) if settings.shard is None else _share(settings.shard, settings.num_shards)
        stack.enter_context(exclusive_lock(settings.output_dir, f"{settings.partition}_extraction", items=places))
        self._config = load_config(settings.model_path, settings.cache_dir)
        n_prefix = len(added_tokens(self.tokenizer)[0]) if settings.windows.with_bos else 0
        require_windows_fit(self._config, settings.model_path, settings.windows.chunk_size, n_prefix)
        _ = self.inputs  # before any text is read
        state = ExtractionState(self.files, self.settings.requested)
        if not state.files_there and self.settings.shard is None:
            # A manifest that speaks for nothing is deleted, so that every flag may change. Not by a shard: another one
            # may have written it a moment ago.
            self.files.part.unlink(missing_ok=True)
            self.files.manifest.unlink(missing_ok=True)
            return PreviousRun()
        if not self.files.manifest.exists():
            if there := state.files_there + ([self.files.part] if self.files.part.exists() else []):
                message = f"{there[0]}: lies there without the manifest that says what it was made from"
                raise InputError(f"{message}; delete it or choose another folder")
            return PreviousRun()
        manifest = self._begin()
        require_untouched(self.files.manifest, manifest)
        results = manifest.results if manifest.complete else {}
        return PreviousRun(
            results,
            manifest.results.get(HIDDEN_SIZE),
            manifest.results.get(N_SHARDS),
            manifest.results.get(N_THREADS),
            self.arguments["batch_size"],
            state.is_complete(results),
        )

    def _begin(self) -> Manifest:
        """Write the manifest, or read the one that is there; raises InputError where that is of other flags or inputs."""
        if self.settings.batch_size is None and self.files.manifest.exists():
            # Without a --batch_size it is that of the earlier runs, however these found it.
            self.arguments["batch_size"] = read_manifest(self.files.manifest, STAGE).arguments.get("batch_size")
        return begin_stage(self.files.manifest, STAGE, self.arguments, self.inputs)

    def _windows_left(self, plan: WindowPlan, previous: PreviousRun) -> np.ndarray:
        """(N,) bool: the windows that are to be computed; raises InputError where there are any with --merge_only."""
        state = ExtractionState(self.files, self.settings.requested)
        is_left = state.windows_left(plan.lengths, previous.hidden_size, previous.results)
        if self.settings.merge_only and is_left.any():
            raise InputError(self._describe_missing(plan, previous, is_left))
        return is_left

    # ---- The plan

    def _plan(self) -> WindowPlan:
        """The windows of the text, which rank 0, or the first shard that comes here, tokenises for all."""
        made_from = self.ranks.broadcast(self._make_plan)
        plan = load_plan(self.files.plan, made_from)
        if plan is None:
            raise InputError(f"{self.files.plan}: is damaged or cannot be read here; delete it and run again")
        return plan

    def _make_plan(self) -> dict[str, Any]:
        """Make the plan where it is not there yet; returns what it is made from. Raises InputError for unusable text."""
        made_from = {name: self.arguments[name] for name in ("chunk_size", "stride", "min_length")}
        made_from |= {name: self.inputs[name] for name in ("text", "tokenizer")} | {
            "with_bos": self.settings.windows.with_bos
        }
        with exclusive_lock(self.files.output_dir, f"{self.files.partition}_plan", wait=True):
            plan = load_plan(self.files.plan, made_from)
            if plan is None:
                n_bytes = self._text_path.stat().st_size
                plan = plan_windows(
                    self._passages, self.tokenizer, self.settings.windows, self.files.output_dir, n_bytes
                )
                save_plan(self.files.plan, plan, made_from)
        require_known_ids(self._config, self.settings.model_path, plan.largest_id)
        self._require_same_windows(plan)
        return made_from

    def _require_same_windows(self, plan: WindowPlan) -> None:
        if not self.files.manifest.exists():
            return
        known = read_manifest(self.files.manifest, STAGE).results.get("windows_fingerprint", plan.fingerprint)
        if known != plan.fingerprint:
            got = "the tokenizer cuts the text otherwise than in the run before, perhaps another version of its library"
            raise InputError(f"{self.files.manifest}: {got}; use another folder or delete the output")

    def _prepare(self, plan: WindowPlan, previous: PreviousRun, is_left: np.ndarray) -> tuple[CausalLM | None, RunPlan]:
        """The LM, None where this process has nothing to compute, and what the ranks agree on."""
        settings, batch_size = self.settings, previous.batch_size or self.settings.batch_size
        is_done = not is_left.any() and previous.hidden_size is not None
        if settings.shard is not None and batch_size and not self._batches_left(plan, batch_size, is_left):
            is_done = True
        if is_done:
            spans = self.ranks.broadcast(lambda: self._mark_spans(plan))
            return None, RunPlan(batch_size or 0, previous.n_threads, spans)
        device = self.ranks.device(settings.device) if settings.device_map is None else settings.device
        lm = load_lm(settings.model_path, device, settings.dtype, settings.cache_dir, settings.device_map)
        run_plan = self.ranks.broadcast(lambda: self._begin_computing(lm, plan))
        use_threads(lm, run_plan.n_threads, None, 1)
        return lm, run_plan

    def _begin_computing(self, lm: CausalLM, plan: WindowPlan) -> RunPlan:
        """Now that the model works: write the manifest, the expert spans, and the `.h5` without rows."""
        # Shards that start at the same time do this one after the other.
        with exclusive_lock(self.files.output_dir, f"{self.files.partition}_manifest", wait=True):
            n_tokens = int(plan.lengths.max()) + len(plan.prefix_ids)
            if self.arguments["batch_size"] is None and not self.files.manifest.exists():
                self.arguments["batch_size"] = find_batch_size(lm, n_tokens)
            manifest = self._begin()
            n_threads = use_threads(lm, self.settings.n_threads, manifest.results.get(N_THREADS), n_tokens)
            if not manifest.complete:
                known: dict[str, Any] = {HIDDEN_SIZE: lm.hidden_size, N_THREADS: n_threads}
                known |= {N_SHARDS: self.settings.num_shards} if self.settings.num_shards else {}
                save_manifest(self.files.manifest, replace(manifest, results=known))
            if self.settings.requested.memmap:
                shape = self._shape(plan, lm.hidden_size)
                if not ExtractionState(self.files, self.settings.requested).has_h5(shape):
                    PartialH5.begin(self.files.part, shape)
            return RunPlan(self.arguments["batch_size"], n_threads, self._mark_spans(plan))

    def _mark_spans(self, plan: WindowPlan) -> dict[str, Any]:
        """Write which tokens lie in expert spans; returns what the results say of them."""
        return write_expert_spans(self.files.folder, plan.expert_spans) | {"n_short_spans": plan.n_short_spans}

    def _shape(self, plan: WindowPlan, hidden_size: int) -> HiddenStateShape:
        return HiddenStateShape(plan.n_windows, plan.n_tokens, hidden_size, self.settings.requested.dtype)

    # ---- Shares of the work

    def _batches_left(self, plan: WindowPlan, batch_size: int, is_left: np.ndarray) -> list[np.ndarray]:
        """The batches of all ranks, or of this shard, in which a window is left."""
        batches = plan_batches(plan.lengths, batch_size)
        if self.settings.shard is not None:
            # A share of all work, whatever is done of it already: shards start at different times.
            batches = _within(plan, batches, _share(self.settings.shard, self.settings.num_shards))
        return [windows for windows in batches if is_left[windows].any()]

    def _describe_missing(self, plan: WindowPlan, previous: PreviousRun, is_left: np.ndarray) -> str:
        """What --merge_only lacks, in words."""
        counts = f"{int(is_left.sum()):,} of {plan.n_windows:,} windows are not there yet"
        n_shards, batch_size = self.settings.num_shards or previous.n_shards, self.arguments["batch_size"]
        if not n_shards or not batch_size:
            return f"{self.files.folder}: {counts}; run the shards first, with the same flags"
        batches = plan_batches(plan.lengths, batch_size)
        places = place_batches(plan.lengths, batches).tolist()
        missing = [place for windows, place in zip(batches, places, strict=True) if is_left[windows].any()]
        shards = [i for i in range(n_shards) if any(place in _share(i, n_shards) for place in missing)]
        names = ", ".join(map(str, shards))
        return (
            f"{self.files.folder}: {counts}; run --shard {names} of --num_shards {n_shards} first, with the same flags"
        )

    # ---- Computing

    def _compute(
        self, lm: CausalLM | None, plan: WindowPlan, batches: list[np.ndarray], previous: PreviousRun
    ) -> Computed:
        """Compute this rank's share of the batches, and read its share of the windows that are there already."""
        nll = np.zeros(plan.n_windows)
        if self.settings.shard is None and (lm is not None or not previous.results):
            # Of a finished run too: where one file was lost since, others may be damaged.
            others = np.setdiff1d(np.arange(plan.n_windows), np.concatenate([np.zeros(0, dtype=np.int64), *batches]))
            self._read_nll(plan, others[self.ranks.rank :: self.ranks.n_ranks], nll)
        if lm is None:
            return Computed(nll)
        own = _within(plan, batches, _share(self.ranks.rank, self.ranks.n_ranks))
        n_tokens = sum(int(plan.lengths[windows].sum()) for windows in own)
        name = f"extracting, rank 0 of {self.ranks.n_ranks}" if self.ranks.n_ranks > 1 else "extracting"
        is_shown = self.ranks.is_first and bool(own)
        started = time.perf_counter()
        with ExitStack() as stack:
            bar = ProgressBar(total=n_tokens, desc=name, unit="tok", unit_scale=True, disable=not is_shown)
            stack.enter_context(bar)
            writer = self._writer(lm, plan, previous, stack)
            for windows, of_windows in compute_batches(lm, writer, plan, own, bar):
                nll[windows] = of_windows
        return Computed(nll, sum(map(len, own)), n_tokens, time.perf_counter() - started)

    def _writer(self, lm: CausalLM, plan: WindowPlan, previous: PreviousRun, stack: ExitStack) -> "WindowWriter":
        """The writer of this run's files; what it opens is closed with the stack."""
        state, shape = ExtractionState(self.files, self.settings.requested), self._shape(plan, lm.hidden_size)
        h5 = None
        if self.settings.requested.memmap and not state.has_h5(shape):
            h5 = stack.enter_context(PartialH5(self.files.part, shape))
        npy_folder = self.files.folder if state.wants_hidden_states(previous.results) else None
        return WindowWriter(self.files.folder, self.tokenizer, plan, shape.dtype, npy_folder, h5)

    def _read_nll(self, plan: WindowPlan, windows: np.ndarray, nll: np.ndarray) -> None:
        """Fill in the negative log-likelihood of windows (M,) that an earlier run computed, from their files.

        Raises InputError where a file is damaged or holds other tokens than the plan.
        """
        self._require_unchanged([token_probs_path(self.files.folder, window) for window in windows.tolist()])
        is_shown = self.ranks.is_first and bool(len(windows))
        for window in ProgressBar(windows.tolist(), desc="reading what is there", unit="window", disable=not is_shown):
            _, token_ids, probabilities = read_token_probs(self.files.folder, window)
            if not np.array_equal(token_ids, plan.token_ids(window)):
                path = token_probs_path(self.files.folder, window)
                raise InputError(
                    f"{path}: holds other tokens than window {window} of the text; delete it and run again"
                )
            nll[window] = window_nll(probabilities, int(plan.first_counted[window]))

    def _require_unchanged(self, paths: list[Path]) -> None:
        """Raise InputError where a file of a finished run, which is about to be read again, was changed since."""
        manifest = read_manifest(self.files.manifest, STAGE)
        require_as_written(self.files.manifest, manifest, paths, verify=True)

    # ---- The end

    def _conclude(self, results: dict[str, Any], plan: WindowPlan | None = None) -> dict[str, Any]:
        """Complete the output from the windows' files and mark it as whole; returns the results with what there is.

        plan: None where all that is asked for was there before.
        """
        requested, discards = self.settings.requested, self.settings.discard_intermediates
        if plan is not None:
            self._complete_memmap(plan, self._shape(plan, results["hidden_size"]))
        state = ExtractionState(self.files, requested)
        outputs = state.whole_outputs(results)
        discards &= "memmap" in outputs
        if discards:
            # Noted before they are deleted: from here on the .h5 stands for them, also where the deletion is cut off.
            outputs = [name for name in outputs if name != "hidden_states"]
        results = results | {"outputs": outputs}
        listed = list_files(self.files.manifest, state.listed_files(outputs))
        finish_stage(self.files.manifest, self._begin(), results, listed)
        if discards:
            for window in windows_with_hidden_states(self.files.folder):
                hidden_states_path(self.files.folder, window).unlink(missing_ok=True)
            self.files.dat.unlink(missing_ok=True)
        self.files.plan.unlink(missing_ok=True)
        return results

    def _complete_memmap(self, plan: WindowPlan, shape: HiddenStateShape) -> None:
        """Make what is missing of the `.h5`, its maps and the `.dat`, in bounded memory."""
        requested = self.settings.requested
        state = ExtractionState(self.files, requested)
        if requested.memmap:
            if not state.has_h5(shape):
                PartialH5.begin(self.files.part, shape)
                with PartialH5(self.files.part, shape) as part:
                    missing = np.flatnonzero(~part.has_rows()).tolist()
                    self._require_unchanged([hidden_states_path(self.files.folder, window) for window in missing])
                    part.copy_rows(missing, self.files.folder, plan.lengths)
                    part.finish()
            if not state.has_index_maps(shape):
                write_index_maps(self.files.index_to_seqlen, self.files.index_to_acc_index, plan.lengths)
            if requested.dat and not state.has_dat(shape):
                write_dat(self.files.h5, self.files.dat)
        self.files.part.unlink(missing_ok=True)  # of a run that was asked for the .h5, or of a time without it


def _results(plan: WindowPlan, nll: np.ndarray, hidden_size: int | None) -> dict[str, Any]:
    """What the manifest says of the output, the same however many runs or processes it took. nll (N,) of each window."""
    n_scored = int((plan.lengths - plan.first_counted).sum())
    return {
        "n_passages": plan.n_passages,
        "n_short_passages": plan.n_short_passages,
        "n_windows": plan.n_windows,
        "n_tokens": plan.n_tokens,
        "hidden_size": hidden_size,
        "windows_fingerprint": plan.fingerprint,
        "perplexity": math.exp(nll.sum() / n_scored) if n_scored else None,
    }


# ---- Shares


def _share(rank: int, n_ranks: int | None) -> range:
    """The places of one of several equal shares."""
    assert n_ranks
    return range(rank * N_PLACES // n_ranks, (rank + 1) * N_PLACES // n_ranks)


def _within(plan: WindowPlan, batches: list[np.ndarray], places: range) -> list[np.ndarray]:
    where = place_batches(plan.lengths, batches).tolist()
    return [windows for windows, place in zip(batches, where, strict=True) if place in places]


def place_batches(lengths: np.ndarray, batches: list[np.ndarray]) -> np.ndarray:
    """(number of batches,) int64, ascending, in [0, N_PLACES): where the middle token of each batch is among all tokens.

    lengths (N,) of the windows. Whoever takes the batches of a range of places has that share of the tokens, but for
    one batch; and ranges that do not overlap have no batch in common.
    """
    sizes = np.array([int(lengths[windows].sum()) for windows in batches], dtype=np.int64)
    middles = np.cumsum(sizes) - sizes // 2 - 1
    # In Python's own numbers: places times tokens is beyond int64.
    total = int(sizes.sum())
    return np.array([int(middle) * N_PLACES // total for middle in middles.tolist()], dtype=np.int64)


# ---- The LM and the writer


def compute_batches(
    lm: CausalLM, writer: "WindowWriter", plan: WindowPlan, batches: list[np.ndarray], bar: ProgressBar
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Score batches of windows; yields each, with its windows' negative log-likelihoods, once its files are written.

    A thread writes while the model goes on. Raises InputError where a file cannot be written or the model computes NaN.
    """
    LOGGER.debug("%s of %s windows are to be read by %s", sum(map(len, batches)), plan.n_windows, lm.name)
    pending: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            for windows in batches:
                token_ids = plan.batch_token_ids(windows)
                scores = start_scoring(lm, token_ids, writer.hidden_dtype, plan.prefix_ids)
                pending.append((windows, thread.submit(writer.write, windows, token_ids, scores)))
                bar.update(token_ids.size)
                if len(pending) > MAX_PENDING_BATCHES:
                    written, nll = pending.popleft()
                    yield written, nll.result()  # raises here what the writer raised
            while pending:
                written, nll = pending.popleft()
                yield written, nll.result()
        finally:
            thread.shutdown(cancel_futures=True)


class WindowWriter:
    """Writes the files of scored windows; looks up the text of each distinct token once."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        plan: WindowPlan,
        dtype: np.dtype,
        npy_folder: Path | None,
        h5: PartialH5 | None,
    ) -> None:
        """dtype: of hidden states on disk; npy_folder: for a `.npy` per window, None for none."""
        self._folder, self._tokenizer, self._first_counted = folder, tokenizer, plan.first_counted
        self._npy_folder, self._h5, self._first_rows = npy_folder, h5, np.cumsum(plan.lengths) - plan.lengths
        n_token_ids = plan.largest_id + 1
        self.hidden_dtype = None if npy_folder is None and h5 is None else dtype  # None: hidden states are not wanted
        self._texts = np.full(n_token_ids, "", dtype=object)
        self._is_known = np.zeros(n_token_ids, dtype=bool)

    def write(self, windows: np.ndarray, token_ids: np.ndarray, pending: PendingScores) -> np.ndarray:
        """Write a batch: windows (B,) numbers, token_ids (B, L). Returns each window's negative log-likelihood (B,).

        Raises InputError where the model computed NaN or infinity, or the dtype on disk does not hold a hidden state.
        """
        scores = pending.get()
        texts = self._texts_of(token_ids)
        probabilities = probabilities_of(scores.log_probs)
        for row, window in enumerate(windows.tolist()):
            require_finite(window, row, scores)
            self._write_hidden_states(window, row, scores)
            write_token_probs(self._folder, window, token_ids[row], probabilities[row], texts[row].tolist())
        return np.array(
            [window_nll(row, first) for row, first in zip(probabilities, self._first_counted[windows], strict=True)]
        )

    def _write_hidden_states(self, window: int, row: int, scores: WindowScores) -> None:
        if scores.hidden_states is None:
            return
        if self._npy_folder is not None:
            write_hidden_states(self._npy_folder, window, scores.hidden_states[row])
        if self._h5 is not None:
            self._h5.write(window, int(self._first_rows[window]), scores.hidden_states[row])

    def _texts_of(self, token_ids: np.ndarray) -> np.ndarray:
        """(B, L) strings."""
        distinct = np.unique(token_ids)
        unknown = distinct[~self._is_known[distinct]]
        self._is_known[unknown] = True
        for token in unknown.tolist():
            self._texts[token] = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self._texts[token_ids]


def probabilities_of(log_probs: np.ndarray) -> np.ndarray:
    """(B, L) float64 in [0, 1], the first column 0: nothing stands before a window's first token that predicts it.

    float64, since a float32 would be 0 from a log-probability of -104 down.
    """
    probabilities = np.exp(log_probs.astype(np.float64))
    probabilities[:, 0] = 0
    return probabilities


def window_nll(probabilities: np.ndarray, first: int) -> float:
    """Negative log-likelihood, in nats, of a window's tokens from the first that counts; probabilities (L,) as on disk."""
    return float(-np.log(np.maximum(probabilities[first:], np.finfo(np.float64).tiny)).sum())
