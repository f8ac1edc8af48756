"""The READMEs: every command is one that its script takes, and each flag table says what its script says.

`python tests/test_readme.py` writes the flag tables anew, after a change of flags.
"""

import argparse
import ast
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from string import Template
from types import ModuleType
from unittest.mock import patch

import pytest
from conftest import ROOT, STAGES

READMES = (ROOT / "README.md", ROOT / "examples/README.md")
PIPELINE = "run_pipeline.sh"
INSPECTOR = "utils/inspect_datastore.py"
TABLE = re.compile(r"<!-- flags of (\S+) -->\n(.*?)<!-- end of flags -->\n", re.DOTALL)
DEFAULT = re.compile(r"\s*\(default: (.*)\)$")


# ---- Commands


def commands(readme: Path) -> list[list[str]]:
    """The words of every command in the bash blocks, with the variables that lines before it set filled in."""
    found, variables = [], dict[str, str]()
    for block in re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
        for line in whole_lines(block.replace("\\\n", " ")):
            if assignment := re.fullmatch(r"(\w+)=(\S+)", line):
                variables[assignment[1]] = assignment[2]
            elif loop := re.fullmatch(r"for (\w+) in (\S+) .*; do", line):
                variables[loop[1]] = loop[2]
            elif "python" in (words := shlex.split(Template(line).safe_substitute(variables))):
                found.append(words[words.index("python") :])
            elif words:
                found.append(words)
    return found


def whole_lines(block: str) -> list[str]:
    """The lines of a block; a quoted text that goes over several stays in one."""
    lines: list[str] = []
    for line in block.splitlines():
        if lines and lines[-1].count('"') % 2:
            lines[-1] += f"\n{line}"
        else:
            lines.append(line)
    return lines


COMMANDS = [(readme.relative_to(ROOT), words) for readme in READMES for words in commands(readme)]
OF_SCRIPTS = [(readme, words[1:]) for readme, words in COMMANDS if words[0] == "python" and words[1].endswith(".py")]
OF_SCRIPTS += [
    (readme, [f"{words[2].replace('.', '/')}.py", *words[3:]])
    for readme, words in COMMANDS
    if words[:2] == ["python", "-m"] and words[2].startswith("utils.")
]
OF_PIPELINE = [(readme, words[1:]) for readme, words in COMMANDS if words[0] == f"./{PIPELINE}"]


def load(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize(("readme", "words"), OF_SCRIPTS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_script_takes_the_command_that_a_readme_shows(readme: Path, words: list[str]) -> None:
    load(words[0]).parse_args(words[1:])


@pytest.mark.parametrize("words", [words for _, words in OF_PIPELINE], ids=" ".join)
def test_pipeline_takes_the_flags_that_a_readme_shows(words: list[str]) -> None:
    # --help comes last, so the flags before it have been judged.
    shown = subprocess.run(["bash", ROOT / PIPELINE, *words, "--help"], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")


def test_readme_shows_all_five_stages_in_their_order() -> None:
    shown = [words[0] for readme, words in OF_SCRIPTS if readme == Path("README.md") and words[0] in STAGES]
    assert tuple(dict.fromkeys(shown)) == STAGES
    assert any(not words for _, words in OF_PIPELINE)


def test_python_of_the_readme_imports_what_there_is() -> None:
    for block in re.findall(r"```python\n(.*?)```", READMES[0].read_text(encoding="utf-8"), re.DOTALL):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: str(readme.relative_to(ROOT)))
def test_links_lead_to_files(readme: Path) -> None:
    links = re.findall(r'(?:\]\(|src="|srcset=")([^)#"\s]+)', readme.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (readme.parent / link).exists()]
    assert not missing


def test_messages_that_the_readme_explains_are_ones_that_a_script_says() -> None:
    readme = READMES[0].read_text(encoding="utf-8")
    table = readme.split("## Troubleshooting\n")[1].split("\n## ")[0]
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for message in re.findall(r"`(.*?)`", row)
    ]
    assert len(messages) > 10
    code = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *(ROOT / "utils").glob("*.py")])
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a sentence that goes over two lines
    unknown = [part.strip() for message in messages for part in message.split("…") if part.strip() not in code]
    assert not unknown


# ---- Flags


class FoundParserError(Exception):
    """Carries a script's parser out of its parse_args."""


def parser_of(script: str) -> argparse.ArgumentParser:
    def carry_out(parser: argparse.ArgumentParser, *_: object) -> None:
        raise FoundParserError(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", carry_out), pytest.raises(FoundParserError) as found:
        load(script).parse_args([])
    return found.value.args[0]


def flag_table(script: str) -> str:
    """The table of a script's flags as Markdown, from the script itself."""
    rows = _rows_of_pipeline() if script == PIPELINE else [_row(action) for action in _actions(script)]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in ["flag | meaning | default", "--- | --- | ---", *lines]) + "\n"


def _actions(script: str) -> list[argparse.Action]:
    return [action for action in parser_of(script)._actions if action.dest != "help"]


def _row(action: argparse.Action) -> tuple[str, str, str]:
    meaning, default = _split_default(action.help or "")
    if action.choices:
        meaning += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
    if action.required:
        default = "required"
    elif isinstance(action.default, list):
        default = " ".join(action.default)
    elif action.default is not None:
        default = "off" if action.nargs == 0 else str(action.default)
    return f"`{(action.option_strings or [action.dest])[0]}`", meaning, default or "-"


def _rows_of_pipeline() -> list[tuple[str, str, str]]:
    shown = subprocess.run(["bash", ROOT / PIPELINE, "--help"], capture_output=True, text=True, check=True).stdout
    rows = []
    for flags, text in re.findall(r"^  (--.*?) {2,}(.*)$", shown, re.MULTILINE):
        meaning, default = _split_default(text)
        if flags != "--help":
            rows.append((f"`{flags}`", meaning, default or ("-" if " " in flags else "off")))
    return rows


def _split_default(text: str) -> tuple[str, str]:
    found = DEFAULT.search(text)
    return (text, "") if found is None else (text[: found.start()], found[1])


TABLES = [(path, script) for path in READMES for script, _ in TABLE.findall(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("readme", "script"), TABLES, ids=[script for _, script in TABLES])
def test_flag_table_says_what_the_script_says(readme: Path, script: str) -> None:
    shown = dict(TABLE.findall(readme.read_text(encoding="utf-8")))[script]
    assert shown.strip() == flag_table(script).strip(), "python tests/test_readme.py writes the tables anew"


def test_every_script_has_its_flag_table() -> None:
    examples = [f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")]
    assert {script for _, script in TABLES} == {*STAGES, PIPELINE, INSPECTOR, *examples}


# ---- The example models


@pytest.mark.parametrize(("name", "n_parameters"), [("large", "5,918,720"), ("small", "1,184,896")])
def test_example_models_have_the_parameters_that_their_readme_says(name: str, n_parameters: str) -> None:
    with open(ROOT / f"examples/models/{name}/model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = [tensor for key, tensor in header.items() if key != "__metadata__"]
    n_bytes = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    assert {tensor["dtype"] for tensor in tensors} == {"F16"}
    assert f"{n_bytes // 2:,}" == n_parameters
    assert n_parameters in (ROOT / "examples/README.md").read_text(encoding="utf-8")


def write_flag_tables() -> None:
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        text = TABLE.sub(
            lambda match: f"<!-- flags of {match[1]} -->\n\n{flag_table(match[1])}\n<!-- end of flags -->\n", text
        )
        readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_flag_tables()
