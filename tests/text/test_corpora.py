"""Stage 1: the six datasets, their splits, resuming, and what it refuses; hub datasets from local copies of the hub."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from utils.files import InputError
from utils.json_io import write_json_list
from utils.text.corpora import (
    CORPORA,
    Passage,
    Source,
    SplitRule,
    WithoutSplits,
    find_input_files,
    local_files,
    read_passages,
    write_splits,
)

STAGE = "preprocess_dataset.py"
RunStage = Callable[..., None]
Refusal = Callable[..., str]
SPLITS = ("train", "validation", "test")
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}

WIKITEXT_README = """---
configs:
- config_name: wikitext-103-v1
  data_files:
  - split: test
    path: wikitext-103-v1/test-*
  - split: train
    path: wikitext-103-v1/train-*
  - split: validation
    path: wikitext-103-v1/validation-*
---
"""
# As the hub has it: blank lines are empty strings, all others keep their line break.
WIKITEXT_TRAIN = [
    "",
    " = Valkyria Chronicles III = \n",
    "",
    " Senjō no Valkyria 3 : <unk> Chronicles \n",
    " Its second line \n",
    "",
    " = = Gameplay = = \n",
    "",
    " As with previous games . \n",
    "",
    " = = = Battle = = = \n",
    "",
    " = 5 is not a title \n",
    "",
    "",
    " = 2 + 2 = 5 = \n",
    "",
    " A song by Radiohead . \n",
    "",
]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as the hub's repositories are."""
    root = tmp_path_factory.mktemp("mirror")
    wikitext = root / "Salesforce" / "wikitext"
    (wikitext / "wikitext-103-v1").mkdir(parents=True)
    (wikitext / "README.md").write_text(WIKITEXT_README)
    # The second article goes on in the second file.
    parquet(wikitext / "wikitext-103-v1" / "train-00000-of-00002.parquet", text=WIKITEXT_TRAIN[:17])
    parquet(wikitext / "wikitext-103-v1" / "train-00001-of-00002.parquet", text=WIKITEXT_TRAIN[17:])
    for split in ("validation", "test"):
        lines = ["", f" = The {split} article = \n", "", f" Text of {split} . \n"]
        parquet(wikitext / "wikitext-103-v1" / f"{split}-00000-of-00001.parquet", text=lines)
    medical = root / "Mohammed-Altaf" / "medical-instruction-100k" / "data"
    medical.mkdir(parents=True)
    conversations = [f"[|Human|] question {i} [|AI|] answer" for i in range(5007)]
    parquet(medical / "train-00000-of-00001-abc.parquet", Conversation=conversations)
    parquet(medical / "test-00000-of-00001-def.parquet", Conversation=["[|Human|] test 0", "[|Human|] test 1"])
    law = root / "pile-of-law" / "pile-of-law" / "data"
    law.mkdir(parents=True)
    with lzma.open(law / "train.federal_register.jsonl.xz", "wt", encoding="utf-8") as file:
        for i in range(60):
            # The type of the last column changes, which schema inference would stop at.
            row = {"url": "x", "text": f"§ {i} Notice", "created_timestamp": "2020-01-01" if i < 30 else {"day": i}}
            file.write(json.dumps(row) + "\n")
    with lzma.open(law / "train.euctr.jsonl.xz", "wt") as file:
        file.write('{"text": "of another subset"}\n')
    code = root / "codeparrot" / "github-code" / "data"
    code.mkdir(parents=True)
    for shard in range(2):
        languages = ["Dockerfile" if i % 3 == 0 else "Python" for i in range(90)]
        texts = [f"FROM {shard}:{i}\n" if i % 3 == 0 else "import os\n" for i in range(90)]
        parquet(
            code / f"train-0000{shard}-of-00002.parquet",
            code=texts,
            repo_name=["a/b"] * 90,
            path=["p"] * 90,
            language=languages,
            license=["mit"] * 90,
            size=pa.array([1] * 90, pa.int32()),
        )
    return root


def parquet(path: Path, /, **columns: object) -> None:
    pq.write_table(pa.table(columns), path)


