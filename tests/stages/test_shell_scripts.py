"""The shell scripts' flags, and the embedded example's prompts. What needs an installation or minutes is not run."""

import importlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, STAGES
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils.files import InputError
from utils.text.prompts import read_prompts
from utils.text.python_docs import split_of

WALK_THROUGHS = ("self_distillation", "knowledge_distillation", "expert_facts", "chat_model")
# What decides what a virtual environment holds: it is set up anew where one of these has changed.
PACKAGES = ("requirements-dev.txt", "requirements.txt", "constraints.txt")
SCRIPTS = ("run_pipeline.sh", "run_tests.sh", ".ci/run", *(f"examples/{name}.sh" for name in WALK_THROUGHS))


def pipeline(
    *flags: object, folder: Path = ROOT, script: Path = ROOT / "run_pipeline.sh"
) -> subprocess.CompletedProcess:
    command = ["bash", str(script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_help_lists_the_flags_and_does_nothing(tmp_path: Path) -> None:
    shown = pipeline("--help", folder=tmp_path)
    assert shown.returncode == 0
    for flag in ("--model_gen", "--model_ds", "--dataset", "--similarity_threshold", "--output_dir", "--prompt_file"):
        assert flag in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120
    assert list(tmp_path.iterdir()) == []


def test_every_flag_that_help_lists_is_one(tmp_path: Path) -> None:
    listed = {word for word in pipeline("--help").stdout.split() if word.startswith("--")}
    for flag in sorted(listed):
        # Not a refusal of the flag: a flag that takes a value lacks it here, the others meet a flag that is none.
        refused = pipeline(flag.strip(",;)"), "--nope").stderr
        assert f"'{flag}'" not in refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nope"], "unknown flag '--nope'"),
        (["--nope=3"], "unknown flag '--nope'"),
        (["stray"], "unknown flag 'stray'"),
        (["--dataset"], "--dataset needs a value"),
        (["--dataset="], "--dataset needs a value"),
        (["--dataset", "--chat"], "--dataset needs a value"),
        (["--input_files"], "--input_files needs a value"),
        (["--prompt_file", "none.json"], "none.json: is no file"),
        (["--model_gen", "./none"], "./none: is no folder"),
        (["--model_gen", "a/model", "--model_ds", "b/model"], "have one name"),
    ],
)
def test_wrong_flags_end_the_pipeline_before_anything_is_made(tmp_path: Path, flags: list[str], message: str) -> None:
    refused = pipeline(*flags, folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("run_pipeline.sh: error: ")
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the pipeline whose Python only notes the commands that it is given, in a folder with a space."""
    root = tmp_path / "a checkout"
    (root / "utils").mkdir(parents=True)
    (root / ".venv/bin").mkdir(parents=True)
    (root / "examples/models/large").mkdir(parents=True)
    (root / "examples/prompts.json").write_text("[]")
    for name in ("run_pipeline.sh", "utils/venv.sh", *PACKAGES):
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / ".venv/.installed-requirements.txt").write_text("".join((root / name).read_text() for name in PACKAGES))
    python = root / ".venv/bin/python"
    python.write_text(
        '#!/usr/bin/env bash\necho "$*" >>"$(dirname "$0")/commands"\nif [[ $* == *"$FAIL"* ]]; then exit 3; fi\n'
    )
    python.chmod(0o755)
    return root


def commands(checkout: Path) -> list[str]:
    """What the pipeline had Python run, without the checks of the flags."""
    lines = (checkout / ".venv/bin/commands").read_text().splitlines()
    return [line for line in lines if not line.endswith("--help")]


@pytest.fixture
def no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "none fails")


@pytest.mark.usefixtures("no_failure")
def test_example_runs_the_five_stages_and_shows_them(checkout: Path) -> None:
    done = pipeline(folder=checkout, script=checkout / "run_pipeline.sh")
    assert done.returncode == 0, done.stderr
    ran = [Path(line.split(".py")[0]).name + ".py" for line in commands(checkout)]
    assert ran == list(STAGES)
    shown = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert len(shown) == 5
    assert commands(checkout)[1].endswith(
        "--partition train --save_hidden_states --construct_memmap --discard_intermediates"
    )
    assert "--compare_baseline" in commands(checkout)[4]


@pytest.mark.usefixtures("no_failure")
@pytest.mark.parametrize(("flag", "n_shown"), [("--quiet", 0), ("--verbose", 5)])
def test_every_stage_is_told_how_much_to_show(checkout: Path, flag: str, n_shown: int) -> None:
    done = pipeline(flag, folder=checkout, script=checkout / "run_pipeline.sh")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in commands(checkout)] == [flag] * 5
    assert sum(line.startswith("+ ") for line in done.stdout.splitlines()) == n_shown


@pytest.mark.usefixtures("no_failure")
@pytest.mark.parametrize("name", WALK_THROUGHS)
def test_walk_through_ends_with_a_report_where_its_caller_wants_it(checkout: Path, tmp_path: Path, name: str) -> None:
    for script in (f"{name}.sh", "walk_through.sh"):
        (checkout / "examples" / script).write_bytes((ROOT / "examples" / script).read_bytes())
    (checkout / "examples/models/small").mkdir()
    (tmp_path / "my results").mkdir()
    # Which its own Python would write.
    (tmp_path / "my results/questions.json").write_text("[]")
    (tmp_path / "my results/smollm2").mkdir()
    (checkout / "examples/chat_questions.json").write_text("[]")
    command = ["bash", str(checkout / "examples" / f"{name}.sh"), "my results"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    report = f"{tmp_path}/my results/report.html"
    assert done.stdout.splitlines()[-1] == report
    assert any(line.startswith("eval.py") and f"--report {report}" in line for line in commands(checkout))
    # What it shows is what it runs.
    assert all(
        f"--output_dir {tmp_path}/my\\ results" in line for line in done.stdout.splitlines() if "./run_p" in line
    )


@pytest.mark.parametrize("flags", [("--help",), ("a", "b")])
def test_walk_through_says_what_it_takes(flags: tuple[str, ...]) -> None:
    shown = subprocess.run(
        ["bash", ROOT / "examples/expert_facts.sh", *flags], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 2
    assert "examples/expert_facts.sh [FOLDER]" in shown.stderr
    assert shown.stdout == ""


@pytest.mark.usefixtures("no_failure")
def test_distillation_reads_the_text_with_both_models(checkout: Path, tmp_path: Path) -> None:
    models = [tmp_path / name for name in ("teacher", "student")]
    for model in models:
        model.mkdir()
    flags = ("--model_ds", models[0], "--model_gen", f"{models[1]}/", "--output_dir", tmp_path / "out/", "--top_k=5")
    done = pipeline(*flags, folder=tmp_path, script=checkout / "run_pipeline.sh")
    assert done.returncode == 0, done.stderr
    _, of_student, of_teacher, chunks, tries, evaluation = commands(checkout)
    assert f"--model_path {models[1]} " in of_student
    assert "--construct_memmap" in of_student
    assert f"--model_path {models[0]} " in of_teacher
    assert "hidden" not in of_teacher
    assert f"--token_prob_dir {tmp_path}/out/extracted/teacher/train " in chunks
    assert f"--model_name {models[0]} " in chunks
    assert f"--all_hidden_states_path {tmp_path}/out/extracted/student/train.h5" in tries
    assert "--model_ds teacher --model_gen student" in tries
    assert f"--model_path {models[1]} " in evaluation
    assert "--top_k 5" in evaluation


@pytest.mark.usefixtures("no_failure")
def test_a_gguf_file_is_a_model_too(checkout: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    refused = pipeline("--model_gen", model, folder=tmp_path, script=checkout / "run_pipeline.sh")
    assert "m.gguf: is no folder" in refused.stderr
    model.touch()
    done = pipeline("--model_gen", model, folder=tmp_path, script=checkout / "run_pipeline.sh")
    assert done.returncode == 0, done.stderr
    assert f"--model_path {model} " in commands(checkout)[-1]
    assert "--model_ds m.gguf --model_gen m.gguf" in commands(checkout)[-1]


@pytest.mark.usefixtures("no_failure")
@pytest.mark.parametrize(("flags", "min_lengths"), [((), ["1"]), (("--min_length", "9"), ["1", "9"])])
def test_expert_spans_of_short_texts_are_kept(checkout: Path, flags: tuple[str, ...], min_lengths: list[str]) -> None:
    flags = ("--input_files", "x.jsonl", "--test_fraction", "0", "--chunk_source", "expert", *flags)
    done = pipeline(*flags, folder=checkout, script=checkout / "run_pipeline.sh")
    assert done.returncode == 0, done.stderr
    text, extraction, chunks, *_ = commands(checkout)
    assert "--test_fraction 0" in text
    assert [words.split()[0] for words in extraction.split("--min_length ")[1:]] == min_lengths  # the last one counts
    assert "--chunk_source expert" in chunks


@pytest.mark.usefixtures("no_failure")
def test_own_files_get_prompts_cut_from_their_test_split(checkout: Path, tmp_path: Path) -> None:
    done = pipeline("--input_files", "a b.txt", "c.txt", "--chat", folder=tmp_path, script=checkout / "run_pipeline.sh")
    assert done.returncode == 0, done.stderr
    first, *_, cut, evaluation = commands(checkout)
    assert "--dataset local" in first
    assert "--input_files a b.txt c.txt" in first
    assert "make_prompts.py --data_file" in cut
    assert "output/local/prompts.json" in evaluation


def test_failing_stage_stops_the_pipeline_with_its_status(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "save_token_trie_info.py --token_prob_dir")
    done = pipeline(folder=checkout, script=checkout / "run_pipeline.sh")
    assert done.returncode == 3


def test_wrong_value_for_the_last_stage_stops_before_the_first(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "--similarity_threshold 7")
    done = pipeline("--similarity_threshold", 7, folder=checkout, script=checkout / "run_pipeline.sh")
    assert done.returncode == 3
    assert commands(checkout) == []


# ---- The example's prompts


@pytest.fixture(scope="module")
def make_prompts() -> ModuleType:
    return importlib.import_module("examples.make_prompts")


def test_example_prompts_are_held_out() -> None:
    prompts = read_prompts(ROOT / "examples/prompts.json")
    assert len(prompts) == 16
    headings = [prompt.text.split("\n")[0] for prompt in prompts]
    modules = [heading.removeprefix("Module ") for heading in headings if heading.startswith("Module ")]
    assert len(modules) == 13
    assert {split_of(module) for module in modules} == {"test"}


def test_prompts_are_the_same_each_time_and_end_with_a_word(make_prompts: ModuleType, tmp_path: Path) -> None:
    for name in ("one.json", "other.json"):
        make_prompts.main(["--output_file", str(tmp_path / name), "--n_prompts", "5", "--n_characters", "100"])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    prompts = json.loads((tmp_path / "one.json").read_text())
    assert len(prompts) == 5
    assert all(0 < len(prompt) <= 100 and prompt == prompt.rstrip() for prompt in prompts)


def test_prompt_is_cut_at_the_last_whole_word(make_prompts: ModuleType) -> None:
    cut: Callable[..., list[str]] = make_prompts.cut_prompts
    assert cut(["ab cd efgh ij kl mn"], 3, 6) == ["ab cd"]
    assert cut(["ab cdef gh ij kl mn op"], 3, 7) == ["ab cdef"]
    assert cut(["東京は日本の首都です"], 1, 3) == ["東京は"]
    assert cut(["too short"], 1, 6) == []
    assert cut([f"{letter} " * 9 for letter in "abcdef"], 3, 1) == ["a", "c", "e"]


def test_text_without_long_documents_is_refused(make_prompts: ModuleType, tmp_path: Path) -> None:
    data = tmp_path / "test.json"
    for content, message in (([{"text": "short"}], "no document of 780 characters"), ([{"txt": ""}], "has no text")):
        data.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            make_prompts.main(["--output_file", str(tmp_path / "p.json"), "--data_file", str(data)])


# ---- The virtual environment


def requirements_in(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_constraints_hold_one_version_in_the_range_of_every_requirement() -> None:
    exact = {name: str(requirement.specifier) for name, requirement in requirements_in("constraints.txt").items()}
    assert all(re.fullmatch(r"==[\w.]+", specifier) for specifier in exact.values()), exact
    wanted = requirements_in("requirements.txt") | requirements_in("requirements-dev.txt")
    assert len(wanted) >= 14
    outside = [name for name, range_ in wanted.items() if exact[name].removeprefix("==") not in range_.specifier]
    assert outside == []


def test_requirements_leave_room_for_the_versions_of_others() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        kinds = {part.operator for requirement in requirements_in(name).values() for part in requirement.specifier}
        assert kinds <= {">=", "<"}, name


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A folder with requirements and a .venv whose pip says much and notes what it is called with."""
    root = tmp_path / "a checkout"
    (root / ".venv/bin").mkdir(parents=True)
    for name in PACKAGES:
        (root / name).write_text(f"# {name}\n")
    python = root / ".venv/bin/python"
    python.write_text(
        '#!/usr/bin/env bash\necho "$*" >>"$0.calls"\necho "Collecting much"; echo "WARNING: of little" >&2\n'
        'if [[ $* == *"$FAIL"* ]]; then echo "ERROR: no such version" >&2; exit 1; fi\n'
    )
    python.chmod(0o755)
    return root


def set_up(root: Path, requirements: str, fail: str = "nothing fails") -> "subprocess.CompletedProcess[str]":
    command = f'set -euo pipefail; source "{ROOT}/utils/venv.sh"; ensure_venv "{root}" {requirements}'
    variables = os.environ | {"FAIL": fail}
    return subprocess.run(["bash", "-c", command], env=variables, capture_output=True, text=True, check=False)


def test_packages_are_installed_in_their_constraints_and_in_one_line(environment: Path) -> None:
    done = set_up(environment, "requirements.txt")
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("installing PyTorch, transformers and what else requirements.txt names into ")
    log = (environment / ".venv/pip.log").read_text()
    assert "Collecting much" in log
    assert "WARNING: of little" in log
    installs = [call for call in (environment / ".venv/bin/python.calls").read_text().splitlines() if "install" in call]
    assert [call.split("-c ")[1] for call in installs] == [
        f"{environment}/constraints.txt torch",
        f"{environment}/constraints.txt -r {environment}/requirements.txt",
    ]


def test_packages_are_installed_again_only_where_their_files_have_changed(environment: Path) -> None:
    def calls() -> int:
        return len((environment / ".venv/bin/python.calls").read_text().splitlines())

    set_up(environment, "requirements.txt")
    before = calls()
    assert set_up(environment, "requirements.txt").stderr == ""
    assert calls() == before
    for name in PACKAGES:
        (environment / name).write_text("# other\n")
        assert "installing" in set_up(environment, "requirements.txt").stderr
        assert calls() > before
        before = calls()
    # What the tests need holds what the pipeline needs.
    assert "installing" in set_up(environment, "requirements-dev.txt").stderr
    assert set_up(environment, "requirements.txt").stderr == ""


@pytest.mark.parametrize("fail", ["constraints.txt torch", "-r "])
def test_an_installation_that_fails_names_its_log_and_is_tried_again(environment: Path, fail: str) -> None:
    for _ in range(2):
        done = set_up(environment, "requirements.txt", fail)
        assert (done.returncode, done.stdout) == (2, "")
        log = environment / ".venv/pip.log"
        assert done.stderr.splitlines()[1:] == [
            f"error: pip could not install requirements.txt; what it said is in {log}"
        ]
        assert log.read_text().endswith("ERROR: no such version\n")
    assert set_up(environment, "requirements.txt").returncode == 0


def test_without_a_browser_the_tests_go_on_and_do_not_try_again(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("bash", "timeout", "touch"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    apt_get = tmp_path / "bin/apt-get"
    apt_get.write_text('#!/bin/bash\necho tried >>"$0.log"\nexit 1\n')
    apt_get.chmod(0o755)
    command = f'set -euo pipefail; source "{ROOT}/utils/venv.sh"; ensure_chromium "{tmp_path}"'
    said = []
    for _ in range(2):
        ended = subprocess.run(
            ["bash", "-c", command], env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True, check=True
        )
        said.append(ended.stderr)
    assert "will be skipped" in said[0]
    assert said[1] == ""
    if os.geteuid() == 0:
        assert (tmp_path / "bin/apt-get.log").read_text() == "tried\n"
