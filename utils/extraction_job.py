"""A run of stage 2: what it is asked for, where it writes, what earlier runs left there, and the manifest that says so."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checksums import list_files
from utils.corpora import split_path
from utils.expert_spans import write_expert_spans
from utils.extraction_output import Wanted, output_files, output_is_whole, require_manifest, whole_outputs
from utils.files import (
    Manifest,
    begin_stage,
    file_fingerprint,
    finish_stage,
    read_manifest,
    sole_writer,
    sole_writer_of_part,
    write_json,
)
from utils.hidden_states import (
    HiddenStateFiles,
    HiddenStateShape,
    begin_h5,
    construct_memmap,
    discard_intermediates,
    h5_is_whole,
)
from utils.ranks import Ranks
from utils.token_probs import STAGE
from utils.windows import WindowPlan, share_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.models import CausalLM

# Where batches stand in the whole work: fine enough that shares differ by a batch at most.
N_PLACES = 1 << 40
# Keys of an unfinished run's results, for those that go on.
HIDDEN_SIZE, N_SHARDS = "hidden_size", "num_shards"


class Job:
    """What a run is asked for, where it writes, and the manifest that says so."""

    def __init__(self, args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> None:
        from utils.models import pick_device

        self.args, self.tokenizer = args, tokenizer
        self.files = HiddenStateFiles(args.output_dir, args.partition)
        keeps_npy = (args.save_hidden_states or args.construct_memmap) and not args.discard_intermediates
        self.wanted = Wanted(keeps_npy, args.construct_memmap, args.keep_dat, np.dtype(args.hidden_dtype))
        self.manifest_path = args.output_dir / f"{args.partition}_manifest.json"
        # Without the flags that say which outputs to make: another run may ask for more.
        names = ("partition", "chunk_size", "stride", "min_length", "batch_size", "dtype", "hidden_dtype")
        self.arguments = {name: getattr(args, name) for name in names} | {"device": pick_device(args.device).type}

    @cached_property
    def inputs(self) -> dict[str, str]:
        from utils.models import model_fingerprint, tokenizer_fingerprint

        return {
            "text": file_fingerprint(split_path(self.args.data_dir, self.args.partition)),
            "model": model_fingerprint(self.args.model_path, self.args.cache_dir),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    def begin(self) -> Manifest:
        """Write the manifest, or take up the one that is there; raises InputError where that is of other flags or inputs."""
        if self.args.batch_size is None and self.manifest_path.exists():
            # Without a --batch_size it is that of the runs before, however it was found.
            self.arguments["batch_size"] = read_manifest(self.manifest_path, STAGE).arguments.get("batch_size")
        return begin_stage(self.manifest_path, STAGE, self.arguments, self.inputs)

    def earlier(self) -> "Earlier":
        """What earlier runs left; raises InputError where these had other flags or inputs, or the model is not whole."""
        _ = self.inputs  # before any text is read
        if not require_manifest(self.manifest_path, self.files, may_forget=self.args.shard is None):
            return Earlier({}, None, None, False)
        manifest = self.begin()
        results = manifest.results if manifest.complete else {}
        is_whole = output_is_whole(self.files, results, self.wanted)
        return Earlier(results, manifest.results.get(HIDDEN_SIZE), manifest.results.get(N_SHARDS), is_whole)

    def settle(self, lm: "CausalLM", plan: WindowPlan) -> "Settled":
        """Begin, now that the model is known to work: the manifest, the marked spans, the `.h5` without rows."""
        from utils.extraction import find_batch_size

        if self.arguments["batch_size"] is None and not self.manifest_path.exists():
            self.arguments["batch_size"] = find_batch_size(lm, int(plan.lengths.max()))
        manifest = self.begin()
        if not manifest.complete:
            known = {HIDDEN_SIZE: lm.hidden_size} | ({N_SHARDS: self.args.num_shards} if self.args.num_shards else {})
            write_json(self.manifest_path, asdict(replace(manifest, results=known)), indent=2)
        if self.wanted.memmap and not h5_is_whole(self.files, self.shape(plan, lm.hidden_size)):
            begin_h5(self.files, self.shape(plan, lm.hidden_size))
        return Settled(self.arguments["batch_size"], self.mark(plan))

    def shape(self, plan: WindowPlan, hidden_size: int) -> HiddenStateShape:
        return HiddenStateShape(plan.n_windows, plan.n_tokens, hidden_size, self.wanted.dtype)

    def mark(self, plan: WindowPlan) -> dict[str, Any]:
        """Write which tokens are in expert spans; returns what the results say of them."""
        return write_expert_spans(self.files.folder, plan.expert_spans) | {"n_short_spans": plan.n_short_spans}

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Note in the manifest which outputs are whole; returns the results with that."""
        outputs = whole_outputs(self.files, results, self.wanted)
        if self.args.discard_intermediates and "memmap" in outputs:
            outputs = [name for name in outputs if name != "hidden_states"]
        results = results | {"outputs": outputs}
        files = list_files(self.manifest_path, output_files(self.files, outputs))
        finish_stage(self.manifest_path, self.begin(), results, files)
        return results

    def conclude(self, plan: WindowPlan, results: dict[str, Any]) -> dict[str, Any]:
        """Make of the windows' files what else is wanted; returns the results with that."""
        results = self.finish(results)
        if not self.args.construct_memmap:
            self.files.part.unlink(missing_ok=True)  # of a run that was asked for it
            return results
        construct_memmap(self.files, plan.lengths, self.wanted.shape(results), self.wanted.dat)
        return self.finish(results)

    def discard(self, results: dict[str, Any]) -> dict[str, Any]:
        """Delete what the `.h5` holds too; returns the results without it."""
        # Noted first: from here on the .h5 stands for them, also where the deletion is cut off.
        results = self.finish(results)
        discard_intermediates(self.files, self.wanted.shape(results))
        return results


@dataclass(frozen=True)
class Earlier:
    """What earlier runs found out: the results of one that finished, else empty; what one that did not has noted."""

    results: dict[str, Any]
    hidden_size: int | None
    n_shards: int | None
    is_whole: bool  # all that is asked for is there


@dataclass(frozen=True)
class Settled:
    """What all ranks must know before they begin: the windows of a batch, and the results about marked spans."""

    batch_size: int
    marked: dict[str, Any]


@contextmanager
def sole_extraction(args: argparse.Namespace, ranks: Ranks) -> Iterator[None]:
    """Refuse to run where another run writes the same windows: other shards may run, another whole run may not."""
    if not ranks.is_first:
        yield  # the first one's lock is for all
        return
    places = range(N_PLACES) if args.shard is None else share_of(args.shard, args.num_shards, N_PLACES)
    with sole_writer_of_part(args.output_dir, f"{args.partition}_extraction", places.start, len(places)):
        yield


@contextmanager
def alone_for_a_moment(args: argparse.Namespace, ranks: Ranks) -> Iterator[None]:
    """Let shards that start at the same time read and write the manifest one after the other."""
    if not ranks.is_first:
        yield
        return
    with sole_writer(args.output_dir, f"{args.partition}_manifest", wait=True):
        yield
