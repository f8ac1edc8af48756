"""Table of perplexity: a small model alone, with chunks from a large one (KCD), its controls, and the large model alone.

All ways read the same windows of the test split. KCD's chunks are the runs that the large model finds likely in the
train split, of the most similar row or of K, and of K rows drawn at random, without their similarities. kNN-LM searches
the same hidden states of the small model over all of the train split's tokens, with λ constant and of the distance; n-grams
are counted in the train split. What is free is chosen on the validation split: the acceptance map by maximum likelihood,
with the mixture of K rows, the constant q, the tuned θ, the weights of n-grams, and, on some of its windows, kNN-LM's k,
temperature and λ. Intervals are of 95%, by drawing windows with replacement, the same draws for all rows; where two ways
are compared, also by drawing passages.

Run     python benchmarks/paper/perplexity.py --output perplexity.json
        python benchmarks/paper/perplexity.py --model_ds smollm2 --model_gen smollm2 --text medicine=data/medicine \
            --tok_prob_threshold 0 --max_chunk_length 16 --skip_first_tokens 0 --neighbors 64 256
        python benchmarks/paper/perplexity.py --model_ds gpt2-xl --model_gen gpt2 --text wiki=data/wiki --text law=data/law
"""

import argparse
import gc
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import table
from benchmarks.paper import knn_lm, ngrams
from benchmarks.paper.common import (
    CONSTANT,
    FITTED,
    TUNED,
    Reader,
    Split,
    add_flags,
    cdlm_rows,
    encode,
    of_passages,
    perplexity_cells,
    proposals_in_words,
    ratio,
    run_table,
    without_windows,
)
from benchmarks.paper.datastores import EXTRACT, Work
from utils.cli import POSITIVE_INT, Parser, Range, run_script
from utils.datastore.store import Datastore, TokenTrie
from utils.evaluation.marginal import Proposals, fit_map
from utils.evaluation.perplexity import base_figures, base_log_likelihoods, compared_figures, grouped, read_positions
from utils.lm.model import CausalLM
from utils.manifest import read_finished
from utils.text.corpora import read_passages, split_path

SMALL_LM, LARGE_LM, NGRAMS = "small LM", "large LM", "LM + n-grams"
KNN_LM, KNN_LM_OF_DISTANCE = "kNN-LM", "kNN-LM, λ(distance)"
ONE_PREFIX, RANDOM_ROWS = "KCD, prefixes", "KCD, random rows"
RANDOM_ROWS_SEED = 8


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument(
        "--neighbors",
        type=Range(int, least=2),
        nargs="+",
        default=[64],
        metavar="K",
        help="rows that propose, beside one",
    )
    parser.add_argument("--without_knn_lm", action="store_true", help="leave out kNN-LM, the slowest rows")
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
    rows[NGRAMS] = ngram_row(reader, validation, test)
    if not args.without_knn_lm:
        rows |= knn_rows(reader, small, validation, test)
    for name, row in cdlm_rows(reader.maps(validation), test, size).items():
        rows[f"KCD, {name}"] = row | {"shown": f"KCD, {row['shown']}"}
    rows |= mixture_rows(reader, small, datastore)
    del small, datastore
    gc.collect()
    if work.model_ds != work.model_gen:
        log_p = base_log_likelihoods(reader.proposals(reader.load(work.model_ds), None, reader.test))
        rows[LARGE_LM] = {"shown": LARGE_LM, "log_p": log_p} | compared_figures(log_p, test, size)
    found = {
        "windows": len(test.lengths),
        "tokens": size.n_tokens,
        "proposals": proposals_in_words(test),
        "rows": without_windows(rows),
        "passages": len(np.unique(reader.test.passages)),
    }
    most = max(args.neighbors)
    for name, of in (("fitted_map_to", f"KCD, {FITTED}"), ("most_rows_to", f"KCD, {most} rows")):
        others = (
            SMALL_LM,
            NGRAMS,
            f"KCD, {CONSTANT}",
            f"KCD, {TUNED}",
            f"{RANDOM_ROWS}, {most}",
            KNN_LM,
            KNN_LM_OF_DISTANCE,
        )
        found[name] = {
            other: compared(rows[of]["log_p"], rows[other]["log_p"], reader.test) for other in others if other in rows
        }
    return found


def mixture_rows(reader: Reader, lm: CausalLM, datastore: Datastore) -> dict[str, Any]:
    """Prefixes of one row's chunk; K rows, each with the mixture that is fitted to them; and as many random rows."""
    rows: dict[str, Any] = {}
    most = max(reader.args.neighbors)
    nearest, random = (
        [reader.proposals(lm, of, split, most) for split in (reader.validation, reader.test)]
        for of in (datastore, RandomRows(datastore))
    )
    ways = [(ONE_PREFIX, nearest, 1)] + [(f"KCD, {k} rows", nearest, k) for k in sorted(set(reader.args.neighbors))]
    for name, (validation, test), k in [*ways, (f"{RANDOM_ROWS}, {most}", random, most)]:
        fitted, _ = fit_map(validation.nearest(k), reader.args.q_max, n_neighbors=k, prefixes=True)
        assert fitted.mixture is not None
        (row,) = cdlm_rows({name: fitted}, test.nearest(k), reader.test.size).values()
        mixture = fitted.mixture
        words = f"{name}, T {mixture.temperature:g}, power {mixture.lm_power:g}" if k > 1 else name
        rows[name] = row | {"shown": words, "mixture": asdict(mixture)}
    return rows


