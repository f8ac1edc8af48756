"""The runs of one command: what they generate, in which order, and what they leave as it is."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS
from pipelines import Pipeline, build

from benchmarks.faults.processes import killed_before_rename
from eval import parse_args, settings_of
from utils.datastore.store import open_datastore
from utils.datastore.trie_files import HIDDEN_STATES_MANIFEST
from utils.decoding.draft import DraftSettings, RetrievalDrafter
from utils.decoding.loop import Decoding, decode
from utils.decoding.types import Generation, Request
from utils.evaluation import runner
from utils.evaluation.results import BASELINE, read_run
from utils.evaluation.runner import WARM_UP_TOKENS, Evaluation
from utils.lm.model import eos_token_ids, load_lm, load_tokenizer
from utils.lm.sampling import Sampler
from utils.text.prompts import read_prompts

THETA = 0.7  # of which some proposals are above and some below
CHUNK, VERIFY = f"generation_t{THETA}", f"verify_generation_t{THETA}"
N_PROMPTS = 4
SHORT = ("--similarity_threshold", THETA, "--max_new_tokens", 6, "--temperature", 0)


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    pipeline = build(gpt2_folder, tmp_path_factory.mktemp("runner"), run_stage, TEXTS)
    run_stage("eval.py", *pipeline.eval_flags(pipeline.root / "flattened", "--max_new_tokens", 1))
    return pipeline


def evaluation_of(pipeline: Pipeline, save_dir: Path, *flags: object) -> Evaluation:
    """What eval.py makes of these flags, not yet run."""
    args = parse_args([str(flag) for flag in pipeline.eval_flags(save_dir, *flags)])
    trie_folder = None if args.gen_baseline_only else pipeline.tries
    return Evaluation(settings_of(args, read_prompts(args.prompt_file), trie_folder, frozenset()))


class Recorder:
    """Stands in the place of a function, calls it, and keeps the arguments of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._function, self.calls = getattr(runner, name), list[tuple[Any, ...]]()
        monkeypatch.setattr(runner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(args)
        return self._function(*args, **kwargs)


def saves(recorder: Recorder) -> list[tuple[int, str]]:
    """Prompt and run of each call of `save_run`."""
    return [(generation.index, name) for _, name, generation, *_ in recorder.calls]


# ---- The warm-up


def counts(generation: Generation) -> tuple[list[int], int, int, int]:
    drafts = generation.stats.drafts
    assert drafts is not None
    return generation.new_token_ids, generation.stats.forward_passes, drafts.n_drafts, drafts.draft_tokens


def test_the_warm_up_leaves_no_text_to_draft_from(made, tmp_path, monkeypatch) -> None:
    n_new = 30
    verify = ("--decoding", "verify", "--live", "session", "--draft_growth", "full")
    saved = Recorder(monkeypatch, "save_run")
    evaluation_of(made, tmp_path, *verify, *SHORT, "--max_new_tokens", n_new).run()
    got = [counts(generation) for _, _, generation, *_ in saved.calls]

    lm, tokenizer = load_lm(str(made.model), "cpu"), load_tokenizer(str(made.model))
    store = open_datastore(made.tries, device=lm.device, max_bytes=2**30)
    texts = json.loads((made.root / "prompts.json").read_text(encoding="utf-8"))
    requests = [Request(index, tokenizer(text)["input_ids"], n_new) for index, text in enumerate(texts)]
    eos = eos_token_ids(lm.model.generation_config, tokenizer)

    def counts_after(warm_up: list[Request]) -> list[tuple[list[int], int, int, int]]:
        drafter = RetrievalDrafter(store, DraftSettings(live="session"))
        decoding = Decoding(Sampler.from_settings(0, 0, 1.0), eos, drafter=drafter)
        list(decode(lm, warm_up, decoding))
        return [counts(generation) for generation in decode(lm, requests, decoding)]

    assert got == counts_after([])
    # The counts would tell: with the warm-up's text in the session, prompt 0 is drafted from it.
    assert got[0] != counts_after([replace(requests[0], max_new_tokens=WARM_UP_TOKENS)])[0]


def test_the_similarities_reported_are_those_of_the_traces(made, tmp_path) -> None:
    evaluation = evaluation_of(made, tmp_path, *SHORT)
    evaluation.run()
    reported = re.search(r"Best similarity of (\d+) proposals", evaluation.summary(colour=False))
    assert reported is not None
    traces = [read_run(tmp_path, index, CHUNK).trace for index in range(N_PROMPTS)]
    assert int(reported[1]) == sum(len(trace.proposals) for trace in traces if trace is not None) > 0


# ---- Batches


N_OF_BATCH = 5


def texts_of(pipeline: Pipeline, save_dir: Path, name: str, *flags: object) -> list[list[int]]:
    """The tokens generated greedily for five prompts, in float32."""
    save_dir.mkdir()
    prompts = ["The quick brown fox", "def add(a, b):\n", "the cat sat on", "東京は", "jumps over"]
    (save_dir / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False), encoding="utf-8")
    how = (*SHORT, "--prompt_file", save_dir / "prompts.json", "--max_new_tokens", 40, "--dtype", "float32")
    evaluation_of(pipeline, save_dir, *how, *flags).run()
    return [read_run(save_dir, index, name).new_token_ids for index in range(N_OF_BATCH)]


