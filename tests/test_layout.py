"""Who imports whom, and who pokes into whom: read from the syntax of every module, function bodies included."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, STAGES

# Each layer imports from itself and from those before it.
LAYERS = ("ground", "text", "lm", "extraction", "datastore", "decoding", "evaluation")
GROUND = {"cli", "progress", "workers", "files", "json_io", "manifest", "tables", "hdf5"}
# Documented ways to start or import what lies in a package.
SHORT_CUTS = {"utils.inspect_datastore", "utils.custom_generate"}
ARGPARSE = {"utils.cli", "utils.datastore.inspect"}  # the second is a script too
PARSERS = {"ArgumentParser", "Parser", "StageParser"}
# Private names of others that are used, and why there is no public one.
ALLOWED_PRIVATE = {
    "_exit": "os._exit is documented; a process that has lost its parent ends without waiting for threads",
    "_attn_implementation": "of a transformers config: which attention a loaded model has",
}
SCRIPTS = {name.removesuffix(".py") for name in STAGES}


@dataclass(frozen=True)
class Module:
    """A module by its dotted name, parsed."""

    name: str
    tree: ast.Module

    def imported(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything that it imports, wherever the import stands; of a name, with its module."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno}: a relative import"
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def modules(folder: str) -> list[Module]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append(Module(name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


UTILS, BENCHMARKS = modules("utils"), modules("benchmarks")
NAMES = {module.name for module in UTILS}


def layer_of(name: str) -> int:
    """The layer of a module of utils, as an index; of a name in one, its module's."""
    parts = name.split(".")
    assert parts[0] == "utils"
    layer = "ground" if parts[1] in GROUND else parts[1]
    assert layer in LAYERS, f"{name} is in no layer"
    return LAYERS.index(layer)


@pytest.mark.parametrize("module", [module for module in UTILS if module.name not in SHORT_CUTS], ids=lambda m: m.name)
def test_imports_go_down_the_layers_only(module: Module) -> None:
    if module.name == "utils":
        assert list(module.imported()) == []
        return
    upwards = [
        f"line {line}: {name}"
        for line, name in module.imported()
        if name.startswith("utils.") and layer_of(name) > layer_of(module.name)
    ]
    assert upwards == []


def test_every_layer_has_modules() -> None:
    found = {layer_of(name) for name in NAMES - SHORT_CUTS - {"utils"}}
    assert found == set(range(len(LAYERS)))
    assert {f"utils.{name}" for name in GROUND} <= NAMES


def test_imports_make_no_circle() -> None:
    """Not even of imports inside functions: with whole files alone, each could be the first to be imported."""
    below: dict[str, set[str]] = {}
    for module in UTILS:
        named = {name if name in NAMES else name.rpartition(".")[0] for _, name in module.imported()}
        below[module.name] = named & NAMES
    while free := {name for name, others in below.items() if not others & below.keys()}:
        below = {name: others for name, others in below.items() if name not in free}
    assert below == {}


@pytest.mark.parametrize("module", UTILS, ids=lambda m: m.name)
def test_utils_imports_no_script_no_test_and_no_benchmark(module: Module) -> None:
    tops = {name.split(".")[0] for _, name in module.imported()}
    assert not tops & (SCRIPTS | {"tests", "benchmarks", "examples", "docs", "conftest"})


@pytest.mark.parametrize("module", BENCHMARKS, ids=lambda m: m.name)
def test_benchmarks_take_nothing_from_tests(module: Module) -> None:
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py")} - {path.stem for path in ROOT.rglob("*.py")}
    tops = {name.split(".")[0] for _, name in module.imported()}
    assert not tops & (helpers | {"tests", "conftest"})
    folders = [node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant)]
    assert "tests" not in folders, "it looks into the folder of tests, or puts it on the path"


# ---- Private names


def private_names(module: Module) -> Iterator[tuple[int, str]]:
    """Line and name of every attribute and import that begins with one underscore, unless the module's own."""
    own = set(defined(module.tree))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            for part in (*str(node.module).split("."), *(alias.name for alias in node.names)):
                if is_private(part):
                    yield node.lineno, part
        elif isinstance(node, ast.Import):
            for part in ".".join(alias.name for alias in node.names).split("."):
                if is_private(part):
                    yield node.lineno, part
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
            and is_private(str(node.args[1].value))
        ):
            yield node.lineno, str(node.args[1].value)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> Iterator[str]:
    """Names of functions, classes and variables that a module or one of its classes defines, and of those set on self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            if node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("module", UTILS, ids=lambda m: m.name)
def test_no_private_name_of_another_module_is_used(module: Module) -> None:
    found = [f"line {line}: {name}" for line, name in private_names(module) if name not in ALLOWED_PRIVATE]
    assert found == []


def test_allowed_private_names_are_used() -> None:
    used = {name for module in UTILS for _, name in private_names(module)}
    assert set(ALLOWED_PRIVATE) <= used


SOURCES = {
    "import numpy as np\nnp._core.x": ["_core"],
    "from numpy._core import x": ["_core"],
    "import numpy._core": ["_core"],
    "from tqdm import _instances": ["_instances"],
    "def f(x):\n    return x._instances": ["_instances"],
    "getattr(x, '_y')": ["_y"],
    "class A(tqdm):\n    def f(self):\n        return self._instances": ["_instances"],
    "class A:\n    def f(self, other):\n        self._a = other._a": [],
    "class A:\n    _a: int = 0\n    def f(self, other):\n        return other._a": [],
    "def _f(): ...\nx.__dict__\n_ = 1": [],
}


@pytest.mark.parametrize("source", SOURCES)
def test_private_names_are_found_where_they_are_another_modules(source: str) -> None:
    assert [name for _, name in private_names(Module("m", ast.parse(source)))] == SOURCES[source]


# ---- Command lines


@pytest.mark.parametrize("module", UTILS, ids=lambda m: m.name)
def test_command_lines_are_parsed_in_one_place(module: Module) -> None:
    made = {
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and (getattr(node.func, "id", None) in PARSERS or getattr(node.func, "attr", None) in PARSERS)
    }
    assert not made or module.name in ARGPARSE


def test_files_of_utils_are_modules_pages_or_the_shells() -> None:
    kinds = {path.suffix for path in (ROOT / "utils").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert kinds == {".py", ".css", ".html", ".js", ".sh"}
    assert not list(Path(ROOT / "utils").rglob("test_*"))
