"""What a CUDA device computes is what the host computes. Each path that asks for the device runs on the host here too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from architectures import tiny_lm
from conftest import TEXTS
from decoding_cases import GREEDY, NO_EOS, PROMPTS, datastore_near_text, new_tokens
from pipelines import Pipeline, build
from transformers import AutoModelForCausalLM

from utils.datastore.search import VectorIndex
from utils.datastore.store import Datastore, TokenTrie, open_datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.draft import DraftSettings, RetrievalDrafter
from utils.decoding.draft_policy import DraftPolicy
from utils.decoding.hf import chunk_generate
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Retriever
from utils.decoding.timing import StepTimer
from utils.decoding.types import Request
from utils.evaluation.results import read_run
from utils.files import InputError
from utils.lm.kv_cache import GraphedKVCache, SlotKVCache, make_kv_cache
from utils.lm.model import CausalLM, load_lm, to_host, upload
from utils.lm.sampling import NO_DISTRIBUTION, Sampler
from utils.lm.scoring import find_batch_size, relative_probs, score_windows, start_scoring

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)], scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module")
def lm(device: torch.device) -> CausalLM:
    return on(device, tiny_lm("llama"))


@pytest.fixture(scope="module")
def store(device: torch.device) -> Datastore:
    return moved(datastore_near_text(tiny_lm("llama"), PROMPTS, 20), device)


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    return build(gpt2_folder, tmp_path_factory.mktemp("made"), run_stage, TEXTS)


def on(device: torch.device, lm: CausalLM) -> CausalLM:
    model: Any = lm.model
    return CausalLM(model.to(device), lm.name)


def moved(store: Datastore, device: torch.device) -> Datastore:
    """The same datastore with its context vectors on the device."""
    tries = [store.trie(entry) for entry in store.n_rows]
    arrays = [vars(trie) for trie in tries if trie is not None]
    names = TokenTrie.__dataclass_fields__
    kept = [{name: each[name] for name in names} for each in arrays]
    return Datastore.of(
        [TokenTrie(**{**each, "context_vectors": each["context_vectors"].to(device)}) for each in kept],
        store.hidden_size,
    )


def texts(lm: CausalLM, **how: Any) -> list[list[int]]:
    """Greedy continuations of PROMPTS, three at a time."""
    requests = [Request(i, prompt, 24) for i, prompt in enumerate(PROMPTS)]
    found = decode(lm, requests, Decoding(GREEDY, NO_EOS, batch_size=3, **how))
    return new_tokens(sorted(found, key=lambda generation: generation.index))


# ---- Copies and times


def test_numbers_go_up_and_come_down_as_they_are(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 4, generator=generator).to(dtype) for dtype in (torch.float64, torch.float16, torch.bool)]
    up = [upload(tensor, device) for tensor in tensors]
    assert {tensor.device.type for tensor in up} == {device.type}
    for got, wanted in zip(to_host(*up), tensors, strict=True):
        assert torch.equal(got, wanted)


def test_a_step_is_timed_without_waiting_for_the_device(device: torch.device) -> None:
    matrix = torch.ones(512, 512, device=device)
    timer = StepTimer(2, device)
    with timer.lm:
        for _ in range(20):
            matrix = matrix @ matrix.T / 512
    with timer.retrieval:
        matrix.sum()
    timer.stop()
    seconds, lm_seconds, retrieval_seconds = timer.share()
    assert seconds > 0
    assert lm_seconds > retrieval_seconds > 0


# ---- The LM


def test_scores_are_those_of_the_host(device: torch.device, lm: CausalLM) -> None:
    ids = np.random.default_rng(0).integers(0, 100, (4, 30))
    wanted = score_windows(tiny_lm("llama"), ids, np.dtype(np.float32), [7], keep_logits=True)
    pending = [start_scoring(lm, ids, np.dtype(np.float32), [7], keep_logits=True) for _ in range(3)]
    for found in (each.get() for each in pending):
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=2e-4)
        assert found.hidden_states is not None
        assert found.logits is not None
        np.testing.assert_allclose(found.hidden_states, wanted.hidden_states, atol=2e-4)
        assert found.logits.device.type == device.type
        assert found.is_finite.all()


def test_a_batch_size_is_found_that_fits(lm: CausalLM) -> None:
    n = find_batch_size(lm, 64)
    assert n >= 1
    score_windows(lm, np.zeros((n, 64), dtype=np.int64))


def test_tokens_that_the_lm_finds_likely_are_the_same(device: torch.device) -> None:
    logits, ids = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)), torch.arange(12).view(6, 2) * 4
    found = relative_probs(logits.to(device), ids.to(device))
    torch.testing.assert_close(found.cpu(), relative_probs(logits, ids))


def test_samples_and_missing_distributions_are_the_hosts(device: torch.device) -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(2))
    logits[7], logits[8] = torch.nan, -torch.inf
    uniforms = np.random.default_rng(0).random(200).tolist()
    for sampler in (GREEDY, Sampler.from_settings(0.7, 20, 0.9)):
        host, found = (sampler.tokens(each, uniforms, lambda i: (i, [])).cpu() for each in (logits, logits.to(device)))
        assert host[7] == found[7] == host[8] == found[8] == NO_DISTRIBUTION
        assert (host != found).sum() <= 1  # a number on the border of two tokens


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_checkpoint_of_16_bits_runs_in_any_dtype(
    dtype: str, device: torch.device, gpt2_folder: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
    lm = load_lm(str(tmp_path), device.type, dtype)
    expected = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(dtype) or getattr(torch, dtype)
    assert (lm.dtype, lm.device.type) == (expected, device.type)
    store = moved(datastore_near_text(lm, [[5, 6]], 8), device) if dtype == "float32" else None
    retriever = None if store is None else Retriever(store, Acceptance(0.5, min_first_token_prob=0.1))
    (generation,) = decode(lm, [Request(0, [5, 6, 7], 12)], Decoding(GREEDY, NO_EOS, retriever))
    assert len(generation.new_token_ids) == 12


# ---- Search


@pytest.mark.parametrize("n_rows", [3, 40_000])
def test_the_nearest_row_is_the_true_one(n_rows: int, device: torch.device) -> None:
    """On CUDA, 40,000 rows of 512 numbers are searched in float16 first."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(n_rows, 512, generator=generator), dim=1)
    queries = torch.randn(40, 512, generator=generator)
    exact = queries.double() @ rows.double().T / queries.double().norm(dim=1, keepdim=True)
    index = VectorIndex(rows.to(device))
    batch_rows, similarities = index.nearest_batch(queries.to(device))
    for i, query in enumerate(queries.to(device)):
        row, similarity = index.nearest(query)
        assert row == int(batch_rows[i]) == int(exact[i].argmax())
        assert similarity == pytest.approx(float(exact[i].max()), abs=1e-6)
        assert float(similarities[i]) == pytest.approx(similarity, abs=1e-9)


