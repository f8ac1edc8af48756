"""Files: there whole or not at all, read as UTF-8, and written by one run at a time."""

import bz2
import errno
import gzip
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT

from utils import files
from utils.files import (
    InputError,
    exclusive_lock,
    make_folder,
    open_text,
    replacing,
    require_file,
    require_folder,
    temporary_folder,
    unwritable,
)

# ---- Writing


def test_a_file_takes_its_place_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    (tmp_path / ".a.json.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"a\.json: cannot be written \(No space left on device\); free space"):
        write(path, b"new" * 100_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_that_breaks_meanwhile_is_not_taken_for_the_file(tmp_path: Path) -> None:
    """A progress bar's reader may leave while a file is written."""
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(BrokenPipeError), replacing(path):
        raise BrokenPipeError
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        make_folder(tmp_path / "file" / "inside")
    with pytest.raises(InputError, match=r"a\.json: cannot be written \(No such file or directory\)"):
        write(tmp_path / "nowhere" / "a.json", b"new")


def write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def test_hdf5s_own_error_is_said_in_the_systems_words(tmp_path: Path) -> None:
    error = OSError("Can't synchronously write data (file write failed: time = ...,\n errno = 28, error message = 'x')")
    assert str(unwritable(tmp_path, error)) == (
        f"{tmp_path}: cannot be written (No space left on device); free space or fix the path"
    )


def test_a_scratch_folder_takes_the_file_until_it_is_whole(tmp_path: Path) -> None:
    path, scratch = tmp_path / "a.json", tmp_path / "scratch"
    scratch.mkdir()
    with replacing(path, scratch) as temporary:
        temporary.write_bytes(b"new")
        assert [temporary] == list(scratch.iterdir())
        assert list(tmp_path.iterdir()) == [scratch]
    assert path.read_bytes() == b"new"
    assert not list(scratch.iterdir())


def test_a_temporary_folder_starts_empty_and_is_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "of a killed run").write_text("")

    def use() -> None:
        with temporary_folder(folder) as given:
            assert given == folder
            assert not list(folder.iterdir())
            (folder / "new").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert not folder.exists()


# ---- Reading


def test_what_is_missing_is_named_with_what_makes_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert require_file(tmp_path / "file", "x.py writes") == tmp_path / "file"
    assert require_folder(tmp_path, "x.py writes") == tmp_path
    for require, name, message in (
        (require_file, "none", "does not exist; give the file that x.py writes"),
        (require_file, "", "is not a file; give the file that x.py writes"),
        (require_folder, "none", "does not exist; give the folder that x.py writes"),
        (require_folder, "file", "is not a folder; give the folder that x.py writes"),
    ):
        with pytest.raises(InputError) as refused:
            require(tmp_path / name, "x.py writes")
        assert str(refused.value) == f"{tmp_path / name}: {message}"


def test_an_error_is_one_line_whatever_its_message_was() -> None:
    assert str(InputError("a\nb\r\nc")) == "a b c"


def test_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    with open_text(path) as file:
        assert file.read() == "[1]"


@pytest.mark.parametrize("n_before", [0, 10, 3_000_000])
def test_the_byte_that_is_not_utf8_is_counted_from_the_files_start(n_before: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * n_before + b"\xff" + b"b" * 100)
    with pytest.raises(InputError, match=rf"^{path}: is not UTF-8 \(byte {n_before}\)"), open_text(path) as file:
        file.read()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def test_every_kind_of_compression_is_tried() -> None:
    assert set(COMPRESSORS) == set(files.COMPRESSION_SUFFIXES)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_text_is_read_as_what_it_holds(suffix: str, tmp_path: Path) -> None:
    lines = [f"line {i} é\n" for i in range(50_000)]
    path, content = tmp_path / f"a.TXT{suffix.upper()}", "".join(lines).encode("utf-8-sig")
    # In two pieces, as parallel compressors write it; the border is within a character.
    border = content.index("é".encode(), len(content) // 2) + 1
    path.write_bytes(COMPRESSORS[suffix](content[:border]) + COMPRESSORS[suffix](content[border:]))
    with open_text(path) as file:
        assert list(file) == lines
    with open_text(path) as file:  # and may be left before its end
        assert next(file) == lines[0]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_text_that_is_damaged_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    compress = COMPRESSORS[suffix]
    whole = compress(os.urandom(100_000).hex().encode())
    for content in (whole[: len(whole) // 2], whole[:-1], b"no such file"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"^{path}: cannot be read "), open_text(path) as file:
            file.read()
    path.write_bytes(compress(b"a" * 1000 + b"\xff"))
    byte = "" if suffix == ".zst" else r" \(byte 1000\)"
    with pytest.raises(InputError, match=rf"^{path}: is not UTF-8{byte};"), open_text(path) as file:
        file.read()
    path.unlink()
    with pytest.raises(InputError, match=rf"^{path}: cannot be read \(.*No such file"), open_text(path) as file:
        pass


# ---- Locks


def test_a_second_writer_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path, "x.py"):
        with pytest.raises(InputError, match="another run is writing here"), exclusive_lock(tmp_path, "x.py"):
            pass
        with exclusive_lock(tmp_path, "another_stage.py"):
            pass
    with exclusive_lock(tmp_path, "x.py"):
        pass


def start(program: str) -> subprocess.Popen[str]:
    """Start a Python program that has `exclusive_lock` and `Path`, with pipes to its stdin and from its stdout."""
    head = "import sys; from pathlib import Path; from utils.files import exclusive_lock\n"
    command = [sys.executable, "-c", head + program]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def says(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def hold(folder: Path, items: range | None = None) -> subprocess.Popen[str]:
    """A process that holds a lock until its stdin is closed."""
    lock = f"exclusive_lock(Path({str(folder)!r}), 'x.py', items={items!r})"
    holder = start(f"with {lock}: print('held', flush=True); sys.stdin.read()")
    assert says(holder) == "held"
    return holder


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    with hold(tmp_path) as holder:
        with pytest.raises(InputError), exclusive_lock(tmp_path, "x.py"):
            pass
        holder.kill()
        holder.wait()
        with exclusive_lock(tmp_path, "x.py"):
            pass


def test_locks_of_other_items_may_be_held_at_the_same_time(tmp_path: Path) -> None:
    with hold(tmp_path, range(3, 6)) as holder:
        for items in (range(0, 3), range(6, 100)):
            with exclusive_lock(tmp_path, "x.py", items=items):
                pass
        for items in (range(0, 4), range(5, 6), range(0, 100)):
            with (
                pytest.raises(InputError, match="another run is writing"),
                exclusive_lock(tmp_path, "x.py", items=items),
            ):
                pass
        holder.communicate()


def test_a_run_that_waits_goes_on_once_the_lock_is_given_back(tmp_path: Path) -> None:
    lock = f"exclusive_lock(Path({str(tmp_path)!r}), 'x.py', wait=True)"
    program = f"print('waiting', flush=True)\nwith {lock}: print(Path({str(tmp_path / 'now')!r}).exists(), flush=True)"
    with hold(tmp_path) as holder, start(program) as waiter:
        assert says(waiter) == "waiting"
        while waiter.poll() is None and not is_asleep(waiter):
            time.sleep(0.01)
        (tmp_path / "now").touch()
        holder.communicate()
        assert says(waiter) == "True"


def is_asleep(process: subprocess.Popen[str]) -> bool:
    """Whether it waits for something, such as a lock."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("S")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("items", [None, range(2, 5)])
@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks_is_used_with_a_warning(
    number: int,
    items: range | None,
    wait: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse_locks(monkeypatch, number)
    for name in ("x.py", "y.py"):
        with exclusive_lock(tmp_path, name, items=items, wait=wait):
            (tmp_path / name).touch()
    assert (tmp_path / "y.py").exists()
    unguarded = "so nothing stops two runs from writing here at the same time"
    assert caplog.messages == [f"{tmp_path}: its file system has no locks ({os.strerror(number)}), {unguarded}"]


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Answer as a file system does that has no locks."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "flock", refuse)
    monkeypatch.setattr(files, "lockf", refuse)


def test_another_error_of_a_lock_is_not_taken_for_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), exclusive_lock(tmp_path, "x.py"):
        pass


def test_a_folder_that_takes_no_lock_is_refused(tmp_path: Path) -> None:
    lock = exclusive_lock(tmp_path / "none", "x.py")
    with pytest.raises(InputError, match=r"\.x\.py\.lock: cannot be written \(No such file"), lock:
        pass
