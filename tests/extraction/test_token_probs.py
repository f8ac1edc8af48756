"""`token_probs_{i}.json`: read as it was written, row by row as JSON has it, and refused where it is something else."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.extraction.token_probs import (
    read_token_probs,
    read_window,
    token_probs_path,
    windows_with_token_probs,
    write_token_probs,
)
from utils.files import InputError


def test_a_token_probs_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    texts = ["a\n", "🙂", '"]']
    ids, probabilities = np.array([5, 7, 2]), np.array([0, 0.1, 1.0])
    write_token_probs(tmp_path, 4, ids, probabilities, texts)
    read = read_token_probs(tmp_path, 4)
    assert read[0] == texts
    assert read[1].tolist() == ids.tolist()
    assert read[2].tolist() == probabilities.tolist()
    assert json.loads(token_probs_path(tmp_path, 4).read_text(encoding="utf-8")) == [
        ["a\n", 0, 4, 0, 5],
        ["🙂", 0.1, 4, 1, 7],
        ['"]', 1, 4, 2, 2],
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


@given(
    texts=st.lists(st.sampled_from(["], [", "]", "[", "], ", " [", '"', "\\", "a", "🙂", "\n", ", "]), min_size=1),
    indent=st.sampled_from([None, 1]),
    ends=st.sampled_from(["", "\n", " \r\n"]),
)
def test_row_texts_are_the_rows_one_by_one(folder: Path, texts: list[str], indent: int | None, ends: str) -> None:
    """Also where a text looks as what stands between two rows, and in a file that another program has written anew."""
    rows = [[text, 0.5, 3, position, position] for position, text in enumerate(texts)]
    token_probs_path(folder, 3).write_text(json.dumps(rows, ensure_ascii=False, indent=indent) + ends, encoding="utf-8")
    window = read_window(folder, 3)
    assert window.texts == texts
    assert b"\n" not in window.json
    assert json.loads(window.json) == rows
    assert [json.loads(b"[" + text + b"]") for text in window.row_texts] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[["a", 0, 3, 0, 5], ["b"', "is not valid JSON"),
        ("{}", "is not a list of"),
        ("[]", "is not a list of"),
        ("[1]", "is not a list of"),
        ('[["a", 0, 3, 0]]', "is not a list of"),
        (
            '[["a", 0, 2, 0, 5]]',
            r"is not a list of \[text, probability in \[0, 1\], 3, position, token id\] rows in order",
        ),
        ('[["a", 0, 3, 1, 5]]', "is not a list of"),
        ('[["a", 0, 3, 0, 5], ["a", 0, 3, 0, 5]]', "is not a list of"),
        ('[["a", 1.5, 3, 0, 5]]', "is not a list of"),
        ('[["a", -0.1, 3, 0, 5]]', "is not a list of"),
        ('[["a", NaN, 3, 0, 5]]', "is not a list of"),
        ('[["a", null, 3, 0, 5]]', "is not a list of"),
        ('[["a", "x", 3, 0, 5]]', "is not a list of"),
        ('[["a", 0, 3, 0, -1]]', "is not a list of"),
        ('[["a", 0, 3, 0, 2.5]]', "is not a list of"),
        ('[["a", 0, 3, 0, "5"]]', "is not a list of"),
        ('[["a", 0, 3, 0, 2147483648]]', "is not a list of"),
        ('[["a", 0, 3, 0, 99999999999999999999]]', "is not a list of"),
    ],
)
def test_a_file_that_is_no_windows_is_refused_with_its_path(content: str, message: str, tmp_path: Path) -> None:
    path = token_probs_path(tmp_path, 3)
    path.write_text(content)
    with pytest.raises(InputError, match=rf"^{path}: {message}"):
        read_window(tmp_path, 3)


def test_windows_with_a_file_are_told_by_its_name(tmp_path: Path) -> None:
    for name in ("token_probs_10.json", "token_probs_2.json", "token_probs_0.json"):
        (tmp_path / name).write_text("")
    for name in ("token_probs_07.json", ".token_probs_3.json.tmp", "token_probs_x.json", "hidden_states_4.npy"):
        (tmp_path / name).write_text("")
    assert windows_with_token_probs(tmp_path) == [0, 2, 10]
