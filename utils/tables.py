"""Text for a terminal: tables, and characters that are safe to print."""

import os
from collections.abc import Sequence
from typing import TextIO


def align(rows: Sequence[Sequence[str]], n_left: int = 1) -> list[str]:
    """The rows as lines with columns of equal width: the first `n_left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" * n_left + ">" * (len(widths) - n_left)
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def format_number(value: float | None, scale: float, decimals: int) -> str:
    """A number times `scale` with thousands separated, or - for None."""
    # Adding zero makes a rounded -0.0 print without its sign.
    return "-" if value is None else f"{round(value * scale, decimals) + 0.0:,.{decimals}f}"


def use_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colours and its user wants them (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(text: str) -> str:
    """The text with control characters, but for line ends and tabs, as symbols: it cannot command the terminal."""
    return text.translate(_CONTROL_SYMBOLS)


# U+2400 … are the symbols of the control characters U+0000 …; line ends and tabs stay.
_CONTROL_SYMBOLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_CONTROL_SYMBOLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
