"""The documents: their commands are ones that the scripts take, their links lead somewhere, their messages are said.

A page whose head says that it uses the README's variables has them; any other page sets its own.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import ModuleType

import pytest
from conftest import ROOT, STAGES

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = ROOT / "examples/README.md"
BENCHMARKS = [ROOT / "benchmarks/README.md", ROOT / "benchmarks/paper/README.md"]
WITH_COMMANDS = [README, *PAGES, EXAMPLES]
MAX_README_LINES = 250
PIPELINE = "./run_pipeline.sh"
WRITTEN_APART = ROOT / "docs/architecture.md"  # not here yet: delete this line, and where it is used, once it is
USES_VARIABLES = "variables of the [README's five stages](../README.md#the-five-stages)"
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# ---- Commands


@dataclass(frozen=True)
class Command:
    """A line of a bash block: its page and its words, variables filled in."""

    page: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)[:60]}"


def read_commands(page: Path) -> tuple[list[Command], dict[str, str]]:
    """The commands of a page, and the variables that its lines set."""
    variables: dict[str, str] = {}
    if USES_VARIABLES in page.read_text(encoding="utf-8"):
        _, variables = read_commands(README)
    commands = []
    for block in blocks(page, "bash"):
        for line in whole_lines(block.replace("\\\n", " ")):
            if assignment := re.fullmatch(r"(\w+)=(\S+)", line):
                variables[assignment[1]] = assignment[2]
            elif loop := re.fullmatch(r"for (\w+) in (\S+) .*; do", line):
                variables[loop[1]] = loop[2]
            elif words := shlex.split(Template(line).safe_substitute(variables)):
                commands.append(Command(name_of(page), words))
    return commands, variables


def whole_lines(block: str) -> list[str]:
    """The lines of a block; a quoted text that goes over several stays in one."""
    lines: list[str] = []
    for line in block.splitlines():
        if lines and lines[-1].count('"') % 2:
            lines[-1] += f"\n{line}"
        else:
            lines.append(line)
    return lines


def python_words(command: Command) -> list[str] | None:
    """What follows `python`, or the script that torchrun starts and what follows; None for other commands."""
    words = command.words
    if words[0] == "torchrun":
        return words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    return words[words.index("python") + 1 :] if "python" in words else None


def script_and_flags(command: Command) -> tuple[str, list[str]] | None:
    """The script of ours that a command starts, as a path, and its flags; None for other commands."""
    words = python_words(command) or [""]
    if words[0].endswith(".py"):
        return words[0], words[1:]
    if words[0] == "-m" and words[1].startswith("utils."):
        return f"{words[1].replace('.', '/')}.py", words[2:]
    return None


def load(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


COMMANDS = [command for page in WITH_COMMANDS for command in read_commands(page)[0]]
OF_SCRIPTS = [command for command in COMMANDS if script_and_flags(command)]
OF_PIPELINE = [command for command in COMMANDS if command.words[0] == PIPELINE]


@pytest.mark.parametrize("command", OF_SCRIPTS, ids=str)
def test_script_takes_the_command_that_a_page_shows(command: Command) -> None:
    found = script_and_flags(command)
    assert found is not None
    script, flags = found
    unset = [flag for flag in flags if re.search(r"\$\{?[A-Za-z_]", flag)]
    assert not unset, f"no line before it sets {unset}"
    load(script).parse_args(flags)


@pytest.mark.parametrize("command", OF_PIPELINE, ids=str)
def test_pipeline_takes_the_flags_that_a_page_shows(command: Command) -> None:
    # --help comes last, so the flags before it have been judged.
    words = ["bash", *command.words, "--help"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")


def test_scripts_that_a_page_runs_by_path_are_there() -> None:
    started = {command.words[0] for command in COMMANDS if command.words[0].endswith(".sh")}
    assert "./run_tests.sh" in started
    assert [script for script in started if not (ROOT / script).is_file()] == []


def test_readme_shows_all_five_stages_in_their_order() -> None:
    found = [script_and_flags(command) for command in OF_SCRIPTS if command.page == "README.md"]
    shown = [script_and_flags[0] for script_and_flags in found if script_and_flags]
    assert tuple(shown) == STAGES
    assert Command("README.md", [PIPELINE]) in OF_PIPELINE


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if blocks(page, "python")], ids=name_of)
def test_python_of_a_page_imports_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        imports: list[ast.stmt] = [
            node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, []), name_of(page), "exec"), {})


# ---- Text


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_readme_links_to_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"(docs/{page.name})" not in text] == []


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes them."""
    text, found = FENCE.sub("", page.read_text(encoding="utf-8")), set[str]()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


@pytest.mark.parametrize("page", [*WITH_COMMANDS, *BENCHMARKS], ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in re.findall(r'(?:\]\(|src="|srcset=")([^)"\s]+)', text):
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_messages_that_troubleshooting_explains_are_in_the_code() -> None:
    table = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`(.*?)`", row)]
    assert len(messages) > 10
    code = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")])
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a sentence that goes over two lines
    unknown = [part.strip() for message in messages for part in message.split("…") if part.strip() not in code]
    assert not unknown


# ---- Flags


@pytest.fixture
def generate_flags(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("generate_flags")


def test_flags_page_says_what_the_scripts_say(generate_flags: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_flags.main(["--check"]) == 0, capsys.readouterr().err


def test_check_of_the_flags_page_finds_a_table_that_is_not_current(
    generate_flags: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stale = tmp_path / "flags.md"
    stale.write_text(generate_flags.PAGE.read_text(encoding="utf-8").replace("--max_passages", "--passages"))
    monkeypatch.setattr(generate_flags, "PAGE", stale)
    assert generate_flags.main(["--check"]) == 1
    assert "is not current; run python docs/generate_flags.py" in capsys.readouterr().err
    assert generate_flags.main([]) == 0
    assert generate_flags.main(["--check"]) == 0


def test_flags_page_has_every_script() -> None:
    text = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    examples = [
        f"examples/{path.name}"
        for path in (ROOT / "examples").glob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert len(examples) >= 4
    scripts = ("run_pipeline.sh", *STAGES, "python -m utils.inspect_datastore", *examples)
    assert set(re.findall(r"^## `(.*)`$", text, re.MULTILINE)) == set(scripts)


# ---- The example models


@pytest.mark.parametrize(("name", "n_parameters"), [("large", "5,918,720"), ("small", "1,184,896")])
def test_example_models_have_the_parameters_that_their_readme_says(name: str, n_parameters: str) -> None:
    with open(ROOT / f"examples/models/{name}/model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = [tensor for key, tensor in header.items() if key != "__metadata__"]
    n_bytes = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    assert {tensor["dtype"] for tensor in tensors} == {"F16"}
    assert f"{n_bytes // 2:,}" == n_parameters
    assert n_parameters in EXAMPLES.read_text(encoding="utf-8")
