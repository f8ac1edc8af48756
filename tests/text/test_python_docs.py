"""The corpus that needs no network: Python's own reference and docstrings, the same in every process."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from utils.text.corpora import SPLITS
from utils.text.python_docs import python_docs, split_of


def test_python_docs_need_no_network_and_are_the_same_in_every_process(tmp_path: Path) -> None:
    script = "import hashlib; from utils.text.python_docs import python_docs\n"
    script += (
        "print([hashlib.sha256(chr(0).join(python_docs(s)).encode()).hexdigest() for s in ('validation', 'test')])"
    )
    outputs = set()
    for hash_seed, locale in (("1", "C"), ("2", "C.UTF-8")):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "LC_ALL": locale, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    here = [hashlib.sha256("\0".join(python_docs(split)).encode()).hexdigest() for split in SPLITS[1:]]
    assert outputs == {f"{here}\n"}


def test_a_document_is_in_the_split_that_the_hash_of_its_name_says() -> None:
    # The first 8 bytes of SHA-256, big-endian, modulo 100: below 90 train, below 95 validation.
    def by_hand(name: str) -> str:
        value = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100
        return "train" if value < 90 else "validation" if value < 95 else "test"

    names = [f"module{i}" for i in range(300)]
    assert [split_of(name) for name in names] == [by_hand(name) for name in names]
    assert {split_of(name) for name in names} == set(SPLITS)


def test_python_docs_hold_the_reference_and_docstrings_and_no_tests() -> None:
    found = [text for split in SPLITS for text in python_docs(split)]
    assert len(found) > 400
    assert any(text.startswith("Module json\n") and "dump(obj, fp, *," in text for text in found)
    assert any(text.startswith('The "if" statement\n') for text in found)
    assert not any(text.startswith(("Module test.", "Module idlelib", "Module lib2to3")) for text in found)
