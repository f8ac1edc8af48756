"""What a script says on stderr while it works: progress bars, and what it reads and how long that takes.

How much of it is shown is the level of the logger `utils`, which the modules' own loggers inherit: WARNING under
--quiet, INFO (bars) by default, DEBUG (bars and lines) under --verbose.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LOGGER = logging.getLogger("utils")
LOGGER.setLevel(logging.INFO)
# Seconds between two states of a bar that goes to a file.
LOG_INTERVAL_S = 10
# Libraries that show bars of their own while they fetch something; read when they are imported, which is later.
HIDE_LIBRARY_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """Show results only, or lines beside the bars, for the rest of this process or until it is called again."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if verbose and not any(isinstance(handler, _LineHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_LineHandler())
    if quiet:
        os.environ.update(dict.fromkeys(HIDE_LIBRARY_BARS, "1"))


class ProgressBar(tqdm):
    """A bar on stderr with the rate and the time left; none under --quiet, and seldom a new state in a log file."""

    def __init__(
        self,
        iterable: Iterable[Item] | None = None,
        *,
        desc: str,
        unit: str,
        total: int | None = None,
        unit_scale: bool = False,
        leave: bool = True,
        disable: bool = False,
    ) -> None:
        super().__init__(
            iterable,
            desc=desc,
            unit=f" {unit}",
            total=total,
            unit_scale=unit_scale,
            leave=leave,
            disable=disable or not LOGGER.isEnabledFor(logging.INFO),
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else LOG_INTERVAL_S,
        )

    def end(self) -> None:
        """Take what there was for all there is, where that was not known before."""
        self.total = self.n
        self.refresh()


def end_bars() -> None:
    """Leave the bars as they are, what is printed next on a line of its own; an error may have left some open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Under --verbose: say what begins, and how long it took once it has ended without an error."""
    LOGGER.debug("%s …", what)
    started = time.perf_counter()
    yield
    LOGGER.debug("%s: %.2f s", what, time.perf_counter() - started)


class _LineHandler(logging.Handler):
    """Writes a line on stderr, past the bars, with the seconds since the program began."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.relativeCreated / 1000:7.2f} s  {record.getMessage()}", file=sys.stderr)