def test_a_query_of_nan_is_refused(device: torch.device) -> None:
    index = VectorIndex(torch.eye(8, device=device))
    with pytest.raises(InputError, match="NaN"):
        index.nearest(torch.full((8,), torch.nan, device=device))


# ---- Decoding


@pytest.mark.parametrize("prefetch_all", [False, True])
@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_chunk_mode_writes_what_the_host_writes(
    lm: CausalLM, store: Datastore, prefetch_all: bool, delta: float
) -> None:
    host = Retriever(datastore_near_text(tiny_lm("llama"), PROMPTS, 20), Acceptance(0.95, min_first_token_prob=delta))
    wanted = texts(tiny_lm("llama"), retriever=host)
    retriever = Retriever(store, Acceptance(0.95, min_first_token_prob=delta))
    assert texts(lm, retriever=retriever, prefetch_all=prefetch_all) == wanted


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("mode", ["plain", "chunk", "verify"])
def test_every_mode_with_and_without_graphs_writes_the_same(
    lm: CausalLM, store: Datastore, mode: str, graphs: bool
) -> None:
    plain = [
        lm.model.generate(torch.tensor([prompt], device=lm.device), do_sample=False, max_new_tokens=24)
        for prompt in PROMPTS
    ]
    wanted = [found[0, len(prompt) :].tolist() for found, prompt in zip(plain, PROMPTS, strict=True)]
    how: dict[str, Any] = {}
    if mode == "chunk":
        how = {"retriever": Retriever(store, Acceptance(0.97))}
        wanted = texts(lm, **how)
    elif mode == "verify":
        how = {"drafter": RetrievalDrafter(store, DraftSettings(max_tokens=8)), "draft_policy": DraftPolicy()}
    with torch.inference_mode():
        cache = make_kv_cache(lm, 3, 64 + 256, graphs)
    assert isinstance(cache, GraphedKVCache if graphs else SlotKVCache)
    assert texts(lm, **how, cache=cache) == wanted


