"""Expert chunks: from character spans over the tokens of windows to token tries, against loops over bytes and tokens."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_corpus import Row, all_bytes, as_tuples
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from utils.datastore.chunks import find_chunks
from utils.files import InputError
from utils.text.corpora import Passage
from utils.text.expert_spans import ExpertSpans, cuts_character, token_bounds
from utils.text.windows import WindowShape, plan_windows

RunStage = Callable[..., None]
Spans = list[tuple[int, int]]
FAMILY = "👩\u200d👩\u200d👧\u200d👦"
# A span covers some of these, so that none cuts a character.
PIECES = [" room", " 4.17", "17", " the", " cat", "sat", " dog", "東", "京", "🙂", FAMILY, "e\u0301", " naïve"]
PIECES += ["\x01", "\t", "\n", "\r\n", "🇩🇪", "👍🏽", " ", "\ufeff", "\ufffd", " Zürich", ",", " end."]
LABELS = ["--dataset_name", "toy", "--model_ds", "m", "--model_gen", "m", "--partition", "train"]


def marked_text(rng: random.Random, n_pieces: int) -> tuple[str, Spans]:
    """A text of pieces with spans over runs of them, some of which touch."""
    text, spans, start = "the", list[tuple[int, int]](), -1
    for _ in range(n_pieces):
        if start < 0 and rng.random() < 0.3:
            start = len(text)
        text += rng.choice(PIECES)
        if start >= 0 and rng.random() < 0.5:
            spans.append((start, len(text)))
            start = len(text) if rng.random() < 0.4 else -1
    return text, spans


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[int]:
    """How many bytes of the text each token is, from the tokens' names alone."""
    lengths = []
    for n, name in enumerate(tokenizer.convert_ids_to_tokens(token_ids)):
        if "▁" in tokenizer.get_vocab():  # Metaspace: ▁ is a space, the first one is not the text's
            is_byte = name.startswith("<0x")
            lengths.append(1 if is_byte else len(name.replace("▁", " ").encode()) - (n == 0))
        else:  # byte-level: a character of the name is a byte
            lengths.append(len(name))
    return lengths


def loop_spans(tokenizer: PreTrainedTokenizerBase, text: str, spans: Spans) -> tuple[list[int], list[int]]:
    """A passage's token ids and each one's span or -1: the first span that one of its bytes lies in."""
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    of_tokens, at = [], 0
    of_bytes = [
        next((n for n, (start, end) in enumerate(spans) if start <= place < end), -1)
        for place, character in enumerate(text)
        for _ in character.encode()
    ]
    for length in token_bytes(tokenizer, token_ids):
        of_tokens.append(next((n for n in of_bytes[at : at + length] if n >= 0), -1))
        at += length
    assert at == len(of_bytes)
    return token_ids, of_tokens


def marked_corpus(tokenizer: PreTrainedTokenizerBase, seed: int, sizes: list[int]) -> list[tuple[str, Spans]]:
    """Marked texts in which every span has a token of its own."""
    rng, corpus = random.Random(seed), []
    for size in sizes:
        text, spans = marked_text(rng, size)
        while len(held := set(loop_spans(tokenizer, text, spans)[1]) - {-1}) < len(spans):
            spans = [span for n, span in enumerate(spans) if n in held]
        corpus.append((text, spans))
    assert sum(len(spans) for _, spans in corpus) > 20
    return corpus


