"""Files and manifests: whole or not at all, streamed both ways, and never another run's."""

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from utils import files
from utils.files import InputError, make_folder, open_text, replacing, exclusive_lock
from utils.manifest import begin_stage, finish_stage, read_finished
from utils.json_io import iter_json_list, json_list_writer, read_json, write_json, write_json_list

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


# ---- replacing


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
    with pytest.raises(InputError, match=r"a\.json: cannot be written \(No space left on device\)"):
        write_json(path, list(range(100_000)))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_lists_written_at_once_the_message_names_the_one_that_is_full(tmp_path: Path) -> None:
    (tmp_path / ".a.json.tmp").symlink_to("/dev/full")
    a, b = tmp_path / "a.json", tmp_path / "b.json"

    def write_both() -> None:
        with json_list_writer(a) as write_a, json_list_writer(b) as write_b:
            for _ in range(1000):
                write_b("b" * 100)
                write_a("a" * 100)

    with pytest.raises(InputError, match=r"a\.json: cannot be written"):
        write_both()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        make_folder(tmp_path / "file" / "inside")
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path / "nowhere" / "a.json", 1)


# ---- JSON lists


@given(entries=st.lists(JSON_VALUES, max_size=6), indent=st.sampled_from([None, 0, 3]), block=st.integers(1, 40))
def test_a_streamed_list_equals_json_loads_wherever_blocks_end(entries: list, indent: int | None, block: int) -> None:
    for ensure_ascii in (True, False):
        text = json.dumps(entries, indent=indent, ensure_ascii=ensure_ascii)
        assert stream(text, block) == json.loads(text)


@given(entries=st.lists(JSON_VALUES, min_size=1, max_size=5), data=st.data(), block=st.integers(1, 40))
def test_every_prefix_of_a_list_is_refused(entries: list, data: st.DataObject, block: int) -> None:
    text = json.dumps(entries)
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(InputError):
        stream(text[:cut], block)


def stream(text: str, block: int) -> list:
    path = Path(stream.folder) / "list.json"  # type: ignore[attr-defined]
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        return list(iter_json_list(path))


@pytest.fixture(autouse=True, scope="module")
def stream_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    stream.folder = tmp_path_factory.mktemp("lists")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a JSON list"),
        (b' {"text": "a"}', "holds something else than a list"),
        (b'[{"text": "a"}, {"te', r"cut off or damaged after entry 1 of it, near '\{\"te'"),
        (b'[{"text": "a"} {"text": "b"}]', "cut off or damaged after entry 0"),
        (b"[1,]", "cut off or damaged after entry 1"),
        (b"[1, 2] 3", "text follows the end"),
        (b"[1, 2", "cut off or damaged after entry 1"),
        (b'["a", "\xff"]', r"is not UTF-8 \(byte 7\)"),
        (b'\xef\xbb\xbf["a", "\xff"]', r"is not UTF-8 \(byte 10\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "cannot be read"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(iter_json_list(path))
    assert str(caught.value).startswith(str(path))


def test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(b'["' + b"a" * 3_000_000 + b'\xff"]')
    with pytest.raises(InputError, match="byte 3000002"):
        list(iter_json_list(path))
    with pytest.raises(InputError, match="byte 3000002"), open_text(path) as file:
        file.read()


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert list(iter_json_list(path)) == [1]
    with open_text(path) as file:
        assert file.read() == "[1]"


def test_damage_is_found_where_it_is_and_not_at_the_end_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    with open(path, "w") as file:
        file.write('[1, {"text": oops},\n')
        for _ in range(400):
            file.write(json.dumps("b" * 100_000) + ",\n")
        file.write("2]")
    tracemalloc.start()
    with pytest.raises(InputError, match="damaged after entry 1"):
        list(iter_json_list(path))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_memory_of_writing_and_reading_does_not_grow_with_the_list(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    tracemalloc.start()
    assert write_json_list(path, ({"text": f"{i} " * 5000} for i in range(500))) == 500
    assert sum(len(entry["text"]) > 0 for entry in iter_json_list(path)) == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 9_000_000
    assert peak < 6_000_000


def test_a_list_is_written_one_entry_a_line_and_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    write_json_list(path, [{"text": "ä\n"}, 2])
    assert path.read_text(encoding="utf-8") == '[\n{"text": "ä\\n"},\n2\n]\n'
    write_json_list(path, [])
    assert path.read_text() == "[\n]\n"
    assert list(iter_json_list(path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1', "is not whole JSON"), (b'"\xff"', "is not UTF-8"), (b"9" * 5000, "cannot be read"), (b"", "whole")],
)
def test_json_that_cannot_be_read_is_an_input_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a.json")


# ---- Manifests


def test_a_manifest_is_taken_up_by_the_same_arguments_only(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    begin_stage(path, "x.py", {"gamma": 0.5, "sizes": (1, 2)}, {"text": "abc"})
    assert not begin_stage(path, "x.py", {"gamma": 0.5, "sizes": (1, 2)}, {"text": "abc"}).complete
    with pytest.raises(InputError, match=r"made with --gamma 0\.5, this run has 0\.4"):
        begin_stage(path, "x.py", {"gamma": 0.4, "sizes": (1, 2)}, {"text": "abc"})
    with pytest.raises(InputError, match="made with the text 'abc', this run has 'abd'"):
        begin_stage(path, "x.py", {"gamma": 0.5, "sizes": (1, 2)}, {"text": "abd"})
    with pytest.raises(InputError, match=r"is no manifest of y\.py"):
        begin_stage(path, "y.py", {}, {})


def test_only_a_finished_stage_is_read_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(InputError, match=r"does not exist.*run x\.py first"):
        read_finished(path, "x.py")
    manifest = begin_stage(path, "x.py", {}, {})
    with pytest.raises(InputError, match=r"x\.py did not end"):
        read_finished(path, "x.py")
    finish_stage(path, manifest, {"n": 3})
    assert read_finished(path, "x.py").results == {"n": 3}


@pytest.mark.parametrize("content", ["[]", '"x"', "{}", '{"stage": "x.py", "arguments": 1, "inputs": {}}'])
def test_a_damaged_manifest_is_an_input_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"is no manifest of x\.py"):
        read_finished(path, "x.py")


# ---- Two runs at once


def test_a_second_writer_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path, "x.py"):
        with pytest.raises(InputError, match="another run is writing here"), exclusive_lock(tmp_path, "x.py"):
            pass
        with exclusive_lock(tmp_path, "another_stage.py"):
            pass
    with exclusive_lock(tmp_path, "x.py"):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    holds = "from utils.files import sole_writer; from pathlib import Path; import sys, time\n"
    holds += f"with sole_writer(Path({str(tmp_path)!r}), 'x.py'): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holds], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(InputError), exclusive_lock(tmp_path, "x.py"):
        pass
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with exclusive_lock(tmp_path, "x.py"):
                return
        except InputError:
            time.sleep(0.05)
    raise AssertionError("the lock outlived its holder")
