"""What the tables of perplexity share: flags, texts in windows, acceptance maps fitted on validation, intervals."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import write_json
from benchmarks.paper.datastores import MAX_CHUNK_LENGTH, SMALL, Work, add_work, work_of
from utils.cli import COSINE, NON_NEGATIVE_INT, POSITIVE_INT, Parser, Range, file_name
from utils.datastore.store import Datastore, open_datastore
from utils.decoding.acceptance import Acceptance, NeighborMixture
from utils.evaluation.marginal import Proposals
from utils.evaluation.perplexity import (
    Setting,
    TextSize,
    cdlm_figures,
    find_proposals,
    fit_maps,
    plan_text,
    setting_log_likelihoods,
)
from utils.files import make_folder, require_file
from utils.lm.model import (
    CausalLM,
    load_config,
    load_lm,
    load_tokenizer,
    pick_device,
    require_known_ids,
    require_windows_fit,
)
from utils.text.corpora import read_passages, split_path
from utils.text.prompts import added_tokens
from utils.text.windows import WindowPlan, WindowShape

SPLITS = ("train", "validation", "test")
# θ of the default map are tried on validation: the paper tunes its η too, and what is right differs from model to model.
THETAS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995)
DEFAULT, TUNED, CONSTANT, FITTED = "default map, θ", "default map, tuned θ", "best constant q", "fitted map"
N_RESAMPLES = 2000

Maps = dict[str, Setting]


# ---- Flags


def add_flags(parser: Parser) -> None:
    """The flags of a table of perplexity: by default the large model's chunks help the small one."""
    add_work(parser, model_gen=SMALL)
    parser.add_argument(
        "--text",
        dest="texts",
        type=named_folder,
        action="append",
        metavar="NAME=DIR",
        help="in the place of --dataset: a name and stage 1's folder with all three splits; may be repeated",
    )
    parser.add_argument(
        "--tok_prob_threshold", type=Range(float, least=0, below=1), default=0.3, help="γ of the datastore, in [0, 1)"
    )
    parser.add_argument(
        "--max_chunk_length", type=POSITIVE_INT, default=MAX_CHUNK_LENGTH, help="tokens of a chunk, at most"
    )
    parser.add_argument(
        "--skip_first_tokens", type=NON_NEGATIVE_INT, help="of each window, not in the datastore (default: stage 3's)"
    )
    parser.add_argument("--similarity_threshold", type=COSINE, default=0.5, help="θ of the map that one knob gives")
    add_windows(parser)
    parser.add_argument("--output", type=Path, help="JSON file of all results")


def add_windows(parser: Parser) -> None:
    """The flags of how a text's perplexity is measured."""
    parser.add_argument(
        "--q_max", type=Range(float, above=0, below=1), default=0.999, help="highest acceptance probability"
    )
    parser.add_argument("--perplexity_window", type=Range(int, least=2), default=512, help="tokens of a window")
    parser.add_argument("--max_windows", type=POSITIVE_INT, help="only a split's first windows (default: all)")
    parser.add_argument("--batch_size", type=POSITIVE_INT, default=8, help="windows that a model reads together")
    parser.add_argument("--trie_cache_gb", type=Range(float, above=0), default=4.0, help="GB of tries kept in memory")


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=DIR, such as law=data/law")
    return file_name(name), Path(folder)


def works_of(args: argparse.Namespace) -> dict[str, Work]:
    """The texts that the flags ask for, by name; raises InputError where a split of one is missing."""
    work = work_of(args)
    if not args.texts:
        return {work.dataset: work}
    for _, folder in args.texts:
        for split in SPLITS:
            require_file(split_path(folder, split), "stage 1 writes, with train, validation and test split")
    return {name: replace(work.of_text(folder, name), dataset=name) for name, folder in args.texts}


