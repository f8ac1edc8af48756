"""Files and manifests: every byte that a stage leaves on disk is written whole or not at all, and says where it is from.

A file is written under a temporary name and renamed (`replacing`). A manifest beside a stage's output holds the
arguments and the fingerprints of the inputs that decide its bytes; a stage that is run again goes on only where they
are the same (`begin_stage`), and the next stage starts only from output that is whole (`read_finished`).
"""

import hashlib
import json
import os
import re
import shutil
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fcntl import LOCK_EX, LOCK_NB, flock, lockf
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from platform import python_version
from typing import Any, TextIO

BLOCK_BYTES = 1 << 20
LONGEST_JSON_WORD = 16  # characters of the longest piece that is wrong until its end is read: \ud83d\ude42, -Infinity
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ERRNO_OF_HDF5 = re.compile(r"\berrno = (\d+)")  # in messages of many lines
PACKAGES = ("torch", "transformers", "datasets", "h5py", "numpy")


class InputError(Exception):
    """What the user gave cannot be used: one sentence that says what, where, got, expected and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what libraries say may have many lines


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends; on an error `path` stays as it was.

    scratch: a folder of this process alone on the same disk for it instead: in one folder, only one can make files.
    """
    temporary = scratch / path.name if scratch else path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        # Where the folder itself is missing or not a folder there is nothing to remove.
        with suppress_os_error():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    if in_hdf5 := _ERRNO_OF_HDF5.search(reason):
        reason = os.strerror(int(in_hdf5[1]))
    return InputError(f"{path}: cannot be written ({' '.join(reason.split())}); free space or fix the path")


@contextmanager
def suppress_os_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


def make_folder(path: Path) -> Path:
    """Make a folder and its parents; raises InputError where a file is in the way or the place is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror}); choose another folder") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: is not writable; choose another folder")
    return path


def require_file(path: Path, made_by: str) -> Path:
    """`path` if it is a readable file; raises InputError that says which command makes it."""
    return _require(path, path.is_file(), "file", made_by)


def require_folder(path: Path, made_by: str) -> Path:
    """`path` if it is a readable folder; raises InputError that says which command makes it."""
    return _require(path, path.is_dir(), "folder", made_by)


def _require(path: Path, is_there: bool, kind: str, made_by: str) -> Path:
    if not is_there:
        got = f"is not a {kind}" if path.exists() else "does not exist"
        raise InputError(f"{path}: {got}; give the {kind} that {made_by}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read; check its permissions")
    return path


@contextmanager
def sole_writer(folder: Path, name: str, *, wait: bool = False) -> Iterator[None]:
    """Refuse a second run of the stage `name` in `folder` while the block runs; a killed run's lock is free again.

    wait: let it wait for the first one instead.
    """
    with _open_lock(folder, name) as file:
        with _refusing_another(folder):
            flock(file, LOCK_EX if wait else LOCK_EX | LOCK_NB)
        yield


@contextmanager
def sole_writer_of_part(folder: Path, name: str, first: int = 0, n_items: int = 0) -> Iterator[None]:
    """Like `sole_writer`, of the items from `first` on alone: runs of other items may go on at the same time.

    n_items 0: all from there on.
    """
    with _open_lock(folder, name) as file:
        with _refusing_another(folder):
            lockf(file, LOCK_EX | LOCK_NB, n_items, first)
        yield


def _open_lock(folder: Path, name: str) -> TextIO:
    path = folder / f".{name}.lock"
    try:
        return open(path, "a")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


@contextmanager
def _refusing_another(folder: Path) -> Iterator[None]:
    try:
        yield
    except (BlockingIOError, PermissionError) as error:
        message = f"{folder}: another run is writing here; wait for it to end or choose another folder"
        raise InputError(message) from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file open for reading, without its byte order mark; only reading belongs into the block.

    Raises InputError where it cannot be read, and at the byte that is not UTF-8.
    """
    try:
        with open(path, "rb") as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                # `error` counts from the start of the block that was read last.
                byte = raw.tell() - len(error.object) + error.start
                raise InputError(f"{path}: is not UTF-8 (byte {byte}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path and the disk") from error


# ---- JSON


class JsonBytes(bytes):
    """Values that are UTF-8 JSON already: `json_list_writer` writes them as they stand."""


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises InputError where it is missing, not UTF-8 or not whole."""
    return read_json_and_bytes(path)[0]


def read_json_and_bytes(path: Path) -> tuple[Any, bytes]:
    """The value in a JSON file and its UTF-8, without a byte order mark; raises InputError as `read_json` does."""
    require_file(path, "holds the JSON")
    with _readable_json(path):
        utf8 = path.read_bytes().removeprefix(BOM_UTF8)
        value = json.loads(utf8.decode())
        # Half of a surrogate pair, which cannot be written again; looked for where an escape may be one.
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


def iter_json_list(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one at a time, in memory that holds a block and one entry.

    Raises InputError where the file is missing, not UTF-8, not whole or not a list.
    """
    require_file(path, "holds a JSON list")
    with _readable_json(path), open_text(path) as file:
        yield from _parse_list(file, path)


