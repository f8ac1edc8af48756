"""Checksums: the list of what a stage wrote, so that the next one names a file that was changed, cut off, lost or mixed
in from another run.

    {…}checksums.txt beside {…}manifest.json    one file a line: CRC-32, bytes, name below the manifest's folder; by name

The manifest holds the list's own SHA-256. Sizes are compared whenever a stage begins, which takes some microseconds a
file; contents with `--verify_checksums`, which reads all. A CRC-32 finds accidents, and is fast; it does not stop
somebody who means to deceive.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from utils.files import InputError, Manifest, n_cores, replacing
from utils.progress import ProgressBar

BLOCK_BYTES = 1 << 20
SHOWN_FILES = 100  # from which on a bar is shown
FILES_PER_TASK = 32  # that a thread reads in one go: handing over a small file takes longer than reading it
_LINE = re.compile(r"([0-9a-f]{8}) (0|[1-9][0-9]{0,17}) ([^\0]+)")


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    crc32: str
    n_bytes: int


def list_path(manifest_path: Path) -> Path:
    return manifest_path.with_name(manifest_path.name.removesuffix("manifest.json") + "checksums.txt")


class SummedFile:
    """A file that is written from its beginning to its end, and what it holds so far."""

    def __init__(self, file: BinaryIO | FileIO) -> None:
        """file: open for writing; for reading too where `read_to` is used."""
        self._file, self._crc32, self._n_bytes = file, 0, 0

    def write(self, data: Any) -> int:
        """data: bytes, or anything with a buffer, in C order."""
        left = memoryview(data).cast("B")
        self._add(left)
        n_bytes = len(left)
        while left:  # files without a buffer may take less
            left = left[self._file.write(left) :]
        return n_bytes

    def read_to(self, end: int | None) -> None:
        """Go on to a place, or to the end, past what the file holds already."""
        while block := self._file.read(BLOCK_BYTES if end is None else end - self._n_bytes):
            self._add(block)

    def _add(self, data: bytes | memoryview) -> None:
        self._crc32, self._n_bytes = zlib.crc32(data, self._crc32), self._n_bytes + len(data)

    @property
    def written(self) -> Written:
        return Written(f"{self._crc32:08x}", self._n_bytes)


@contextmanager
def summed(path: Path, scratch: Path | None = None) -> Iterator[SummedFile]:
    """A file that takes the place of `path` when the block ends, as `replacing`, and need not be read again to be listed."""
    with replacing(path, scratch) as temporary, open(temporary, "wb") as file:
        yield SummedFile(file)


def list_files(
    manifest_path: Path, files: Iterable[Path], written: Mapping[str, Written] | None = None
) -> dict[str, Any]:
    """Write the list of a stage's files, which lie below the manifest's folder; returns what the manifest says of it.

    written: what this run knows of some of them, by name. What an earlier list says of a file holds on where the file
    is older than that list, so that a stage which goes on reads only what is new. No files, no list. Raises InputError
    where a file is gone.
    """
    path = list_path(manifest_path)
    if not (files := list(files)):
        path.unlink(missing_ok=True)
        return {}
    earlier, since = _earlier(path)
    by_name = {_name_below(path.parent, file): file for file in files}
    found = {name: known for name, known in (written or {}).items() if name in by_name}
    for name, known in earlier.items():
        if name in by_name and name not in found:
            stat = _stat(by_name[name])
            if known.n_bytes == stat.st_size and stat.st_mtime_ns < since:
                found[name] = known
    new = {name: file for name, file in by_name.items() if name not in found}
    found |= dict(zip(new, _all_written(list(new.values()), "listing files"), strict=True))
    text = "".join(f"{found[name].crc32} {found[name].n_bytes} {name}\n" for name in sorted(found)).encode()
    if not path.exists() or path.read_bytes() != text:
        with replacing(path) as temporary:
            temporary.write_bytes(text)
    n_bytes = sum(written.n_bytes for written in found.values())
    return {"n_files": len(found), "n_bytes": n_bytes, "list_sha256": hashlib.sha256(text).hexdigest()}


def _earlier(path: Path) -> tuple[dict[str, Written], int]:
    """What a list says that may be damaged or not there, and when it was written, in nanoseconds."""
    try:
        return _parse(path.read_bytes()), path.stat().st_mtime_ns
    except (OSError, ValueError):
        return {}, 0


def require_as_written(manifest_path: Path, manifest: Manifest, files: Iterable[Path], *, verify: bool) -> None:
    """Raise InputError for the first of a stage's files that is gone or has another size than when it was written.

    files: below the manifest's folder, or moved elsewhere under their names. verify: also where one has other content,
    all of which is read. A manifest without a list of files says nothing of them.
    """
    listed = read_list(manifest_path, manifest)
    named = {path: listed.get(_name_below(manifest_path.parent, path)) or listed.get(path.name) for path in files}
    _require_unchanged({path: written for path, written in named.items() if written}, manifest.stage, verify)


def _name_below(folder: Path, path: Path) -> str:
    """The name of a path below a folder, or its last part where it lies elsewhere."""
    # Not Path.relative_to, which takes longer than writing a small file.
    start, name = f"{folder}{os.sep}", str(path)
    return name.removeprefix(start) if name.startswith(start) else path.name


def read_list(manifest_path: Path, manifest: Manifest) -> dict[str, Written]:
    """What a stage wrote, by name below the manifest's folder; empty where its manifest says nothing of it.

    Raises InputError where the list is gone, damaged or another run's.
    """
    wanted = manifest.files.get("list_sha256")
    if wanted is None:
        return {}
    path = list_path(manifest_path)
    remedy = f"restore it, or delete {manifest_path.name} and what it speaks of and run {manifest.stage} again"
    try:
        text = path.read_bytes()
        if hashlib.sha256(text).hexdigest() != wanted:
            raise InputError(f"{path}: is not the list that {manifest_path.name} speaks of; {remedy}")
        return _parse(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error


def _parse(text: bytes) -> dict[str, Written]:
    found = {}
    for line in text.decode().splitlines():
        match = _LINE.fullmatch(line)
        # A name is read as a path below the folder and nowhere else.
        if not match or match[3].startswith("/") or ".." in match[3].split("/"):
            raise ValueError(f"no list of checksums: {line[:60]!r}")
        found[match[3]] = Written(match[1], int(match[2]))
    return found


def _require_unchanged(files: Mapping[Path, Written], made_by: str, verify: bool) -> None:
    remedy = f"restore it, or delete it and run {made_by} again, which goes on where it was"
    for path, written in files.items():
        n_bytes = _stat(path, remedy).st_size
        if n_bytes != written.n_bytes:
            raise InputError(f"{path}: has {n_bytes:,} bytes, {made_by} wrote {written.n_bytes:,}; {remedy}")
    if verify:
        for (path, written), found in zip(files.items(), _all_written(list(files), "verifying"), strict=True):
            if found != written:
                got = f"has the CRC-32 {found.crc32}, {made_by} wrote one with {written.crc32}"
                raise InputError(f"{path}: was changed or is another run's ({got}); {remedy}")


def _stat(path: Path, remedy: str = "run the stage again") -> Any:
    try:
        return path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def _all_written(paths: list[Path], doing: str) -> Iterable[Written]:
    """What each file holds, in their order: threads read, and CRC-32 lets others run meanwhile."""
    bar = ProgressBar(total=len(paths), desc=doing, unit="file", leave=False, disable=len(paths) < SHOWN_FILES)
    groups = [paths[first : first + FILES_PER_TASK] for first in range(0, len(paths), FILES_PER_TASK)]
    with bar, ThreadPoolExecutor(n_cores()) as threads:
        try:
            for written in threads.map(lambda group: list(map(_written, group)), groups):
                bar.update(len(written))
                yield from written
        finally:
            threads.shutdown(cancel_futures=True)


def _written(path: Path) -> Written:
    try:
        with open(path, "rb", buffering=0) as file:
            held = SummedFile(file)
            held.read_to(None)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    return held.written
