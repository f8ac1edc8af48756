"""Command lines: the flags that several scripts share, each with one spelling, default and help text, and how a script
ends."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import ENAMETOOLONG
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from utils.files import InputError
from utils.progress import close_bars, set_verbosity


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong flags in one line instead of printing the usage of every flag first."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class StageParser(Parser):
    """The parser of a stage, which also has --quiet and --verbose and obeys them."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As usual; `given` in the result is the set of the flags, by the names of their values, that were given."""
        verbosity = self.add_mutually_exclusive_group()  # added here, to come last in the help
        verbosity.add_argument("--quiet", action="store_true", help="show results and errors only, no progress bars")
        verbosity.add_argument(
            "--verbose", action="store_true", help="also say what is read and how long each part takes"
        )
        parsed = super().parse_args(args)
        # Once more: argparse leaves alone what the namespace has already, so what stays unset was not given.
        unset = object()
        second = super().parse_args(args, argparse.Namespace(**dict.fromkeys(vars(parsed), unset)))
        parsed.given = {name for name, value in vars(second).items() if value is not unset}
        set_verbosity(quiet=parsed.quiet, verbose=parsed.verbose)
        return parsed

    def refuse_flags(self, parsed: argparse.Namespace, names: Sequence[str], reason: str) -> None:
        """Refuse the first of some flags that was given although it would do nothing."""
        for name in names:
            if name in parsed.given:
                self.error(f"--{name}: {reason}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Prints the description as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or action.required or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Terminated(KeyboardInterrupt):
    """SIGTERM, which job schedulers send before they kill: the script ends as it does for Ctrl-C."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function.

    Unusable input ends in one line on stderr and exit status 2, Ctrl-C in 130, SIGTERM in 143, and a reader that closes
    the pipe (`| head`) in 141, as it ends other programs. Bugs keep a traceback.
    """
    prog = Path(sys.argv[0]).name
    _prepare_streams()
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except InputError as error:
        sys.exit(_final_message(prog, f"error: {error}", 2))
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        name = max(Path(str(error.filename)).parts, key=len)
        message = f"error: {name[:60]}…: is too long for the name of a file; give a shorter name or label"
        sys.exit(_final_message(prog, message, 2))
    except KeyboardInterrupt as interrupt:
        what, status = ("terminated", 143) if isinstance(interrupt, Terminated) else ("interrupted", 130)
        sys.exit(_final_message(prog, f"{what}; run the same command again and it goes on from here", status))


def _prepare_streams() -> None:
    """Let printing never fail: not on a terminal without γ and θ, and not where cron closed the streams."""
    # A file that is opened later must not get the number of a closed stream, which libraries print to.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # by worker processes too
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open until the process ends)
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _raise_terminated(*_: object) -> NoReturn:
    raise Terminated


def _final_message(prog: str, message: str, status: int) -> int:
    # Nothing is left to clean up, so a second signal may end the process at once, without a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        close_bars()
        print(f"{prog}: {message}", file=sys.stderr)
    except OSError:
        _drop_output()
    return status


def _drop_output() -> None:
    """Forget what is still buffered and has no reader: Python would complain about it at exit."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- Types of flags


@dataclass(frozen=True)
class Range:
    """An argparse type: a number within bounds. `least` and `most` belong to the range, `above` and `below` do not."""

    kind: type[int] | type[float]
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
            # NaN compares false, so it is refused as well.
            if self.least <= value <= self.most and self.above < value < self.below:
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {self}")

    def __str__(self) -> str:
        number = "a whole number" if self.kind is int else "a number"
        if self.most == self.below == math.inf:
            return (
                f"{number} above {self.above:g}" if self.least == -math.inf else f"{number} of at least {self.least:g}"
            )
        low = f"({self.above:g}" if self.least == -math.inf else f"[{self.least:g}"
        high = f"{self.below:g})" if self.most == math.inf else f"{self.most:g}]"
        return f"{number} in {low}, {high}"


POSITIVE_INT = Range(int, least=1)
NON_NEGATIVE_INT = Range(int, least=0)
COSINE = Range(float, least=-1, most=1)


def boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return values[text.lower()]


def file_name(text: str) -> str:
    if not text or "/" in text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name without a slash: it becomes a file's")
    return text


# ---- Flags of several scripts


def add_cache_dir(parser: Parser) -> None:
    parser.add_argument(
        "--cache_dir", type=Path, help="folder for downloads from the Hugging Face hub (default: the hub's own)"
    )


def add_model(parser: Parser, default: str | None = None) -> None:
    """default: what the script uses without --model_path, for the help; None: the flag is required."""
    of_model = "folder or hub name of a causal language model or of a peft adapter, or a .gguf file"
    of_model += f" (default: {default})" if default else ""
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


def add_threads(parser: Parser) -> None:
    parser.add_argument(
        "--threads",
        type=POSITIVE_INT,
        metavar="N",
        help="threads that torch computes with (default: OMP_NUM_THREADS, or those of the run that is continued, or, on a "
        "CPU, torch's own number or one, whichever reads a text faster at the start)",
    )


def add_datastore_labels(parser: Parser, dataset_flag: str, required: bool = True) -> None:
    """The five labels that name a datastore's folder; stage 5 spells `--dataset_name` as `--dataset`."""
    parser.add_argument(
        dataset_flag, dest="dataset_name", required=required, help="label of the text, part of folder names"
    )
    parser.add_argument(
        "--model_ds", required=required, help="label of the model whose probabilities choose the chunks"
    )
    parser.add_argument(
        "--model_gen", help="label of the model whose hidden states index the chunks (default: --model_ds)"
    )
    parser.add_argument("--partition", required=required, help="label of the split, such as train")
    parser.add_argument(
        "--tok_prob_threshold",
        type=Range(float, least=0, below=1),
        required=required,
        help="γ in [0, 1): a token above it belongs to a chunk",
    )


def add_max_workers(parser: Parser) -> None:
    parser.add_argument(
        "--max_workers", type=POSITIVE_INT, default=32, help="processes, never more than there are cores"
    )


def add_verify_checksums(parser: Parser) -> None:
    parser.add_argument(
        "--verify_checksums",
        action="store_true",
        help="compare the SHA-256 of all input files with what the earlier stages recorded; sizes are always compared",
    )


def add_excluded_tries(parser: Parser) -> None:
    parser.add_argument(
        "--excluded_tries_prior",
        type=Path,
        metavar="FILE",
        help="JSON list of entry token ids whose tries are left out",
    )