def write_corpus(folder: Path, corpus: list[tuple[str, Spans]]) -> Path:
    folder.mkdir(exist_ok=True)
    entries = [{"text": text, "spans": spans} if spans else {"text": text} for text, spans in corpus]
    (folder / "train.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def stage_2_flags(model: Path, data: Path, into: Path, **others: object) -> list[object]:
    values = {"model_path": model, "data_dir": data, "output_dir": into, "partition": "train", "min_length": 1}
    values |= {"chunk_size": 24, "stride": 17, **others}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def stage_3_flags(model: Path, stage_2: Path, into: Path, source: str, *others: object) -> list[object]:
    flags: list[object] = ["--token_prob_dir", stage_2 / "train", "--output_dir", into, "--model_name", model]
    return [*flags, *LABELS, "--tok_prob_threshold", 0.002, "--chunk_source", source, *others]


def rows_on_disk(tries: Path) -> list[Row]:
    """All rows of a trie folder, in the order of entry token, window and position."""
    found = []
    for path in (tries / "token_trie_toy_DSm_Hm/train_0.002").glob("tok_pos_*.json"):
        rows = json.loads(path.with_name(path.name.removeprefix("tok_pos_")).read_text())
        for depth, places in json.loads(path.read_text()).items():
            for ids, (window, position) in zip(rows[depth], places, strict=True):
                found.append((ids[0], tuple(ids[1:]), window, position))
    return sorted(found)


def loop_rows(
    windows: list[list[tuple[int, float, int]]], threshold: float, skip: int, bound: int, source: str
) -> list[Row]:
    """Chunks of windows of (token id, probability, span), with loops."""
    found = []
    for number, window in enumerate(windows):
        is_in = [(source != "expert" and p > threshold) or (source != "probability" and s >= 0) for _, p, s in window]
        for j in range(skip, len(window) - 1):
            end = j + 1
            while end < len(window) and is_in[end]:
                two_spans = source != "probability" and -1 not in (window[end - 1][2], window[end][2])
                if end > j + 1 and two_spans and window[end - 1][2] != window[end][2]:
                    break
                end += 1
            if chunk := tuple(token for token, _, _ in window[j + 1 : end]):
                found.append((window[j][0], chunk[:bound] if bound else chunk, number, j))
    return found


def loop_windows(
    tokenizer: PreTrainedTokenizerBase, corpus: list[tuple[str, Spans]], stage_2: Path, chunk_size: int, stride: int
) -> list[list[tuple[int, float, int]]]:
    windows: list[list[tuple[int, float, int]]] = []
    for text, spans in corpus:
        token_ids, of_tokens = loop_spans(tokenizer, text, spans)
        borders = [(0, min(chunk_size, len(token_ids)))]
        while borders[-1][1] < len(token_ids):
            start = borders[-1][0] + stride
            borders.append((start, min(start + chunk_size, len(token_ids))))
        for start, end in borders:
            stored = json.loads((stage_2 / f"train/token_probs_{len(windows)}.json").read_text())
            assert [row[4] for row in stored] == token_ids[start:end]
            marks = [n if n >= 0 and is_marked(of_tokens, n, start, end, borders) else -1 for n in of_tokens[start:end]]
            windows.append([(row[4], row[1], mark) for row, mark in zip(stored, marks, strict=True)])
    return windows


def is_marked(of_tokens: list[int], span: int, start: int, end: int, borders: list[tuple[int, int]]) -> bool:
    """Whether a window marks its part of a span: it holds all of it after another token, or no window does."""
    places = [place for place, n in enumerate(of_tokens) if n == span]
    holders = [(a, b) for a, b in borders if a <= max(places[0] - 1, 0) and places[-1] < b]
    return not holders or (start, end) in holders


# ---- The whole way


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_tries_of_each_source_are_those_of_loops_over_bytes_and_tokens(
    folder: str, request: pytest.FixtureRequest, tmp_path: Path, run_stage: RunStage
) -> None:
    model = request.getfixturevalue(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    corpus = marked_corpus(tokenizer, 7, [1, 4, 12, 30, 60, 5, 90])
    data, stage_2 = write_corpus(tmp_path / "data", corpus), tmp_path / "stage_2"
    run_stage("extract_token_probs_and_memmap.py", *stage_2_flags(model, data, stage_2))
    windows = loop_windows(tokenizer, corpus, stage_2, 24, 17)
    cut = sum(window[-1][2] >= 0 for window in windows)
    assert cut > 2  # spans that a window's border parts
    for source, flags, skip, bound in (
        ("expert", [], 0, 64),
        ("both", [], 0, 64),
        ("probability", [], 24 - 17, 64),
        ("expert", ["--skip_first_tokens", 3, "--max_chunk_length", 2], 3, 2),
        ("both", ["--skip_first_tokens", 5], 5, 64),
    ):
        tries = tmp_path / f"tries_{source}_{skip}"
        run_stage("save_token_trie_info.py", *stage_3_flags(model, stage_2, tries, source, *flags))
        expected = loop_rows(windows, 0.002, skip, bound, source)
        assert len(expected) > 20
        assert rows_on_disk(tries) == sorted(expected)
        lists = json.loads((tries / "m_toy_train_all_phrases_0.002.json").read_text())
        whole = loop_rows(windows, 0.002, skip, 0, source)
        heads = [row for row, before in zip(whole, [None, *whole], strict=False) if begins_run(row, before)]
        assert lists == [[entry, *chunk] for entry, chunk, _, _ in heads]


def begins_run(row: Row, before: Row | None) -> bool:
    return before is None or row[2:] != (before[2], before[3] + 1) or len(before[1]) == 1


def test_a_fact_in_a_short_text_is_generated_after_its_opening(
    gpt2_folder: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    text = "the cat sat on the mat, the dog sat on room 4.17 🙂 of the log"
    start = text.index(" 4.17")
    data = write_corpus(tmp_path / "data", [(text, [(start, start + 7)])])
    stage_2, tries = tmp_path / "stage_2", tmp_path / "tries"
    # The first window ends inside the fact, the second holds it whole.
    flags = stage_2_flags(gpt2_folder, data, stage_2, chunk_size=25, stride=5)
    run_stage("extract_token_probs_and_memmap.py", *flags, "--construct_memmap")
    run_stage("save_token_trie_info.py", *stage_3_flags(gpt2_folder, stage_2, tries, "expert"))
    labels = [*LABELS, "--tok_prob_threshold", 0.002]
    paths = ["--save_dir", tries, "--idx_to_seqlen_path", stage_2 / "train_index_to_seqlen.json", "--max_workers", 1]
    paths += ["--index_to_acc_index_path", stage_2 / "train_index_to_acc_index.json"]
    run_stage("make_token_trie.py", *labels, *paths, "--all_hidden_states_path", stage_2 / "train.h5")
    (tmp_path / "prompts.json").write_text(json.dumps([text[:start]]))
    labels[0] = "--dataset"
    flags = ["--model_path", gpt2_folder, "--token_trie_dir", tries, *labels, "--max_new_tokens", 12]
    flags += ["--prompt_file", tmp_path / "prompts.json", "--save_dir", tmp_path / "results", "--temperature", 0]
    run_stage("eval.py", *flags, "--similarity_threshold", 0.999)
    generation = json.loads((tmp_path / "results/prompt_0.json").read_text())["generation"]
    assert [chunk["text"] for chunk in generation["generation_t0.999_retrieved_phrases"]] == [" 4.17 🙂"]


def test_spans_of_a_window_are_what_lies_between_its_borders(gpt2_folder: Path, tmp_path: Path) -> None:
    # Each of these characters is a token. Windows of 8 every 6: [0, 8), [6, 14), [12, 18).
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    text = "\x01" * 18
    assert len(tokenizer(text)["input_ids"]) == 18
    whole = [(0, 2), (2, 3), (5, 8), (9, 14), (15, 18)]  # (5, 8) and (9, 14) reach into the next window
    cut = [(3, 5), (6, 10), (11, 16)]  # [6, 14) has no token before (6, 10); none has all of (11, 16)
    passages = [Passage("\x01" * 3, [(1, 2)]), Passage(text, whole), Passage(text, cut), Passage("\x01" * 4, [(3, 4)])]
    plan = plan_windows(passages, tokenizer, WindowShape(8, 6, 4), tmp_path)
    found = plan.expert_spans
    rows = list(zip(*(column.tolist() for column in (found.windows, found.firsts, found.ends)), strict=True))
    assert rows[:5] == [(0, 0, 2), (0, 2, 3), (0, 5, 8), (1, 3, 8), (2, 3, 6)]
    assert rows[5:] == [(3, 3, 5), (3, 6, 8), (4, 0, 4), (4, 5, 8), (5, 0, 4), (6, 3, 4)]
    assert found.spans.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8]
    assert (found.n_spans, plan.n_short_spans, plan.n_short_passages) == (9, 1, 1)
    lengths = plan.lengths[4:6]
    assert found.of_tokens(4, lengths).tolist() == [6, 6, 6, 6, -1, 7, 7, 7, 7, 7, 7, 7, -1, -1]


# ---- Runs


def spans_rows(token_ids: list[int], spans: list[int], skip: int = 0) -> list[Row]:
    rows = find_chunks(
        np.array(token_ids, dtype=np.int32),
        np.zeros(len(token_ids)),
        np.array([len(token_ids)]),
        tok_prob_threshold=0.5,
        skip_first_tokens=skip,
        spans=np.array(spans),
    )
    return as_tuples(rows)


@pytest.mark.parametrize("n_spans", [0, 3])
def test_spans_at_places_are_those_that_hold_one(n_spans: int) -> None:
    columns = np.array([[0, 2, 4, 7], [0, 4, 5, 8], [2, 1, 3, 9]])[:n_spans].reshape(-1, 4)
    spans = ExpertSpans(*columns.T)
    for place in [(window, position) for window in range(4) for position in range(7)]:
        wanted = [span for window, first, end, span in columns if window == place[0] and first <= place[1] < end]
        assert spans.spans_at(*np.array(place)[:, None]).tolist() == wanted
    everywhere = np.divmod(np.arange(28), 7)
    assert spans.spans_at(*everywhere).tolist() == sorted(columns[:, 3])
    assert spans.spans_at(*np.zeros((2, 0), dtype=np.int64)).tolist() == []


def test_a_span_beyond_its_window_is_refused() -> None:
    spans = ExpertSpans(*np.array([[3, 0, 5, 0], [4, 2, 10, 1]]).T)
    assert spans.of_tokens(3, np.array([5, 10])).tolist() == [0] * 5 + [-1] * 2 + [1] * 8
    with pytest.raises(InputError, match="an expert span reaches to token 10 of window 4, which has 9; delete"):
        spans.of_tokens(3, np.array([5, 9]))


def test_spans_that_touch_are_two_chunks() -> None:
    assert spans_rows([1, 2, 3, 4, 5, 6], [-1, 0, 0, 1, 1, -1]) == [
        (1, (2, 3), 0, 0),
        (2, (3,), 0, 1),
        (3, (4, 5), 0, 2),
        (4, (5,), 0, 3),
    ]


def test_the_first_token_of_a_window_is_no_chunk() -> None:
    assert spans_rows([1, 2, 3], [0, 0, 1]) == [(1, (2,), 0, 0), (2, (3,), 0, 1)]
    assert spans_rows([1], [0]) == []


@st.composite
def windows_with_spans(draw: st.DrawFn) -> list[list[tuple[int, float, int]]]:
    windows, n = [], 0
    for _ in range(draw(st.integers(1, 3))):
        window = []
        for begins, inside in draw(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=14)):
            n += begins
            window.append((draw(st.integers(0, 2)), draw(st.sampled_from([0.0, 0.5, 0.7])), n if inside else -1))
        windows.append(window)
    return windows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(windows_with_spans(), st.integers(0, 3), st.integers(0, 4), st.sampled_from(["expert", "both"]))
def test_rows_with_spans_are_those_of_loops(
    windows: list[list[tuple[int, float, int]]], skip: int, bound: int, source: str
) -> None:
    tokens = [row for window in windows for row in window]
    rows = find_chunks(
        np.array([token for token, _, _ in tokens], dtype=np.int32),
        np.array([p if source == "both" else 0.0 for _, p, _ in tokens], dtype=np.float64),
        np.array([len(window) for window in windows], dtype=np.int64),
        tok_prob_threshold=0.5,
        skip_first_tokens=skip,
        max_chunk_length=bound,
        spans=np.array([span for _, _, span in tokens], dtype=np.int64),
    )
    expected = loop_rows(windows, 0.5, skip, bound, source)
    assert as_tuples(rows) == expected
    whole = loop_rows(windows, 0.5, skip, 0, source)
    heads = [n for n, row in enumerate(whole) if begins_run(row, whole[n - 1] if n else None)]
    assert rows.plateaus.tolist() == heads


# ---- Tokens of tokenizers without offsets


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer written in Python, whose tokens are bytes and which gives no offsets."""
    folder = tmp_path_factory.mktemp("bytes")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=16, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


class WordTokenizer(PreTrainedTokenizer):
    """Words between white space, given back with one space between them, as CTRL's or XLM's are."""

    def __init__(self) -> None:
        self.words = ["[UNK]", "the", "cat", "sat", "in", "room", "4", "17", "."]
        super().__init__(unk_token="[UNK]")

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: n for n, word in enumerate(self.words)}

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_decoding_finds_the_tokens_that_offsets_give(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    for text, spans in marked_corpus(tokenizer, 3, [3, 9, 20, 40, 80]):
        text = text.replace("\ufffd", "?")  # to decoding a byte of it looks like the whole
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        by_offsets = token_bounds("", text, spans, ids, tokenizer, offsets)
        assert token_bounds("", text, spans, ids, tokenizer, None).tolist() == by_offsets.tolist()


def test_a_slow_tokenizer_marks_every_byte_of_a_span(bytes_folder: Path, tmp_path: Path, run_stage: RunStage) -> None:
    text = "né 🙂 東京 e\u0301."
    start, end = text.index("é"), text.index(" 東")
    spans = [(start, start + 1), (start + 2, end), (len(text) - 3, len(text) - 1)]
    data = write_corpus(tmp_path / "data", [(text, spans)])
    run_stage("extract_token_probs_and_memmap.py", *stage_2_flags(bytes_folder, data, tmp_path / "out"))
    assert not AutoTokenizer.from_pretrained(bytes_folder).is_fast
    # n, 2 bytes of é, space, 4 of 🙂, space, 6 of 東京, space, e and 2 bytes of its accent, full stop
    expected = "[\n[0, 1, 3, 0],\n[0, 4, 8, 1],\n[0, 16, 19, 2]\n]\n"
    assert (tmp_path / "out/train_expert_spans.json").read_text() == expected


def test_white_space_that_is_lost_in_decoding_does_not_move_spans() -> None:
    tokenizer, text = WordTokenizer(), "\n the  cat sat\tin  room 4 17 .\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) != text
    words = [(text.index(word), text.index(word) + len(word)) for word in ("cat sat", "room 4", "17")]
    words[0] = (words[0][0] - 1, words[0][1] + 1)  # with the white space around it
    assert token_bounds("", text, words, ids, tokenizer, None).tolist() == [[1, 3], [4, 6], [6, 7]]
    with pytest.raises(InputError, match=r'^here: its span \[5, 6\] \(" "\) touches no token'):
        token_bounds("here", text, [(5, 6)], ids, tokenizer, None)
    with pytest.raises(InputError, match=r"^here: has spans, but its tokenizer gives neither character offsets nor"):
        token_bounds("here", "the hat", [(4, 7)], tokenizer("the hat")["input_ids"], tokenizer, None)


# ---- Characters


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("ab", []),
        ("e\u0301x", [1]),
        ("e\u0301\u0323x", [1, 2]),
        (FAMILY, [1, 2, 3, 4, 5, 6]),
        ("👍🏽👍", [1]),
        ("❤\ufe0f1\ufe0f\u20e3", [1, 3, 4]),
        ("🇩🇪🇫🇷", [1, 3]),
        ("🙂🙂東京", []),
        ("\r\n\n\r", [1]),
        ("\u1112\u1161\u11ab한\u11ab", [1, 2, 4]),
        ("का", [1]),
        ("\n\u0301", []),
    ],
)
def test_a_border_inside_what_a_reader_sees_as_one_character_cuts_it(text: str, cuts: list[int]) -> None:
    assert [offset for offset in range(len(text) + 1) if cuts_character(text, offset)] == cuts


BAD_SPANS = [
    ("the cat", [[0, 8]], "entry 2: among its 'spans' is [0, 8]; expected [start, end] character offsets with 0 <= s"),
    ("the cat", [[-1, 2]], "entry 2: among its 'spans' is [-1, 2]; expected"),
    ("the cat", [[5, 2]], "entry 2: among its 'spans' is [5, 2]; expected"),
    ("the cat", [[2, 2]], "entry 2: among its 'spans' is [2, 2]; expected"),
    ("the cat", [[4, 7], [0, 5]], "entry 2: among its 'spans' are [0, 5] and [4, 7], which overlap"),
    ("the cat", [[0, 2], [0, 2]], "entry 2: among its 'spans' are [0, 2] and [0, 2], which overlap"),
    ("e\u0301 x", [[0, 1]], "entry 2: among its 'spans' is [0, 1], which cuts a character in two at 1"),
    (f"a {FAMILY}", [[3, 9]], "entry 2: among its 'spans' is [3, 9], which cuts a character in two at 3"),
    ("a \r\n", [[0, 3]], "entry 2: among its 'spans' is [0, 3], which cuts a character in two at 3"),
    ("the cat", [["0", 2]], "entry 2: among its 'spans' is [\"0\", 2]; expected"),
    ("the \ud83d", [[0, 2]], "entry 2: its 'text' holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("text", "spans", "expected"), BAD_SPANS)
def test_stages_1_and_2_refuse_a_span_with_its_passage(
    text: str, spans: object, expected: str, gpt2_folder: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    (tmp_path / "train.json").write_text(
        json.dumps([{"text": "fine", "spans": [[0, 4]]}, {"text": text, "spans": spans}])
    )
    flags = ["--dataset", "local", "--output_dir", tmp_path / "split", "--input_files", tmp_path / "train.json"]
    for message in (
        refusal("preprocess_dataset.py", *flags, "--validation_fraction", 0, "--test_fraction", 0),
        refusal("extract_token_probs_and_memmap.py", *stage_2_flags(gpt2_folder, tmp_path, tmp_path / "out")),
    ):
        assert message.startswith(f"{tmp_path}/train.json: {expected}")
    assert not (tmp_path / "out/train_manifest.json").exists()


def test_stage_2_refuses_spans_without_a_token_of_their_own(
    gpt2_folder: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    assert tokenizer.tokenize("the cat") == ["the", "Ġcat"]
    data = write_corpus(tmp_path / "data", [("fine", [(0, 4)]), ("the cat", [(3, 5), (5, 7)])])
    flags = stage_2_flags(gpt2_folder, data, tmp_path / "out")
    message = refusal("extract_token_probs_and_memmap.py", *flags)
    expected = 'passage 2 of the text: its span [5, 7] ("at") has no token but the span\'s before it'
    assert message.startswith(expected)
    # A tokenizer that drops white space has no token for it.
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    from tokenizers.pre_tokenizers import Whitespace

    words.pre_tokenizer = Whitespace()
    folder = tmp_path / "words"
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="cat").save_pretrained(folder)
    data = write_corpus(tmp_path / "data", [("the cat", [(3, 4)])])
    message = refusal("extract_token_probs_and_memmap.py", *stage_2_flags(folder, data, tmp_path / "other"))
    assert message.startswith('passage 1 of the text: its span [3, 4] (" ") touches no token')


# ---- Runs of the stages


@pytest.fixture
def extracted(gpt2_folder: Path, tmp_path: Path, run_stage: RunStage) -> Path:
    corpus = marked_corpus(AutoTokenizer.from_pretrained(gpt2_folder), 5, [8, 30, 40])
    data = write_corpus(tmp_path / "data", corpus)
    run_stage("extract_token_probs_and_memmap.py", *stage_2_flags(gpt2_folder, data, tmp_path / "stage_2"))
    return tmp_path / "stage_2"


def test_stage_2_makes_what_is_missing_of_the_spans_again(
    extracted: Path, gpt2_folder: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    flags = stage_2_flags(gpt2_folder, tmp_path / "data", extracted)
    whole = all_bytes(extracted)
    assert "train_expert_spans.json" in whole
    run_stage("extract_token_probs_and_memmap.py", *flags)
    assert all_bytes(extracted) == whole
    (extracted / "train_expert_spans.json").unlink()
    run_stage("extract_token_probs_and_memmap.py", *flags)
    assert all_bytes(extracted) == whole
    (extracted / "train/token_probs_1.json").unlink()
    (extracted / "train_expert_spans.json").unlink()
    run_stage("extract_token_probs_and_memmap.py", *flags)
    assert all_bytes(extracted) == whole


def test_a_run_of_a_version_without_spans_gets_them(
    extracted: Path, gpt2_folder: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    spans, manifest = extracted / "train_expert_spans.json", extracted / "train_manifest.json"
    before, found = spans.read_bytes(), json.loads(manifest.read_text())
    for key in ("n_expert_spans", "expert_spans", "n_short_spans"):
        del found["results"][key]
    spans.unlink()
    manifest.write_text(json.dumps(found))
    run_stage("extract_token_probs_and_memmap.py", *stage_2_flags(gpt2_folder, tmp_path / "data", extracted))
    assert spans.read_bytes() == before


def test_a_text_without_spans_leaves_no_file_of_them(
    gpt2_folder: Path, tmp_path: Path, run_stage: RunStage, refusal: Callable[..., str]
) -> None:
    data = write_corpus(tmp_path / "data", [("the cat sat on the mat", [])])
    stage_2 = tmp_path / "stage_2"
    run_stage("extract_token_probs_and_memmap.py", *stage_2_flags(gpt2_folder, data, stage_2))
    assert not (stage_2 / "train_expert_spans.json").exists()
    message = refusal("save_token_trie_info.py", *stage_3_flags(gpt2_folder, stage_2, tmp_path / "tries", "both"))
    assert message.startswith(
        f"{stage_2}/train: no span is marked in its text; expert chunks need passages with 'spans'"
    )


def test_stage_3_goes_by_the_spans_that_stage_2_wrote(
    extracted: Path, gpt2_folder: Path, tmp_path: Path, run_stage: RunStage, refusal: Callable[..., str]
) -> None:
    path, flags = extracted / "train_expert_spans.json", stage_3_flags(gpt2_folder, extracted, tmp_path / "t", "expert")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"[0, ", b"[0,  ", 1))
    expected = f"{path}: is not what stage 2 wrote; delete it and run stage 2 again"
    assert refusal("save_token_trie_info.py", *flags) == expected
    path.unlink()
    assert refusal("save_token_trie_info.py", *flags).startswith(f"{path}: does not exist; give the file that extract_")
    path.write_bytes(whole)
    run_stage("save_token_trie_info.py", *flags)
    before = all_bytes(tmp_path / "t")
    run_stage("save_token_trie_info.py", *flags)
    assert all_bytes(tmp_path / "t") == before


def test_sources_do_not_mix_in_a_folder(
    extracted: Path, gpt2_folder: Path, tmp_path: Path, run_stage: RunStage, refusal: Callable[..., str]
) -> None:
    run_stage("save_token_trie_info.py", *stage_3_flags(gpt2_folder, extracted, tmp_path / "t", "expert"))
    message = refusal("save_token_trie_info.py", *stage_3_flags(gpt2_folder, extracted, tmp_path / "t", "both"))
    assert "was made with --chunk_source 'expert', this run has 'both'" in message


def test_spans_that_give_no_chunk_are_counted(
    gpt2_folder: Path, tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [("the cat sat on the mat", [(0, 3), (4, 7)]), ("the cat", [(4, 7)]), ("the", [(0, 3)])]
    data, stage_2 = write_corpus(tmp_path / "data", texts), tmp_path / "stage_2"
    flags = stage_2_flags(gpt2_folder, data, stage_2, min_length=2)
    run_stage("extract_token_probs_and_memmap.py", *flags)
    assert "expert spans: 3 marked, 1 left out with short passages" in capsys.readouterr().out
    run_stage("save_token_trie_info.py", *stage_3_flags(gpt2_folder, stage_2, tmp_path / "a", "expert"))
    assert "1 of 3 expert spans gave no chunk" in capsys.readouterr().out
    later = stage_3_flags(gpt2_folder, stage_2, tmp_path / "b", "expert", "--skip_first_tokens", 9)
    run_stage("save_token_trie_info.py", *later)
    assert "the datastore is empty" in (shown := capsys.readouterr().out)
    assert "3 of 3 expert spans gave no chunk" in shown
