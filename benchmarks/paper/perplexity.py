"""Table of perplexity: a small model alone, with chunks from a large one (KCD), as kNN-LM, and the large model alone.

All ways read the same windows of the test split. KCD's chunks are the runs that the large model finds likely in the
train split; kNN-LM searches the same hidden states of the small model over all of the train split's tokens. What is
free is chosen on the validation split: the acceptance map by maximum likelihood, the constant q, the tuned θ, and, on
some of its windows, kNN-LM's k, temperature and λ. Intervals are of 95%, by drawing windows with replacement, the same
draws for all rows; where two ways are compared, also by drawing passages.

Run     python benchmarks/paper/perplexity.py --output perplexity.json
        python benchmarks/paper/perplexity.py --model_ds gpt2-xl --model_gen gpt2 --text wiki=data/wiki --text law=data/law
"""

import argparse
import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import table
from benchmarks.paper import knn_lm
from benchmarks.paper.common import (
    CONSTANT,
    FITTED,
    TUNED,
    Reader,
    Split,
    add_flags,
    cdlm_rows,
    of_passages,
    perplexity_cells,
    proposals_in_words,
    ratio,
    run_table,
    without_windows,
)
from benchmarks.paper.datastores import EXTRACT, Work
from utils.cli import POSITIVE_INT, Parser, run_script
from utils.evaluation.marginal import Proposals
from utils.evaluation.perplexity import base_figures, base_log_likelihoods, compared_figures, grouped, read_positions
from utils.lm.model import CausalLM
from utils.manifest import read_finished
from utils.text.corpora import split_path

SMALL_LM, LARGE_LM, KNN_LM = "small LM", "large LM", "kNN-LM"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument("--without_knn_lm", action="store_true", help="leave out kNN-LM, the slowest row")
    parser.add_argument(
        "--knn_tuning_windows",
        type=POSITIVE_INT,
        default=32,
        help="validation windows, evenly spread, that kNN-LM is tuned on: each of their tokens is compared with all keys",
    )
    return parser.parse_args(argv)


def measure(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of one text, and how its proposals were."""
    reader = Reader.of(work, args)
    small = reader.load(work.model_gen)
    datastore = reader.datastore(small)
    validation, test = (reader.proposals(small, datastore, split) for split in (reader.validation, reader.test))
    size = reader.test.size
    base = base_log_likelihoods(test)
    rows: dict[str, Any] = {SMALL_LM: {"shown": SMALL_LM, "log_p": base} | base_figures(test, size)}
    if not args.without_knn_lm:
        rows[KNN_LM] = knn_row(reader, small, validation, test)
    for name, row in cdlm_rows(reader.maps(validation), test, size).items():
        rows[f"KCD, {name}"] = row | {"shown": f"KCD, {row['shown']}"}
    del small, datastore
    gc.collect()
    if work.model_ds != work.model_gen:
        log_p = base_log_likelihoods(reader.proposals(reader.load(work.model_ds), None, reader.test))
        rows[LARGE_LM] = {"shown": LARGE_LM, "log_p": log_p} | compared_figures(log_p, test, size)
    fitted = rows[f"KCD, {FITTED}"]
    others = [name for name in (SMALL_LM, f"KCD, {CONSTANT}", f"KCD, {TUNED}", KNN_LM) if name in rows]
    return {
        "windows": len(test.lengths),
        "tokens": size.n_tokens,
        "proposals": proposals_in_words(test),
        "rows": without_windows(rows),
        "passages": len(np.unique(reader.test.passages)),
        "fitted_map_to": {name: compared(fitted["log_p"], rows[name]["log_p"], reader.test) for name in others},
    }


def compared(log_p: np.ndarray, other: np.ndarray, split: Split) -> dict[str, Any]:
    """The ratio of two ways' perplexities with its interval over windows, and over passages, whose windows are alike."""
    columns = (log_p, other, split.plan.lengths - 1)
    over_passages = ratio(*(of_passages(column, split.passages) for column in columns))
    over = {"lower_over_passages": over_passages.lower, "upper_over_passages": over_passages.upper}
    return vars(ratio(*columns)) | over


def knn_row(reader: Reader, lm: CausalLM, validation: Proposals, test: Proposals) -> dict[str, Any]:
    work = reader.work
    extracted = work.extracted(work.model_gen)
    manifest = read_finished(extracted / f"{work.partition}_manifest.json", EXTRACT)
    text = split_path(work.data(), work.partition)
    keys = knn_lm.read_keys(extracted / f"{work.partition}.h5", text, manifest, reader.tokenizer, work.folder)

    batch_size = reader.args.batch_size
    plan = reader.validation.plan
    windows = np.unique(np.linspace(0, plan.n_windows - 1, reader.args.knn_tuning_windows).round().astype(int))
    part = replace(plan, starts=plan.starts[windows], lengths=plan.lengths[windows])
    of_part = np.concatenate([validation.log_probs[validation.windows()[window]] for window in windows.tolist()])
    choice = knn_lm.tune(keys, grouped(read_positions(lm, part, batch_size)), of_part, lm.device)
    positions = grouped(read_positions(lm, reader.test.plan, batch_size))
    of_tokens = knn_lm.log_probs(keys, positions, test.log_probs, choice, lm.device)
    log_p = np.array([of_tokens[part].sum() for part in test.windows()])
    words = f"{KNN_LM}, k {choice.n_neighbors}, T {choice.temperature:.3g}, λ {choice.weight:.3g}"
    about = {"shown": words, "keys": len(keys.kept), "tuned_on_tokens": len(of_part), "log_p": log_p} | vars(choice)
    return about | compared_figures(log_p, test, reader.test.size)


def report(name: str, found: dict[str, Any]) -> str:
    header = ["", "perplexity (95%)", "to the small LM's (95%)", "bits/byte", "accepted %", "from chunks %"]
    lines = []
    for row in found["rows"].values():
        shares = [f"{row[key]:.1%}".rstrip("%") if key in row else "" for key in ("accepted", "from_chunks")]
        lines.append([row["shown"], *perplexity_cells(row), f"{row['bits_per_byte']:.4f}", *shares])
    to = "; ".join(
        "{value:.4f} ({lower:.4f} to {upper:.4f}, over passages {lower_over_passages:.4f} to "
        "{upper_over_passages:.4f})".format(**found_to)
        + f" of {other}"
        for other, found_to in found["fitted_map_to"].items()
    )
    about = f"{found['tokens']:,} tokens in {found['windows']:,} windows of {found['passages']} passages of test; "
    return f"{name}\n{table(header, lines)}\n{about}{found['proposals']}\nperplexity of KCD, {FITTED}: {to}"


def main(argv: list[str] | None = None) -> None:
    run_table(parse_args(argv), argv, measure, report)


if __name__ == "__main__":
    run_script(main)
