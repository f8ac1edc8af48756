"""Text for a terminal: columns stay under each other, and what a model writes cannot command it."""

import io

import pytest

from utils.tables import align, format_number, use_colour, visible


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    rows = [("method", "tokens/s", "n"), ("CD-LM", "1,234", "10"), ("plain", "7", "")]
    assert align(rows) == ["method  tokens/s   n", "CD-LM      1,234  10", "plain          7"]
    assert align(rows, n_left=2) == ["method  tokens/s   n", "CD-LM   1,234     10", "plain   7"]


@pytest.mark.parametrize(
    ("value", "scale", "decimals", "shown"),
    [
        (None, 1, 2, "-"),
        (1234.5, 1, 1, "1,234.5"),
        (0.125, 100, 0, "12"),
        (-0.0004, 1, 2, "0.00"),
        (-0.006, 1, 2, "-0.01"),
    ],
)
def test_numbers_are_scaled_and_rounded(value: float | None, scale: float, decimals: int, shown: str) -> None:
    assert format_number(value, scale, decimals) == shown


def test_control_characters_are_shown_and_do_nothing() -> None:
    assert visible("a\tb\n\x1b[31m\x00\x7f\r\x9b") == "a\tb\n␛[31m␀␡␍\ufffd"
    assert visible("naïve 東京 🙂\u200d") == "naïve 東京 🙂\u200d"


def test_colour_needs_a_terminal_and_no_veto(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert use_colour(Terminal())
    assert not use_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")
    assert use_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not use_colour(Terminal())
