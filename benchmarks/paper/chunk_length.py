"""Table of chunk length: what is left of KCD's gain where chunks are cut to 1, 2 and 4 tokens.

Rows are chosen as ever, by the hidden state alone; the chunk is cut before it is compared with the text. Maps are fitted
anew for each length, on the validation split. Ratios are of CD-LM's perplexity to the base LM's on the same windows of
the test split, with intervals of 95% by drawing windows with replacement.

Run     python benchmarks/paper/chunk_length.py --output chunk_length.json
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import table
from benchmarks.paper.common import (
    FITTED,
    Interval,
    Reader,
    add_flags,
    cdlm_rows,
    headings,
    proposals_in_words,
    ratio,
    ratio_cell,
    run_table,
    without_windows,
)
from benchmarks.paper.datastores import Work
from utils.cli import NON_NEGATIVE_INT, Parser, run_script
from utils.evaluation.marginal import Proposals

UNCUT = 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument(
        "--lengths", type=NON_NEGATIVE_INT, nargs="+", default=[1, 2, 4, UNCUT], help="tokens of a chunk; 0: uncut"
    )
    return parser.parse_args(argv)


def measure(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """For each length its settings' figures, and the fitted map's perplexity to the uncut one's."""
    reader = Reader.of(work, args)
    lm = reader.load(work.model_gen)
    datastore = reader.datastore(lm)
    validation, test = (reader.proposals(lm, datastore, split) for split in (reader.validation, reader.test))
    lengths: dict[int, dict[str, Any]] = {}
    for n_tokens in sorted({*args.lengths, UNCUT}, key=lambda n: n or np.inf):
        cut = _cut(test, n_tokens)
        known = ~np.isnan(cut.similarities)
        lengths[n_tokens] = {
            "matched": float(cut.matches[known].mean()),
            "mean_chunk_length": float(cut.chunk_lengths[known].mean()),
            "rows": cdlm_rows(reader.maps(_cut(validation, n_tokens)), cut, reader.test.size),
        }
    uncut = lengths[UNCUT]["rows"][FITTED]["log_p"]
    for found in lengths.values():
        found["fitted_map_to_uncut"] = vars(ratio(found["rows"][FITTED]["log_p"], uncut, test.lengths))
        found["rows"] = without_windows(found["rows"])
    about = {"windows": len(test.lengths), "tokens": reader.test.size.n_tokens}
    return about | {"proposals": proposals_in_words(test), "lengths": lengths}


def _cut(proposals: Proposals, n_tokens: int) -> Proposals:
    return proposals if n_tokens == UNCUT else proposals.cut(n_tokens)


def report(name: str, found: dict[str, Any]) -> str:
    settings = headings(next(iter(found["lengths"].values()))["rows"])
    header = ["chunks of at most", "mean", "matched %", *settings, f"{FITTED} to uncut"]
    lines = []
    for n_tokens, of_length in found["lengths"].items():
        cells = [ratio_cell(row) for row in of_length["rows"].values()]
        to_uncut = Interval(**of_length["fitted_map_to_uncut"]).text(4)
        mean, matched = f"{of_length['mean_chunk_length']:.2f}", f"{100 * of_length['matched']:.1f}"
        lines.append([f"{n_tokens or 'uncut'}", mean, matched, *cells, to_uncut])
    about = f"{found['tokens']:,} tokens in {found['windows']:,} windows of test; {found['proposals']}"
    return f"{name}, perplexity to the base LM's (95%)\n{table(header, lines)}\n{about}"


def main(argv: list[str] | None = None) -> None:
    run_table(parse_args(argv), argv, measure, report)


if __name__ == "__main__":
    run_script(main)