def _parse_list(file: TextIO, path: Path) -> Iterator[Any]:
    scan = json.JSONDecoder().raw_decode
    buffer, at, block = file.read(BLOCK_BYTES), 0, BLOCK_BYTES
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
            at, after_entry, block, n_entries = end, True, BLOCK_BYTES, n_entries + 1
            continue
        # Only what stands at the very end of the buffer can become right with the text that follows.
        more = file.read(block) if stop > len(buffer) - LONGEST_JSON_WORD else ""
        if not more:
            near = f"after entry {n_entries} of it, near {buffer[at : at + 40]!r}"
            raise InputError(f"{path}: the JSON list is cut off or damaged {near}; make it anew")
        # `at` may stand behind a comma that is consumed: `after_entry` keeps that.
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
                raise _unwritable(path, error) from error
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
        raise InputError(f"{path}: is not whole JSON ({error.msg} at {place}); mend it or make it anew") from error
    except RecursionError as error:
        raise InputError(f"{path}: JSON is nested too deeply; expected a few levels") from error
    except ValueError as error:
        # Python reads no integer of more than 4300 digits.
        raise InputError(f"{path}: holds JSON that cannot be read ({error}); mend it") from error


# ---- Manifests


@dataclass
class Manifest:
    """What decided a stage's output: flags by name, fingerprints of what it read, and whether it is whole."""

    stage: str
    arguments: dict[str, Any]
    inputs: dict[str, Any]
    complete: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)  # what utils/checksums.py says of the output
    versions: dict[str, str] = field(default_factory=lambda: package_versions())


def begin_stage(path: Path, stage: str, arguments: dict[str, Any], inputs: dict[str, Any]) -> Manifest:
    """Write the manifest of a run that starts, or take up the one that is there.

    Raises InputError where the one that is there has other arguments or inputs: its output is not this run's.
    """
    wanted = Manifest(stage, json.loads(json.dumps(arguments)), json.loads(json.dumps(inputs)))
    if path.exists():
        found = read_manifest(path, stage)
        _require_same(path, "--{}", found.arguments, wanted.arguments)
        _require_same(path, "the {}", found.inputs, wanted.inputs)
        return found
    _save(path, wanted)
    return wanted


def _require_same(path: Path, wording: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            what = wording.format(name.replace("_", " ") if wording.startswith("the") else name)
            difference = f"was made with {what} {found.get(name)!r}, this run has {wanted.get(name)!r}"
            raise InputError(
                f"{path.parent}: what lies there {difference}; use another folder or delete {path}'s output"
            )


def finish_stage(path: Path, manifest: Manifest, results: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Mark a stage's output as whole, with its counts and what `list_files` says of its files; where not marked so."""
    finished = replace(manifest, complete=True, results=results, files=files or {})
    if finished != manifest:
        manifest.__dict__.update(finished.__dict__)
        _save(path, manifest)


def read_finished(path: Path, stage: str) -> Manifest:
    """The manifest of output that is whole; raises InputError where the stage has not run there, or not to its end."""
    if not path.is_file():
        raise InputError(f"{path}: does not exist, so nothing here was made by {stage}; run {stage} first")
    manifest = read_manifest(path, stage)
    if not manifest.complete:
        raise InputError(f"{path}: says that {stage} did not end; run it again, it goes on where it stopped")
    return manifest


def read_manifest(path: Path, stage: str) -> Manifest:
    """The manifest at `path`; raises InputError where it is damaged or another stage's."""
    fields = read_json(path)
    try:
        manifest = Manifest(**fields)
    except TypeError as error:
        raise InputError(f"{path}: is no manifest of {stage}; delete it and run {stage} again") from error
    parts = (manifest.arguments, manifest.inputs, manifest.results, manifest.files)
    if manifest.stage != stage or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path}: is no manifest of {stage}; delete it and run {stage} again")
    return manifest


def _save(path: Path, manifest: Manifest) -> None:
    write_json(path, asdict(manifest), indent=2)


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that results depend on, where they are installed."""
    found = {"python": python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def n_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove_folder(path: Path) -> None:
    """Delete a folder and what is in it, where there is one."""
    if path.exists():
        shutil.rmtree(path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is there while the block runs; what a killed run left of it is deleted first."""
    remove_folder(path)
    try:
        yield make_folder(path)
    finally:
        remove_folder(path)
