"""Texts are cut at token borders without losing a space or splitting a character, and drafts are counted by depth."""

from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from utils.decoding.types import DraftCounts, Generation, GenerationStats, TokenTexts, text_pieces

HOSTILE = "</script><b onload='x'>{{data}} &lt; \u2028\u202e\ufeff\x00\x1b[31m\x7f\x85 🙂 e\u0301 👩‍👩‍👧"


def test_draft_counts_are_by_how_far_ahead_a_token_is() -> None:
    counts = DraftCounts()
    counts.add([1, 1, 2, 3], 2)
    counts.add([], 0)
    counts.add([1, 2], 0)
    assert (counts.n_drafts, counts.draft_tokens, counts.accepted_tokens) == (2, 6, 2)
    assert (counts.drafted, counts.accepted) == ([2, 2, 1], [1, 1, 0])


def test_a_generations_flat_list_begins_with_the_prompt() -> None:
    generation = Generation(0, [5, 6], [7], [], GenerationStats(1, 1.0, 1.0, 0.0))
    assert generation.token_ids == [5, 6, 7]


# ---- Text


@settings(max_examples=60)
@given(token_ids=st.lists(st.integers(0, 319), max_size=20), borders=st.lists(st.integers(0, 22), max_size=5))
def test_pieces_join_to_the_whole_text(gpt2_folder: Path, token_ids: list[int], borders: list[int]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(gpt2_folder)
    pieces = text_pieces(token_ids, sorted(borders), tokenizer.decode)
    assert len(pieces) == len(borders) + 1
    assert "".join(pieces) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_token_texts_cuts_as_text_pieces_does(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    cutter = TokenTexts(decode)
    for text in [*TEXTS, HOSTILE]:
        ids = tokenizer.encode(text)[:120]
        pieces = cutter.cut(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == decode(ids)
        slow = text_pieces(ids, range(1, len(ids)), decode)
        if "\ufffd" not in decode(ids):
            assert pieces == slow
    assert cutter.cut([]) == []
