"""Stage 2's files hold what the model gives each window read by itself, whatever was interrupted or asked for before."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from architectures import Scripted
from conftest import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.faults.processes import in_child, killed_before_rename, on_full_disk
from utils.extraction.hidden_states import hidden_states_path, read_hidden_states, windows_with_hidden_states
from utils.extraction.run import N_PLACES, WindowWriter, probabilities_of, window_nll
from utils.extraction.token_probs import STAGE, read_token_probs, token_probs_path, windows_with_token_probs
from utils.files import InputError, exclusive_lock
from utils.lm.fingerprint import model_fingerprint, tokenizer_fingerprint
from utils.lm.model import CausalLM, load_lm, load_tokenizer
from utils.lm.scoring import score_windows, start_scoring
from utils.manifest import read_finished
from utils.text.expert_spans import ExpertSpans
from utils.text.windows import TokenFile, WindowPlan, WindowShape

SHAPE = {"chunk_size": 24, "stride": 18, "min_length": 10}
ALL_FILES = {".h5", "_index_to_seqlen.json", "_index_to_acc_index.json", "_manifest.json", "_checksums.txt"}


@pytest.fixture(params=["gpt2_folder", "llama_folder"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def write_text(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_text(tmp_path / "data", [*TEXTS, "too short", TEXTS[2][:90]])


class Stage:
    """The command line with a model, a text and an output folder; flags may be left out with None, or added."""

    def __init__(self, run: Callable[..., object], model: Path, data: Path, output_dir: Path) -> None:
        self.run, self.model, self.data, self.output_dir = run, model, data, output_dir

    def __call__(self, *switches: object, **changed: object) -> Any:
        paths = {"model_path": self.model, "data_dir": self.data, "output_dir": self.output_dir}
        flags: dict[str, object] = {**paths, "partition": "train", "batch_size": 3, **SHAPE, **changed}
        pairs = [(f"--{name}", value) for name, value in flags.items() if value is not None]
        return self.run(STAGE, *(word for pair in pairs for word in pair), *switches)

    def to(self, output_dir: Path) -> "Stage":
        return Stage(self.run, self.model, self.data, output_dir)

    @property
    def folder(self) -> Path:
        return self.output_dir / "train"

    @property
    def manifest(self) -> dict:
        return json.loads((self.output_dir / "train_manifest.json").read_text())


@pytest.fixture
def stage(run_stage: Callable[..., None], gpt2_folder: Path, data: Path, tmp_path: Path) -> Stage:
    return Stage(run_stage, gpt2_folder, data, tmp_path / "out")


@pytest.fixture
def refused(refusal: Callable[..., str], gpt2_folder: Path, data: Path, tmp_path: Path) -> Stage:
    return Stage(refusal, gpt2_folder, data, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; locks are empty."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reference_windows(model_folder: Path, texts: list[str], dtype: str = "float32") -> list[tuple]:
    """Token ids, probabilities, hidden states and the first token not seen before of each window, a pass each."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    plain = tokenizer.encode("a", add_special_tokens=False)
    prefix, found = tokenizer.encode("a")[: -len(plain)], []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        start = 0
        while len(ids) >= SHAPE["min_length"]:
            window = ids[start : start + SHAPE["chunk_size"]]
            with torch.no_grad():
                output = model(torch.tensor([prefix + window]), output_hidden_states=True)
            shares = output.logits[0, len(prefix) :].double().softmax(-1)
            probabilities = [0.0] + [float(shares[i - 1, window[i]]) for i in range(1, len(window))]
            first = SHAPE["chunk_size"] - SHAPE["stride"] if start else 1  # the window before holds the others too
            hidden_states = output.hidden_states[-1][0, len(prefix) :].float().numpy()
            found.append((window, probabilities, hidden_states, first))
            if start + SHAPE["chunk_size"] >= len(ids):
                break
            start += SHAPE["stride"]
    return found


# ---- What the files hold


