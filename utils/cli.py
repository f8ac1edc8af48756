"""The flags that several scripts share, each with one spelling, default and help text, and how a script ends."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.files import InputError
from utils.progress import end_bars, set_verbosity


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong flags in one line, without the usage of every flag before it."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class StageParser(Parser):
    """The parser of a stage: it also takes, and obeys, the flags that say how much is shown on the way."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        shown = self.add_mutually_exclusive_group()  # added here, to come last in the help
        shown.add_argument("--quiet", action="store_true", help="show results and errors only, no progress bars")
        shown.add_argument("--verbose", action="store_true", help="also say what is read and how long each part takes")
        parsed = super().parse_args(args, namespace)
        set_verbosity(quiet=parsed.quiet, verbose=parsed.verbose)
        return parsed


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """The description as it is written; each flag's default behind its help where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or action.required or "default" in shown:
            return shown
        return f"{shown} (default: %(default)s)"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as job schedulers send it before they kill: the script ends as it does for Ctrl-C."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main, which ends in one line on stderr and exit status 2 for unusable input, 130 for Ctrl-C, 143
    for SIGTERM; our bugs keep a traceback."""
    prog = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        main()
    except InputError as error:
        sys.exit(_last_words(prog, f"error: {error}", 2))
    except KeyboardInterrupt as end:
        what, status = ("terminated", 143) if isinstance(end, Terminated) else ("interrupted", 130)
        sys.exit(_last_words(prog, f"{what}; run the same command again and it goes on from here", status))


def _raise_terminated(*_: object) -> NoReturn:
    raise Terminated


def _last_words(prog: str, message: str, status: int) -> int:
    # From here on there is nothing to clean up: another signal ends the process at once, without a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    end_bars()
    print(f"{prog}: {message}", file=sys.stderr)
    return status


# ---- Types of flags


def positive_int(text: str) -> int:
    return int(_number(text, int, "a whole number of at least 1", lambda value: value >= 1))


def non_negative_int(text: str) -> int:
    return int(_number(text, int, "a whole number of at least 0", lambda value: value >= 0))


def positive_float(text: str) -> float:
    return _number(text, float, "a number above 0", lambda value: 0 < value < float("inf"))


def non_negative_float(text: str) -> float:
    return _number(text, float, "a number of at least 0", lambda value: 0 <= value < float("inf"))


def share(text: str) -> float:
    return _number(text, float, "a number in [0, 1)", lambda value: 0 <= value < 1)


def probability(text: str) -> float:
    return _number(text, float, "a number in (0, 1)", lambda value: 0 < value < 1)


def top_p(text: str) -> float:
    return _number(text, float, "a number in (0, 1]", lambda value: 0 < value <= 1)


def draft_size(text: str) -> int:
    return int(_number(text, int, "a whole number from 1 to 256", lambda value: 1 <= value <= 256))


def window_size(text: str) -> int:
    return int(_number(text, int, "a whole number of at least 2", lambda value: value >= 2))


def cosine(text: str) -> float:
    return _number(text, float, "a cosine similarity in [-1, 1]", lambda value: -1 <= value <= 1)


def boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return values[text.lower()]


def plain_name(text: str) -> str:
    if not text or "/" in text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name without a slash: it becomes a file's")
    return text


def _number(text: str, kind: type, expected: str, is_right: Callable[[float], bool]) -> float:
    try:
        value = kind(text)
        # Comparisons with NaN are all false, so it is refused too.
        if is_right(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")


# ---- Flags of several scripts


def add_cache_dir(parser: Parser) -> None:
    parser.add_argument(
        "--cache_dir", type=Path, help="folder for what the Hugging Face hub sends (default: the hub's own)"
    )


def add_model(parser: Parser, default: str | None = None) -> None:
    """default: what the script itself takes where no --model_path is given, for the help; None: one must be given."""
    of_model = "folder or hub name of a causal language model" + (f" (default: {default})" if default else "")
    parser.add_argument("--model_path", required=default is None, help=of_model)
    add_cache_dir(parser)
    parser.add_argument(
        "--device", default="auto", help="torch device, such as cpu or cuda:1; auto: CUDA if there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model's weights; auto: the checkpoint's on CUDA, float32 on CPU",
    )


def add_datastore_labels(parser: Parser, dataset_flag: str, required: bool = True) -> None:
    """The five labels that name a datastore's folder; stage 5 spells `--dataset_name` as `--dataset`."""
    parser.add_argument(
        dataset_flag, dest="dataset_name", required=required, help="label of the text, part of folder names"
    )
    parser.add_argument(
        "--model_ds", required=required, help="label of the model whose probabilities choose the chunks"
    )
    parser.add_argument("--model_gen", required=required, help="label of the model whose hidden states index them")
    parser.add_argument("--partition", required=required, help="label of the split, such as train")
    parser.add_argument(
        "--tok_prob_threshold", type=share, required=required, help="γ in [0, 1): a token above it belongs to a chunk"
    )


def add_max_workers(parser: Parser) -> None:
    parser.add_argument(
        "--max_workers", type=positive_int, default=32, help="processes, never more than there are cores"
    )


def add_verify_checksums(parser: Parser) -> None:
    parser.add_argument(
        "--verify_checksums",
        action="store_true",
        help="read all of what the stages before wrote and name what was changed since; sizes are always compared",
    )


def add_excluded_tries(parser: Parser) -> None:
    parser.add_argument(
        "--excluded_tries_prior",
        type=Path,
        metavar="FILE",
        help="JSON list of entry token ids whose tries are left out",
    )
