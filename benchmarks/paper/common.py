"""What the paper's tables share: their flags, the texts they are about, and the interval of a mean."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.cli import Parser, non_negative_int, plain_name, positive_int, share
from utils.corpora import split_path
from utils.files import require_file

ROOT = Path(__file__).resolve().parent.parent.parent
LARGE_MODEL, SMALL_MODEL = (ROOT / "examples" / "models" / size for size in ("large", "small"))
EXAMPLE_TEXT = "python-docs"
SPLITS = ("train", "validation", "test")
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Text:
    """A text with train, validation and test split, as stage 1 writes it; folder None: the embedded python-docs."""

    name: str
    folder: Path | None


def add_shared_flags(parser: Parser) -> None:
    """What every table takes, beside its own flags."""
    parser.add_argument("--model_large", default=str(LARGE_MODEL), help="model whose probabilities choose the chunks")
    parser.add_argument("--model_small", default=str(SMALL_MODEL), help="model that is helped by another one's chunks")
    parser.add_argument(
        "--text",
        dest="texts",
        type=text_flag,
        action="append",
        metavar="NAME=DIR",
        help=f"a text's name and folder, as stage 1 writes it; may be repeated (default: the embedded {EXAMPLE_TEXT})",
    )
    parser.add_argument("--tok_prob_threshold", type=share, default=0.3, help="γ of the datastore, in [0, 1)")
    parser.add_argument("--max_chunk_length", type=non_negative_int, default=64, help="tokens of a chunk; 0: no bound")
    parser.add_argument("--device", default="auto", help="torch device; auto: CUDA if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the models' weights"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "output" / "paper",
        help="folder of datastores, made where they are missing",
    )
    parser.add_argument("--output", type=Path, help="JSON file of all results")


def add_window_flags(parser: Parser) -> None:
    """What the tables of perplexity take as well."""
    parser.add_argument("--perplexity_window", type=positive_int, default=512, help="tokens of a window")
    parser.add_argument("--max_windows", type=positive_int, help="only a split's first windows (default: all)")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="windows that a model reads together")


def text_flag(value: str) -> Text:
    name, is_there, folder = value.partition("=")
    if not is_there or not folder:
        raise argparse.ArgumentTypeError(f"got {value!r}, expected NAME=DIR, such as law=data/law")
    return Text(plain_name(name), Path(folder))


def texts_of(args: argparse.Namespace) -> list[Text]:
    """The texts that were asked for; raises InputError where a split of one is missing."""
    texts = args.texts or [Text(EXAMPLE_TEXT, None)]
    for text in texts:
        if text.folder is not None:
            for split in SPLITS:
                require_file(split_path(text.folder, split), "stage 1 writes, with train, validation and test split")
    return texts


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
    """The mean of values (N,), such as one of each prompt, weighted where wanted; which N were drawn is what varies.

    The draws are the same each time, so that differences of the same N are paired.
    """
    weights = np.ones(len(values)) if weights is None else weights
    counts = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), size=N_RESAMPLES)
    means = (counts @ (values * weights)) / (counts @ weights)
    lower, upper = np.percentile(means, [2.5, 97.5])
    return Interval(float((values * weights).sum() / weights.sum()), float(lower), float(upper))
