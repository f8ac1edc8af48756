"""The corpus that needs no network: Python's language reference and its standard library's docstrings.

Both come with every CPython: the reference as `pydoc_data.topics`, the docstrings in the library's source files. The
sources are parsed, never imported, so that nothing of the machine (optional C modules, installed packages) shows in
the text, and each document goes to the split that a hash of its name says: the same on every machine with the same
Python.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Left out because distributions ship them apart from Python, or patch them.
_OMITTED = (
    "__future__ _sysconfigdata antigravity distutils ensurepip idlelib lib2to3 pydoc_data sysconfig test this tkinter "
    "turtle turtledemo venv"
)
OMITTED_MODULES = frozenset(_OMITTED.split())
# Of 100 hash values: the first 90 are train, then 5 each.
SPLIT_BOUNDS = {"train": 90, "validation": 95, "test": 100}


def python_docs(split: str) -> Iterator[str]:
    """The documents of one split, `train`, `validation` or `test`: first the reference by topic, then by module."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if split_of(name) == split:
            yield topics[name].strip() + "\n"
    for name, path in _modules():
        # Asked before the module is parsed, which is where the time goes.
        if split_of(name) == split and (text := _module_text(name, path)):
            yield text


def split_of(name: str) -> str:
    """The split of a document, from the SHA-256 of its name alone."""
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return next(split for split, bound in SPLIT_BOUNDS.items() if value < bound)


def _modules() -> Iterator[tuple[str, Path]]:
    """The dotted name and the source file of each module of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - OMITTED_MODULES):
        for path in _source_files(library, module):
            parts = path.relative_to(library).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _source_files(library: Path, module: str) -> list[Path]:
    """The source files of a top-level module or package, without its tests and what it bundles."""
    single = library / f"{module}.py"
    if single.is_file():
        return [single]
    files = sorted((library / module).rglob("*.py"))
    return [f for f in files if not {"test", "tests", "site-packages"} & set(f.relative_to(library).parts)]


def _module_text(name: str, path: Path) -> str:
    """One module's docstrings in the order of the source, each under its signature; empty where it has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the library holds a few files that are meant not to parse
        return ""
    blocks = list(_docstring_blocks(tree, indent=0))
    return f"Module {name}\n\n" + "\n\n".join(blocks) + "\n" if blocks else ""


def _docstring_blocks(node: ast.AST, indent: int) -> Iterator[str]:
    margin = "    " * indent
    if isinstance(node, ast.Module):
        heading, inner = None, 0
    else:
        heading, inner = margin + _signature(node), indent + 1
    docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
    if docstring:
        pad = "    " * inner
        body = "\n".join((pad + line).rstrip() for line in docstring.splitlines())
        yield body if heading is None else f"{heading}\n{body}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DOCUMENTED):
            yield from _docstring_blocks(child, inner)


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"