def with_eos(pipeline: Pipeline, model: Path, token_ids: list[int]) -> Pipeline:
    """The same, but that these tokens end a text."""
    shutil.copytree(pipeline.model, model)
    config = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": token_ids}), encoding="utf-8")
    return Pipeline(model, pipeline.root)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (BASELINE, ("--gen_baseline_only",)),
        (CHUNK, ()),
        (VERIFY, ("--decoding", "verify", "--draft_growth", "full")),
    ],
)
def test_a_batch_refills_its_rows_and_changes_no_text(made, tmp_path, monkeypatch, name, flags):
    whole = texts_of(made, tmp_path / "whole", name, *flags)
    pipeline = with_eos(made, tmp_path / "model", [whole[1][4], whole[2][8], whole[4][16]])
    alone = texts_of(pipeline, tmp_path / "alone", name, *flags)
    assert len({len(token_ids) for token_ids in alone}) >= 3
    decoded = Recorder(monkeypatch, "decode")
    assert texts_of(pipeline, tmp_path / "batched", name, *flags, "--batch_size", 2) == alone
    # The warm-up of both rows, then all prompts in one call, which gives the row of a text that ends to the next one.
    assert [len(requests) for _, requests, _ in decoded.calls] == [2, N_OF_BATCH]


# ---- Turns


def test_runs_take_turns_prompt_by_prompt_and_in_going_first(made, tmp_path, monkeypatch) -> None:
    saved = Recorder(monkeypatch, "save_run")
    evaluation_of(made, tmp_path, "--compare_baseline", *SHORT).run()
    pairs = [(BASELINE, CHUNK), (CHUNK, BASELINE)] * 2
    assert saves(saved) == [(index, name) for index, pair in enumerate(pairs) for name in pair]


def test_runs_that_lack_different_prompts_still_take_turns(made, tmp_path, monkeypatch) -> None:
    evaluation_of(made, tmp_path, *SHORT).run()
    for index in (1, 2, 3):
        (tmp_path / f"prompt_{index}.json").unlink()
    saved = Recorder(monkeypatch, "save_run")
    evaluation_of(made, tmp_path, "--compare_baseline", *SHORT).run()
    got = saves(saved)
    assert sorted(got) == [(0, BASELINE), *((i, name) for i in (1, 2, 3) for name in (BASELINE, CHUNK))]
    for name, wanted in ((BASELINE, [0, 1, 2, 3]), (CHUNK, [1, 2, 3])):
        assert [index for index, saved_name in got if saved_name == name] == wanted


# ---- What is read, and what is there already


def test_the_datastores_manifest_is_hashed_once_however_many_prompts(made, tmp_path, monkeypatch) -> None:
    hashed = Recorder(monkeypatch, "file_fingerprint")
    evaluation = evaluation_of(made, tmp_path, "--compare_baseline", "--report", tmp_path / "page.html", *SHORT)
    evaluation.run()
    evaluation.summary(colour=False)
    assert hashed.calls == [(made.tries / HIDDEN_STATES_MANIFEST,)]


@pytest.mark.parametrize("n_saved", [1, 3, 6])
def test_a_killed_command_run_again_generates_only_what_is_missing(made, tmp_path, monkeypatch, n_saved) -> None:
    flags = ("--compare_baseline", *SHORT)
    pairs = [(BASELINE, CHUNK), (CHUNK, BASELINE)] * 2
    in_order = [(index, name) for index, pair in enumerate(pairs) for name in pair]
    assert killed_before_rename(n_saved, lambda: evaluation_of(made, tmp_path, *flags).run())
    before = {path.name: path.read_bytes() for path in tmp_path.glob("prompt_*.json")}
    assert len(before) == (n_saved + 1) // 2
    saved = Recorder(monkeypatch, "save_run")
    evaluation_of(made, tmp_path, *flags).run()
    assert sorted(saves(saved)) == sorted(in_order[n_saved:])
    for index in range(n_saved // 2):  # whole already
        path = tmp_path / f"prompt_{index}.json"
        assert path.read_bytes() == before[path.name]


def test_a_command_with_nothing_left_to_do_loads_no_model(made, tmp_path, monkeypatch) -> None:
    evaluation_of(made, tmp_path, "--compare_baseline", *SHORT).run()
    loaded, decoded = Recorder(monkeypatch, "load_lm"), Recorder(monkeypatch, "decode")
    evaluation = evaluation_of(made, tmp_path, "--compare_baseline", *SHORT)
    evaluation.run()
    assert CHUNK in evaluation.summary(colour=False)
    assert loaded.calls == decoded.calls == []


# ---- A corpus of the texts


def test_generated_texts_become_a_corpus_that_stage_2_reads(made, run_stage, tmp_path):
    flags = ("--gen_baseline_only", "--prompt_file", made.root / "prompts.json", "--save_dir", tmp_path / "answers")
    corpus = ("--num_return_sequences", 5, "--save_as_corpus", tmp_path / "corpus", "--max_new_tokens", 30)
    run_stage("eval.py", "--model_path", made.model, *flags, *corpus, "--device", "cpu")
    entries = json.loads((tmp_path / "corpus" / "train.json").read_text(encoding="utf-8"))
    prompts = json.loads((made.root / "prompts.json").read_text(encoding="utf-8"))
    assert len(entries) == 20
    for i, entry in enumerate(entries):
        assert entry["text"].startswith(prompts[i // 5])
    assert len({entry["text"] for entry in entries}) == 20
    extract = ("--data_dir", tmp_path / "corpus", "--output_dir", tmp_path / "extracted", "--partition", "train")
    sizes = ("--chunk_size", 64, "--stride", 48, "--min_length", 10, "--device", "cpu")
    run_stage("extract_token_probs_and_memmap.py", "--model_path", made.model, *extract, *sizes)
    assert len(list((tmp_path / "extracted" / "train").glob("token_probs_*.json"))) >= 20
