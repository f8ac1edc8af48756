"""Windows cover each token once with context before it, and batches depend on nothing but their arguments."""

import gc
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from utils.files import InputError
from utils.text import windows
from utils.text.corpora import Passage
from utils.text.expert_spans import ExpertSpans
from utils.text.windows import TokenFile, WindowPlan, WindowShape, load_plan, plan_batches, plan_windows, save_plan


@pytest.mark.parametrize(
    ("n_tokens", "bounds"),
    [
        (0, []),
        (2, []),
        (3, [(0, 3)]),
        (4, [(0, 4)]),
        (5, [(0, 4), (3, 5)]),
        (7, [(0, 4), (3, 7)]),
        (8, [(0, 4), (3, 7), (6, 8)]),
        (10, [(0, 4), (3, 7), (6, 10)]),
    ],
)
def test_windows_of_four_tokens_every_three(n_tokens: int, bounds: list[tuple[int, int]]) -> None:
    assert WindowShape(chunk_size=4, stride=3, min_length=3).bounds(n_tokens) == bounds


@pytest.mark.parametrize(
    ("n_tokens", "bounds"), [(4, [(0, 4)]), (5, [(0, 4), (4, 5)]), (8, [(0, 4), (4, 8)]), (9, [(0, 4), (4, 8), (8, 9)])]
)
def test_a_stride_of_the_chunk_size_leaves_no_overlap(n_tokens: int, bounds: list[tuple[int, int]]) -> None:
    assert WindowShape(chunk_size=4, stride=4, min_length=1).bounds(n_tokens) == bounds


@settings(max_examples=200)
@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_every_window_brings_new_tokens_and_all_tokens_come(
    n_tokens: int, chunk_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, chunk_size))
    covered = 0
    for k, (start, end) in enumerate(WindowShape(chunk_size, stride, 1).bounds(n_tokens)):
        assert start == k * stride <= covered  # no gap
        assert covered < end == min(start + chunk_size, n_tokens)  # something new
        covered = end
    assert covered == n_tokens


