"""What a script says on stderr while it works: progress bars, and under --verbose what it reads and how long that takes.

The level of the logger `utils`, which the loggers of its modules inherit, decides how much is shown: WARNING under
--quiet, INFO (bars) by default, DEBUG (bars and lines) under --verbose.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakSet

from tqdm import tqdm

Item = TypeVar("Item")

LOGGER = logging.getLogger("utils")
LOGGER.setLevel(logging.INFO)
# Seconds between two states of a bar that goes to a file, so that a log of hours stays short.
LOG_INTERVAL_S = 10
# Libraries that show bars of their own while they download; they read these variables when they are first imported.
HIDE_LIBRARY_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """Choose how much this process shows from now on."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if verbose and not any(isinstance(handler, _LineHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_LineHandler())
    if quiet:
        os.environ.update(dict.fromkeys(HIDE_LIBRARY_BARS, "1"))


class ProgressBar(tqdm):
    """A bar on stderr with the rate and the time left; hidden under --quiet, and rarely updated in a log file."""

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
        _BARS.add(self)

    def end(self) -> None:
        """Show the bar as full where its total was not known before."""
        self.total = self.n
        self.refresh()


_BARS: "WeakSet[ProgressBar]" = WeakSet()


def close_bars() -> None:
    """Close the bars that an error left open, so that what is printed next starts on a line of its own."""
    for bar in list(_BARS):
        bar.close()


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Under --verbose: say what begins, and how long it took once it has ended without an error."""
    LOGGER.debug("%s …", what)
    started = time.perf_counter()
    yield
    LOGGER.debug("%s: %.2f s", what, time.perf_counter() - started)


class _LineHandler(logging.Handler):
    """Writes a line on stderr above the bars, with the seconds since the program began."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.relativeCreated / 1000:7.2f} s  {record.getMessage()}", file=sys.stderr)