def run_table(
    args: argparse.Namespace,
    argv: list[str] | None,
    measure: Callable[[Work, argparse.Namespace], dict[str, Any]],
    report: Callable[[str, dict[str, Any]], str],
) -> None:
    """Measure each text that the flags ask for, print its table, and write the results of all where they are wanted."""
    results = {}
    for name, work in works_of(args).items():
        results[name] = measure(work, args)
        print(report(name, results[name]), end="\n\n")
    if args.output is not None:
        write_json(args.output, pick_device(args.device), argv, results)


# ---- Texts in windows


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """(T,) int64 token ids of a text, nothing added."""
    return np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """A split that perplexity is measured on, in windows that are the same for all models."""

    path: Path
    plan: WindowPlan
    size: TextSize
    passages: np.ndarray  # (W,) int64: which passage each window is of

    @classmethod
    def of(cls, path: Path, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, folder: Path) -> "Split":
        """folder: for a temporary file. Raises InputError where the file has no windows."""
        shape = WindowShape(args.perplexity_window, args.perplexity_window, min_length=2)
        plan, size = plan_text(path, tokenizer, shape, args.max_windows, folder)
        lengths = (len(encode(tokenizer, each.text)) for each in read_passages(path))
        # A window of one token predicts nothing, and is none of the plan.
        n_windows = [sum(end - start > 1 for start, end in shape.bounds(length)) for length in lengths]
        return cls(path, plan, size, np.repeat(np.arange(len(n_windows)), n_windows)[: plan.n_windows])

    def windows(self) -> list[np.ndarray]:
        """The token ids of each window."""
        return [self.plan.token_ids(window) for window in range(self.plan.n_windows)]


@dataclass(frozen=True)
class Reader:
    """Reads the splits of a text with a model; what stands between the flags and proposals."""

    work: Work
    args: argparse.Namespace
    tokenizer: PreTrainedTokenizerBase
    validation: Split
    test: Split

    @classmethod
    def of(cls, work: Work, args: argparse.Namespace) -> "Reader":
        """Raises InputError where a model cannot read the windows or a split has none."""
        tokenizer = load_tokenizer(work.model_gen, args.cache_dir)
        n_prefix = len(added_tokens(tokenizer)[0])
        for model in (work.model_ds, work.model_gen):
            config = load_config(model, args.cache_dir)
            require_windows_fit(config, model, args.perplexity_window, n_prefix, ("--perplexity_window",))
        folder = make_folder(work.folder)
        splits = [Split.of(work.split(name), tokenizer, args, folder) for name in SPLITS[1:]]
        return cls(work, args, tokenizer, *splits)

    def load(self, model: str) -> CausalLM:
        lm = load_lm(model, self.args.device, self.args.dtype, self.args.cache_dir)
        for split in (self.validation, self.test):
            require_known_ids(lm.model.config, lm.name, split.plan.largest_id)
        return lm

    def datastore(self, lm: CausalLM, work: Work | None = None) -> Datastore:
        """The datastore of the text, or of a part of it, made where it is not there."""
        args = self.args
        folder = (work or self.work).tries(args.tok_prob_threshold, args.max_chunk_length, args.skip_first_tokens)
        return open_datastore(folder, device=lm.device, max_bytes=int(self.args.trie_cache_gb * 10**9))

    def proposals(self, lm: CausalLM, datastore: Datastore | None, split: Split, n_neighbors: int = 1) -> Proposals:
        """The proposals of a split; n_neighbors: rows that propose at each position."""
        several = Acceptance(0.0, neighbors=NeighborMixture(n_neighbors)) if n_neighbors > 1 else None
        return find_proposals(lm, datastore, split.plan, self.args.batch_size, several)

    def maps(self, validation: Proposals) -> Maps:
        """The settings that every table shows side by side, each chosen or fitted on the validation split alone."""
        fitted, constant = fit_maps(self.validation.path, validation, self.args.q_max)
        by_theta = [Acceptance(theta, "bernoulli", self.args.q_max) for theta in THETAS]
        tried = setting_log_likelihoods(by_theta, validation)
        return {
            DEFAULT: Acceptance(self.args.similarity_threshold, "bernoulli", self.args.q_max),
            TUNED: by_theta[int(tried.sum(axis=1).argmax())],
            CONSTANT: constant,
            FITTED: fitted,
        }