@pytest.mark.parametrize(("chunk_size", "stride"), [(4, 5), (4, 0), (0, 0)])
def test_a_stride_beyond_the_chunk_size_is_refused(chunk_size: int, stride: int) -> None:
    with pytest.raises(InputError, match=f"--stride {stride}: expected 1 to the --chunk_size of {chunk_size}"):
        WindowShape(chunk_size, stride, 1)


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("characters_at_once", [1, 1000, 1 << 20])
def test_a_plan_holds_the_passages_tokens_without_special_ones(
    folder: str,
    characters_at_once: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(windows, "TOKENIZED_CHARACTERS", characters_at_once)
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    texts = [*TEXTS, "", "too short", TEXTS[0][:40]]
    shape = WindowShape(20, 15, 12)
    plan = plan_windows((Passage(text) for text in texts), tokenizer, shape, tmp_path)

    expected, n_short, window_ids = [], 0, []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        window_ids += [ids[start:end] for start, end in shape.bounds(len(ids))]
        n_short += len(ids) < 12
        expected += ids if len(ids) >= 12 else []
    assert [plan.token_ids(i).tolist() for i in range(plan.n_windows)] == window_ids
    assert plan.passage_tokens.read(0, len(expected) + 1).tolist() == expected
    assert plan.n_tokens == sum(map(len, window_ids))
    assert (plan.n_short_passages, plan.n_passages) == (n_short, len(texts) - n_short)
    assert plan.largest_id == max(expected)
    assert not list(tmp_path.iterdir())  # the file of ids has no name


def test_the_fingerprint_tells_other_windows_apart(gpt2_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)

    def fingerprint(texts: list[str], *shape: int) -> str:
        return plan_windows(map(Passage, texts), tokenizer, WindowShape(*shape), tmp_path).fingerprint

    same = fingerprint(TEXTS, 20, 15, 12)
    assert same == fingerprint([*TEXTS, "short"], 20, 15, 12)
    others = [fingerprint(TEXTS, 20, 16, 12), fingerprint(TEXTS, 19, 15, 12), fingerprint(TEXTS[::-1], 20, 15, 12)]
    assert len({same, *others}) == 4


@pytest.mark.parametrize(("texts", "longest"), [([], 0), (["abc", "the quick brown fox"], None)])
def test_a_text_without_a_long_enough_passage_is_refused(
    texts: list[str], longest: int | None, gpt2_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    longest = max((len(tokenizer.encode(text)) for text in texts), default=0)
    expected = (
        rf"no passage of the 64 tokens of --min_length \(the longest of its {len(texts)} passages has {longest}\)"
    )
    with pytest.raises(InputError, match=expected):
        plan_windows(map(Passage, texts), tokenizer, WindowShape(64, 64, 64), tmp_path)


def test_the_text_is_streamed(gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "TOKENIZED_CHARACTERS", 2000)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    alive = most = 0

    class Counted(Passage):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def passages() -> Iterator[Passage]:
        nonlocal alive, most
        for _ in range(200):
            alive += 1
            most = max(most, alive)
            yield Counted(TEXTS[0])

    plan = plan_windows(passages(), tokenizer, WindowShape(20, 15, 12), tmp_path)
    assert plan.n_passages == 200
    assert most <= 2 * 5 + 1  # five make up the 2000 characters that are tokenised together


# ---- What counts


@settings(max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 20), st.data())
def test_each_token_that_something_stands_before_counts_once(
    passages: list[int], chunk_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, chunk_size))
    starts, lengths, n_before = [], [], 0
    firsts: set[int] = set()  # of which nothing stands before them in their window
    for n_tokens in passages:
        for start, end in WindowShape(chunk_size, stride, 1).bounds(n_tokens):
            starts.append(n_before + start)
            lengths.append(end - start)
            if start == 0 or stride == chunk_size:
                firsts.add(n_before + start)
        n_before += n_tokens
    plan = plan_of_windows(starts, lengths)
    counted = [
        place
        for start, length, first in zip(starts, lengths, plan.first_counted.tolist(), strict=True)
        for place in range(start + first, start + length)
    ]
    assert sorted(counted) == sorted(set(range(n_before)) - firsts)


def plan_of_windows(starts: list[int], lengths: list[int]) -> WindowPlan:
    spans = ExpertSpans.of_rows(np.zeros((0, 4)))
    with tempfile.TemporaryFile() as file:
        return WindowPlan(TokenFile(file), np.array(starts), np.array(lengths), 1, 0, 0, 0, "", [], spans)


