"""Stage 2: record the probability and the hidden state that a language model gives to each token of a text.

Reads   DATA_DIR/{partition}.json                             [{"text": str, "spans"?: [[start, end], ...]}, ...]
Writes  OUTPUT_DIR/{partition}/token_probs_{i}.json           [[token text, probability, chunk id, position, token id], ...]
        OUTPUT_DIR/{partition}/hidden_states_{i}.npy          (tokens, hidden size), with --save_hidden_states
        OUTPUT_DIR/{partition}.h5, _index_to_seqlen.json, _index_to_acc_index.json    with --construct_memmap
        OUTPUT_DIR/{partition}.dat                            the same rows raw, with --keep_dat
        OUTPUT_DIR/{partition}_expert_spans.json              [[window, first token, end, span], ...], where spans are marked
        OUTPUT_DIR/{partition}_manifest.json                  what all this was made from
        OUTPUT_DIR/{partition}_plan.npy                       until all is done: the text's token ids and windows
Run     python extract_token_probs_and_memmap.py --model_path gpt2 --data_dir data --output_dir out --partition train \\
            --save_hidden_states --construct_memmap
        torchrun --nproc_per_node 8 extract_token_probs_and_memmap.py ...                        on 8 GPUs
        python extract_token_probs_and_memmap.py ... --shard 3 --num_shards 100, then --merge_only    as a job array

Run again after an interruption, it goes on where it was; with more outputs asked for, it adds them.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH keeps out
from utils.cli import (
    NON_NEGATIVE_INT,
    POSITIVE_INT,
    StageParser,
    add_model,
    add_threads,
    boolean,
    file_name,
    run_script,
)
from utils.extraction.distributed import joined_ranks
from utils.text.expert_spans import N_SPANS
from utils.text.windows import WindowShape

if TYPE_CHECKING:
    from utils.extraction.run import ExtractionSettings, Outcome


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = StageParser(__doc__)
    add_model(parser)
    add_threads(parser)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that preprocess_dataset.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the output")
    parser.add_argument("--partition", type=file_name, required=True, help="split to read, such as train")
    parser.add_argument("--chunk_size", type=POSITIVE_INT, default=512, help="most tokens of a window")
    parser.add_argument("--stride", type=POSITIVE_INT, default=448, help="tokens from a window's start to the next's")
    parser.add_argument(
        "--min_length",
        type=POSITIVE_INT,
        default=64,
        help="shorter passages are left out, in tokens; 1 keeps all, as short texts with expert spans need",
    )
    parser.add_argument(
        "--no_bos",
        action="store_true",
        help="read windows without BOS, as the authors do, where the tokenizer puts it before prompts",
    )
    parser.add_argument(
        "--batch_size",
        type=POSITIVE_INT,
        help="windows of one forward pass (default: what an earlier run took, else on a CPU 2048 tokens, on a GPU 32768 "
        "tokens, halved until they fit)",
    )
    parser.add_argument(
        "--device_map", choices=("auto",), help="spread a model too large for one GPU over all; needs accelerate"
    )
    parser.add_argument("--shard", type=NON_NEGATIVE_INT, help="compute only this shard of the windows, counted from 0")
    parser.add_argument("--num_shards", type=POSITIVE_INT, help="number of shards")
    parser.add_argument("--merge_only", action="store_true", help="compute nothing; merge the output of the shards")
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
        help="put all hidden states into one .h5, with index maps; implies --save_hidden_states",
    )
    parser.add_argument("--keep_dat", action="store_true", help="also write all hidden states raw into a .dat")
    parser.add_argument(
        "--discard_intermediates", action="store_true", help="leave only the .h5 of the hidden states, no .npy files"
    )
    args = parser.parse_args(argv)
    for flag, is_given in (("discard_intermediates", args.discard_intermediates), ("keep_dat", args.keep_dat)):
        if is_given and not args.construct_memmap:
            parser.error(f"--{flag}: is about the .h5, so it needs --construct_memmap")
    if args.discard_intermediates and args.keep_dat:
        parser.error("--keep_dat: --discard_intermediates leaves only the .h5; give one of the two")
    if not (args.save_hidden_states or args.construct_memmap):
        parser.refuse_flags(args, ("hidden_dtype",), "no hidden states are written without --save_hidden_states")
    if args.device_map and args.device != "auto":
        parser.error("--device_map: takes all GPUs, so it goes without --device")
    check_shard(parser, args)
    return args


def check_shard(parser: StageParser, args: argparse.Namespace) -> None:
    if args.shard is not None and args.num_shards is None:
        parser.error("--shard: needs --num_shards")
    if args.shard is not None and args.shard >= args.num_shards:
        parser.error(f"--shard {args.shard}: the last of {args.num_shards} is {args.num_shards - 1}")
    if args.shard is not None and args.merge_only:
        parser.error("--merge_only: puts the shards together once all are there, so it goes without --shard")
    if args.num_shards is not None and args.shard is None and not args.merge_only:
        parser.error("--num_shards: says nothing without --shard or --merge_only")


def main(argv: list[str] | None = None) -> None:
    with joined_ranks() as ranks:
        with ranks.quiet_but_first():
            args = parse_args(argv)
            windows = WindowShape(args.chunk_size, args.stride, args.min_length, not args.no_bos)
            ranks.refuse_flags({"--shard": args.shard is not None, "--merge_only": args.merge_only})
        # Imported late: torch takes seconds, and wrong flags are answered before.
        from utils.extraction.run import run_extraction

        outcome = run_extraction(settings_of(args, windows), ranks)
        if ranks.is_first:
            report(args, outcome)


def settings_of(args: argparse.Namespace, windows: WindowShape) -> "ExtractionSettings":
    import numpy as np

    from utils.extraction.run import ExtractionSettings, RequestedOutputs

    keeps_npy = (args.save_hidden_states or args.construct_memmap) and not args.discard_intermediates
    requested = RequestedOutputs(keeps_npy, args.construct_memmap, args.keep_dat, np.dtype(args.hidden_dtype))
    return ExtractionSettings(
        model_path=args.model_path,
        cache_dir=args.cache_dir,
        device=args.device,
        dtype=args.dtype,
        n_threads=args.threads,
        device_map=args.device_map,
        data_dir=args.data_dir,
        partition=args.partition,
        output_dir=args.output_dir,
        windows=windows,
        batch_size=args.batch_size,
        requested=requested,
        discard_intermediates=args.discard_intermediates,
        shard=args.shard,
        num_shards=args.num_shards,
        merge_only=args.merge_only,
    )


def report(args: argparse.Namespace, outcome: "Outcome") -> None:
    if args.shard is not None and not outcome.was_complete:
        shard = f"{args.partition}, shard {args.shard} of {args.num_shards}"
        print(f"{shard}: {outcome.n_windows:,} windows computed{outcome.speed}; after all shards run --merge_only")
        return
    if outcome.was_complete:
        print(f"{args.output_dir}: all that is asked for is there already")
    results: dict[str, Any] = outcome.results
    short = f" ({results['n_short_passages']:,} shorter left out)" if results["n_short_passages"] else ""
    perplexity = f", perplexity {results['perplexity']:.3f}" if results["perplexity"] else ""
    counts = f"{results['n_windows']:,} windows, {results['n_tokens']:,} tokens"
    print(f"{args.partition}: {results['n_passages']:,} passages{short}, {counts}{perplexity}{outcome.speed}")
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
