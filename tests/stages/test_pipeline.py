"""The whole pipeline through its command lines: the datastore is the one that loops over stage 2's files build."""

import json
from collections import Counter
from collections.abc import Callable

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TEXTS
from pipelines import GAMMA, MAX_CHUNK, SKIP, Pipeline, build

from utils.datastore.store import read_flattened
from utils.extraction.hidden_states import read_hidden_states
from utils.lm.model import load_lm, load_tokenizer


@pytest.fixture(scope="module", params=["gpt2_folder", "llama_folder", "example"])
def pipeline(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]
) -> Pipeline:
    """Of random models on emoji, CJK, control characters; of the example model on a document it has not seen."""
    root = tmp_path_factory.mktemp("pipeline")
    if request.param == "example":
        return build(ROOT / "examples" / "models" / "large", root, run_stage, [TEXTS[1], TEXTS[2]])
    return build(request.getfixturevalue(request.param), root, run_stage, TEXTS)


def rows_by_loops(pipeline: Pipeline) -> Counter[tuple[int, tuple[int, ...], int, int, bytes]]:
    """(entry, chunk, window, position, unit vector) of every row, from token_probs and hidden_states files alone."""
    rows: Counter[tuple[int, tuple[int, ...], int, int, bytes]] = Counter()
    for path in pipeline.windows.glob("token_probs_*.json"):
        tokens = json.loads(path.read_text(encoding="utf-8"))
        window = int(path.stem.split("_")[-1])
        vectors = np.load(pipeline.windows / f"hidden_states_{window}.npy").astype(np.float64)
        for position in range(SKIP, len(tokens) - 1):
            chunk: list[int] = []
            for token in tokens[position + 1 :]:
                if not token[1] > GAMMA or len(chunk) == MAX_CHUNK:
                    break
                chunk.append(token[4])
            if chunk:
                unit = vectors[position] / np.sqrt((vectors[position] ** 2).sum())
                rounded = np.round(unit, 5).astype(np.float32) + 0.0
                rows[tokens[position][4], tuple(chunk), window, position, rounded.tobytes()] += 1
    return rows


def rows_of_datastore(pipeline: Pipeline, hidden_size: int) -> Counter[tuple[int, tuple[int, ...], int, int, bytes]]:
    rows: Counter[tuple[int, tuple[int, ...], int, int, bytes]] = Counter()
    folder = pipeline.tries / "individual_flattened_tries"
    for path in folder.glob("*.pkl"):
        trie = read_flattened(folder, int(path.stem), hidden_size, torch.device("cpu"))
        for row in range(len(trie.windows)):
            rounded = np.round(trie.context_vectors[row].double().numpy(), 5).astype(np.float32) + 0.0
            place = int(trie.windows[row]), int(trie.positions[row])
            rows[trie.entry_token_id, tuple(trie.chunk(row)), *place, rounded.tobytes()] += 1
    return rows


def test_the_datastore_is_the_one_that_loops_build(pipeline, run_stage, tmp_path):
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, "--max_new_tokens", 1))
    hidden_size = np.load(pipeline.windows / "hidden_states_0.npy").shape[1]
    wanted = rows_by_loops(pipeline)
    assert len(wanted) > 100
    got = rows_of_datastore(pipeline, hidden_size)
    # Vectors are compared to 5 digits; a value on the border between two may round either way.
    assert Counter(key[:4] for key in got.elements()) == Counter(key[:4] for key in wanted.elements())
    assert (got & wanted).total() >= 0.9 * wanted.total()
    for (*place, a), (*same, b) in zip(sorted(got), sorted(wanted), strict=True):
        assert place == same
        assert np.allclose(np.frombuffer(a, np.float32), np.frombuffer(b, np.float32), atol=2e-5)


def test_flattened_rows_are_prefix_sorted_and_of_length_one(pipeline, run_stage, tmp_path):
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, "--max_new_tokens", 1))
    folder = pipeline.tries / "individual_flattened_tries"
    hidden_size = np.load(pipeline.windows / "hidden_states_0.npy").shape[1]
    for path in folder.glob("*.pkl"):
        trie = read_flattened(folder, int(path.stem), hidden_size, torch.device("cpu"))
        keys = [(trie.chunk(i), int(trie.windows[i]), int(trie.positions[i])) for i in range(len(trie.windows))]
        assert keys == sorted(keys)
        assert torch.allclose(trie.context_vectors.norm(dim=1), torch.ones(len(keys)), atol=1e-5)


def test_stage_4s_vectors_are_stage_2s(pipeline):
    for path in sorted(pipeline.tries.glob("*.h5"))[:10]:
        places = json.loads((pipeline.tries / f"tok_pos_{path.stem}.json").read_text())
        with h5py.File(path) as file:
            for depth, rows in places.items():
                for vector, (window, position) in zip(file["hidden_states"][depth], rows, strict=True):
                    assert np.array_equal(vector, read_hidden_states(pipeline.windows, window)[position])


@pytest.mark.parametrize("theta", [-1.0, 0.6, 0.95, 1.0])
def test_eval_generates_what_a_naive_decoder_does(pipeline, run_stage, tmp_path, theta):
    """The naive decoder reads stage 2's files, recomputes everything for every token and looks at every position."""
    n_new = 12
    run_stage(
        "eval.py",
        *pipeline.eval_flags(tmp_path, "--max_new_tokens", n_new, "--temperature", 0, "--similarity_threshold", theta),
    )
    lm, tokenizer = load_lm(str(pipeline.model), "cpu"), load_tokenizer(str(pipeline.model))
    eos = lm.model.generation_config.eos_token_id
    rows = sorted(rows_by_loops(pipeline))
    for i, prompt in enumerate(json.loads((pipeline.root / "prompts.json").read_text(encoding="utf-8"))):
        text = list(tokenizer(prompt)["input_ids"])
        n_prompt = len(text)
        while len(text) < n_prompt + n_new and text[-1] != eos:
            with torch.inference_mode():
                hidden, logits = lm.forward(torch.tensor([text]))
            query = hidden[0, -1].double().numpy()
            best, chunk = -2.0, [int(logits[0, -1].argmax())]
            for entry, tokens, window, position, _ in rows:
                if entry == text[-1]:
                    vector = np.load(pipeline.windows / f"hidden_states_{window}.npy")[position].astype(np.float64)
                    similarity = vector @ query / np.sqrt((vector @ vector) * (query @ query))
                    if similarity > best + 1e-9 and similarity >= theta and theta < 1:
                        best, chunk = similarity, list(tokens)
            for token in chunk:
                if len(text) < n_prompt + n_new and (len(text) == n_prompt or text[-1] != eos):
                    text.append(token)
        got = json.loads((tmp_path / f"prompt_{i}.json").read_text(encoding="utf-8"))
        assert got["generation"][f"generation_t{theta}_tokens"] == text