def test_a_window_that_is_left_out_changes_nothing_for_those_after_it() -> None:
    assert plan_of_windows([0, 3, 6, 20], [4, 4, 4, 4]).first_counted.tolist() == [1, 1, 1, 1]
    assert plan_of_windows([0, 6, 20], [8, 4, 4]).first_counted.tolist() == [1, 2, 1]
    assert plan_of_windows([0, 4, 5], [4, 1, 3]).first_counted.tolist() == [1, 1, 1]


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("shape", [WindowShape(20, 20, 2), WindowShape(20, 13, 2), WindowShape(7, 7, 2)])
def test_the_bytes_of_a_window_are_those_of_its_text_after_its_first_token(
    folder: str, shape: WindowShape, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With the spaces that a tokenizer takes for a part of its words, also at the beginning of a window."""
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    texts = [text for text in TEXTS if text.isascii()]
    plan = plan_windows(map(Passage, texts), tokenizer, shape, tmp_path, counts_bytes=True)
    expected = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        ends = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
        assert ends[-1] == len(text)
        expected += [ends[end] - ends[start + 1] for start, end in shape.bounds(len(ids))]
    assert plan.n_bytes is not None
    assert plan.n_bytes.tolist() == expected
    assert plan_windows(map(Passage, texts), tokenizer, shape, tmp_path).n_bytes is None


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize(
    "text", ["x 東京は日本の首都です。 👩‍👩‍👧‍👦 family 🙂🙂", "x naïve e\u0301 \u0000\t \n  end. ", "x "]
)
def test_the_bytes_of_all_tokens_are_those_of_the_text(
    folder: str, text: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    plan = plan_windows([Passage(text)], tokenizer, WindowShape(500, 500, 2), tmp_path, counts_bytes=True)
    assert plan.n_bytes is not None
    assert plan.n_bytes.tolist() == [len(text.encode()) - 1]  # "x" is a token


def test_a_tokenizer_without_offsets_shares_the_bytes_out(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()  # written in Python; a token is a byte
    plan = plan_windows([Passage(TEXTS[3])], tokenizer, WindowShape(20, 20, 2), tmp_path, counts_bytes=True)
    assert plan.n_bytes is not None
    assert plan.n_bytes.tolist() == (plan.lengths - 1).tolist()


# ---- Batches


def test_batches_hold_equally_long_windows_in_the_order_of_the_text() -> None:
    lengths = np.array([8, 8, 3, 8, 5, 8, 3, 8])
    found = [batch.tolist() for batch in plan_batches(lengths, batch_size=2)]
    assert found == [[0, 1], [2, 6], [3, 5], [4], [7]]


@settings(max_examples=100)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(1, 9))
def test_every_window_is_in_one_batch(lengths: list[int], batch_size: int) -> None:
    batches = plan_batches(np.array(lengths), batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len({lengths[window] for window in batch}) == 1
        assert 1 <= len(batch) <= batch_size
    n_needed = sum(-(-lengths.count(length) // batch_size) for length in set(lengths))
    assert len(batches) == n_needed


# ---- A plan that processes share

MADE_FROM = {"text": "a", "chunk_size": 20}


@pytest.fixture
def plan(gpt2_folder: Path, tmp_path: Path) -> WindowPlan:
    """Of texts with marked spans, one of them in a passage that is left out."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    passages = [*map(Passage, TEXTS), Passage("the cat", [(0, 3)]), Passage(TEXTS[0], [(0, 9), (10, 40), (60, 62)])]
    return plan_windows(passages, tokenizer, WindowShape(20, 15, 12), tmp_path)


def n_open(path: Path) -> int:
    """How many times this process has a file open."""
    return sum(os.path.realpath(entry) == str(path) for entry in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("copied_tokens", [1, 7, 1 << 20])
def test_a_plan_is_loaded_as_it_was_saved(
    copied_tokens: int, plan: WindowPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "COPIED_TOKENS", copied_tokens)
    path = tmp_path / "train_plan.npy"
    save_plan(path, plan, MADE_FROM)
    loaded = load_plan(path, MADE_FROM)
    assert loaded is not None
    assert len(plan.expert_spans.rows) == 3
    for name in (
        "n_windows",
        "n_tokens",
        "n_passages",
        "n_short_passages",
        "n_short_spans",
        "largest_id",
        "fingerprint",
        "prefix_ids",
    ):
        assert getattr(loaded, name) == getattr(plan, name), name
    for found, wanted in (
        (loaded.starts, plan.starts),
        (loaded.lengths, plan.lengths),
        (loaded.expert_spans.rows, plan.expert_spans.rows),
        *((loaded.token_ids(window), plan.token_ids(window)) for window in range(plan.n_windows)),
    ):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("with_bos", "prefix_ids"), [(True, [1]), (False, [])])
def test_a_plan_knows_what_is_read_before_its_windows(
    with_bos: bool, prefix_ids: list[int], llama_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    plan = plan_windows([Passage(TEXTS[0])], tokenizer, WindowShape(20, 15, 12, with_bos), tmp_path)
    save_plan(tmp_path / "train_plan.npy", plan, MADE_FROM)
    loaded = load_plan(tmp_path / "train_plan.npy", MADE_FROM)
    assert loaded is not None
    assert loaded.prefix_ids == plan.prefix_ids == prefix_ids
    assert loaded.token_ids(0).tolist() == tokenizer.encode(TEXTS[0], add_special_tokens=False)[:20]


def test_a_plan_that_is_saved_again_has_the_same_bytes(plan: WindowPlan, tmp_path: Path) -> None:
    save_plan(tmp_path / "a.npy", plan, MADE_FROM)
    loaded = load_plan(tmp_path / "a.npy", MADE_FROM)
    assert loaded is not None
    save_plan(tmp_path / "b.npy", loaded, MADE_FROM)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_numpy_reads_the_four_arrays_of_a_plans_file(plan: WindowPlan, tmp_path: Path) -> None:
    save_plan(tmp_path / "a.npy", plan, MADE_FROM)
    with open(tmp_path / "a.npy", "rb") as file:
        about, bounds, spans, token_ids = (np.load(file) for _ in range(4))
        assert not file.read()
    assert json.loads(about.tobytes())["made_from"] == MADE_FROM
    assert (bounds == np.column_stack([plan.starts, plan.lengths])).all()
    assert (spans == plan.expert_spans.rows).all()
    assert (token_ids == plan.passage_tokens.read(0, len(token_ids) + 1)).all()


@pytest.mark.parametrize("made_from", [{}, {"text": "b", "chunk_size": 20}, {**MADE_FROM, "stride": 1}])
def test_a_plan_of_something_else_is_not_loaded(made_from: dict[str, object], plan: WindowPlan, tmp_path: Path) -> None:
    path = tmp_path / "train_plan.npy"
    save_plan(path, plan, MADE_FROM)
    assert load_plan(path, made_from) is None
    assert n_open(path) == 0


def test_a_plan_that_is_missing_cut_off_or_too_long_is_not_loaded(plan: WindowPlan, tmp_path: Path) -> None:
    path = tmp_path / "train_plan.npy"
    assert load_plan(path, MADE_FROM) is None
    assert load_plan(tmp_path, MADE_FROM) is None
    save_plan(path, plan, MADE_FROM)
    content = path.read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        assert load_plan(path, MADE_FROM) is None, length
    path.write_bytes(content + b"\0")
    assert load_plan(path, MADE_FROM) is None
    assert n_open(path) == 0
    path.write_bytes(content)
    assert load_plan(path, MADE_FROM) is not None


@pytest.mark.parametrize("byte", [b"\0", b"9", b"}", b"\xff"])
def test_no_damage_to_a_plans_file_is_an_error(byte: bytes, plan: WindowPlan, tmp_path: Path) -> None:
    """A changed token id is not noticed; who changes the file of a run that goes on may do so."""
    path = tmp_path / "train_plan.npy"
    save_plan(path, plan, MADE_FROM)
    content = path.read_bytes()
    for at in [*range(0, 1200, 3), *range(1200, len(content), 97)]:
        path.write_bytes(content[:at] + byte + content[at + 1 :])
        load_plan(path, MADE_FROM)
    assert n_open(path) == 0


def test_a_loaded_plans_file_is_closed_with_it(plan: WindowPlan, tmp_path: Path) -> None:
    path = tmp_path / "train_plan.npy"
    save_plan(path, plan, MADE_FROM)
    assert n_open(path) == 0
    loaded = load_plan(path, MADE_FROM)
    assert n_open(path) == 1
    path.unlink()  # as the run that ends first does
    assert loaded is not None
    assert loaded.token_ids(3).tolist() == plan.token_ids(3).tolist()
    del loaded
    gc.collect()
    assert n_open(path) == n_open(Path(f"{path} (deleted)")) == 0


def test_a_plan_on_a_full_disk_is_refused_with_its_file(plan: WindowPlan, tmp_path: Path) -> None:
    (tmp_path / ".train_plan.npy.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"train_plan\.npy: cannot be written \(No space left on device\)"):
        save_plan(tmp_path / "train_plan.npy", plan, MADE_FROM)