def test_generate_with_chunks_as_drafts_is_generate(lm: CausalLM, store: Datastore) -> None:
    prompt = torch.tensor([PROMPTS[2]], device=lm.device)
    wanted = lm.model.generate(prompt, do_sample=False, max_new_tokens=20)
    how = {"custom_generate": chunk_generate, "datastore": store, "decoding": "verify"}
    assert torch.equal(lm.model.generate(prompt, do_sample=False, max_new_tokens=20, **how), wanted)


# ---- The commands


def test_stage_2_writes_what_the_host_writes(
    device: torch.device, made: Pipeline, run_stage: Callable[..., None], tmp_path: Path
) -> None:
    flags = ("--model_path", made.model, "--data_dir", made.root / "data", "--output_dir", tmp_path / "out")
    shape = ("--chunk_size", 64, "--stride", 48, "--min_length", 20, "--partition", "train", "--dtype", "float32")
    run_stage("extract_token_probs_and_memmap.py", *flags, *shape, "--device", device.type, "--construct_memmap")
    with h5py.File(tmp_path / "out/train.h5") as found, h5py.File(made.root / "extracted/train.h5") as wanted:
        np.testing.assert_allclose(found["all_hidden_states"][:], wanted["all_hidden_states"][:], atol=2e-4)


@pytest.mark.parametrize(
    "flags", [(), ("--move_trie_to_gpu",), ("--cuda_graphs",), ("--decoding", "verify"), ("--batch_size", 3)]
)
def test_stage_5_writes_what_the_host_writes(
    flags: tuple[object, ...], device: torch.device, made: Pipeline, run_stage: Callable[..., None], tmp_path: Path
) -> None:
    # Greedy, in float32: what the host and the device round otherwise decides no token of these texts.
    common = ("--temperature", 0, "--max_new_tokens", 16, "--similarity_threshold", 0.9, "--dtype", "float32")
    verified = flags if "verify" in flags else ()
    run_stage("eval.py", *made.eval_flags(tmp_path / "host", *common, *verified))
    run_stage("eval.py", *made.eval_flags(tmp_path / "found", *common, *flags), "--device", device.type)
    name = "verify_generation_t0.9" if verified else "generation_t0.9"
    for i in range(4):
        host, found = (read_run(tmp_path / each, i, name).token_ids for each in ("host", "found"))
        assert found == host


def test_perplexity_is_the_hosts(
    device: torch.device, made: Pipeline, run_stage: Callable[..., None], tmp_path: Path
) -> None:
    def figures(name: str, *flags: object) -> dict[str, Any]:
        text = ("--perplexity_file", made.root / "data/train.json", "--sweep_similarity_threshold", 0.5, 0.9)
        labels = made.eval_flags(tmp_path / name, *text, "--perplexity_window", 64, "--dtype", "float32", *flags)
        labels = [*labels[: labels.index("--prompt_file")], *labels[labels.index("--prompt_file") + 2 :]]
        run_stage("eval.py", *labels)
        return json.loads((tmp_path / name / "perplexity.json").read_text())

    gate = ("--min_first_token_prob", 0.2)
    for flags in ((), gate):
        host = figures(f"host{len(flags)}", *flags)
        found = figures(f"found{len(flags)}", *flags, "--device", device.type)
        assert found["base"]["nll"] == pytest.approx(host["base"]["nll"], rel=1e-4)
        for theta in ("0.5", "0.9"):
            assert found["cdlm"][theta]["nll"] == pytest.approx(host["cdlm"][theta]["nll"], rel=1e-3)


def test_tries_move_to_the_device(device: torch.device, made: Pipeline) -> None:
    datastore = open_datastore(made.tries, device=device, max_bytes=10**9)
    datastore.load_all()
    for entry in datastore.n_rows:
        trie = datastore.trie(entry)
        assert trie is not None
        assert trie.context_vectors.device.type == trie.first_ids.device.type == device.type
