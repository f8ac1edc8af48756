"""Files and folders: errors that a user can act on, atomic writes, and locks.

A file is written under a temporary name and renamed, so that it is there whole or not at all (`replacing`).
"""

import bz2
import errno
import gzip
import hashlib
import logging
import lzma
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock, lockf
from functools import cache
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from zlib import error as ZlibError

LOGGER = logging.getLogger(__name__)
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# What file systems without locks answer: NFS without a lock daemon, Lustre without -o flock, some FUSE drives.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
# HDF5 hides the system's error number in a message of many lines.
_ERRNO_OF_HDF5 = re.compile(r"\berrno = (\d+)")


class InputError(Exception):
    """What the user gave cannot be used. One sentence: what, where, got, expected and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # messages of libraries may have many lines


# ---- Writing


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block ends; on an error `path` stays as it was.

    scratch: a folder on the same disk, used by this process alone, for the temporary file; None: beside `path`. File
    systems let only one process at a time create files in a folder, so processes that write many files each need one.
    Raises InputError where the file cannot be written.
    """
    temporary = scratch / path.name if scratch else path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the folder itself may be missing
            temporary.unlink(missing_ok=True)
        # A pipe that broke is not the file but where the script reports to.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: Path, error: OSError) -> InputError:
    """The error to raise where `path` could not be written."""
    reason = error.strerror or str(error)
    if in_hdf5 := _ERRNO_OF_HDF5.search(reason):
        reason = os.strerror(int(in_hdf5[1]))
    return InputError(f"{path}: cannot be written ({' '.join(reason.split())}); free space or fix the path")


def make_folder(path: Path) -> Path:
    """Make a folder and its parents; raises InputError where a file is in the way or the folder is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror}); choose another folder") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: is not writable; choose another folder")
    return path


def remove_folder(path: Path) -> None:
    """Delete a folder and its content, where there is one."""
    if path.exists():
        shutil.rmtree(path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder that exists while the block runs; what a killed run left there is deleted first."""
    remove_folder(path)
    try:
        yield make_folder(path)
    finally:
        remove_folder(path)


# ---- Reading


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
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file open for reading, compressed or not, its byte order mark skipped; the block may do nothing but read.

    Raises InputError where the file cannot be read, with the byte's number where it is not UTF-8 (.zst and pipes apart).
    """
    try:
        with _open_binary(path) as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                at = ""
                with suppress(OSError):  # a .zst or a pipe does not say how much of it was read
                    # `error` counts from the start of the block that was read last.
                    at = f" (byte {raw.tell() - len(error.object) + error.start})"
                raise InputError(f"{path}: is not UTF-8{at}; save it as UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError, ZlibError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path and the disk") from error


def _open_binary(path: Path) -> BinaryIO:
    """A file open for reading, decompressed where its name says that it is compressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # imported late: few files are .zst

        return BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Locks


@contextmanager
def exclusive_lock(folder: Path, name: str, *, items: range | None = None, wait: bool = False) -> Iterator[None]:
    """Hold the lock `name` of a folder while the block runs; a process that is killed gives its locks back.

    items: lock only these of many items, so that runs on other items may go on at the same time; None: one lock for
    all. wait: wait until another run gives the lock back. Raises InputError where another run holds it, or where the
    lock file cannot be written. A file system without locks, as some network drives are, is used with a warning.
    """
    path = folder / f".{name}.lock"
    try:
        file = open(path, "a")  # noqa: SIM115 (closed below, which also unlocks it)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    with file:
        if not _lock(file, folder, items, LOCK_EX | LOCK_NB):
            if not wait:
                message = f"{folder}: another run is writing here; wait for it to end or choose another folder"
                raise InputError(message)
            LOGGER.warning("%s: waiting for another run that is writing here", folder)
            _lock(file, folder, items, LOCK_EX)
        yield


def _lock(file: TextIO, folder: Path, items: range | None, how: int) -> bool:
    """Whether the lock is held now; False where another run holds it."""
    try:
        if items is None:
            flock(file, how)
        else:
            lockf(file, how, len(items), items.start)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_of_missing_locks(folder, error.strerror or "")
    return True


@cache
def warn_of_missing_locks(folder: Path, reason: str) -> None:
    LOGGER.warning(
        "%s: its file system has no locks (%s), so nothing stops two runs from writing here at the same time",
        folder,
        reason,
    )
