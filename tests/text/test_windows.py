"""Windows cover each token once with context before it, and batches depend on nothing but their arguments."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import utils.text.windows
from utils.text.corpora import Passage
from utils.files import InputError
from utils.text.windows import WindowShape, place_batches, plan_batches, plan_windows, share_of


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


@settings(max_examples=200, deadline=None)
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
    monkeypatch.setattr(utils.windows, "TOKENIZED_CHARACTERS", characters_at_once)
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
    monkeypatch.setattr(utils.windows, "TOKENIZED_CHARACTERS", 2000)
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


def test_batches_hold_equally_long_windows_in_the_order_of_the_text() -> None:
    lengths = np.array([8, 8, 3, 8, 5, 8, 3, 8])
    found = [batch.tolist() for batch in plan_batches(lengths, batch_size=2)]
    assert found == [[0, 1], [2, 6], [3, 5], [4], [7]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(1, 9))
def test_every_window_is_in_one_batch(lengths: list[int], batch_size: int) -> None:
    batches = plan_batches(np.array(lengths), batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len({lengths[window] for window in batch}) == 1
        assert 1 <= len(batch) <= batch_size
    n_needed = sum(-(-lengths.count(length) // batch_size) for length in set(lengths))
    assert len(batches) == n_needed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 9))
def test_shares_have_every_batch_once_and_as_many_tokens_but_for_a_batch(
    lengths: list[int], batch_size: int, n_shares: int
) -> None:
    found = plan_batches(np.array(lengths), batch_size)
    places = place_batches(np.array(lengths), found, 1 << 40).tolist()
    shares = [[i for i, place in enumerate(places) if place in share_of(k, n_shares, 1 << 40)] for k in range(n_shares)]
    assert [i for share in shares for i in share] == list(range(len(found)))  # each once, and neighbours together
    sizes = [sum(lengths[window] for window in batch) for batch in found]
    for share in shares:
        assert abs(sum(sizes[i] for i in share) - sum(lengths) / n_shares) <= max(sizes)


def test_shares_of_another_number_overlap_only_where_they_have_batches_in_common() -> None:
    assert share_of(0, 3, 10) == range(0, 3)
    assert share_of(2, 3, 10) == range(6, 10)
    assert [share_of(k, 4, 10) for k in range(4)] == [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
