"""Stage 3: extract the token sequences that the LM gave a high probability, or that an expert marked, as token tries.

Reads   TOKEN_PROB_DIR/token_probs_{i}.json    what stage 2 wrote for one partition, and its manifest beside that folder
        {partition}_expert_spans.json          beside that folder too, with --chunk_source expert and both
Writes  OUTPUT_DIR/{model_ds}_{dataset}_{partition}_token_prob_list.json            one window a line
        OUTPUT_DIR/{model_ds}_{dataset}_{partition}_all_phrases_{γ}.json            [[entry, c1, …], …], not cut
        OUTPUT_DIR/{model_ds}_{dataset}_{partition}_all_filtered_tok_probs_{γ}.json the same as rows of token_probs
        OUTPUT_DIR/token_trie_{dataset}_DS{model_ds}_H{model_gen}/{partition}_{γ}/
            {id}.json           {depth: [[entry, c1, …], …]} token ids, per entry token
            tok_pos_{id}.json   {depth: [[chunk id, position], …]} of the entry tokens, row for row
            manifest.json       what all this was made from
Run     python save_token_trie_info.py --token_prob_dir out/train --output_dir tries --model_name gpt2 \\
            --dataset_name wikitext-103-v1 --model_ds gpt2 --model_gen gpt2 --partition train --tok_prob_threshold 0.9

Run again after an interruption, it goes on where it was.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH keeps out
from utils.cli import (
    NON_NEGATIVE_INT,
    Range,
    StageParser,
    add_cache_dir,
    add_datastore_labels,
    add_max_workers,
    add_verify_checksums,
    run_script,
)
from utils.datastore.chunk_lists import ChunkListPaths, ChunkRule, Corpus, find_all_chunks
from utils.datastore.external_sort import FOLDER as RUNS_FOLDER
from utils.datastore.external_sort import unit_bytes_in, write_tries
from utils.datastore.trie_files import (
    MANIFEST,
    STAGE,
    entry_token_ids,
    refuse_files_without_manifest,
    trie_files,
    trie_folder_path,
)
from utils.extraction.token_probs import find_token_probs, token_probs_path
from utils.files import InputError, exclusive_lock, make_folder, temporary_folder
from utils.manifest import FileSum, Manifest, begin_stage, finish_stage, list_files, require_as_written
from utils.progress import ProgressBar, phase
from utils.text.expert_spans import FINGERPRINT, SOURCES, read_expert_spans
from utils.workers import n_cores


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = StageParser(__doc__)
    parser.add_argument(
        "--token_prob_dir", type=Path, required=True, help="stage 2's {output_dir}/{partition}, or its --output_dir"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the lists and the token tries")
    parser.add_argument(
        "--model_name", required=True, help="folder or hub name of stage 2's tokenizer; no weights are read"
    )
    add_cache_dir(parser)
    add_datastore_labels(parser, "--dataset_name")
    parser.add_argument(
        "--chunk_source",
        choices=SOURCES,
        default="probability",
        help="a token belongs to a chunk where its probability is above γ, where it lies in an expert span (each span a "
        "chunk of its own, γ only names the folder), or where either holds",
    )
    parser.add_argument(
        "--max_chunk_length", type=NON_NEGATIVE_INT, default=64, help="tokens at which a chunk is cut; 0: not cut"
    )
    parser.add_argument(
        "--skip_first_tokens",
        type=NON_NEGATIVE_INT,
        help="tokens of each window that are context only, expert spans in them included (default: stage 2's --chunk_size "
        "less its --stride; 0 with --chunk_source expert and both, so that short texts lose no span)",
    )
    add_max_workers(parser)
    add_verify_checksums(parser)
    parser.add_argument(
        "--max_memory_gb",
        type=Range(float, above=0),
        default=4,
        help="GB of memory for all processes together, with what they load",
    )
    args = parser.parse_args(argv)
    args.model_gen = args.model_gen or args.model_ds
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    token_prob_dir, extraction = find_token_probs(args.token_prob_dir, args.partition)
    files = [token_probs_path(token_prob_dir, window) for window in range(extraction.results["n_windows"])]
    manifest_path = token_prob_dir.with_name(f"{args.partition}_manifest.json")
    require_as_written(manifest_path, extraction, files, verify=args.verify_checksums)
    expert_spans = None
    if args.chunk_source != "probability":
        expert_spans = read_expert_spans(token_prob_dir, extraction.results)
    if args.skip_first_tokens is None:
        overlap = extraction.arguments["chunk_size"] - extraction.arguments["stride"]
        args.skip_first_tokens = overlap if expert_spans is None else 0
    unit_bytes = unit_bytes_in(args.max_memory_gb, min(args.max_workers, n_cores()))
    n_token_ids = check_tokenizer(args, extraction)
    corpus = Corpus(token_prob_dir, extraction.results, n_token_ids, expert_spans)
    make_folder(args.output_dir)
    with exclusive_lock(args.output_dir, "token_tries"):
        run(args, corpus, extraction, unit_bytes)


def check_tokenizer(args: argparse.Namespace, extraction: Manifest) -> int:
    """One more than the tokenizer's largest id; raises InputError where it is not the one of stage 2."""
    from utils.lm.fingerprint import tokenizer_fingerprint
    from utils.lm.model import load_tokenizer

    tokenizer = load_tokenizer(args.model_name, args.cache_dir)
    if tokenizer_fingerprint(tokenizer) != extraction.inputs["tokenizer"]:
        raise InputError(
            f"--model_name {args.model_name}: its tokenizer is not the one that {args.token_prob_dir} was made with; "
            "give the model of stage 2"
        )
    return max(tokenizer.get_vocab().values()) + 1


