"""What KCD's gain is made of: chunks that match, how long they are, how often their entry token was seen, duplicates.

Each position's proposal adds β(n) - log p(x_n) - β(n+1) nats to the log-likelihood of the text: what begins at n becomes
likelier by that where the proposal is what the text says, and less likely where not. Summed over all positions this is
the distance between CD-LM and the base LM, exactly. It is given per 1,000 tokens of the text, for each map.

Near-duplicates are passages of the datastore's text that share runs of tokens with the validation or test split. They
are taken out of the datastore; the models, which may have learned them, stay as they are. Beside that, datastores without
other passages, drawn at random, of about as many tokens: what a smaller datastore alone does.

Run     python benchmarks/paper/composition.py --output composition.json
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import table
from benchmarks.paper.common import (
    FITTED,
    Interval,
    Maps,
    Reader,
    add_flags,
    cdlm_rows,
    encode,
    headings,
    proposals_in_words,
    ratio,
    ratio_cell,
    run_table,
    without_windows,
)
from benchmarks.paper.datastores import EXTRACT, Work
from benchmarks.paper.gain_groups import composition, entry_rows_of
from benchmarks.paper.near_duplicates import PartOfDatastore, SharedRuns
from utils.cli import POSITIVE_INT, Parser, Range, run_script
from utils.datastore.store import Datastore
from utils.evaluation.marginal import Proposals
from utils.files import InputError
from utils.manifest import read_finished
from utils.progress import ProgressBar
from utils.text.corpora import Passage, read_passages
from utils.text.windows import WindowShape

N_DRAWS = 3  # of other passages


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument("--run_length", type=POSITIVE_INT, default=13, help="tokens of a run that two passages share")
    parser.add_argument(
        "--overlap",
        type=Range(float, above=0, below=1),
        default=0.1,
        help="share of runs from which a passage is a near-duplicate",
    )
    return parser.parse_args(argv)


# ---- Without near-duplicates


@dataclass(frozen=True)
class Passages:
    """The passages that stage 2 read, in their order."""

    n_tokens: np.ndarray  # (P,) int64
    n_windows: np.ndarray  # (P,) int64: 0 where the passage is too short
    overlaps: np.ndarray  # (P,) float64: with the validation or test split

    def without(self, whole: Datastore, is_left_out: np.ndarray) -> PartOfDatastore:
        """The datastore of the other passages; is_left_out (P,) bool."""
        return PartOfDatastore(whole, np.repeat(is_left_out, self.n_windows))

    def as_many_others(self, is_duplicate: np.ndarray, seed: int) -> np.ndarray:
        """(P,) bool: other passages, drawn at random, of at most as many tokens."""
        others = np.random.default_rng(seed).permutation(np.flatnonzero(~is_duplicate))
        left, drawn = int(self.n_tokens[is_duplicate].sum()), np.zeros(len(self.n_tokens), dtype=bool)
        for i in others.tolist():
            if self.n_tokens[i] <= left:
                drawn[i] = True
                left -= int(self.n_tokens[i])
        return drawn


def read_overlaps(reader: Reader, run_length: int) -> Passages:
    """Raises InputError where stage 2 read other windows than the partition now has."""
    work = reader.work

    def token_ids(passage: Passage) -> np.ndarray:
        return encode(reader.tokenizer, passage.text)

    manifest = read_finished(work.extracted(work.model_gen) / f"{work.partition}_manifest.json", EXTRACT)
    shape = WindowShape(*(manifest.arguments[name] for name in ("chunk_size", "stride", "min_length")))
    held_out = (passage for split in (reader.validation, reader.test) for passage in read_passages(split.path))
    shared = SharedRuns(map(token_ids, held_out), run_length)
    n_tokens, n_windows, overlaps = [], [], []
    path = work.split(work.partition)
    for passage in ProgressBar(read_passages(path), desc="looking for near-duplicates", unit="passage"):
        ids = token_ids(passage)
        n_tokens.append(len(ids))
        n_windows.append(len(shape.bounds(len(ids))))
        overlaps.append(shared.overlap(ids))
    if sum(n_windows) != manifest.results["n_windows"]:
        raise InputError(f"{path}: gives other windows than stage 2 read; run stage 2 again")
    return Passages(np.array(n_tokens), np.array(n_windows), np.array(overlaps))


def _rows(maps: Maps, test: Proposals, reader: Reader) -> dict[str, Any]:
    return {"proposals": proposals_in_words(test), "rows": cdlm_rows(maps, test, reader.test.size)}


# ---- The command


def measure(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    reader = Reader.of(work, args)
    lm = reader.load(work.model_gen)
    datastore = reader.datastore(lm)
    validation, test = (reader.proposals(lm, datastore, split) for split in (reader.validation, reader.test))
    maps = reader.maps(validation)
    found: dict[str, Any] = {"windows": len(test.lengths), "tokens": reader.test.size.n_tokens}
    found["groups"] = composition(test, maps, entry_rows_of(reader.test.plan, datastore))
    passages = read_overlaps(reader, args.run_length)
    is_duplicate = passages.overlaps >= args.overlap
    found["near_duplicates"] = {
        "passages": int(is_duplicate.sum()),
        "of_passages": len(is_duplicate),
        "share_of_tokens": float(passages.n_tokens[is_duplicate].sum() / passages.n_tokens.sum()),
    }
    stores = {"all passages": _rows(maps, test, reader)}
    parts = {"without near-duplicates": is_duplicate}
    parts |= {f"without others, draw {i + 1}": passages.as_many_others(is_duplicate, i) for i in range(N_DRAWS)}
    for name, is_left_out in parts.items():
        part = passages.without(datastore, is_left_out)
        validation, test = (reader.proposals(lm, part, split) for split in (reader.validation, reader.test))
        stores[name] = _rows(reader.maps(validation), test, reader)
    whole = stores["all passages"]["rows"][FITTED]["log_p"]
    for store in stores.values():
        store["fitted_map_to_all"] = vars(ratio(store["rows"][FITTED]["log_p"], whole, test.lengths))
        store["rows"] = without_windows(store["rows"])
    return found | {"datastores": stores}


def report(name: str, found: dict[str, Any]) -> str:
    maps = list(found["groups"][""]["all positions"]["gain"])
    lines: list[list[str]] = []
    for kind, groups in found["groups"].items():
        lines += [[kind, *[""] * (2 + len(maps))]] if kind else []
        for group, part in groups.items():
            matched = "" if part["matched"] is None else f"{100 * part['matched']:.1f}"
            cells = [Interval(**part["gain"][each]).text(1) for each in maps]
            lines.append([f"  {group}" if kind else group, f"{100 * part['share']:.1f}", matched, *cells])
    names = headings(found["datastores"]["all passages"]["rows"])
    gained = table(["nats per 1,000 tokens (95%)", "positions %", "matched %", *names], lines)
    lines = []
    for store, part in found["datastores"].items():
        ratios = [ratio_cell(row) for row in part["rows"].values()]
        lines.append([store, *ratios, Interval(**part["fitted_map_to_all"]).text(4)])
    stores = table(["perplexity to the base LM's (95%)", *names, f"{FITTED} to that of all"], lines)
    about = f"{found['tokens']:,} tokens in {found['windows']:,} windows of test"
    for store, part in found["datastores"].items():
        about += f"\n{store}: {part['proposals']}"
    about += "\nnear-duplicates: {passages} of {of_passages} passages, {share_of_tokens:.1%} of the tokens".format(
        **found["near_duplicates"]
    )
    return f"{name}\n{gained}\n\n{stores}\n{about}"


def main(argv: list[str] | None = None) -> None:
    run_table(parse_args(argv), argv, measure, report)


if __name__ == "__main__":
    run_script(main)
