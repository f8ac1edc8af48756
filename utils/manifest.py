"""Manifests: what a stage's output was made from, whether it is whole, and the size and checksum of every file of it.

    {…}manifest.json     arguments and fingerprints of the inputs that decide the output's bytes, counts, versions
    {…}checksums.txt     beside it, one file a line: CRC-32, bytes, name below the manifest's folder; sorted by name

A stage that is run again goes on only where arguments and inputs are the same (`begin_stage`), and the next stage
starts only from output that is whole (`read_finished`) and as it was written (`require_as_written`). Sizes are always
compared, which takes some microseconds a file; contents with --verify_checksums, which reads all of them. The manifest
holds the SHA-256 of the list. A CRC-32 finds accidents, and is fast; it does not stop a forger.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from platform import python_version
from typing import Any, BinaryIO

from utils.files import InputError, replacing
from utils.json_io import read_json, write_json
from utils.progress import ProgressBar
from utils.workers import n_cores

PACKAGES = ("torch", "transformers", "datasets", "h5py", "numpy")
BLOCK_BYTES = 1 << 20
MIN_FILES_OF_BAR = 100  # fewer are read before a bar would be drawn
FILES_PER_TASK = 32  # that a thread reads in one task: handing one small file over takes longer than reading it
_LINE = re.compile(r"([0-9a-f]{8}) (0|[1-9][0-9]{0,17}) ([^\0]+)")


# ---- Manifests


@dataclass
class Manifest:
    """What decided a stage's output: flags by name, fingerprints of what it read, and whether it is whole."""

    stage: str
    arguments: dict[str, Any]
    inputs: dict[str, Any]
    complete: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)  # what `list_files` returns
    versions: dict[str, str] = field(default_factory=lambda: package_versions())


def begin_stage(path: Path, stage: str, arguments: dict[str, Any], inputs: dict[str, Any]) -> Manifest:
    """Write the manifest of a run that starts, or return the one that is there.

    Raises InputError where the one that is there has other arguments or inputs: its output is not this run's.
    """
    wanted = Manifest(stage, json.loads(json.dumps(arguments)), json.loads(json.dumps(inputs)))
    if path.exists():
        found = read_manifest(path, stage)
        _require_same(path, found, wanted)
        return found
    save_manifest(path, wanted)
    return wanted


def _require_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise InputError, which names what differs, where two runs have other arguments or inputs."""
    pairs = {f"--{name}": pair for name, pair in _differing(found.arguments, wanted.arguments)}
    pairs |= {f"the {name.replace('_', ' ')}": pair for name, pair in _differing(found.inputs, wanted.inputs)}
    if not pairs:
        return
    remedy = f"use another folder or delete what {path} lists"
    if len(pairs) > 1:
        *names, last = pairs
        named = f"{', '.join(names)} and {last}"
        raise InputError(f"{path.parent}: its output and this run differ in {named}; {remedy}")
    ((name, (before, now)),) = pairs.items()
    raise InputError(f"{path.parent}: its output was made with {name} {before!r}, this run has {now!r}; {remedy}")


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    names = sorted(found.keys() | wanted.keys())
    return [(name, (found.get(name), wanted.get(name))) for name in names if found.get(name) != wanted.get(name)]


def finish_stage(path: Path, manifest: Manifest, results: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Mark a stage's output as whole, with its counts and what `list_files` says of its files, unless it is so marked."""
    finished = replace(manifest, complete=True, results=results, files=files or {})
    if finished != manifest:
        manifest.__dict__.update(finished.__dict__)
        save_manifest(path, manifest)


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


def save_manifest(path: Path, manifest: Manifest) -> None:
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


# ---- Checksums of files as they are written


@dataclass(frozen=True)
class FileSum:
    """The checksum and size of a file."""

    crc32: str
    n_bytes: int


class SummedFile:
    """A file that is written from its beginning to its end, and the checksum of what it holds so far."""

    def __init__(self, file: BinaryIO | FileIO) -> None:
        """file: open for writing; for reading too where `read_to` is used."""
        self._file, self._crc32, self._n_bytes = file, 0, 0

    def write(self, data: Any) -> int:
        """data: bytes, or anything with a buffer, in C order."""
        rest = memoryview(data).cast("B")
        self._add(rest)
        n_bytes = len(rest)
        while rest:  # unbuffered files may take less than they are given
            rest = rest[self._file.write(rest) :]
        return n_bytes

    def read_to(self, end: int | None) -> None:
        """Go forward to the byte `end`, or to the file's end, past what the file holds already."""
        while block := self._file.read(BLOCK_BYTES if end is None else end - self._n_bytes):
            self._add(block)

    def _add(self, data: bytes | memoryview) -> None:
        self._crc32, self._n_bytes = zlib.crc32(data, self._crc32), self._n_bytes + len(data)

    @property
    def sum(self) -> FileSum:
        return FileSum(f"{self._crc32:08x}", self._n_bytes)


@contextmanager
def summed(path: Path, scratch: Path | None = None) -> Iterator[SummedFile]:
    """A file that is renamed to `path` when the block ends, as by `replacing`, and need not be read again to be listed."""
    with replacing(path, scratch) as temporary, open(temporary, "wb") as file:
        yield SummedFile(file)


# ---- The list of a stage's files


def list_path(manifest_path: Path) -> Path:
    return manifest_path.with_name(manifest_path.name.removesuffix("manifest.json") + "checksums.txt")


