"""Results on the terminal: the summary as a table, and a generation with its chunks marked."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from utils.generation import AcceptedChunk, Decode, Generation, text_pieces

RUNS_PER_TABLE = 4
# Label, key, scale and decimals of each row over all prompts, and of each spread.
TOTAL_ROWS = (
    ("prompts", "prompts", 1, 0),
    ("new tokens", "new_tokens", 1, 0),
    ("forward passes", "forward_passes", 1, 0),
    ("FPS, forward passes saved (%)", "fps", 100, 1),
    ("TTS, time per token saved (%)", "tts", 100, 1),
    ("time per new token (ms)", "seconds_per_token", 1000, 2),
    ("time in all (s)", "seconds", 1, 2),
    ("  in the LM (s)", "lm_seconds", 1, 2),
    ("  in retrieval (s)", "retrieval_seconds", 1, 2),
    ("  in the rest (s)", "rest_seconds", 1, 2),
    ("tokens per forward pass", "tokens_per_forward", 1, 2),
    ("chunks accepted", "chunks_accepted", 1, 0),
    ("tokens from chunks (% of new)", "share_from_chunks", 100, 1),
    ("mean chunk length (tokens)", "mean_chunk_length", 1, 2),
    ("drafts verified", "drafts", 1, 0),
    ("drafted tokens per draft", "draft_length", 1, 2),
    ("accepted tokens per draft", "accepted_per_draft", 1, 2),
    ("perplexity under the base LM", "perplexity", 1, 2),
)
SPREAD_ROWS = (
    ("  FPS (%)", "fps", 100, 1),
    ("  TTS (%)", "tts", 100, 1),
    ("  time per new token (ms)", "seconds_per_token", 1000, 2),
    ("  tokens per forward pass", "tokens_per_forward", 1, 2),
    ("  tokens from chunks (% of new)", "share_from_chunks", 100, 1),
    ("  mean chunk length (tokens)", "mean_chunk_length", 1, 2),
)
SPREAD_HEADING = "over prompts: median [quartiles]"


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as a table for a terminal: a row per figure with its unit, a column per run, numbers on the right."""
    runs = list(summary["runs"].items())
    groups = [runs[start : start + RUNS_PER_TABLE] for start in range(0, len(runs), RUNS_PER_TABLE)]
    return "\n\n".join(_format_group(dict(group)) for group in groups)


def _format_group(runs: Mapping[str, Mapping[str, Any]]) -> str:
    lines = align(figure_rows(runs))
    if apart := [name for name, run in runs.items() if not run.get("tts_same_run", True)]:
        lines.append(
            f"TTS of {', '.join(apart)}: the baseline was timed by another command; time both by one to compare"
        )
    return "\n".join(lines)


