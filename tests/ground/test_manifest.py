"""Manifests: what a stage wrote is noted and listed, and the next names what was changed, cut off, lost or mixed in."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults.crashes import Stage, build_stages
from utils import manifest as manifests
from utils.files import InputError
from utils.json_io import read_json, write_json
from utils.manifest import (
    Manifest,
    SummedFile,
    begin_stage,
    file_sum,
    finish_stage,
    list_files,
    list_path,
    read_finished,
    read_list,
    require_as_written,
    summed,
)

Refusal = Callable[..., str]


# ---- Manifests


def test_a_manifest_is_taken_up_by_the_same_arguments_only(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    begin_stage(path, "x.py", {"gamma": 0.5, "sizes": (1, 2)}, {"text": "abc"})
    assert not begin_stage(path, "x.py", {"gamma": 0.5, "sizes": (1, 2)}, {"text": "abc"}).complete
    with pytest.raises(InputError, match=r"made with --gamma 0\.5, this run has 0\.4"):
        begin_stage(path, "x.py", {"gamma": 0.4, "sizes": (1, 2)}, {"text": "abc"})
    with pytest.raises(InputError, match="made with the text 'abc', this run has 'abd'"):
        begin_stage(path, "x.py", {"gamma": 0.5, "sizes": (1, 2)}, {"text": "abd"})
    with pytest.raises(InputError, match=r"is no manifest of y\.py"):
        begin_stage(path, "y.py", {}, {})


def test_only_a_finished_stage_is_read_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(InputError, match=r"does not exist.*run x\.py first"):
        read_finished(path, "x.py")
    manifest = begin_stage(path, "x.py", {}, {})
    with pytest.raises(InputError, match=r"x\.py did not end"):
        read_finished(path, "x.py")
    finish_stage(path, manifest, {"n": 3})
    assert read_finished(path, "x.py").results == {"n": 3}


@pytest.mark.parametrize("content", ["[]", '"x"', "{}", '{"stage": "x.py", "arguments": 1, "inputs": {}}'])
def test_a_damaged_manifest_is_an_input_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"is no manifest of x\.py"):
        read_finished(path, "x.py")


# ---- Lists of files


@pytest.fixture
def listed(tmp_path: Path) -> tuple[Path, Manifest, list[Path]]:
    """The manifest of three files, one of them in a folder, and their list."""
    files = [tmp_path / name for name in ("b.json", "a.h5", "train/ä 1.npy")]
    files[2].parent.mkdir()
    for n, file in enumerate(files):
        file.write_bytes(b"123456789" * n)
    path = tmp_path / "train_manifest.json"
    return path, Manifest("stage.py", {}, {}, True, files=list_files(path, files)), files


def test_the_list_holds_crc_32_size_and_name_in_order(listed: tuple[Path, Manifest, list[Path]]) -> None:
    path, manifest, _ = listed
    assert list_path(path).name == "train_checksums.txt"
    # CRC-32's check value is that of the nine digits; the crc32 of the eighteen is zlib's and gzip's.
    assert list_path(path).read_text(encoding="utf-8").splitlines() == [
        "cbf43926 9 a.h5",
        "00000000 0 b.json",
        f"{int.from_bytes(gzip_crc(b'123456789' * 2), 'little'):08x} 18 train/ä 1.npy",
    ]
    assert (manifest.files["n_files"], manifest.files["n_bytes"]) == (3, 27)


def gzip_crc(data: bytes) -> bytes:
    """As another program computes it: the four bytes before the length at the end of a gzip file."""
    return subprocess.run(["gzip", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout[-8:-4]


@pytest.mark.parametrize("verify", [False, True])
def test_files_as_they_were_written_pass_also_where_they_were_moved(
    listed: tuple[Path, Manifest, list[Path]], tmp_path: Path, verify: bool
) -> None:
    path, manifest, files = listed
    moved = Path(shutil.move(files[1], tmp_path / "train" / "a.h5"))
    require_as_written(path, manifest, [files[0], moved, files[2], tmp_path / "unlisted"], verify=verify)


def test_a_file_that_is_gone_or_cut_off_is_named_by_its_size_alone(listed: tuple[Path, Manifest, list[Path]]) -> None:
    path, manifest, files = listed
    files[2].write_bytes(b"1")
    with pytest.raises(InputError, match=r"ä 1\.npy: has 1 bytes, stage\.py wrote 18; restore it, or delete it"):
        require_as_written(path, manifest, files, verify=False)
    files[2].unlink()
    with pytest.raises(InputError, match=r"ä 1\.npy: cannot be read \(No such file"):
        require_as_written(path, manifest, files, verify=False)


def test_other_content_of_the_same_size_is_named_where_all_is_read(listed: tuple[Path, Manifest, list[Path]]) -> None:
    path, manifest, files = listed
    files[1].write_bytes(b"123456780")
    require_as_written(path, manifest, files, verify=False)
    with pytest.raises(InputError, match=r"a\.h5: was changed or is another run's \(has the CRC-32"):
        require_as_written(path, manifest, files, verify=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cbf43926 9 a.h5\n", "is not the list that train_manifest.json speaks of"),
        (None, "cannot be read"),
    ],
)
def test_a_list_that_is_not_the_manifests_is_refused(
    listed: tuple[Path, Manifest, list[Path]], text: bytes | None, message: str
) -> None:
    path, manifest, files = listed
    if text is None:
        list_path(path).unlink()
    else:
        list_path(path).write_bytes(text)
    with pytest.raises(InputError, match=message):
        require_as_written(path, manifest, files, verify=False)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "", "a\0b"])
def test_a_list_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / "manifest.json", f"cbf43926 9 {name}\n".encode()
    list_path(path).write_bytes(text)
    manifest = Manifest("x.py", {}, {}, files={"list_sha256": hashlib.sha256(text).hexdigest()})
    with pytest.raises(InputError, match=r"checksums\.txt: cannot be read \(no list of checksums"):
        read_list(path, manifest)


def test_a_list_is_gone_on_with_and_reads_only_what_is_newer(
    listed: tuple[Path, Manifest, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest, files = listed
    os.utime(list_path(path), ns=(2**60, 2 * 10**18))
    read: list[Path] = []
    monkeypatch.setattr(manifests, "file_sum", lambda path: (read.append(path), file_sum(path))[1])
    assert list_files(path, files) == manifest.files
    assert not read
    files[0].write_bytes(b"new")
    os.utime(files[0], ns=(2**60, 3 * 10**18))
    assert list_files(path, files) != manifest.files
    assert read == [files[0]]


def test_what_a_run_wrote_itself_is_listed_without_reading_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "a.json", b"123456789" * 5
    with summed(path) as file:
        for piece in (data[:7], data[7:40], data[40:]):
            assert file.write(piece) == len(piece)
        assert not path.exists()
    assert path.read_bytes() == data
    read = list_files(tmp_path / "manifest.json", [path])
    list_path(tmp_path / "manifest.json").unlink()
    monkeypatch.setattr(manifests, "file_sum", None)
    sums = {path.name: file.sum, "of another run": file.sum}
    assert list_files(tmp_path / "manifest.json", [path], sums) == read


def test_an_unbuffered_file_is_written_whole_past_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"head....between....tail")
    with open(path, "r+b", buffering=0) as raw:
        file = SummedFile(raw)
        for at, data in ((4, np.arange(2, dtype=np.int16)), (15, memoryview(b"DATA"))):
            file.read_to(at)
            file.write(data)
        file.read_to(None)
    assert path.read_bytes() == b"head\0\0\1\0betweenDATAtail"
    assert file.sum == file_sum(path)


# ---- The stages


@pytest.fixture(scope="module")
def stages(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return {stage.name: stage for stage in build_stages(gpt2_folder, tmp_path_factory.mktemp("stages"))}


def change(path: Path, how: str) -> None:
    """Cut a file off, or change a digit or a bit so that it stays readable and as long."""
    data = path.read_bytes()
    if how == "cut off":
        path.write_bytes(data[:-1])
    elif path.suffix == ".json":
        at = max(data.rfind(b"%d" % digit) for digit in range(1, 9))
        path.write_bytes(data[:at] + b"%d" % (int(data[at : at + 1]) + 1) + data[at + 1 :])
    else:
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert path.read_bytes() != data


TRIES = "tries/token_trie_texts_DSds_Hgen/train_0.004"


@pytest.mark.parametrize("how", ["cut off", "changed"])
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("3 tries", "extracted/train/token_probs_2.json"),
        ("4 vectors", "extracted/train.h5"),
        ("4 vectors", "extracted/train_index_to_seqlen.json"),
        ("4 vectors", f"{TRIES}/tok_pos_*.json"),
        ("5 flatten, generate", f"{TRIES}/[0-9]*.json"),
        ("5 flatten, generate", f"{TRIES}/[0-9]*.h5"),
        ("5 generate, verify", f"{TRIES}/individual_flattened_tries/*.pkl"),
    ],
)
def test_what_was_changed_after_a_stage_is_named_by_the_next(
    stages: dict[str, Stage], tmp_path: Path, refusal: Refusal, name: str, pattern: str, how: str
) -> None:
    stage = stages[name]
    with stage.copy(tmp_path) as folder:
        path = sorted(folder.glob(pattern))[0]
        change(path, how)
        flags = [*stage.flags(folder), *(["--verify_checksums"] if how == "changed" else [])]
        said = refusal(stage.script, *flags)
        assert said.startswith(f"{path}: ")
        assert ("was changed or is another run's" if how == "changed" else "bytes") in said or how == "cut off"


def test_a_text_that_was_changed_after_stage_1_is_named_by_stage_2(
    stages: dict[str, Stage], tmp_path: Path, refusal: Refusal
) -> None:
    stage = stages["2 extract"]
    with stage.copy(tmp_path) as folder:
        path = folder / "data" / "train.json"
        path.write_bytes(path.read_bytes().replace(b"return", b"retorn", 1))
        assert f"{path}: was changed or is another run's" in refusal(stage.script, *stage.flags(folder))


def test_unchanged_files_pass_every_stage_with_verify_checksums(
    stages: dict[str, Stage], tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    for name in ("3 tries", "4 vectors", "5 flatten, generate"):
        with stages[name].copy(tmp_path) as folder:
            run_stage(stages[name].script, *stages[name].flags(folder), "--verify_checksums")


def test_a_pickle_that_is_gone_is_made_again_and_no_reprocessing_refuses(
    stages: dict[str, Stage], tmp_path: Path, run_stage: Callable[..., None], refusal: Refusal
) -> None:
    stage = stages["5 generate, verify"]
    with stage.copy(tmp_path) as folder:
        path = sorted(folder.glob(f"{TRIES}/individual_flattened_tries/*.pkl"))[1]
        before = path.read_bytes()
        path.unlink()
        assert str(path) in refusal(stage.script, *stage.flags(folder), "--no_reprocessing")
        run_stage(stage.script, *stage.flags(folder))
        assert path.read_bytes() == before


def test_no_reprocessing_refuses_pickles_of_another_datastore(
    stages: dict[str, Stage], tmp_path: Path, refusal: Refusal
) -> None:
    stage = stages["5 generate, verify"]
    with stage.copy(tmp_path) as folder:
        path = folder / TRIES / "hidden_states_manifest.json"
        manifest = read_json(path)
        manifest["files"]["list_sha256"] = "0" * 64  # as of vectors made anew by another run
        write_json(path, manifest)
        said = refusal(stage.script, *stage.flags(folder), "--no_reprocessing")
        assert "were made from another datastore" in said
