"""Stage 4: give each chunk of the token tries its context vector, the hidden state at its entry token.

Reads   SAVE_DIR/token_trie_{dataset}_DS{model_ds}_H{model_gen}/{partition}_{γ}/tok_pos_{id}.json    of stage 3
        ALL_HIDDEN_STATES_PATH .h5, IDX_TO_SEQLEN_PATH, INDEX_TO_ACC_INDEX_PATH, {partition}_manifest.json  of stage 2
        with model_gen
Writes  {id}.h5 into the same folder: group `hidden_states`, dataset (rows, hidden size) per depth, row for row
        hidden_states_manifest.json: what they were made from
Run     python make_token_trie.py --save_dir tries --dataset_name wikitext-103-v1 --model_ds gpt2 --model_gen gpt2 \\
            --partition train --tok_prob_threshold 0.9 --idx_to_seqlen_path out/train_index_to_seqlen.json \\
            --index_to_acc_index_path out/train_index_to_acc_index.json --all_hidden_states_path out/train.h5

Run again after an interruption, it goes on where it was. Slices (--k) may run at the same time.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH keeps out
from utils.cli import (
    NON_NEGATIVE_INT,
    POSITIVE_INT,
    StageParser,
    add_datastore_labels,
    add_excluded_tries,
    add_max_workers,
    add_verify_checksums,
    run_script,
)
from utils.datastore.context_vectors import HiddenStates, open_hidden_states, write_all_context_vectors
from utils.datastore.trie_files import (
    HIDDEN_STATES_MANIFEST,
    HIDDEN_STATES_STAGE,
    MANIFEST,
    STAGE,
    entry_tokens_with_vectors,
    find_trie_folder,
    finished_entry_token_ids,
    positions_path,
    read_token_id_list,
    vectors_path,
)
from utils.extraction.token_probs import read_extraction
from utils.files import InputError, exclusive_lock, require_file
from utils.manifest import (
    FileSum,
    Manifest,
    begin_stage,
    finish_stage,
    list_files,
    read_finished,
    read_manifest,
    require_as_written,
    require_untouched,
)
from utils.progress import ProgressBar


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = StageParser(__doc__)
    parser.add_argument("--save_dir", type=Path, required=True, help="the --output_dir of stage 3, or the trie folder")
    add_datastore_labels(parser, "--dataset_name")
    parser.add_argument("--idx_to_seqlen_path", type=Path, required=True, help="stage 2's map of windows to lengths")
    parser.add_argument(
        "--index_to_acc_index_path", type=Path, required=True, help="stage 2's map of windows to first rows"
    )
    parser.add_argument(
        "--all_hidden_states_path", type=Path, required=True, help="stage 2's .h5, its manifest beside it"
    )
    add_max_workers(parser)
    parser.add_argument(
        "--k", type=NON_NEGATIVE_INT, help="make only the k-th slice, from 0, of --k_interval entry tokens"
    )
    parser.add_argument("--k_interval", type=POSITIVE_INT, help="entry tokens of a slice, in the order of their ids")
    parser.add_argument(
        "--process_missing_tokens",
        action="store_true",
        help="make only the tries without an .h5, as every run does, or all those of --missing_tokens_file",
    )
    parser.add_argument(
        "--missing_tokens_file",
        type=Path,
        metavar="FILE",
        help="JSON list of entry token ids; with --process_missing_tokens these are made, anew where they are there",
    )
    add_excluded_tries(parser)
    add_verify_checksums(parser)
    args = parser.parse_args(argv)
    args.model_gen = args.model_gen or args.model_ds
    if (args.k is None) != (args.k_interval is None):
        parser.error("--k and --k_interval: give both or neither")
    if args.missing_tokens_file and not args.process_missing_tokens:
        parser.error("--missing_tokens_file: needs --process_missing_tokens")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    labels = (args.dataset_name, args.model_ds, args.model_gen, args.partition, args.tok_prob_threshold)
    folder = find_trie_folder(args.save_dir, *labels)
    tries = read_finished(folder / MANIFEST, STAGE)
    hidden_states, extraction = find_hidden_states(args)
    require_same_text(args, folder, tries, extraction)
    token_ids = finished_entry_token_ids(folder, tries)
    positions = [positions_path(folder, token) for token in token_ids]
    require_as_written(folder / MANIFEST, tries, positions, verify=args.verify_checksums)
    excluded = read_known(args.excluded_tries_prior, token_ids) or set()
    listed = read_known(args.missing_tokens_file, token_ids)
    first, end = slice_bounds(args, len(token_ids))
    with exclusive_lock(folder, "context_vectors", items=range(first, end)):
        with exclusive_lock(folder, "hidden_states_manifest", wait=True):
            inputs = provenance(tries, extraction, hidden_states)
            begin_stage(folder / HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE, tries.arguments, inputs)
        there = set(entry_tokens_with_vectors(folder))
        chosen = set(token_ids[first:end]).difference(excluded)
        todo = sorted(chosen - there if listed is None else chosen & listed)
        with ProgressBar(total=len(todo), desc="gathering context vectors", unit="trie", disable=not todo) as bar:
            sums: dict[str, FileSum] = {}
            for added in write_all_context_vectors(folder, todo, hidden_states, args.max_workers):
                sums |= added
                bar.update(len(added))
        if todo:  # other slices may have ended too
            there = set(entry_tokens_with_vectors(folder))
        print(f"{folder}: {conclude(folder, set(token_ids), there, excluded, sums)}")


def find_hidden_states(args: argparse.Namespace) -> tuple[HiddenStates, Manifest]:
    path = require_file(args.all_hidden_states_path, "stage 2 writes with --construct_memmap")
    manifest_path = path.with_name(f"{path.stem}_manifest.json")
    extraction = read_extraction(manifest_path)
    files = (path, args.idx_to_seqlen_path, args.index_to_acc_index_path)
    require_as_written(manifest_path, extraction, files, verify=args.verify_checksums)
    return open_hidden_states(path, args.idx_to_seqlen_path, args.index_to_acc_index_path, extraction), extraction


def require_same_text(args: argparse.Namespace, folder: Path, tries: Manifest, extraction: Manifest) -> None:
    """Raise InputError where the tries and the hidden states are not of the same windows."""
    if tries.inputs.get("tokenizer") != extraction.inputs["tokenizer"]:
        got = f"was made with another tokenizer than the tries in {folder}"
    elif tries.inputs.get("windows_fingerprint") != extraction.results["windows_fingerprint"]:
        got = f"holds other windows than those the tries in {folder} were cut from"
    else:
        return
    remedy = "run stage 2 with model_gen on the same text, --chunk_size, --stride and --min_length"
    raise InputError(f"{args.all_hidden_states_path}: {got}; {remedy}")


def read_known(path: Path | None, token_ids: list[int]) -> set[int] | None:
    """The token ids listed in a file, None without a file; raises InputError where one has no trie."""
    if path is None:
        return None
    listed = set(read_token_id_list(path))
    if unknown := listed.difference(token_ids):
        raise InputError(f"{path}: lists {min(unknown)}, which is no entry token of these tries; take it out")
    return listed


def slice_bounds(args: argparse.Namespace, n_tokens: int) -> tuple[int, int]:
    if args.k is None or not n_tokens:
        return 0, n_tokens
    first = args.k * args.k_interval
    if first >= n_tokens:
        last = (n_tokens - 1) // args.k_interval
        raise InputError(f"--k {args.k}: the last slice of {n_tokens} entry tokens is --k {last}; give 0 to {last}")
    return first, min(first + args.k_interval, n_tokens)


def provenance(tries: Manifest, extraction: Manifest, hidden_states: HiddenStates) -> dict[str, Any]:
    """The inputs that decide the output's bytes, the tries by a digest of their own manifest."""
    made_from = json.dumps([tries.arguments, tries.inputs], sort_keys=True)
    return {
        "tries": hashlib.sha256(made_from.encode()).hexdigest(),
        "windows_fingerprint": extraction.results["windows_fingerprint"],
        "tokenizer": extraction.inputs["tokenizer"],
        "model_gen": extraction.inputs["model"],
        "hidden_size": hidden_states.hidden_size,
        "dtype": str(hidden_states.dtype),
        "extraction": extraction.arguments,
    }


def conclude(folder: Path, token_ids: set[int], there: set[int], excluded: set[int], sums: dict[str, FileSum]) -> str:
    """Mark the output as whole where all entry tokens but the excluded have their `.h5`; says what there is."""
    lacking = token_ids - there
    made = f"{len(sums):,} token tries given their context vectors" if sums else "nothing to do"
    if n_left := len(lacking - excluded):
        return f"{made}; {n_left:,} of {len(token_ids):,} are still without"
    path = folder / HIDDEN_STATES_MANIFEST
    results = {"entry_tokens": len(there), "excluded": sorted(lacking)}
    with exclusive_lock(folder, "hidden_states_manifest", wait=True):
        manifest = read_manifest(path, HIDDEN_STATES_STAGE)
        require_untouched(path, manifest)
        files = list_files(path, [vectors_path(folder, token) for token in there], sums)
        finish_stage(path, manifest, results, files)
    left_out = f", {len(lacking):,} left out" if lacking else ""
    return f"{made}; all {len(there):,} have them{left_out}" if token_ids else "the datastore is empty, nothing to do"


if __name__ == "__main__":
    run_script(main)