def list_files(manifest_path: Path, files: Iterable[Path], sums: Mapping[str, FileSum] | None = None) -> dict[str, Any]:
    """Write the list of a stage's files, which lie below the manifest's folder; returns what the manifest says of it.

    sums: of files that this run has written, by name. The sum in an earlier list counts where the file is older than
    that list, so that a stage that goes on reads only what is new. No files, no list. Raises InputError where a file
    is gone.
    """
    path = list_path(manifest_path)
    if not (files := list(files)):
        path.unlink(missing_ok=True)
        return {}
    earlier, since = _read_earlier(path)
    by_name = {_name_below(path.parent, file): file for file in files}
    found = {name: known for name, known in (sums or {}).items() if name in by_name}
    for name, known in earlier.items():
        if name in by_name and name not in found:
            stat = _stat(by_name[name])
            if known.n_bytes == stat.st_size and stat.st_mtime_ns < since:
                found[name] = known
    new = {name: file for name, file in by_name.items() if name not in found}
    found |= dict(zip(new, _sum_all(list(new.values()), "listing files"), strict=True))
    text = "".join(f"{found[name].crc32} {found[name].n_bytes} {name}\n" for name in sorted(found)).encode()
    if not path.exists() or path.read_bytes() != text:
        with replacing(path) as temporary:
            temporary.write_bytes(text)
    n_bytes = sum(file_sum.n_bytes for file_sum in found.values())
    return {"n_files": len(found), "n_bytes": n_bytes, "list_sha256": hashlib.sha256(text).hexdigest()}


def _read_earlier(path: Path) -> tuple[dict[str, FileSum], int]:
    """An earlier list, which may be damaged or missing, and when it was written, in nanoseconds."""
    try:
        return _parse_list(path.read_bytes()), path.stat().st_mtime_ns
    except (OSError, ValueError):
        return {}, 0


def require_as_written(manifest_path: Path, manifest: Manifest, files: Iterable[Path], *, verify: bool) -> None:
    """Raise InputError for the first of a stage's files that is missing or has another size than when it was written.

    files: below the manifest's folder, or moved elsewhere under their names. verify: also read all of them, and refuse
    one of other content. A manifest without a list of files says nothing of them.
    """
    listed = read_list(manifest_path, manifest)
    named = {path: listed.get(_name_below(manifest_path.parent, path)) or listed.get(path.name) for path in files}
    _require_unchanged({path: file_sum for path, file_sum in named.items() if file_sum}, manifest.stage, verify)


def require_untouched(manifest_path: Path, manifest: Manifest) -> None:
    """Raise InputError for a file of a finished stage that is newer than the stage's list and has other content.

    So that a run that goes on does not list it as its own. Only what is newer is read. A file of another size is left to
    those who read it, and a missing one may be made again.
    """
    path = list_path(manifest_path)
    if not manifest.complete or not path.exists():
        return
    listed, since = read_list(manifest_path, manifest), path.stat().st_mtime_ns
    newer = []
    for name, known in listed.items():
        file = path.parent / name
        with suppress(OSError):  # it is not there
            stat = file.stat()
            if stat.st_mtime_ns >= since and stat.st_size == known.n_bytes:
                newer.append(file)
    require_as_written(manifest_path, manifest, newer, verify=True)


def _name_below(folder: Path, path: Path) -> str:
    """The name of a path below a folder, or its last part where it lies elsewhere."""
    # Not Path.relative_to, which takes longer than writing a small file.
    start, name = f"{folder}{os.sep}", str(path)
    return name.removeprefix(start) if name.startswith(start) else path.name


def read_list(manifest_path: Path, manifest: Manifest) -> dict[str, FileSum]:
    """What a stage wrote, by name below the manifest's folder; empty where its manifest has no list.

    Raises InputError where the list is missing, damaged or of another run.
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
        return _parse_list(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error


def _parse_list(text: bytes) -> dict[str, FileSum]:
    found = {}
    for line in text.decode().splitlines():
        match = _LINE.fullmatch(line)
        # A name is a path below the folder and never leads out of it.
        if not match or match[3].startswith("/") or ".." in match[3].split("/"):
            raise ValueError(f"no list of checksums: {line[:60]!r}")
        found[match[3]] = FileSum(match[1], int(match[2]))
    return found


def _require_unchanged(files: Mapping[Path, FileSum], made_by: str, verify: bool) -> None:
    remedy = f"restore it, or delete it and run {made_by} again, which goes on where it was"
    for path, listed in files.items():
        n_bytes = _stat(path, remedy).st_size
        if n_bytes != listed.n_bytes:
            raise InputError(f"{path}: has {n_bytes:,} bytes, {made_by} wrote {listed.n_bytes:,}; {remedy}")
    if verify:
        for (path, listed), found in zip(files.items(), _sum_all(list(files), "verifying"), strict=True):
            if found != listed:
                got = f"has the CRC-32 {found.crc32}, {made_by} wrote one with {listed.crc32}"
                raise InputError(f"{path}: was changed or is another run's ({got}); {remedy}")


def _stat(path: Path, remedy: str = "run the stage again") -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def _sum_all(paths: list[Path], doing: str) -> Iterator[FileSum]:
    """The sum of each file, in their order. Threads read, since CRC-32 lets other threads run meanwhile."""
    bar = ProgressBar(total=len(paths), desc=doing, unit="file", leave=False, disable=len(paths) < MIN_FILES_OF_BAR)
    groups = [paths[first : first + FILES_PER_TASK] for first in range(0, len(paths), FILES_PER_TASK)]
    with bar, ThreadPoolExecutor(n_cores()) as threads:
        try:
            for sums in threads.map(lambda group: list(map(file_sum, group)), groups):
                bar.update(len(sums))
                yield from sums
        finally:
            threads.shutdown(cancel_futures=True)


def file_sum(path: Path) -> FileSum:
    """The checksum and size of a file; raises InputError where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            held = SummedFile(file)
            held.read_to(None)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    return held.sum
