"""Stage 1: turn a dataset into passages, one document each.

Reads   a dataset of the Hugging Face hub, or --input_files
Writes  output_dir/{train,validation,test}.json  [{"text": str, "spans"?: [[start, end], ...]}, ...], one entry a line
        output_dir/manifest.json                 what they were made from
Run     python preprocess_dataset.py --dataset python-docs --output_dir data/python-docs

wikitext-103-v1, med_instruction and python-docs have their own splits. The passages of the others are dealt out to the
splits by a hash of --seed and the text, so that copies of a text are all in one split. Passages without a visible
character are left out. Run again after an interruption, it makes only the split files that are not there yet.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from platform import python_version
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH keeps out
from utils.cli import POSITIVE_INT, Range, StageParser, add_cache_dir, run_script
from utils.files import InputError, exclusive_lock, make_folder, require_folder
from utils.manifest import Manifest, begin_stage, finish_stage, list_files, read_manifest
from utils.text.corpora import (
    CORPORA,
    INPUT_SUFFIXES,
    STAGE,
    Source,
    SplitRule,
    WithoutSplits,
    files_fingerprint,
    find_input_files,
    split_path,
    splits_in,
    write_splits,
)

FRACTION = 0.05
SEED = 0
NEEDS_NO_HUB = ("python-docs", "local")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = StageParser(__doc__)
    parser.add_argument("--dataset", required=True, choices=tuple(CORPORA), help="name of the dataset")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that the split files go to")
    add_cache_dir(parser)
    parser.add_argument(
        "--hub_mirror",
        type=Path,
        metavar="DIR",
        help="folder of copies of the hub's dataset repositories, such as DIR/Salesforce/wikitext, read in its place",
    )
    parser.add_argument(
        "--max_passages", type=POSITIVE_INT, metavar="N", help="of each split, the first N (default: all)"
    )
    local = parser.add_argument_group("local files (--dataset local)")
    local.add_argument(
        "--input_files",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files, or folders, which are searched for such files: .txt (one passage each), .jsonl (an object a "
        "line), .json (a list of objects), .parquet; a column `spans` of [start, end] character offsets is kept",
    )
    local.add_argument("--text_column", metavar="NAME", help="column that holds the text (default: text)")
    split = parser.add_argument_group("splits (datasets without splits of their own)")
    for name in ("validation", "test"):
        split.add_argument(
            f"--{name}_fraction",
            type=Range(float, least=0, below=1),
            help=f"share of the passages, 0: {name}.json is empty (default: {FRACTION})",
        )
    split.add_argument("--seed", type=int, help=f"of the random split (default: {SEED})")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args


def check_flags(parser: StageParser, args: argparse.Namespace) -> None:
    """Answer flags that do not go together, and set the defaults of those that not every dataset has."""
    is_local = args.dataset == "local"
    has_no_splits = isinstance(CORPORA[args.dataset], WithoutSplits)
    if is_local and not args.input_files:
        parser.error(f"--dataset local needs --input_files (folders, or files that end in {', '.join(INPUT_SUFFIXES)})")
    if args.hub_mirror and args.dataset in NEEDS_NO_HUB:
        parser.error(f"--hub_mirror is for datasets of the hub, {args.dataset} is none")
    for flag in ("input_files", "text_column"):
        if getattr(args, flag) is not None and not is_local:
            parser.error(f"--{flag} is for --dataset local, not for {args.dataset}")
    for flag, default in {"validation_fraction": FRACTION, "test_fraction": FRACTION, "seed": SEED}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default if has_no_splits else None)
        elif not has_no_splits:
            parser.error(f"--{flag} is for datasets without splits, {args.dataset} has its own")
    if has_no_splits and args.validation_fraction + args.test_fraction >= 1:
        parser.error("--validation_fraction and --test_fraction add up to 1 or more, nothing is left for train")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    source = source_of(args)
    make_folder(args.output_dir)
    with exclusive_lock(args.output_dir, STAGE):
        path = args.output_dir / "manifest.json"
        forget_fruitless_run(path)
        manifest = begin_stage(path, STAGE, *arguments_and_inputs(args, source))
        if manifest.complete and len(splits_in(args.output_dir)) == 3:
            print(f"{args.output_dir}: was made whole with these flags before; nothing to do")
        else:
            rule = SplitRule(args.validation_fraction or 0, args.test_fraction or 0, args.seed or 0)
            sizes = write_splits(source, rule, args.output_dir, args.max_passages)
            files = list_files(path, [split_path(args.output_dir, split) for split in sizes])
            finish_stage(path, manifest, {split: asdict(size) for split, size in sizes.items()}, files)
        report(args.output_dir, manifest)


def source_of(args: argparse.Namespace) -> Source:
    """Where the passages come from; raises InputError where that is missing."""
    files = find_input_files(args.input_files) if args.input_files else []
    mirror = args.hub_mirror and require_folder(args.hub_mirror, "holds copies of the hub's datasets").absolute()
    return Source(args.dataset, tuple(files), args.text_column or "text", mirror, args.cache_dir)


def arguments_and_inputs(args: argparse.Namespace, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the bytes of the split files."""
    names = ("dataset", "max_passages", "validation_fraction", "test_fraction", "seed")
    arguments = {name: getattr(args, name) for name in names}
    arguments["text_column"] = source.text_column if source.input_files else None
    arguments["hub_mirror"] = str(source.hub_mirror) if source.hub_mirror else None
    inputs = {"input_files": files_fingerprint(source.input_files)} if source.input_files else {}
    return arguments, inputs | ({"python": python_version()} if args.dataset == "python-docs" else {})


def forget_fruitless_run(path: Path) -> None:
    """Delete the manifest of a run that ended before its first split file, and refuse split files that have none."""
    splits = splits_in(path.parent)
    if path.exists() and not splits and not read_manifest(path, STAGE).complete:
        path.unlink()
    if splits and not path.exists():
        there = split_path(path.parent, splits[0])
        raise InputError(f"{there}: is there, but no manifest.json says what made it; use another folder or delete it")


def report(folder: Path, manifest: Manifest) -> None:
    for split, size in manifest.results.items():
        passages, characters = size["n_passages"], size["n_characters"]
        print(f"{split_path(folder, split)}: {passages:,} passages, {characters:,} characters")


if __name__ == "__main__":
    run_script(main)