def figure_rows(runs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The summary's runs as a table: the names of the runs, then a label and the figures of each."""
    rows = [("", *runs)]
    for label, key, scale, decimals in TOTAL_ROWS:
        if any(run.get(key) is not None for run in runs.values()):
            rows.append((label, *(_number(run.get(key), scale, decimals) for run in runs.values())))
    rows.append((SPREAD_HEADING, *("" for _ in runs)))
    for label, key, scale, decimals in SPREAD_ROWS:
        if any(run["spread"][key] for run in runs.values()):
            rows.append((label, *(_quartiles(run["spread"][key], scale, decimals) for run in runs.values())))
    return rows


def align(rows: Sequence[Sequence[str]], n_left: int = 1) -> list[str]:
    """The rows as lines, each column as wide as its widest cell; the first `n_left` columns on the left, the others on
    the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" * n_left + ">" * (len(widths) - n_left)
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def _number(value: float | None, scale: float, decimals: int) -> str:
    # Adding zero makes a rounded -0.0 print without its sign.
    return "-" if value is None else f"{round(value * scale, decimals) + 0.0:,.{decimals}f}"


def _quartiles(spread: Mapping[str, float] | None, scale: float, decimals: int) -> str:
    if spread is None:
        return "-"
    median, lower, upper = (
        _number(spread[key], scale, decimals) for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{median} [{lower}, {upper}]"


BRACKETS = "⟦", "⟧"
LINE_END = "↵"
RESET, DIM = "\x1b[0m", "\x1b[2m"
# Backgrounds of the 256-colour palette from the least to the most similar chunk, under black text.
SHADES = (194, 157, 120, 83)


def use_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colours and its user wants them (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def format_example(generation: Generation, name: str, decode: Decode, colour: bool = False) -> str:
    """One generation to read: the prompt, then what follows it with its chunks marked."""
    n_prompt, chunks = len(generation.prompt_ids), generation.chunks
    prompt = visible(text_pieces(generation.token_ids, [n_prompt], decode)[0])
    marked = mark_chunks(generation.token_ids, chunks, decode, n_prompt=n_prompt, colour=colour)
    n_from_chunks = sum(len(chunk.token_ids) for chunk in chunks)
    counted = f"{n_from_chunks} of {len(generation.new_token_ids)} tokens are from {len(chunks)} chunks"
    marking = "coloured, the stronger the more similar" if colour else f"in {''.join(BRACKETS)}"
    headings = f"prompt {generation.index}", f"{name}, chunks {marking}: {counted}"
    if colour:
        prompt = _coloured(prompt, DIM)
    return f"--- {headings[0]}\n{prompt}\n--- {headings[1]}\n{marked}\n---"


def mark_chunks(
    token_ids: Sequence[int],
    chunks: Sequence[AcceptedChunk],
    decode: Decode,
    *,
    n_prompt: int = 0,
    colour: bool = False,
) -> str:
    """The text of `token_ids` after the first `n_prompt` of them, its chunks in brackets or, with `colour`, coloured.

    A character whose bytes a border parts belongs to the piece that completes it. Control characters are shown as
    symbols, so that a generation cannot command the terminal.
    """
    chunks = sorted(chunks, key=lambda chunk: chunk.position)
    borders = [n_prompt]
    for chunk in chunks:
        borders += [chunk.position, chunk.position + len(chunk.token_ids)]
    pieces = [visible(piece) for piece in text_pieces(token_ids, borders, decode)][1:]
    similarities = [chunk.similarity for chunk in chunks]
    lowest, highest = min(similarities, default=0.0), max(similarities, default=0.0)
    underlined, end = False, -1
    for number, chunk in enumerate(chunks):
        rank = (chunk.similarity - lowest) / (highest - lowest) if highest > lowest else 1.0
        shade = SHADES[round(rank * (len(SHADES) - 1))]
        # Of chunks that touch every second one is underlined, or they would look like one.
        underlined = chunk.position == end and not underlined
        end = chunk.position + len(chunk.token_ids)
        pieces[2 * number + 1] = _marked(pieces[2 * number + 1], shade, colour, underlined)
    return "".join(pieces)


class TokenStream:
    """Prints a text while it is generated, one prompt after the other, its chunks marked."""

    def __init__(self, stream: TextIO, decode: Decode, colour: bool) -> None:
        self._stream, self._decode, self._colour = stream, decode, colour
        self._name, self._prompts = "", dict[int, list[int]]()
        self._index, self._token_ids, self._n_shown = -1, list[int](), 0
        self._follows_chunk = self._underlined = False

    def begin(self, name: str, prompts: Mapping[int, list[int]]) -> None:
        """The texts that come next: the run's name and the prompts' token ids by their index."""
        self._name, self._prompts, self._index = name, dict(prompts), -1

    def write(self, index: int, token_ids: list[int], chunk: object | None) -> None:
        """The next tokens of a prompt's text; `chunk` is not None where they are a retrieved one."""
        if index != self._index:
            self._index, self._token_ids = index, list(self._prompts[index])
            prompt = self._decode(self._token_ids)
            self._n_shown, self._follows_chunk, self._underlined = len(prompt), False, False
            shown = visible(prompt)
            self._stream.write(
                f"\n--- prompt {index}, {self._name}\n{_coloured(shown, DIM) if self._colour else shown}"
            )
        self._token_ids += token_ids
        text = self._decode(self._token_ids)
        # A character whose last bytes are still to come decodes to replacement characters until then.
        end = len(text.rstrip("\ufffd")) if len(text) - len(text.rstrip("\ufffd")) <= 3 else len(text)
        piece, self._n_shown = visible(text[self._n_shown : end]), max(end, self._n_shown)
        if chunk is not None:
            self._underlined = self._follows_chunk and not self._underlined
            piece = _marked(piece, SHADES[-1], self._colour, self._underlined)
        self._follows_chunk = chunk is not None
        self._stream.write(piece)
        self._stream.flush()


def _marked(piece: str, shade: int, colour: bool, underlined: bool = False) -> str:
    left, right = BRACKETS
    if not colour:
        return f"{left}{piece}{right}"
    # A line end has no colour of its own, and may be all that a chunk is.
    return _coloured(piece.replace("\n", f"{LINE_END}\n"), f"\x1b[{'4;' if underlined else ''}38;5;16;48;5;{shade}m")


def _coloured(text: str, code: str) -> str:
    # The colour ends before each line does: many terminals fill the rest of the line with it.
    return "\n".join(f"{code}{line}{RESET}" if line else "" for line in text.split("\n"))


def visible(text: str) -> str:
    """The text with control characters, all but line ends and tabs, as symbols: it cannot command the terminal."""
    return text.translate(_CONTROL_SYMBOLS)


# U+2400 … are the symbols of the control characters U+0000 …; line ends and tabs stay.
_CONTROL_SYMBOLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_CONTROL_SYMBOLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
