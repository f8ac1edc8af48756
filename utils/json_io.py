"""JSON files: read with errors that name the place, streamed where a list may be long, written whole or not at all."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from utils.files import InputError, open_text, replacing, require_file, unwritable

# Characters that a list is read by at a time.
BLOCK_CHARACTERS = 1 << 20
LONGEST_JSON_WORD = 16  # characters of the longest piece that is wrong until its end is read: \ud83d\ude42, -Infinity
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonBytes(bytes):
    """A value that is UTF-8 JSON already: `json_list_writer` writes it as it is."""


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises InputError where the file is missing, not UTF-8 or not whole."""
    return read_json_and_bytes(path)[0]


def read_json_and_bytes(path: Path) -> tuple[Any, bytes]:
    """The value in a JSON file, and the file's UTF-8 without a byte order mark; raises InputError as `read_json` does."""
    require_file(path, "holds the JSON")
    with _readable_json(path):
        utf8 = path.read_bytes().removeprefix(BOM_UTF8)
        value = json.loads(utf8.decode())
        # Half of a surrogate pair could not be written again. Only text with an escape like it can hold one.
        if _SURROGATE.search(utf8):
            _require_unicode(value)
        return value, utf8


def _require_unicode(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!a} is half of a surrogate pair") from error


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    # Not json.dump, which encodes value by value in Python: several times slower.
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")


# ---- Lists, one entry at a time


def iter_json_list(path: Path) -> Iterator[Any]:
    """The entries of a JSON list one at a time, in memory that holds a block of text and one entry.

    Raises InputError where the file is missing, not UTF-8, not whole or not a list.
    """
    require_file(path, "holds a JSON list")
    with _readable_json(path), open_text(path) as file:
        yield from _parse_list(file, path)


def _parse_list(file: TextIO, path: Path) -> Iterator[Any]:
    scan = json.JSONDecoder().raw_decode
    buffer, at, block = file.read(BLOCK_CHARACTERS), 0, BLOCK_CHARACTERS
    at = _skip_space(buffer, at)
    if buffer[at : at + 1] != "[":
        got = "is empty" if not buffer.strip() else "holds something else than a list"
        raise InputError(f"{path}: {got}; expected a JSON list")
    at, after_entry, n_entries = at + 1, False, 0
    while True:
        at = _skip_space(buffer, at)
        if after_entry and buffer[at : at + 1] == ",":
            at, after_entry = _skip_space(buffer, at + 1), False
        elif buffer[at : at + 1] == "]" and (after_entry or not n_entries):
            if (buffer[at + 1 :] + file.read()).strip():
                raise InputError(f"{path}: text follows the end of the JSON list; expected nothing there")
            return
        try:
            entry, end = scan(buffer, at)
            # A number may go on in the next block, so an entry counts only once its separator is in sight.
            stop = _skip_space(buffer, end)
            is_whole = buffer[stop : stop + 1] in tuple(",]")
        except json.JSONDecodeError as error:
            is_whole, stop = False, len(buffer) if error.msg.startswith("Unterminated string") else error.pos
        if is_whole:
            yield entry
            at, after_entry, block, n_entries = end, True, BLOCK_CHARACTERS, n_entries + 1
            continue
        # Only what stands at the very end of the buffer can become right with the text that follows.
        more = file.read(block) if stop > len(buffer) - LONGEST_JSON_WORD else ""
        if not more:
            near = f"after entry {n_entries} of it, near {buffer[at : at + 40]!r}"
            raise InputError(f"{path}: the JSON list is cut off or damaged {near}; write it again")
        # `at` may stand behind a comma that is consumed: `after_entry` remembers that.
        buffer, at, block = buffer[at:] + more, 0, block * 2


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def write_json_list(path: Path, entries: Iterable[Any]) -> int:
    """Write a JSON list, one entry a line, as the entries come; returns how many there were."""
    n_entries = 0
    with json_list_writer(path) as write:
        for entry in entries:
            write(entry)
            n_entries += 1
    return n_entries


@contextmanager
def json_list_writer(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that writes the next entry of a JSON list, one a line; the file is there when the block ends."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        before = b"[\n"

        def write(entry: Any) -> None:
            nonlocal before
            try:
                file.write(before)
                file.write(entry if isinstance(entry, JsonBytes) else json.dumps(entry, ensure_ascii=False).encode())
            except OSError as error:  # raised here, it names the right one of several files that are written at once
                raise unwritable(path, error) from error
            before = b",\n"

        yield write
        file.write(b"\n]\n" if before == b",\n" else b"[\n]\n")


@contextmanager
def _readable_json(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: is not valid JSON ({error.msg} at {place}); correct it or write it again") from error
    except RecursionError as error:
        raise InputError(f"{path}: JSON is nested too deeply; expected a few levels") from error
    except ValueError as error:
        # Python reads no integer of more than 4300 digits.
        raise InputError(f"{path}: holds JSON that cannot be read ({error}); correct it") from error
