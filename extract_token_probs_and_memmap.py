"""Stage 2: record the probability and the hidden state that a language model gives to each token of a text.

Reads   DATA_DIR/{partition}.json                             [{"text": str, "spans"?: [[start, end], ...]}, ...]
Writes  OUTPUT_DIR/{partition}/token_probs_{i}.json           [[token text, probability, chunk id, position, token id], ...]
        OUTPUT_DIR/{partition}/hidden_states_{i}.npy          (tokens, hidden size), with --save_hidden_states
        OUTPUT_DIR/{partition}.dat, .h5, _index_to_seqlen.json, _index_to_acc_index.json    with --construct_memmap
        OUTPUT_DIR/{partition}_expert_spans.json              [[window, first token, end, span], ...], where spans are marked
        OUTPUT_DIR/{partition}_manifest.json                  what all this was made from
Run     python extract_token_probs_and_memmap.py --model_path gpt2 --data_dir data --output_dir out --partition train \\
            --save_hidden_states --construct_memmap

Run again after an interruption, it goes on where it was; with more outputs asked for, it adds them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.cli import StageParser, add_model, boolean, plain_name, positive_int, run_script
from utils.corpora import Passage, read_passages, split_path
from utils.expert_spans import N_SPANS, write_expert_spans
from utils.extraction_output import (
    Wanted,
    keeps_hidden_states,
    output_is_whole,
    require_manifest,
    whole_outputs,
    windows_to_do,
)
from utils.files import InputError, Manifest, begin_stage, file_fingerprint, finish_stage, make_folder, sole_writer
from utils.hidden_states import HiddenStateFiles, construct_memmap, discard_intermediates
from utils.token_probs import STAGE
from utils.windows import WindowPlan, WindowShape, plan_batches, plan_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = StageParser(__doc__)
    add_model(parser)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that preprocess_dataset.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the output")
    parser.add_argument("--partition", type=plain_name, required=True, help="split to read, such as train")
    parser.add_argument("--chunk_size", type=positive_int, default=512, help="most tokens of a window")
    parser.add_argument("--stride", type=positive_int, default=448, help="tokens from a window's start to the next's")
    parser.add_argument(
        "--min_length",
        type=positive_int,
        default=64,
        help="shorter passages are left out, in tokens; 1 keeps all, as short texts with expert spans need",
    )
    parser.add_argument("--batch_size", type=positive_int, default=8, help="windows of one forward pass")
    parser.add_argument("--save_hidden_states", action="store_true", help="write a .npy of hidden states per window")
    parser.add_argument(
        "--hidden_dtype", choices=("float32", "float16"), default="float32", help="of the hidden states on disk"
    )
    parser.add_argument(
        "--construct_memmap",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="put all hidden states into one .dat and one .h5, with index maps; implies --save_hidden_states",
    )
    parser.add_argument(
        "--discard_intermediates",
        action="store_true",
        help="delete the .npy files and the .dat once the .h5 is whole; it holds the same",
    )
    args = parser.parse_args(argv)
    if args.discard_intermediates and not args.construct_memmap:
        parser.error("--discard_intermediates: leaves only the .h5, so it needs --construct_memmap")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shape = WindowShape(args.chunk_size, args.stride, args.min_length)
    passages = read_passages(split_path(args.data_dir, args.partition))
    make_folder(args.output_dir / args.partition)
    with sole_writer(args.output_dir, f"{args.partition}_extraction"):
        run(args, shape, passages)


def run(args: argparse.Namespace, shape: WindowShape, passages: Iterator[Passage]) -> None:
    from utils.models import load_config, load_tokenizer, require_known_ids, require_windows_fit

    config = load_config(args.model_path, args.cache_dir)
    require_windows_fit(config, args.model_path, args.chunk_size)
    tokenizer = load_tokenizer(args.model_path, args.cache_dir)
    job = Job(args, tokenizer)
    results, speed = job.earlier_results(), ""
    if output_is_whole(job.files, results, job.wanted):
        print(f"{args.output_dir}: all that is asked for is there already")
    else:
        n_bytes = split_path(args.data_dir, args.partition).stat().st_size
        plan = plan_windows(passages, tokenizer, shape, args.output_dir, n_bytes)
        require_known_ids(config, args.model_path, plan.largest_id)
        results, speed = extract_missing(job, plan, tokenizer, results)
        if args.construct_memmap:
            has_dat = not args.discard_intermediates
            construct_memmap(job.files, plan.lengths, job.wanted.shape(results), keep_dat=has_dat)
        results = job.finish(results)
    if args.discard_intermediates:
        # Noted first: from here on the .h5 stands for them, also where the deletion is cut off.
        results = job.finish(results, discarded=True)
        discard_intermediates(job.files, job.wanted.shape(results))
    report(args, results, speed)


class Job:
    """What a run is asked for, where it writes, and the manifest that says so."""

    def __init__(self, args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> None:
        from utils.models import model_fingerprint, pick_device, tokenizer_fingerprint

        self.args = args
        self.files = HiddenStateFiles(args.output_dir, args.partition)
        has_hidden_states = args.save_hidden_states or args.construct_memmap
        self.wanted = Wanted(has_hidden_states, args.construct_memmap, np.dtype(args.hidden_dtype))
        self.manifest_path = args.output_dir / f"{args.partition}_manifest.json"
        # Without the flags that say which outputs to make: another run may ask for more.
        names = ("partition", "chunk_size", "stride", "min_length", "batch_size", "dtype", "hidden_dtype")
        self.arguments = {name: getattr(args, name) for name in names} | {"device": pick_device(args.device).type}
        self.inputs = {
            "text": file_fingerprint(split_path(args.data_dir, args.partition)),
            "model": model_fingerprint(args.model_path, args.cache_dir),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }

    def begin(self) -> Manifest:
        return begin_stage(self.manifest_path, STAGE, self.arguments, self.inputs)

    def earlier_results(self) -> dict[str, Any]:
        """The results of a run that finished here; empty where none has."""
        return self.begin().results if require_manifest(self.manifest_path, self.files) else {}

    def mark(self, plan: WindowPlan) -> dict[str, Any]:
        """Write which tokens are in expert spans; returns what the results say of them."""
        return write_expert_spans(self.files.folder, plan.expert_spans) | {"n_short_spans": plan.n_short_spans}

    def finish(self, results: dict[str, Any], discarded: bool = False) -> dict[str, Any]:
        """Note in the manifest which outputs are whole; returns the results with that."""
        outputs = whole_outputs(self.files, results, self.wanted)
        if discarded:
            outputs = [name for name in outputs if name != "hidden_states"]
        results = results | {"outputs": outputs}
        manifest = self.begin()
        if manifest.results != results:
            finish_stage(self.manifest_path, manifest, results)
        return results


def extract_missing(
    job: Job, plan: WindowPlan, tokenizer: "PreTrainedTokenizerBase", earlier: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Compute the windows that lack a file; returns the stage's results and a word on the speed."""
    from utils.extraction import extract
    from utils.models import load_lm

    args = job.args
    if earlier and earlier["windows_fingerprint"] != plan.fingerprint:
        got = "the tokenizer cuts the text otherwise than in the run before, perhaps another version of its library"
        raise InputError(f"{job.manifest_path}: {got}; use another folder or delete the output")
    to_do = windows_to_do(job.files, plan.n_windows, earlier, job.wanted)
    if earlier and not to_do.any():
        return earlier | job.mark(plan), ""
    lm = load_lm(args.model_path, args.device, args.dtype, args.cache_dir)
    job.begin()  # only now, so that a text or a model that cannot be used leaves no manifest behind
    marked = job.mark(plan)
    batches = [windows for windows in plan_batches(plan.lengths, args.batch_size) if to_do[windows].any()]
    hidden_dtype = job.wanted.dtype if keeps_hidden_states(job.files, earlier, job.wanted) else None
    found = extract(lm, tokenizer, plan, job.files.folder, batches, hidden_dtype)
    rate = f", {found.n_computed / found.seconds:,.0f} tokens/s ({str(lm.dtype).removeprefix('torch.')} on {lm.device})"
    return job.finish(found.results(lm, plan) | marked), rate if found.n_computed else ""


def report(args: argparse.Namespace, results: dict[str, Any], speed: str) -> None:
    short = f" ({results['n_short_passages']:,} shorter left out)" if results["n_short_passages"] else ""
    perplexity = f", perplexity {results['perplexity']:.3f}" if results["perplexity"] else ""
    counts = f"{results['n_windows']:,} windows, {results['n_tokens']:,} tokens"
    print(f"{args.partition}: {results['n_passages']:,} passages{short}, {counts}{perplexity}{speed}")
    if results[N_SPANS] or results["n_short_spans"]:
        print(f"expert spans: {results[N_SPANS]:,} marked, {results['n_short_spans']:,} left out with short passages")
    folder = args.output_dir / args.partition
    names = {
        "token_probs": f"{folder}/token_probs_*.json",
        "hidden_states": f"{folder}/hidden_states_*.npy",
        "memmap": f"{folder}.h5",
    }
    print(f"written: {', '.join(names[output] for output in results['outputs'])}")


if __name__ == "__main__":
    run_script(main)