def test_files_hold_what_each_window_gives_by_itself(
    run_stage: Callable[..., None],
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stage = Stage(run_stage, model_folder, data, tmp_path / "out")
    stage("--construct_memmap")
    out, err = capfd.readouterr()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = [entry["text"] for entry in json.loads((data / "train.json").read_text())]
    expected = reference_windows(model_folder, texts)
    assert len(expected) > 20

    numbers = list(range(len(expected)))
    assert windows_with_token_probs(stage.folder) == windows_with_hidden_states(stage.folder) == numbers
    nll: list[float] = []
    for window, (ids, probabilities, hidden_states, first) in enumerate(expected):
        rows = json.loads(token_probs_path(stage.folder, window).read_text(encoding="utf-8"))
        assert [row[0] for row in rows] == [tokenizer.decode([token]) for token in ids]
        assert [row[2:] for row in rows] == [[window, position, token] for position, token in enumerate(ids)]
        assert rows[0][1] == 0
        np.testing.assert_allclose([row[1] for row in rows], probabilities, rtol=1e-4, atol=1e-7)
        found = read_hidden_states(stage.folder, window)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, hidden_states, rtol=1e-4, atol=1e-5)
        nll += [-math.log(probability) for probability in probabilities[first:]]

    with h5py.File(stage.output_dir / "train.h5") as file:
        rows_in_order = [read_hidden_states(stage.folder, window) for window in numbers]
        np.testing.assert_array_equal(file["all_hidden_states"][:], np.concatenate(rows_in_order))
    results = read_finished(stage.output_dir / "train_manifest.json", STAGE).results
    perplexity = math.exp(sum(nll) / len(nll))
    assert results["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert results["n_tokens"] == sum(len(ids) for ids, *_ in expected)
    assert (results["n_windows"], results["n_passages"], results["n_short_passages"]) == (len(expected), 5, 1)
    assert results["hidden_size"] == expected[0][2].shape[1]
    assert results["outputs"] == ["token_probs", "hidden_states", "memmap"]

    summary = f"{len(expected)} windows, {results['n_tokens']:,} tokens, perplexity {results['perplexity']:.3f}"
    assert f"train: 5 passages (1 shorter left out), {summary}" in out
    assert "tokens/s (float32 on cpu)" in out
    assert f"{stage.output_dir}/train.h5" in out
    assert "extracting" in err
    assert "Loading weights" not in err
    assert "longer than" not in err


def test_the_manifest_says_what_the_output_was_made_from(stage: Stage, gpt2_folder: Path, data: Path) -> None:
    stage()
    manifest = read_finished(stage.output_dir / "train_manifest.json", STAGE)
    assert manifest.arguments == {
        "partition": "train",
        **SHAPE,
        "batch_size": 3,
        "dtype": "auto",
        "hidden_dtype": "float32",
        "device": "cpu",
    }
    assert manifest.inputs["model"] == model_fingerprint(str(gpt2_folder))
    assert manifest.inputs["tokenizer"] == tokenizer_fingerprint(load_tokenizer(str(gpt2_folder)))
    assert manifest.results["outputs"] == ["token_probs"]


def test_windows_of_two_models_with_one_tokenizer_have_one_fingerprint(
    stage: Stage, tmp_path: Path, gpt2_folder: Path
) -> None:
    other = Path(shutil.copytree(gpt2_folder, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    model.transformer.wte.weight.data += 0.1
    model.save_pretrained(other)
    stage()
    second = stage.to(tmp_path / "second")
    second(model_path=other, batch_size=2)
    assert second.manifest["results"]["windows_fingerprint"] == stage.manifest["results"]["windows_fingerprint"]
    assert second.manifest["inputs"]["model"] != stage.manifest["inputs"]["model"]


@pytest.mark.parametrize("flag", ["auto", "bfloat16", "float16"])
def test_half_precision_checkpoints_give_float32_files(
    flag: str, stage: Stage, gpt2_folder: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = "bfloat16" if flag == "auto" else flag
    copy = Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))
    AutoModelForCausalLM.from_pretrained(copy, dtype=checkpoint).save_pretrained(copy)
    write_text(data, TEXTS[:1])
    stage("--save_hidden_states", model_path=copy, dtype=flag)
    expected = reference_windows(copy, TEXTS[:1], "float32" if flag == "auto" else flag)
    tolerance = {"auto": 1e-4, "float16": 0.02, "bfloat16": 0.1}[flag]
    for window, (ids, probabilities, hidden_states, _) in enumerate(expected):
        _, found_ids, found = read_token_probs(stage.folder, window)
        assert found_ids.tolist() == ids
        np.testing.assert_allclose(found, probabilities, atol=tolerance)
        found_hidden_states = read_hidden_states(stage.folder, window)
        assert found_hidden_states.dtype == np.float32
        np.testing.assert_allclose(found_hidden_states, hidden_states, atol=tolerance * 4)


def test_hidden_states_can_be_kept_in_float16(stage: Stage, tmp_path: Path) -> None:
    stage("--construct_memmap")
    half = stage.to(tmp_path / "half")
    half("--construct_memmap", hidden_dtype="float16")
    with h5py.File(stage.output_dir / "train.h5") as full, h5py.File(half.output_dir / "train.h5") as file:
        assert file["all_hidden_states"].dtype == np.float16
        np.testing.assert_array_equal(file["all_hidden_states"][:], full["all_hidden_states"][:].astype(np.float16))


def test_a_chunk_size_equal_to_the_stride_works(stage: Stage) -> None:
    stage(chunk_size=24, stride=24)
    lengths = [len(read_token_probs(stage.folder, i)[1]) for i in windows_with_token_probs(stage.folder)]
    assert max(lengths) == 24
    ids = [token for i in range(len(lengths)) for token in read_token_probs(stage.folder, i)[1].tolist()]
    tokenizer = load_tokenizer(str(stage.model))
    texts = [*TEXTS, TEXTS[2][:90]]
    assert ids == [token for text in texts for token in tokenizer.encode(text)]


@pytest.mark.parametrize("value", ["False", "false"])
def test_construct_memmap_false_means_false(value: str, stage: Stage) -> None:
    stage("--construct_memmap", value)
    assert not (stage.output_dir / "train.h5").exists()
    assert not windows_with_hidden_states(stage.folder)


@pytest.mark.parametrize("switches", [("--construct_memmap", "True"), ("--construct_memmap",)])
def test_construct_memmap_true_needs_no_other_flag(switches: tuple[str, ...], stage: Stage) -> None:
    stage(*switches)
    names = {path.name for path in stage.output_dir.iterdir() if not path.name.startswith(".")}
    assert names == {"train"} | {f"train{end}" for end in ALL_FILES}


def test_windows_of_one_token_have_no_perplexity(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage(chunk_size=1, stride=1, min_length=1)
    assert stage.manifest["results"]["perplexity"] is None
    assert "perplexity" not in capsys.readouterr().out


# ---- Numbers that go wrong


@pytest.fixture
def tiny_lm(gpt2_folder: Path) -> CausalLM:

    return load_lm(str(gpt2_folder))


IDS = np.arange(20).reshape(2, 10)


def test_certain_and_impossible_tokens_stay_probabilities(tiny_lm: CausalLM) -> None:

    def change(hidden_states: torch.Tensor, logits: torch.Tensor) -> None:
        logits[:] = 0
        logits[0, 0, 1] = 1e4  # certain
        logits[0, 1, 5] = 1e4  # so the token that came has log-probability -10,000
        logits[0, 2, 5] = 200
        logits[0, 3, 4] = -math.inf  # as models write for tokens that never come

    probabilities = probabilities_of(score_windows(Scripted(tiny_lm, change), IDS).log_probs)[0]
    assert probabilities[0] == 0
    assert probabilities[1] == 1
    assert probabilities[2] == 0
    assert probabilities[3] == pytest.approx(math.exp(-200), rel=1e-3)  # below the smallest float32
    assert probabilities[4] == 0
    assert math.isfinite(window_nll(probabilities, first=1))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("logits", "window 7: the model computed NaN or infinity; use another --dtype"),
        ("hidden state", "window 7: the model computed NaN or infinity; use another --dtype"),
        ("infinite hidden state", "window 7: the model computed NaN or infinity; use another --dtype"),
        (
            "large hidden state",
            "window 7: a hidden state exceeds the 65504 that float16 holds; use --hidden_dtype float32",
        ),
    ],
)
def test_a_number_that_is_none_is_refused_with_its_window(
    where: str, message: str, tiny_lm: CausalLM, gpt2_folder: Path, tmp_path: Path
) -> None:

    def change(hidden_states: torch.Tensor, logits: torch.Tensor) -> None:
        if where == "logits":
            logits[1, 4, 3] = math.nan
        else:
            value = {"hidden state": math.nan, "infinite hidden state": math.inf, "large hidden state": 7e4}[where]
            hidden_states[1, 9, 3] = value

    tokenizer = load_tokenizer(str(gpt2_folder))
    with tempfile.TemporaryFile() as file:
        plan = WindowPlan(
            TokenFile(file),
            np.arange(8) * 10,
            np.full(8, 10),
            8,
            0,
            0,
            319,
            "",
            [],
            ExpertSpans.of_rows(np.zeros((0, 4))),
        )
    writer = WindowWriter(tmp_path, tokenizer, plan, np.dtype("float16"), tmp_path, None)
    pending = start_scoring(Scripted(tiny_lm, change), IDS, writer.hidden_dtype)
    with pytest.raises(InputError, match=f"^{message}"):
        writer.write(np.array([4, 7]), IDS, pending)
    assert windows_with_token_probs(tmp_path) == [4]


def test_what_the_writer_raises_ends_the_run(refused: Stage, gpt2_folder: Path, tmp_path: Path) -> None:
    """The model is sound on the probe of its loading; only positions from 20 on are not."""
    copy = Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.transformer.wpe.weight.data[20:] = math.nan
    model.save_pretrained(copy)
    message = refused(model_path=copy)
    assert message == "window 0: the model computed NaN or infinity; use another --dtype, such as float32"


# ---- Interrupted, run again, asked for more


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that this process renames into place."""
    rename, names = os.replace, list[str]()

    def replace(source: Path, target: Path) -> None:
        names.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return names


@pytest.mark.parametrize("flags", [("--construct_memmap",), ("--construct_memmap", "--discard_intermediates")])
def test_a_run_killed_at_any_point_goes_on_to_the_same_bytes(
    flags: tuple[str, ...], stage: Stage, data: Path, tmp_path: Path, renamed: list[str]
) -> None:
    write_text(data, [TEXTS[0][:150], TEXTS[2][:40], TEXTS[1][:60]])
    stage(*flags)
    whole, names = contents(stage.output_dir), renamed[:]
    of_windows = [n for n, name in enumerate(names) if name.startswith(("token_probs_", "hidden_states_"))]
    others = set(range(len(names))).difference(of_windows)
    for n_renames in sorted(others | {of_windows[0], of_windows[1], of_windows[5], of_windows[-1]}):
        again = stage.to(tmp_path / f"killed_{n_renames}")
        assert killed_before_rename(n_renames, lambda again=again: again(*flags))
        again(*flags)
        assert contents(again.output_dir) == whole
    assert not killed_before_rename(len(names), lambda: stage.to(tmp_path / "not_killed")(*flags))


def test_lost_files_are_made_again_with_the_same_bytes(stage: Stage) -> None:
    flags = ("--save_hidden_states",)
    stage(*flags)
    whole = contents(stage.output_dir)
    for window in (0, 4, 5, 11):
        token_probs_path(stage.folder, window).unlink()
    for window in (4, 20):
        hidden_states_path(stage.folder, window).unlink()
    stage(*flags)
    assert contents(stage.output_dir) == whole


def test_a_run_that_goes_on_computes_only_batches_that_are_not_whole(stage: Stage) -> None:
    stage()
    windows = windows_with_token_probs(stage.folder)
    full_length = [window for window in windows if len(read_token_probs(stage.folder, window)[1]) == 24]
    times = {window: token_probs_path(stage.folder, window).stat().st_mtime_ns for window in windows}
    token_probs_path(stage.folder, full_length[4]).unlink()
    stage()
    written = {w for w in windows if token_probs_path(stage.folder, w).stat().st_mtime_ns != times[w]}
    assert written == set(full_length[3:6])  # its batch of three


def test_a_finished_run_is_not_run_again(stage: Stage, capsys: pytest.CaptureFixture[str], gpt2_folder: Path) -> None:
    flags = ("--construct_memmap",)
    stage(*flags)
    before = {path: path.stat().st_mtime_ns for path in stage.output_dir.rglob("*") if path.is_file()}
    first = capsys.readouterr().out.splitlines()
    stage(*flags)
    out, err = capsys.readouterr()
    assert "all that is asked for is there already" in out
    assert out.splitlines()[-1] == first[-1]
    assert err == ""
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_memmap_is_added_without_the_model(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage("--save_hidden_states")
    both = stage.to(tmp_path / "both")
    both("--save_hidden_states", "--construct_memmap")
    monkeypatch.setattr("utils.extraction.run.load_lm", None)
    stage("--save_hidden_states", "--construct_memmap")
    assert contents(stage.output_dir) == contents(both.output_dir)


def test_hidden_states_are_added_to_token_probs(stage: Stage, tmp_path: Path) -> None:
    stage()
    both = stage.to(tmp_path / "both")
    both("--save_hidden_states")
    stage("--save_hidden_states")
    assert contents(stage.output_dir) == contents(both.output_dir)


def test_intermediates_are_discarded_and_stay_so(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--construct_memmap", "--discard_intermediates")
    full = stage.to(tmp_path / "full")
    full("--construct_memmap")
    stage(*flags)
    kept = {name: content for name, content in contents(full.output_dir).items() if not name.endswith(".npy")}
    found = contents(stage.output_dir)
    assert found.keys() == kept.keys()
    assert {name for name in found if found[name] != kept[name]} == {"train_manifest.json", "train_checksums.txt"}
    assert stage.manifest["results"]["outputs"] == ["token_probs", "memmap"]

    monkeypatch.setattr("utils.extraction.run.load_lm", None)
    for switches in (flags, ("--construct_memmap",), ("--save_hidden_states",), ()):
        stage(*switches)
        assert contents(stage.output_dir) == found
    full(*flags)
    assert contents(full.output_dir) == found


def test_a_deletion_that_was_cut_off_goes_on(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--construct_memmap", "--discard_intermediates")
    full = stage.to(tmp_path / "full")
    full("--construct_memmap")
    spared = contents(full.output_dir)
    stage(*flags)
    whole = contents(stage.output_dir)
    for name in ("train/hidden_states_3.npy", "train/hidden_states_9.npy"):
        (stage.output_dir / name).write_bytes(spared[name])
    monkeypatch.setattr("utils.extraction.run.load_lm", None)
    stage(*flags)
    assert contents(stage.output_dir) == whole


def test_a_damaged_h5_is_made_again_also_without_intermediates(stage: Stage) -> None:
    for flags in (("--construct_memmap",), ("--construct_memmap", "--discard_intermediates")):
        stage(*flags)
        whole = contents(stage.output_dir)
        path = stage.output_dir / "train.h5"
        path.write_bytes(path.read_bytes()[:-1000])
        stage(*flags)
        assert contents(stage.output_dir) == whole


ENDS = [".dat", ".h5", "_index_to_seqlen.json", "_index_to_acc_index.json"]


@pytest.mark.parametrize(
    ("end", "damage"),
    [*((end, damage) for end in ENDS for damage in ("cut off", "missing", "empty")), (".dat", "longer")],
)
def test_a_half_written_file_of_all_windows_is_made_again(end: str, damage: str, stage: Stage, data: Path) -> None:
    write_text(data, [TEXTS[0][:150]])
    flags = ("--construct_memmap", "--keep_dat")
    stage(*flags)
    whole, path = contents(stage.output_dir), stage.output_dir / f"train{end}"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut off": content[:-7], "empty": b"", "longer": content + b"1234567"}[damage])
    stage(*flags)
    assert contents(stage.output_dir) == whole


def test_a_dat_is_made_where_it_is_asked_for_and_of_a_whole_h5(stage: Stage) -> None:
    h5, dat = stage.output_dir / "train.h5", stage.output_dir / "train.dat"
    stage("--construct_memmap", "--discard_intermediates")
    assert not dat.exists()
    written = h5.stat().st_mtime_ns
    stage("--construct_memmap", "--keep_dat")
    assert h5.stat().st_mtime_ns == written
    assert not windows_with_hidden_states(stage.folder)
    with h5py.File(h5) as file:
        assert dat.read_bytes() == file["all_hidden_states"][:].tobytes()


def test_flags_change_freely_while_there_is_no_output(stage: Stage, refused: Stage, tmp_path: Path) -> None:
    stage()
    assert "was made with --chunk_size 24, this run has 25" in refused(chunk_size=25)
    shutil.rmtree(stage.folder)
    stage(chunk_size=25)
    assert stage.manifest["arguments"]["chunk_size"] == 25


# ---- Bad input


def text_of(content: bytes) -> Callable[[Path], None]:
    return lambda data: (data / "train.json").write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "train.json").unlink(), "train.json: does not exist"),
        (lambda data: shutil.rmtree(data), "train.json: does not exist"),
        (lambda data: ((data / "train.json").unlink(), (data / "train.json").mkdir())[1], "is not a file"),
        (text_of(b""), "train.json: is empty; expected a JSON list"),
        (text_of(b'[{"text": "abc"}, {"te'), "train.json: the JSON list is cut off"),
        (text_of(b'[{"text": "\xff"}]'), "train.json: is not UTF-8"),
        (text_of(b'{"text": "abc"}'), "expected a JSON list"),
        (text_of(b"[]"), r"no passage of the 10 tokens of --min_length \(the longest of its 0 passages has 0\)"),
        (text_of(b'[{"text": "abc"}]'), r"the longest of its 1 passages has 3\)"),
        (text_of(b'[{"title": "abc"}]'), "text"),
        (text_of(b'[{"text": 7}]'), "text"),
        (text_of(b'[{"text": "a\\ud800 lone surrogate, which no tokenizer takes"}]'), "text|UTF-8|surrogate"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(
    damage: Callable[[Path], None], message: str, refused: Stage, data: Path
) -> None:
    damage(data)
    found = refused()
    assert re.search(message, found), found
    there = {path.name for path in refused.output_dir.rglob("*")}
    assert there <= {"train", ".train_extraction.lock", ".train_plan.lock"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"chunk_size": 0}, "--chunk_size: got '0', expected a whole number of at least 1"),
        ({"chunk_size": -1}, "--chunk_size: got '-1'"),
        ({"stride": 0}, "--stride: got '0'"),
        ({"stride": 25}, "--stride 25: expected 1 to the --chunk_size of 24"),
        ({"min_length": 0}, "--min_length: got '0'"),
        ({"batch_size": 1.5}, "--batch_size: got '1.5'"),
        ({"chunk_size": 129}, "--chunk_size 129: "),
        ({"dtype": "int8"}, "--dtype: invalid choice: 'int8'"),
        ({"hidden_dtype": "bfloat16"}, "--hidden_dtype: invalid choice: 'bfloat16'"),
        ({"device": "cuda:99"}, "--device cuda:99: not available here"),
        ({"partition": "a/b"}, "--partition: got 'a/b', expected a name without a slash"),
        ({"partition": "validation"}, "validation.json: does not exist"),
        ({"construct_memmap": "maybe"}, "--construct_memmap: got 'maybe', expected True or False"),
        ({"model_path": "/nowhere"}, "/nowhere: does not exist; give the folder of a model"),
        ({"output_dir": "/proc/nowhere"}, "/proc/nowhere"),
        ({"data_dir": None}, "--data_dir"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(flags: dict[str, object], message: str, refused: Stage) -> None:
    assert message in refused(**flags)
    assert not list(refused.output_dir.rglob("*.json"))


def test_discarding_without_an_h5_is_refused(refused: Stage) -> None:
    for flag in ("--discard_intermediates", "--keep_dat"):
        assert f"{flag}: is about the .h5, so it needs --construct_memmap" in refused(flag)
    assert "give one of the two" in refused("--construct_memmap", "--discard_intermediates", "--keep_dat")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["model.safetensors"], "no weights found"),
        (["tokenizer.json", "tokenizer_config.json"], "its tokenizer has no tokens"),
        (["config.json"], "no model config can be loaded"),
    ],
)
def test_a_model_folder_that_is_not_whole_is_refused(
    removed: list[str], message: str, refused: Stage, gpt2_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))
    for name in removed:
        (copy / name).unlink()
    assert refused(model_path=copy).startswith(f"{copy}: {message}")
    assert not list(refused.output_dir.rglob("*.json"))


def test_a_tokenizer_of_another_model_is_refused(
    refused: Stage, gpt2_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_folder / name, copy / name)
    assert "but its model knows only 320 ids" in refused(model_path=copy)


def test_damaged_weights_leave_no_manifest_that_stands_in_the_way(
    stage: Stage, refused: Stage, gpt2_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes((gpt2_folder / "model.safetensors").read_bytes()[:-100])
    assert "its weights are damaged" in refused(model_path=copy)
    stage()


def test_an_output_folder_that_is_a_file_is_refused(refused: Stage, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "out" in refused()


def test_output_of_another_text_model_or_shape_is_refused(
    stage: Stage, refused: Stage, data: Path, llama_folder: Path, tmp_path: Path, gpt2_folder: Path
) -> None:
    stage("--construct_memmap")
    whole = contents(stage.output_dir)
    assert "differ in --no_bos, the model and the tokenizer;" in refused(model_path=llama_folder)
    for flag, value in {
        "stride": 17,
        "min_length": 11,
        "batch_size": 4,
        "dtype": "float32",
        "hidden_dtype": "float16",
    }.items():
        assert f"was made with --{flag}" in refused("--construct_memmap", **{flag: value})
    write_text(data, TEXTS[1:])
    assert "was made with the text" in refused()
    assert contents(stage.output_dir) == whole


@pytest.mark.parametrize(
    "name",
    ["train/token_probs_0.json", "train/hidden_states_4.npy", "train.dat", "train.h5", "train_index_to_acc_index.json"],
)
def test_output_without_a_manifest_is_refused(name: str, refused: Stage) -> None:
    path = refused.output_dir / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"from who knows where")
    assert "lies there without the manifest that says what it was made from" in refused("--construct_memmap")
    assert path.read_bytes() == b"from who knows where"


def test_files_of_windows_that_are_not_in_the_text_are_refused(stage: Stage, refused: Stage) -> None:
    stage()
    shutil.copy(token_probs_path(stage.folder, 0), token_probs_path(stage.folder, 999))
    assert "holds a file of window 999, but the text has only" in refused()


@pytest.mark.parametrize("damage", ["cut", "other tokens"])
def test_a_damaged_file_is_named_where_another_was_lost(damage: str, stage: Stage, refused: Stage) -> None:
    stage()
    path = token_probs_path(stage.folder, 0)
    rows = json.loads(path.read_text())
    rows[3][4] += 1
    path.write_text(path.read_text()[:-30] if damage == "cut" else json.dumps(rows))
    token_probs_path(stage.folder, len(windows_with_token_probs(stage.folder)) - 1).unlink()
    assert refused().startswith(str(path))
    path.unlink()
    stage()


def test_a_damaged_file_of_an_interrupted_run_is_named(stage: Stage, refused: Stage) -> None:
    assert killed_before_rename(12, stage)
    path = token_probs_path(stage.folder, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert refused().startswith(f"{path}: is not valid JSON")
    path.write_bytes(whole)
    stage()


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-4], lambda content: b"", lambda content: content[:-4] + b"\0\0\xc0\x7f"]
)
def test_a_damaged_npy_is_named_and_made_again_once_deleted(
    damage: Callable[[bytes], bytes], stage: Stage, refused: Stage
) -> None:
    stage("--save_hidden_states")
    whole = contents(stage.output_dir)
    path = hidden_states_path(stage.folder, 5)
    path.write_bytes(damage(path.read_bytes()))
    assert refused("--construct_memmap").startswith(f"{path}: ")
    assert not (stage.output_dir / "train.h5").exists()
    path.unlink()
    stage("--save_hidden_states")
    assert contents(stage.output_dir) == whole
    stage("--construct_memmap")


def test_a_full_disk_is_named_and_what_was_whole_stays_whole(stage: Stage, tmp_path: Path) -> None:
    flags = {"chunk_size": 100, "stride": 90}
    stage("--construct_memmap", "--keep_dat", **flags)
    whole = contents(stage.output_dir)
    limited = stage.to(tmp_path / "full")
    # In the order of their lengths: the ids of all tokens, the .h5 of all, and without it a window's .npy.
    for n_bytes, name, switches in (
        (1000, "the text's token ids", ("--construct_memmap",)),
        (20_000, "train.h5.part", ("--construct_memmap",)),
        (9000, "hidden_states_", ("--save_hidden_states",)),
        (len(whole["train.h5"]) - 100, "train.h5.part", ("--construct_memmap",)),
    ):
        message = on_full_disk(n_bytes, lambda switches=switches: limited(*switches, **flags))
        assert name in message
        assert str(limited.output_dir) in message
        assert "File too large" in message
        assert "free space" in message
        for path, content in contents(limited.output_dir).items():
            assert path in ("train_manifest.json", "train_plan.npy") or content == whole[path]
    limited("--construct_memmap", **flags)
    assert "train.dat" in on_full_disk(20_000, lambda: limited("--construct_memmap", "--keep_dat", **flags))
    limited("--construct_memmap", "--keep_dat", **flags)
    assert contents(limited.output_dir) == whole


def test_hidden_states_are_on_disk_twice_at_most_and_once_if_discarded(
    stage: Stage, tmp_path: Path, renamed: list[str]
) -> None:
    """Also while the .h5 is made: just before it is renamed into place."""
    for flags, n_copies in ((("--construct_memmap",), 2), (("--construct_memmap", "--discard_intermediates"), 1)):
        killed, done = stage.to(tmp_path / f"killed_{n_copies}"), stage.to(tmp_path / f"done_{n_copies}")
        renamed.clear()
        done(*flags)
        assert killed_before_rename(renamed.index("train.h5"), lambda killed=killed, flags=flags: killed(*flags))
        assert (killed.output_dir / "train.h5.part").exists()
        results = done.manifest["results"]
        n_bytes = results["n_tokens"] * results["hidden_size"] * 4
        for folder in (killed.output_dir, done.output_dir):
            states = [path for path in folder.rglob("*") if path.suffix in (".npy", ".h5", ".part", ".dat")]
            n_taken = sum(path.stat().st_size for path in states)
            assert n_copies <= n_taken / n_bytes < n_copies + 0.1


def test_a_second_run_in_the_same_folder_is_refused(stage: Stage) -> None:
    stage.folder.mkdir(parents=True)
    with exclusive_lock(stage.output_dir, "train_extraction", items=range(N_PLACES)):
        # A process is never refused by its own lock.
        _, message = in_child(stage)
    assert "another run is writing here" in message
    stage()


def test_windows_are_cut_as_the_plan_says(stage: Stage, data: Path) -> None:
    write_text(data, TEXTS[:1])
    stage()
    n_tokens = len(load_tokenizer(str(stage.model)).encode(TEXTS[0]))
    bounds = WindowShape(**SHAPE).bounds(n_tokens)
    found = [len(read_token_probs(stage.folder, i)[1]) for i in windows_with_token_probs(stage.folder)]
    assert found == [end - start for start, end in bounds]