def texts(folder: Path, split: str) -> list[str]:
    return [entry["text"] for entry in json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")}


# ---- The hub's datasets


def test_a_wikitext_passage_is_a_whole_article(mirror: Path, tmp_path: Path, run_stage: RunStage) -> None:
    run_stage(STAGE, "--dataset", "wikitext-103-v1", "--hub_mirror", mirror, "--output_dir", tmp_path)
    assert texts(tmp_path, "train") == [
        " = Valkyria Chronicles III = \n \n Senjō no Valkyria 3 : <unk> Chronicles \n Its second line \n \n"
        " = = Gameplay = = \n \n As with previous games . \n \n = = = Battle = = = \n \n = 5 is not a title\n",
        " = 2 + 2 = 5 = \n \n A song by Radiohead .\n",
    ]
    assert texts(tmp_path, "validation") == [" = The validation article = \n \n Text of validation .\n"]
    assert texts(tmp_path, "test") == [" = The test article = \n \n Text of test .\n"]


def test_the_last_5000_medical_train_conversations_are_validation(
    mirror: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    run_stage(STAGE, "--dataset", "med_instruction", "--hub_mirror", mirror, "--output_dir", tmp_path)
    assert texts(tmp_path, "train") == [f"[|Human|] question {i} [|AI|] answer" for i in range(7)]
    assert texts(tmp_path, "validation") == [f"[|Human|] question {i} [|AI|] answer" for i in range(7, 5007)]
    assert texts(tmp_path, "test") == ["[|Human|] test 0", "[|Human|] test 1"]


def test_federal_register_reads_its_own_compressed_files_only(
    mirror: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    flags = ("--validation_fraction", 0.2, "--test_fraction", 0.3)
    run_stage(
        STAGE, "--dataset", "pile-of-law-federal_register", "--hub_mirror", mirror, "--output_dir", tmp_path, *flags
    )
    found = [text for split in SPLITS for text in texts(tmp_path, split)]
    assert sorted(found) == sorted(f"§ {i} Notice" for i in range(60))
    assert all(texts(tmp_path, split) for split in SPLITS)


def test_dockerfiles_are_the_rows_of_that_language(mirror: Path, tmp_path: Path, run_stage: RunStage) -> None:
    run_stage(STAGE, "--dataset", "Dockerfile", "--hub_mirror", mirror, "--output_dir", tmp_path)
    found = [text for split in SPLITS for text in texts(tmp_path, split)]
    assert sorted(found) == sorted(f"FROM {shard}:{i}\n" for shard in range(2) for i in range(0, 90, 3))


def test_a_hub_that_cannot_be_reached_is_named_with_the_dataset(tmp_path: Path, refusal: Refusal) -> None:
    for dataset, repository in {
        "wikitext-103-v1": "Salesforce/wikitext",
        "med_instruction": "Mohammed-Altaf/medical-instruction-100k",
        "pile-of-law-federal_register": "pile-of-law/pile-of-law",
        "Dockerfile": "codeparrot/github-code",
    }.items():
        message = refusal(STAGE, "--dataset", dataset, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "c")
        assert message.startswith(f"{dataset}: {repository} cannot be read")
        assert "--hub_mirror" in message


def test_a_run_that_made_nothing_does_not_stand_in_the_way_of_the_next(
    tmp_path: Path, refusal: Refusal, run_stage: RunStage
) -> None:
    refusal(STAGE, "--dataset", "Dockerfile", "--output_dir", tmp_path, "--cache_dir", tmp_path / "c")
    run_stage(STAGE, "--dataset", "python-docs", "--output_dir", tmp_path, "--max_passages", 1)
    assert len(texts(tmp_path, "train")) == 1


def test_a_damaged_or_partial_mirror_is_an_input_error(tmp_path: Path, refusal: Refusal) -> None:
    flags = ("--hub_mirror", tmp_path, "--output_dir", tmp_path / "out")
    assert "Salesforce/wikitext" in refusal(STAGE, "--dataset", "wikitext-103-v1", *flags)
    law, code = tmp_path / "pile-of-law/pile-of-law/data", tmp_path / "codeparrot/github-code/data"
    law.mkdir(parents=True)
    assert "holds no passage" in refusal(STAGE, "--dataset", "pile-of-law-federal_register", *flags)
    whole = lzma.compress(b'{"text": "a"}\n' * 1000)
    (law / "train.federal_register.jsonl.xz").write_bytes(whole[:-30])
    assert "cannot be read" in refusal(STAGE, "--dataset", "pile-of-law-federal_register", *flags)
    (law / "train.federal_register.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n{"text"\n'))
    assert "line 2 is not valid JSON" in refusal(STAGE, "--dataset", "pile-of-law-federal_register", *flags)
    code.mkdir(parents=True)
    parquet(code / "train-0.parquet", content=["FROM a"], language=["Dockerfile"])
    assert "code" in refusal(STAGE, "--dataset", "Dockerfile", *flags)


# ---- The cache of the hub's datasets


def test_a_cache_that_cannot_be_written_is_named_with_the_flag_for_another(
    mirror: Path, tmp_path: Path, refusal: Refusal, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/none"))
    flags = ("--dataset", "Dockerfile", "--hub_mirror", mirror, "--output_dir", tmp_path / "out")
    message = "the cache of Hugging Face datasets is not writable; choose one with --cache_dir"
    assert refusal(STAGE, *flags) == f"/proc/none: {message}"
    assert refusal(STAGE, *flags, "--cache_dir", "/proc/other") == f"/proc/other: {message}"
    run_stage(STAGE, *flags, "--cache_dir", tmp_path / "cache")
    assert texts(tmp_path / "out", "train")


def test_the_users_own_files_need_no_cache(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=["a", "b"])
    flags = ("--dataset", "local", "--input_files", tmp_path / "a.parquet", "--output_dir", tmp_path / "out")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    variables["HOME"] = "/proc/none"  # where nothing can be written
    command = [sys.executable, STAGE, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(len(texts(tmp_path / "out", split)) for split in SPLITS) == 2


# ---- Local files


def test_every_kind_of_local_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "b.txt").write_bytes("\ufeffone é\r\ntwo".encode())
    (tmp_path / "in" / "a.txt").write_text("  first  \n")
    (tmp_path / "in" / "notes.md").write_text("not read")
    (tmp_path / "in" / ".hidden.txt").write_text("not read")
    (tmp_path / "x.jsonl").write_text('{"text": "l1", "spans": [[0, 2]]}\n\n{"text": "l2", "spans": null}\n')
    (tmp_path / "x.json").write_text('[{"text": "j1", "spans": []}, {"n": [1], "text": "2020-01-01"}]')
    parquet(tmp_path / "p[1]*.parquet", n=[1, 2], text=["p1", "p2"], spans=[[[0, 1], [1, 2]], None])
    files = find_input_files([tmp_path / "in", tmp_path / "x.jsonl", tmp_path / "x.json", tmp_path / "p[1]*.parquet"])
    assert passages_of(files) == [
        Passage("  first  \n"),
        Passage("one é\ntwo"),
        Passage("l1", [(0, 2)]),
        Passage("l2"),
        Passage("j1", []),
        Passage("2020-01-01"),
        Passage("p1", [(0, 1), (1, 2)]),
        Passage("p2"),
    ]


def passages_of(files: list[Path]) -> list[Passage]:
    return list(local_files(Source("local", tuple(files))))


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \n\t" * 1000])
def test_json_lines_are_read_under_the_name_of_json_too(before: bytes, tmp_path: Path) -> None:
    """Many tools call them so; what begins with a bracket is a list."""
    path = tmp_path / "x.json"
    path.write_bytes(before + b'{"text": "a"}\n\n{"text": "b", "spans": [[0, 1]]}\n')
    assert passages_of([path]) == [Passage("a"), Passage("b", [(0, 1)])]
    path.write_bytes(before + b'[{"text": "a"}]')
    assert passages_of([path]) == [Passage("a")]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_as_what_they_hold(suffix: str, tmp_path: Path) -> None:
    contents = {"a.txt": "a\n", "b.jsonl": '{"text": "b"}\n{"text": "c"}', "d.json": '[{"text": "d"}]', "e.md": "e"}
    for name, content in contents.items():
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESSORS[suffix](content.encode()))
    files = find_input_files([tmp_path])
    assert [path.name for path in files] == [f"{name}{suffix}" for name in ("a.txt", "b.jsonl", "d.json")]
    assert passages_of(files) == [Passage("a\n"), Passage("b"), Passage("c"), Passage("d")]


def test_linked_folders_are_read_once_and_loops_have_an_end(tmp_path: Path) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    for path in (folder / "deep/a.txt", other / "b.txt", other / "c.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.stem)
    (folder / "linked").symlink_to(other)
    (folder / "linked again").symlink_to("linked")
    (folder / "deep/up").symlink_to("..")
    (other / "back").symlink_to(folder)
    (folder / "d.txt").symlink_to(other / "c.txt")
    found = find_input_files([folder])
    assert found == [folder / name for name in ("d.txt", "deep/a.txt", "linked/b.txt", "linked/c.txt")]
    (tmp_path / "to it").symlink_to(folder)
    assert [path.read_text() for path in find_input_files([tmp_path / "to it"])] == ["c", "a", "b", "c"]


@pytest.mark.parametrize("target", ["nowhere", "gone.txt"])
def test_a_link_that_leads_nowhere_is_named(target: str, tmp_path: Path) -> None:
    """It may have led to a folder of texts, whatever it is called."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep").mkdir()
    for link in (tmp_path / "deep/link", tmp_path / "link.txt"):
        link.symlink_to(target)
        with pytest.raises(InputError) as refused:
            find_input_files([tmp_path])
        message = f"{link}: is a link to {target}, which does not exist; correct or remove it"
        assert str(refused.value) == message
        link.unlink()
    (tmp_path / ".#a.txt").symlink_to("user@host:1")  # as an editor leaves it
    assert find_input_files([tmp_path]) == [tmp_path / "a.txt"]


def test_a_file_that_two_paths_stand_for_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert find_input_files([tmp_path, tmp_path / "a.txt", tmp_path]) == [tmp_path / "a.txt"]


def test_spans_pass_through_into_the_entries(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "marked", "spans": [[0, 3], [4, 6]]}\n{"body": "plain"}\n')
    run_stage(
        STAGE, "--dataset", "local", "--input_files", tmp_path / "x.jsonl", "--text_column", "body",
        "--validation_fraction", 0, "--test_fraction", 0, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    expected = '[\n{"text": "marked", "spans": [[0, 3], [4, 6]]},\n{"text": "plain"}\n]\n'
    assert (tmp_path / "out" / "train.json").read_text() == expected
    assert list(read_passages(tmp_path / "out" / "train.json")) == [
        Passage("marked", [(0, 3), (4, 6)]),
        Passage("plain"),
    ]
    assert (tmp_path / "out" / "validation.json").read_text() == "[\n]\n"
    assert list(read_passages(tmp_path / "out" / "test.json")) == []


def test_the_split_of_local_passages_is_seeded_and_keeps_copies_together(tmp_path: Path, run_stage: RunStage) -> None:
    passages = [f"passage {i % 800}" for i in range(1600)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    flags = ("--dataset", "local", "--input_files", tmp_path / "x.jsonl", "--validation_fraction", 0.1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_stage(STAGE, *flags, "--test_fraction", 0.25, "--seed", seed, "--output_dir", tmp_path / name)
    a, b, c = ({split: texts(tmp_path / name, split) for split in SPLITS} for name in "abc")
    assert a == b != c
    assert sorted(a["train"] + a["validation"] + a["test"]) == sorted(passages)
    assert not set(a["train"]) & set(a["test"])
    assert not set(a["train"]) & set(a["validation"])
    # Standard deviations of a binomial share of 800 texts: 0.0106 and 0.0153; four of them are allowed.
    assert len(a["validation"]) / 1600 == pytest.approx(0.1, abs=0.043)
    assert len(a["test"]) / 1600 == pytest.approx(0.25, abs=0.062)


def test_a_split_rule_is_the_hash_of_seed_and_text() -> None:
    rule = SplitRule(validation_fraction=0.3, test_fraction=0.2, seed=7)
    for text in map(str, range(200)):
        point = int(hashlib.sha256(f"7\n{text}".encode()).hexdigest()[:16], 16) / 2**64
        assert rule.split_of(text) == ("test" if point < 0.2 else "validation" if point < 0.5 else "train")


def test_passages_without_a_visible_character_are_left_out(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"text": text} for text in ("", " \n\t", "a", "\u3000")]))
    flags = ("--validation_fraction", 0, "--test_fraction", 0, "--output_dir", tmp_path / "out")
    run_stage(STAGE, "--dataset", "local", "--input_files", tmp_path / "x.json", *flags)
    assert texts(tmp_path / "out", "train") == ["a"]


# ---- Streaming, bounds and results


def test_max_passages_takes_the_first_of_each_split(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(400)))
    flags = ("--dataset", "local", "--input_files", tmp_path / "x.jsonl", "--output_dir")
    run_stage(STAGE, *flags, tmp_path / "all")
    run_stage(STAGE, *flags, tmp_path / "some", "--max_passages", 3)
    for split in SPLITS:
        assert texts(tmp_path / "some", split) == texts(tmp_path / "all", split)[:3]


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_no_more_is_read_than_max_passages_needs(tmp_path: Path, fraction: float) -> None:
    # The damage far behind would be an error if it were reached.
    good = "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(2000))
    (tmp_path / "x.jsonl").write_text(good + '{"text": \n')
    source = Source("local", (tmp_path / "x.jsonl",))
    sizes = write_splits(source, SplitRule(fraction, 0.0, 0), tmp_path, max_passages=5)
    assert (sizes["train"].n_passages, sizes["test"].n_passages) == (5, 0)
    assert sizes["validation"].n_passages == (5 if fraction else 0)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def peak(n_passages: int) -> int:
        folder = tmp_path / str(n_passages)
        folder.mkdir()
        with open(folder / "x.jsonl", "w") as file:
            for i in range(n_passages):
                file.write(json.dumps({"text": f"{i} " * 4000}) + "\n")
        write_json_list(folder / "y.json", ({"text": f"y{i} " * 4000} for i in range(n_passages)))
        source = Source("local", (folder / "x.jsonl", folder / "y.json"))
        tracemalloc.start()
        write_splits(source, SplitRule(0.1, 0.1, 0), folder, None)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(300), peak(1500)
    assert large < small + 1_000_000  # it holds 45 MB more of text


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table({"text": [os.urandom(2000).hex() for _ in range(1000)]})
    for name, n_row_groups in (("small", 2), ("large", 40)):
        with pq.ParquetWriter(tmp_path / f"{name}.parquet", table.schema) as writer:
            for _ in range(n_row_groups):
                writer.write_table(table)
    script = f"""
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from utils.text.corpora import Source, local_files
for name in ("small", "large"):
    n_passages = sum(1 for _ in local_files(Source("local", (Path({str(tmp_path)!r}) / (name + ".parquet"),))))
    print(n_passages, getrusage(RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    (n_small, small_kb), (n_large, large_kb) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (n_small, n_large) == (2000, 40_000)
    assert large_kb - small_kb < 50_000  # it holds 152 MB more of text


def test_the_results_are_passages_and_characters_per_split(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("äbc")
    flags = ("--validation_fraction", 0, "--test_fraction", 0, "--output_dir", tmp_path)
    run_stage(STAGE, "--dataset", "local", "--input_files", tmp_path / "a.txt", *flags)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{tmp_path}/train.json: 1 passages, 3 characters",
        f"{tmp_path}/validation.json: 0 passages, 0 characters",
        f"{tmp_path}/test.json: 0 passages, 0 characters",
    ]
    assert re.search(r"local: 100%.* 1/1 .*passages", err.splitlines()[-1])
    assert json.loads((tmp_path / "manifest.json").read_text())["results"]["train"] == {
        "n_passages": 1,
        "n_characters": 3,
    }


def test_a_new_dataset_is_one_function_and_one_line(
    tmp_path: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = WithoutSplits(lambda source: (Passage(f"number {i}") for i in range(40)))
    monkeypatch.setitem(CORPORA, "numbers", numbers)
    run_stage(STAGE, "--dataset", "numbers", "--output_dir", tmp_path)
    assert sum(len(texts(tmp_path, split)) for split in SPLITS) == 40


# ---- Run again


def test_a_killed_run_goes_on_to_the_same_bytes_and_keeps_what_was_whole(tmp_path: Path, run_stage: RunStage) -> None:
    flags = ["--dataset", "python-docs", "--max_passages", "20", "--output_dir"]
    run_stage(STAGE, *flags, tmp_path / "undisturbed")
    cut = tmp_path / "cut"
    cut.mkdir()
    # A pipe that nobody reads holds the run at its second split file.
    os.mkfifo(cut / ".validation.json.tmp")
    process = subprocess.Popen([sys.executable, STAGE, *flags, str(cut)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (cut / "train.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "validation.json").exists()
    (cut / ".validation.json.tmp").unlink()
    (cut / ".validation.json.tmp").write_text('[\n{"text": "half wri')
    train = (cut / "train.json").stat()
    run_stage(STAGE, *flags, cut)
    assert (cut / "train.json").stat().st_ino == train.st_ino
    assert (cut / "train.json").stat().st_mtime_ns == train.st_mtime_ns
    assert all_bytes(cut) == all_bytes(tmp_path / "undisturbed")


def test_splits_that_are_missing_are_dealt_out_anew_to_the_same_bytes(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(300)))
    flags = ("--dataset", "local", "--input_files", tmp_path / "x.jsonl", "--output_dir", tmp_path / "out")
    run_stage(STAGE, *flags)
    before = all_bytes(tmp_path / "out")
    for gone in (["test"], ["train", "validation"], list(SPLITS)):
        for split in gone:
            (tmp_path / "out" / f"{split}.json").unlink()
        run_stage(STAGE, *flags)
        assert all_bytes(tmp_path / "out") == before


def test_a_finished_run_says_so_and_other_arguments_are_refused(
    tmp_path: Path, run_stage: RunStage, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    flags = ("--dataset", "local", "--input_files", tmp_path / "a.txt", "--output_dir", tmp_path / "out")
    run_stage(STAGE, *flags)
    before = all_bytes(tmp_path / "out")
    run_stage(STAGE, *flags)
    assert "nothing to do" in capsys.readouterr().out
    assert "--seed 0, this run has 1" in refusal(STAGE, *flags, "--seed", 1)
    assert "--max_passages None, this run has 2" in refusal(STAGE, *flags, "--max_passages", 2)
    assert "differ in --dataset," in refusal(STAGE, "--dataset", "python-docs", "--output_dir", tmp_path / "out")
    (tmp_path / "a.txt").write_text("same size")
    assert "the input files" in refusal(STAGE, *flags)
    assert all_bytes(tmp_path / "out") == before


def test_split_files_of_unknown_origin_are_neither_used_nor_lost(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "train.json").write_text("[]")
    message = refusal(STAGE, "--dataset", "python-docs", "--output_dir", tmp_path)
    assert "no manifest.json says what made it" in message
    assert (tmp_path / "train.json").read_text() == "[]"


def test_a_second_run_at_once_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    from utils.files import exclusive_lock

    with exclusive_lock(tmp_path, STAGE):
        assert "another run is writing" in refusal(STAGE, "--dataset", "python-docs", "--output_dir", tmp_path)


def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path: Path, refusal: Refusal, run_stage: RunStage) -> None:
    flags = ("--dataset", "python-docs", "--max_passages", 5, "--output_dir", tmp_path)
    (tmp_path / ".validation.json.tmp").symlink_to("/dev/full")
    message = refusal(STAGE, *flags)
    assert message.startswith(f"{tmp_path / 'validation.json'}: cannot be written (No space left on device)")
    whole = (tmp_path / "train.json").read_bytes()
    run_stage(STAGE, *flags)
    assert (tmp_path / "train.json").read_bytes() == whole
    assert texts(tmp_path, "validation")


# ---- read_passages


def test_a_missing_split_is_an_error_that_names_those_there(tmp_path: Path) -> None:
    write_json_list(tmp_path / "train.json", [{"text": "a"}])
    write_json_list(tmp_path / "test.json", [{"text": "a"}])
    with pytest.raises(InputError, match=r"validation\.json: does not exist.*train\.json, test\.json"):
        read_passages(tmp_path / "validation.json")
    with pytest.raises(InputError, match="does not exist"):
        read_passages(tmp_path / "nowhere" / "train.json")
    with pytest.raises(InputError, match="is not a file"):
        read_passages(tmp_path)


def test_passages_are_streamed(tmp_path: Path) -> None:
    good = ",\n".join(json.dumps({"text": "a" * 1000}) for _ in range(3000))
    (tmp_path / "train.json").write_text(f"[{good}")
    assert len(list(islice(read_passages(tmp_path / "train.json"), 10))) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"', "damaged after entry 1"),
        (b'[{"text": "\xe9"}]', "is not UTF-8"),
        (b'{"text": "a"}', "expected a JSON list"),
        (b"", "is empty"),
        (b'[{"text": "a"}, "b"]', 'entry 2: is "b"; expected an object'),
        (b'[{"text": "a"}, {"body": "b", "id": 1}]', "entry 2: has no 'text', only 'body', 'id'"),
        (b"[{}]", "entry 1: has no 'text', only nothing"),
        (b'[{"text": 5}]', "entry 1: its 'text' is 5; expected a string"),
        (b'[{"text": null}]', "entry 1: its 'text' is null"),
        (b'[{"text": "a"}, {"text": "b\\ud83d"}]', r"entry 2: its 'text' holds half of a surrogate pair \(U\+D83D at "),
        (b'[{"text": "abc", "spans": 5}]', "entry 1: its 'spans' are 5; expected a list"),
        (b'[{"text": "abc", "spans": [[0]]}]', r"entry 1: among its 'spans' is \[0\]"),
        (b'[{"text": "abc", "spans": [[0, 4]]}]', r"is \[0, 4\]; expected .* <= 3"),
        (b'[{"text": "abc", "spans": [[2, 2]]}]', r"is \[2, 2\]"),
        (b'[{"text": "abc", "spans": [[-1, 2]]}]', r"is \[-1, 2\]"),
        (b'[{"text": "abc", "spans": [[0, 1.0]]}]', r"is \[0, 1.0\]"),
        (b'[{"text": "abc", "spans": [[false, true]]}]', r"is \[false, true\]"),
        (b'[{"text": "abc", "spans": {"0": 1}}]', "expected a list"),
    ],
)
def test_a_split_file_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_passages(tmp_path / "train.json"))
    assert str(caught.value).startswith(str(tmp_path / "train.json"))


# ---- Bad input to stage 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"te', "a.json: the JSON list is cut off"),
        ("a.json", b'[{"text": "\xff"}]', "a.json: is not UTF-8"),
        ("a.json", b'"text"', "a.json: holds something else than a list"),
        ("a.json", b'{"body": "a"}', "a.json: line 1: has no 'text', only 'body'"),
        ("a.json", b'{\n"text": "a"}', "a.json: line 1 is not valid JSON"),
        ("a.json", b"[]", "local: holds no passage with text"),
        ("a.json", b'[{"body": "a"}]', "a.json: entry 1: has no 'text', only 'body'"),
        ("a.json", b'[{"text": ["a"]}]', "entry 1: its 'text' is [\"a\"]; expected a string"),
        ("a.json", b'[{"text": "\\udc00"}]', "half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', "a.jsonl: line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "a.jsonl: line 2: is [1]; expected an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}', "a.jsonl: line 2: its 'text' is 5"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl: is not UTF-8 (byte 10)"),
        ("a.jsonl", b'{"text": "a", "spans": [[0, 9]]}', "a.jsonl: line 1: among its 'spans' is [0, 9]"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1 is not valid JSON"),
        ("a.txt", b"caf\xe9", "a.txt: is not UTF-8 (byte 3)"),
        ("a.txt", b"", "local: holds no passage with text"),
        ("a.parquet", b"PAR1 cut off", "a.parquet: cannot be read"),
        ("a.csv", b"text\na", "a.csv: ends in '.csv'; expected .txt, .jsonl, .json, .parquet, or one of these and .gz"),
        ("a.gz", b"", "a.gz: ends in '.gz'; expected .txt"),
        ("a.parquet.gz", b"", "a.parquet.gz: ends in '.gz'; expected .txt"),
        ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz: cannot be read (Not a gzipped file"),
    ],
)
def test_input_files_that_cannot_be_used_are_refused(
    tmp_path: Path, refusal: Refusal, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    assert message in refusal(STAGE, "--dataset", "local", "--input_files", tmp_path / name, "--output_dir", out)
    assert not out.exists() or not list(out.glob("*t*.json.tmp")) + list(out.glob("t*.json"))


def test_a_parquet_file_is_refused_by_column_and_by_row(tmp_path: Path, refusal: Refusal) -> None:
    flags = ("--dataset", "local", "--output_dir", tmp_path / "out", "--input_files")
    parquet(tmp_path / "a.parquet", body=["a"], n=[1])
    message = refusal(STAGE, *flags, tmp_path / "a.parquet")
    assert message.startswith(f"{tmp_path / 'a.parquet'}: has no 'text', only 'body', 'n'; ")
    parquet(tmp_path / "b.parquet", text=["a", None])
    assert "row 2: its 'text' is null; expected a string" in refusal(STAGE, *flags, tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    assert "c.parquet: cannot be read" in refusal(STAGE, *flags, tmp_path / "c.parquet")


BAD_FLAGS = [
    (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    (["--dataset", "local"], "needs --input_files"),
    (["--dataset", "local", "--input_files", "{tmp}/nothing.txt"], "nothing.txt: does not exist"),
    (["--dataset", "local", "--input_files", "{tmp}/empty"], "empty: holds no file that ends in .txt"),
    (["--dataset", "local", "--input_files", "{tmp}/file.txt", "--test_fraction", "1"], "expected a number in [0, 1)"),
    (["--dataset", "local", "--input_files", "{tmp}/file.txt", "--seed", "x"], "invalid int value: 'x'"),
    (
        [
            "--dataset",
            "local",
            "--input_files",
            "{tmp}/file.txt",
            "--test_fraction",
            "0.5",
            "--validation_fraction",
            "0.5",
        ],
        "add up to 1 or more",
    ),
    (["--dataset", "local", "--input_files", "{tmp}/file.txt", "--hub_mirror", "{tmp}"], "for datasets of the hub"),
    (["--dataset", "python-docs", "--input_files", "{tmp}/file.txt"], "is for --dataset local"),
    (["--dataset", "python-docs", "--text_column", "body"], "is for --dataset local"),
    (["--dataset", "python-docs", "--seed", "1"], "python-docs has its own"),
    (["--dataset", "python-docs", "--max_passages", "0"], "expected a whole number of at least 1"),
    (["--dataset", "Dockerfile", "--hub_mirror", "{tmp}/nowhere"], "nowhere: does not exist"),
    (["--dataset", "Dockerfile", "--hub_mirror", "{tmp}/file.txt"], "file.txt: is not a folder"),
    (["--dataset", "python-docs", "--output_dir", "{tmp}/file.txt"], "file.txt: cannot be made a folder"),
    (["--dataset", "python-docs", "--output_dir", "/proc/nowhere"], "/proc/nowhere: cannot be made a folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_flags_that_cannot_be_used_are_refused(
    tmp_path: Path, refusal: Refusal, flags: list[str], message: str
) -> None:
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    given = [flag.format(tmp=tmp_path) for flag in flags]
    if "--output_dir" not in given:
        given += ["--output_dir", str(tmp_path / "out")]
    assert message in refusal(STAGE, *given)
    assert (tmp_path / "file.txt").read_text() == "text"


def test_help_and_wrong_flags_answer_without_loading_anything_heavy(tmp_path: Path) -> None:
    script = (
        f"import sys, preprocess_dataset as p\ntry: p.main(['--dataset', 'local', '--output_dir', {str(tmp_path)!r}])\n"
    )
    script += (
        "except SystemExit as stop: print(stop.code, [m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 []\n"
