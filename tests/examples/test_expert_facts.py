"""Expert facts: the committed directory, the counting of answers, and the example script on a random model."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from examples.fact_questions import Count, Question, best_threshold, count, holds, read_questions, wilson_interval
from utils.files import InputError
from utils.text.corpora import read_passages

DIRECTORY = ROOT / "examples/staff_directory.json"


def load(name: str) -> ModuleType:
    return importlib.import_module(f"examples.{name}")


def test_the_committed_directory_is_the_one_that_its_script_makes(tmp_path: Path) -> None:
    load("make_staff_directory").main(["--output_file", str(tmp_path / "made.json")])
    assert (tmp_path / "made.json").read_bytes() == DIRECTORY.read_bytes()


def test_spans_hold_their_fact_alone_and_no_question_is_a_copy() -> None:
    entries = json.loads(DIRECTORY.read_text())
    texts, facts = [entry["text"] for entry in entries], [entry["fact"] for entry in entries]
    assert len({entry["name"] for entry in entries}) >= 40
    assert len(set(facts)) == len(facts)
    assert len(list(read_passages(DIRECTORY.with_name("staff_directory.json")))) == len(entries)
    for entry in entries:
        (start, end), *others = entry["spans"]
        assert (entry["text"][start:end], others) == (f" is {entry['fact']},", [])
        assert entry["text"][:start].endswith(entry["name"])
        for question in entry["questions"].values():
            assert question.endswith(entry["name"])
            assert not any(question in text for text in texts)
            assert not any(holds(question, fact) for fact in facts)


def test_an_interval_is_wilsons() -> None:
    # (0.5 + z²/20 ± z √(0.25/10 + z²/400)) / (1 + z²/10), z = 1.96
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson_interval(0, 128) == pytest.approx((0, 0.02914), abs=1e-5)
    assert wilson_interval(1, 1) == pytest.approx((0.20654, 1), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "is_held"), [(" is 417, and", True), ("417", True), ("4170", False), ("a417", False), ("4 17", False)]
)
def test_a_fact_is_held_where_it_is_no_part_of_a_longer_one(text: str, is_held: bool) -> None:
    assert holds(text, "417") is is_held


def test_an_answer_with_the_fact_is_right_whatever_else_it_says() -> None:
    asked = Question("Ada Quill", "417", "its words", "", "")
    answers = [" is 417.", " is 417 or 900", " is 900", " is 4170", ""]
    found = count([(asked, answer) for answer in answers], ["417", "900"])
    assert found == Count(5, 2, 1)
    assert found.share == 0.4


def test_of_equally_good_thresholds_the_highest_is_best() -> None:
    assert best_threshold({0.5: Count(9, 3, 6), 0.9: Count(9, 4, 1), 0.8: Count(9, 4, 2), 1.0: Count(9, 0, 0)}) == 0.9


GOOD = {"text": "a is b", "spans": [[1, 6]], "name": "a", "fact": "b", "questions": {"plain": "so a"}}


@pytest.mark.parametrize(
    "entry",
    [
        *({key: value for key, value in GOOD.items() if key != left_out} for left_out in GOOD),
        *(GOOD | {key: ""} for key in ("text", "name", "fact")),
        GOOD | {"questions": {}},
        GOOD | {"questions": ["so a"]},
        GOOD | {"questions": {"plain": 1}},
        GOOD | {"spans": []},
        "a is b",
    ],
)
def test_an_entry_that_lacks_something_is_refused(entry: object, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps([GOOD, entry]))
    with pytest.raises(
        InputError, match=r"facts\.json: entry 2 is none of a directory; expected an object with text, "
    ):
        read_questions(tmp_path / "facts.json")


def test_the_script_refuses_to_hold_out_everybody(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is about 48 people; give a smaller --n_held_out"):
        load("expert_facts").main(["--output_dir", str(tmp_path / "out"), "--n_held_out", "48"])
    with pytest.raises(InputError, match=r"none\.json: does not exist"):
        load("expert_facts").main(["--output_dir", str(tmp_path / "out"), "--directory", str(tmp_path / "none.json")])


def test_facts_are_generated_where_the_context_is_the_texts_own(
    gpt2_folder: Path,
    tmp_path: Path,
    run_stage: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    script, stage = load("expert_facts"), load("expert_facts").stage

    def stage_here(name: str, *flags: object) -> None:
        """Spares the import of torch: stage 1 alone is run as from a shell."""
        (stage if name == "preprocess_dataset.py" else run_stage)(name, *flags)

    monkeypatch.setattr(script, "stage", stage_here)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320,
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "model")
    entries: list[dict[str, object]] = []
    for name, fact in (("the cat", "417"), ("the dog", "98 🙂"), ("the fox", "over")):
        before, marked = f"the room of {name}", f" is {fact},"
        spans = [[len(before), len(before + marked)]]
        # Asked in the very words of the text, the context vector is the row's own.
        questions = {"same": before, "none": "東京は日本の首都です"}
        entries.append({"text": f"{before}{marked} or so", "spans": spans, "name": name, "fact": fact})
        entries[-1]["questions"] = questions
    (tmp_path / "facts.json").write_text(json.dumps(entries))
    flags = [
        "--directory",
        tmp_path / "facts.json",
        "--model_path",
        tmp_path / "model",
        "--output_dir",
        tmp_path / "out",
    ]
    script.main([str(flag) for flag in (*flags, "--n_held_out", 1, "--max_new_tokens", 12)])
    results = json.loads((tmp_path / "out/expert_facts.json").read_text())
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row in results["table"]:
        found[row["way"], row["asked_in"]] = (row["right"], row["n"])
    assert found["LM with expert chunks", "same"] == (2, 2)
    assert found["LM with expert chunks", "all"][1] == 4
    assert found["LM", "all"] == (0, 4)
    assert re.search(r"LM with expert chunks +same +2 of 2 +100\.0%", capfd.readouterr().out)
    answers = {(a["name"], a["asked_in"]): a["LM with expert chunks"] for a in results["answers"]}
    assert answers["the dog", "same"].startswith(" is 98 🙂,")
