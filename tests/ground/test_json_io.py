"""JSON files: streamed both ways in little memory, and refused with their place where they are not whole."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils import json_io
from utils.files import InputError, open_text
from utils.json_io import JsonBytes, iter_json_list, json_list_writer, read_json, write_json, write_json_list

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


def test_of_two_lists_written_at_once_the_full_one_is_named(tmp_path: Path) -> None:
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


# ---- Lists


@given(entries=st.lists(JSON_VALUES, max_size=6), indent=st.sampled_from([None, 0, 3]), block=st.integers(1, 40))
def test_a_streamed_list_equals_json_loads_wherever_blocks_end(
    folder: Path, entries: list, indent: int | None, block: int
) -> None:
    for ensure_ascii in (True, False):
        text = json.dumps(entries, indent=indent, ensure_ascii=ensure_ascii)
        assert stream(folder, text, block) == json.loads(text)


@given(entries=st.lists(JSON_VALUES, min_size=1, max_size=5), data=st.data(), block=st.integers(1, 40))
def test_every_prefix_of_a_list_is_refused(folder: Path, entries: list, data: st.DataObject, block: int) -> None:
    text = json.dumps(entries)
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(InputError):
        stream(folder, text[:cut], block)


def stream(folder: Path, text: str, block: int) -> list:
    path = folder / "list.json"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_io, "BLOCK_CHARACTERS", block)
        return list(iter_json_list(path))


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
    [
        (b'{"a": 1', "is not valid JSON"),
        (b'"\xff"', "is not UTF-8"),
        (b"9" * 5000, "cannot be read"),
        (b"", "is not valid JSON"),
    ],
)
def test_json_that_cannot_be_read_is_an_input_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a.json")


@given(value=JSON_VALUES, indent=st.sampled_from([None, 2]))
def test_json_is_read_as_it_was_written(folder: Path, value: object, indent: int | None) -> None:
    path = folder / "value.json"
    write_json(path, value, indent=indent)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(r'["whole \ud83d\ude42"]')
    assert read_json(path) == ["whole 🙂"]
    path.write_text(r'["half \ud83d"]')
    with pytest.raises(
        InputError, match=r"a\.json: holds JSON that cannot be read \('\\ud83d' is half of a surrogate pair\)"
    ):
        read_json(path)


def test_bytes_that_are_json_already_are_written_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    with json_list_writer(path) as write:
        write(JsonBytes(b'{"a":1}'))
        write({"a": 1})
    assert path.read_text() == '[\n{"a":1},\n{"a": 1}\n]\n'