def shown(name: str, setting: Setting) -> str:
    """A setting in words, with its number."""
    if isinstance(setting, Acceptance):
        return f"{name} {setting.similarity_threshold:g}"
    return f"{name} {setting.probabilities[0]:.3g}" if name == CONSTANT else name


# ---- Figures


def ratio(log_p: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> "Interval":
    """The perplexity of one way to another's, from the log-likelihoods of the same windows (W,), lengths (W,) tokens."""
    mean = mean_interval((other - log_p) / lengths, lengths)
    return Interval(*np.exp([mean.value, mean.lower, mean.upper]).tolist())


def of_passages(values: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """The sums over the windows of each passage; values and passages (W,)."""
    return np.bincount(np.unique(passages, return_inverse=True)[1], values)


def cdlm_rows(maps: Maps, proposals: Proposals, size: TextSize) -> dict[str, Any]:
    """The figures of each setting, and under "log_p" the log-likelihoods of the windows."""
    settings = list(maps.values())
    figures, log_p = cdlm_figures(proposals, settings, size), setting_log_likelihoods(settings, proposals)
    return {
        name: {"shown": shown(name, setting), "log_p": of_windows} | found
        for (name, setting), found, of_windows in zip(maps.items(), figures, log_p, strict=True)
    }


def headings(rows: dict[str, Any]) -> list[str]:
    """Of a column for each setting, where the rows are other texts or datastores: what was chosen differs from row to row."""
    return [row["shown"] if name == DEFAULT else name for name, row in rows.items()]


def without_windows(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows as they are written, without what each window had."""
    return {name: {key: value for key, value in row.items() if key != "log_p"} for name, row in rows.items()}


def proposals_in_words(proposals: Proposals) -> str:
    """At how many positions there was one, how many were right, and how similar they were."""
    known = ~np.isnan(proposals.similarities)
    if not known.any():
        return "no proposals"
    quantiles = np.percentile(proposals.similarities[known], [5, 25, 50, 75, 95])
    return (
        f"proposals at {known.mean():.1%}, {proposals.matches[known].mean():.1%} of them what the text says; "
        f"similarity, 5 to 95%: {' '.join(f'{value:.3f}' for value in quantiles)}"
    )


def perplexity_cells(row: dict[str, Any]) -> list[str]:
    """Perplexity and its ratio to the base LM's, each with its interval."""
    cells = [Interval(row["perplexity"], row["perplexity_lower"], row["perplexity_upper"]).text(2)]
    cells.append(ratio_cell(row) if "ratio" in row else "")
    return cells


def ratio_cell(row: dict[str, Any]) -> str:
    """Perplexity to the base LM's, with its interval."""
    return Interval(row["ratio"], row["ratio_lower"], row["ratio_upper"]).text(4)


@dataclass(frozen=True)
class Interval:
    """A figure and its bootstrap 95% interval."""

    value: float
    lower: float
    upper: float

    def text(self, decimals: int = 3, scale: float = 1.0) -> str:
        value, lower, upper = (f"{scale * figure:,.{decimals}f}" for figure in (self.value, self.lower, self.upper))
        return f"{value} ({lower} to {upper})"


def mean_interval(values: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """The mean of values (N,), such as one of each window or prompt, and by how much it hangs on which were drawn.

    The draws are the same each time, so that differences of the same N are paired. weights (N,); None: all alike.
    """
    weights = np.ones(len(values)) if weights is None else weights
    counts = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), size=N_RESAMPLES)
    means = (counts @ (values * weights)) / (counts @ weights)
    lower, upper = np.percentile(means, [2.5, 97.5])
    return Interval(float((values * weights).sum() / weights.sum()), float(lower), float(upper))