def run(args: argparse.Namespace, corpus: Corpus, extraction: Manifest, unit_bytes: int) -> None:
    labels = (args.dataset_name, args.model_ds, args.model_gen, args.partition, args.tok_prob_threshold)
    folder = trie_folder_path(args.output_dir, *labels)
    lists = ChunkListPaths(args.output_dir, args.dataset_name, args.model_ds, args.partition, args.tok_prob_threshold)
    lists.require_names_fit()
    refuse_files_without_manifest(folder)
    lists.refuse_files_without_manifest()
    make_folder(folder)
    arguments, inputs = provenance(args, extraction)
    manifest = begin_stage(folder / MANIFEST, STAGE, arguments, inputs)
    # What the lists depend on: they are shared by datastores that differ in the rest.
    names = ("dataset_name", "model_ds", "partition", "skip_first_tokens", "chunk_source")
    shared = {name: arguments[name] for name in names}
    lists_manifest = begin_stage(lists.manifest, STAGE, shared, inputs)
    is_whole = manifest.complete and len(entry_token_ids(folder)) == manifest.results.get("entry_tokens")
    if is_whole and all(path.exists() for path in lists.lists):
        print(f"Nothing to do: {summary(folder, manifest)}")
        return
    rule = ChunkRule(args.tok_prob_threshold, args.skip_first_tokens, args.max_chunk_length, args.chunk_source)
    with temporary_folder(folder / RUNS_FOLDER) as runs_folder:
        n_windows = corpus.extracted["n_windows"]
        bar = ProgressBar(total=n_windows, desc="finding chunks", unit="window")
        with phase(f"reading {n_windows} windows in {corpus.token_prob_dir}"), bar:
            chunks = find_all_chunks(corpus, rule, lists, runs_folder, args.max_workers, bar.update)
        counts = {"windows": chunks.n_windows, "tokens": chunks.n_tokens}
        finish_stage(lists.manifest, lists_manifest, counts, list_files(lists.manifest, lists.files))
        bar = ProgressBar(total=chunks.runs.n_entry_tokens, desc="writing token tries", unit="trie")
        with phase(f"sorting and writing {chunks.runs.n_rows} chunks"), bar:
            bar.update(len(there := entry_token_ids(folder)))
            sums: dict[str, FileSum] = {}
            for added in write_tries(folder, runs_folder, chunks.runs, args.max_workers, unit_bytes, there):
                sums |= added
                bar.update(len(added) // 2)  # files of a trie
    counts |= {"entry_tokens": chunks.runs.n_entry_tokens, "rows": chunks.runs.n_rows, "plateaus": chunks.n_plateaus}
    if corpus.expert_spans is not None:
        n_in_chunks = len(chunks.expert_spans)
        counts |= {"expert_spans": corpus.expert_spans.n_spans, "expert_spans_in_chunks": n_in_chunks}
    finish_stage(folder / MANIFEST, manifest, counts, list_files(folder / MANIFEST, trie_files(folder), sums))
    print(summary(folder, manifest))


def provenance(args: argparse.Namespace, extraction: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and the inputs that decide the output's bytes."""
    names = ("dataset_name", "model_ds", "model_gen", "partition", "tok_prob_threshold")
    arguments = {
        name: getattr(args, name) for name in (*names, "max_chunk_length", "skip_first_tokens", "chunk_source")
    }
    inputs = {
        "windows_fingerprint": extraction.results["windows_fingerprint"],
        "tokenizer": extraction.inputs["tokenizer"],
        "model_ds": extraction.inputs["model"],
        "extraction": extraction.arguments,
    }
    if args.chunk_source != "probability":
        inputs["expert_spans"] = extraction.results[FINGERPRINT]
    return arguments, inputs


def summary(folder: Path, manifest: Manifest) -> str:
    counts = manifest.results
    found = f"{counts['rows']:,} chunks of {counts['plateaus']:,} plateaus in {counts['tokens']:,} tokens"
    shown = f"{folder}: {counts['entry_tokens']:,} token tries, {found}"
    if not counts["rows"]:
        shown = (
            f"{folder}: the datastore is empty, no token of {counts['tokens']:,} is above the threshold or in a span"
        )
    if missing := counts.get("expert_spans", 0) - counts.get("expert_spans_in_chunks", 0):
        reason = "they lie in the tokens skipped, or begin a window, where no token stands before them"
        shown += f"\n{missing:,} of {counts['expert_spans']:,} expert spans gave no chunk: {reason}"
    return shown


if __name__ == "__main__":
    run_script(main)