class RandomRows(Datastore):
    """A datastore whose rows are drawn at random and alike in similarity: what its vectors bring is not there."""

    def __init__(self, datastore: Datastore) -> None:
        self.n_rows, self.hidden_size, self._datastore = datastore.n_rows, datastore.hidden_size, datastore
        self._generator = torch.Generator().manual_seed(RANDOM_ROWS_SEED)

    def trie(self, entry_token_id: int) -> TokenTrie | None:
        found = self._datastore.trie(entry_token_id)
        if found is None:
            return None
        found = replace(found)
        found.__dict__["index"] = _RandomIndex(len(found.windows), self._generator)
        return found


@dataclass(frozen=True)
class _RandomIndex:
    n_rows: int
    generator: torch.Generator

    def nearest_k(self, queries: Tensor, n_neighbors: int, allowed: None) -> tuple[Tensor, Tensor]:
        """As of `VectorIndex`, without a restriction."""
        k = min(n_neighbors, self.n_rows)
        order = torch.rand(len(queries), self.n_rows, generator=self.generator).topk(k, dim=1).indices
        return order, torch.zeros(len(queries), k, dtype=torch.float64)


def compared(log_p: np.ndarray, other: np.ndarray, split: Split) -> dict[str, Any]:
    """The ratio of two ways' perplexities with its interval over windows, and over passages, whose windows are alike."""
    columns = (log_p, other, split.plan.lengths - 1)
    over_passages = ratio(*(of_passages(column, split.passages) for column in columns))
    over = {"lower_over_passages": over_passages.lower, "upper_over_passages": over_passages.upper}
    return vars(ratio(*columns)) | over


def ngram_row(reader: Reader, validation: Proposals, test: Proposals) -> dict[str, Any]:
    """Of the train split's n-grams."""
    path = split_path(reader.work.data(), reader.work.partition)
    passages = [encode(reader.tokenizer, passage.text) for passage in read_passages(path)]
    of_splits = [split.windows() for split in (reader.validation, reader.test)]
    mixed = ngrams.fit(passages, of_splits[0], validation.log_probs)
    of_tokens = mixed.log_probs(of_splits[1], test.log_probs)
    log_p = np.array([of_tokens[part].sum() for part in test.windows()])
    words = f"{NGRAMS}, orders 1 to {ngrams.ORDERS}"
    return {"shown": words, "log_p": log_p} | compared_figures(log_p, test, reader.test.size)


def knn_rows(reader: Reader, lm: CausalLM, validation: Proposals, test: Proposals) -> dict[str, Any]:
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
    choices = knn_lm.tune(keys, grouped(read_positions(lm, part, batch_size)), of_part, lm.device)
    positions = grouped(read_positions(lm, reader.test.plan, batch_size))
    found = knn_lm.log_probs(keys, positions, test.log_probs, choices, lm.device)
    rows = {}
    for name, choice, of_tokens in zip((KNN_LM, KNN_LM_OF_DISTANCE), choices, found, strict=True):
        log_p = np.array([of_tokens[part].sum() for part in test.windows()])
        words = f"{name}, k {choice.n_neighbors}, T {choice.temperature:.3g}"
        words += "" if choice.weight_map else f", λ {choice.weight:.3g}"
        about = {"shown": words, "keys": len(keys.kept), "tuned_on_tokens": len(of_part), "log_p": log_p}
        rows[name] = about | asdict(choice) | compared_figures(log_p, test, reader.test.size)
    return rows


def report(name: str, found: dict[str, Any]) -> str:
    header = ["", "perplexity (95%)", "to the small LM's (95%)", "bits/byte", "accepted %", "from chunks %"]
    lines = []
    for row in found["rows"].values():
        shares = [f"{row[key]:.1%}".rstrip("%") if key in row else "" for key in ("accepted", "from_chunks")]
        lines.append([row["shown"], *perplexity_cells(row), f"{row['bits_per_byte']:.4f}", *shares])
    to = []
    for key, of in (("fitted_map_to", FITTED), ("most_rows_to", "most rows")):
        ratios = (
            "{value:.4f} ({lower:.4f} to {upper:.4f}, over passages {lower_over_passages:.4f} to "
            "{upper_over_passages:.4f})".format(**found_to)
            + f" of {other}"
            for other, found_to in found[key].items()
        )
        to.append(f"perplexity of KCD, {of}: {'; '.join(ratios)}")
    about = f"{found['tokens']:,} tokens in {found['windows']:,} windows of {found['passages']} passages of test; "
    return "\n".join([name, table(header, lines), f"{about}{found['proposals']}", *to])


def main(argv: list[str] | None = None) -> None:
    run_table(parse_args(argv), argv, measure, report)


if __name__ == "__main__":
    run_script(main)
