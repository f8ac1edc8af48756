"""Hidden states on disk: what is read is what was written, each file is whole or not there, and damage is named."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from utils.extraction import hidden_states
from utils.extraction.hidden_states import (
    HiddenStateShape,
    PartialH5,
    hidden_states_path,
    map_all_hidden_states,
    read_hidden_states,
    read_index_map,
    windows_with_hidden_states,
    write_dat,
    write_hidden_states,
    write_index_maps,
)
from utils.files import InputError
from utils.json_io import write_json

LENGTHS = np.array([3, 1, 5, 2])
FIRSTS = np.array([0, 3, 4, 9])
HIDDEN_SIZE = 6


def write_windows(output_dir: Path, dtype: str = "float32") -> tuple[Path, HiddenStateShape, list[np.ndarray]]:
    """A folder `train` with the .npy of each window."""
    folder = output_dir / "train"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((length, HIDDEN_SIZE)).astype(dtype) for length in LENGTHS]
    for window, array in enumerate(arrays):
        write_hidden_states(folder, window, array)
    return folder, HiddenStateShape(len(LENGTHS), int(LENGTHS.sum()), HIDDEN_SIZE, np.dtype(dtype)), arrays


def make_h5(folder: Path, shape: HiddenStateShape) -> Path:
    """The .h5 of a folder's windows, beside it."""
    part = folder.with_name("train.h5.part")
    PartialH5.begin(part, shape)
    with PartialH5(part, shape) as h5:
        h5.copy_rows(np.flatnonzero(~h5.has_rows()).tolist(), folder, LENGTHS)
        h5.finish()
    assert not part.exists()
    return folder.with_name("train.h5")


def rows_left(part: Path, shape: HiddenStateShape, lengths: np.ndarray = LENGTHS) -> list[bool]:
    with PartialH5(part, shape) as h5:
        return h5.rows_left(lengths).tolist()


# ---- All windows in one file


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("copy_bytes", [24, 1 << 24])
def test_all_rows_stand_in_the_windows_order(
    dtype: str, copy_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "COPY_BYTES", copy_bytes)
    folder, shape, arrays = write_windows(tmp_path, dtype)
    h5, dat = make_h5(folder, shape), tmp_path / "train.dat"
    write_dat(h5, dat)
    rows = np.concatenate(arrays)
    np.testing.assert_array_equal(map_all_hidden_states(h5), rows)
    np.testing.assert_array_equal(np.fromfile(dat, dtype=dtype).reshape(11, HIDDEN_SIZE), rows)
    with h5py.File(h5) as file:  # as any other program reads it
        assert list(file) == ["all_hidden_states"]
        assert file["all_hidden_states"].chunks is None
        assert file["all_hidden_states"].dtype == dtype
        np.testing.assert_array_equal(file["all_hidden_states"][:], rows)


def test_index_maps_are_lengths_and_first_rows(tmp_path: Path) -> None:
    seqlen, acc_index = tmp_path / "seqlen.json", tmp_path / "acc_index.json"
    write_index_maps(seqlen, acc_index, LENGTHS)
    assert seqlen.read_text() == '{"0": 3, "1": 1, "2": 5, "3": 2}\n'
    assert acc_index.read_text() == '{"0": 0, "1": 3, "2": 4, "3": 9}\n'
    assert read_index_map(seqlen).tolist() == LENGTHS.tolist()
    assert read_index_map(acc_index).tolist() == FIRSTS.tolist()


def test_rows_written_in_any_order_give_the_same_h5_as_npy_files(tmp_path: Path) -> None:
    folder, shape, arrays = write_windows(tmp_path / "npy")
    whole = make_h5(folder, shape).read_bytes()
    direct = tmp_path / "direct" / "train"
    direct.mkdir(parents=True)
    part = tmp_path / "direct" / "train.h5.part"
    PartialH5.begin(part, shape)
    with PartialH5(part, shape) as one, PartialH5(part, shape) as other:
        for h5, window in ((one, 2), (other, 0), (other, 3)):
            h5.write(window, FIRSTS[window], arrays[window])
    assert rows_left(part, shape) == [False, True, False, False]
    PartialH5.begin(part, shape)  # as a run that goes on does
    assert rows_left(part, shape) == [False, True, False, False]
    write_hidden_states(direct, 1, arrays[1])  # read from there
    assert make_h5(direct, shape).read_bytes() == whole


def test_a_run_cut_off_before_the_h5_is_renamed_goes_on(tmp_path: Path) -> None:
    folder, shape, _ = write_windows(tmp_path)
    h5, part = make_h5(folder, shape), tmp_path / "train.h5.part"
    whole = h5.read_bytes()
    h5.rename(part)
    for window in range(len(LENGTHS)):
        hidden_states_path(folder, window).unlink()
    assert rows_left(part, shape) == [False] * 4
    assert make_h5(folder, shape).read_bytes() == whole


def test_rows_that_a_power_cut_lost_are_found(tmp_path: Path) -> None:
    """As after a crash of the machine: the marks are on the disk, a page of the rows is not."""
    lengths = np.array([700, 400, 900])
    shape, part = HiddenStateShape(3, 2000, HIDDEN_SIZE, np.dtype("float32")), tmp_path / "train.h5.part"
    PartialH5.begin(part, shape)
    with PartialH5(part, shape) as h5:
        for window, first in enumerate((0, 700, 1100)):
            h5.write(window, first, np.full((lengths[window], HIDDEN_SIZE), 0.5, dtype=np.float32))
    assert rows_left(part, shape, lengths) == [False] * 3
    with open(part, "r+b") as file:
        file.seek(8 * 4096)
        file.write(bytes(4096))
    assert rows_left(part, shape, lengths) == [False, False, True]


@pytest.mark.parametrize("damage", ["cut", "no HDF5", "other shape", "other dtype", "other windows"])
def test_a_part_of_something_else_is_refused_and_begun_anew(damage: str, tmp_path: Path) -> None:
    folder, shape, arrays = write_windows(tmp_path)
    part = tmp_path / "train.h5.part"
    others = {
        "other shape": HiddenStateShape(4, 12, HIDDEN_SIZE, shape.dtype),
        "other dtype": HiddenStateShape(4, 11, HIDDEN_SIZE, np.dtype("float16")),
        "other windows": HiddenStateShape(5, 11, HIDDEN_SIZE, shape.dtype),
    }
    PartialH5.begin(part, others.get(damage, shape))
    if damage not in others:
        content = part.read_bytes()
        part.write_bytes(content[:-40] if damage == "cut" else b"x" * len(content))
    with pytest.raises(InputError, match=rf"^{part}: .*run stage 2 again"):
        PartialH5(part, shape)
    PartialH5.begin(part, shape)
    assert rows_left(part, shape) == [True] * 4
    np.testing.assert_array_equal(map_all_hidden_states(make_h5(folder, shape)), np.concatenate(arrays))


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.h5: takes 4,000,000\.0 GB, but .* GB are free on its disk"):
        PartialH5.begin(tmp_path / "train.h5.part", HiddenStateShape(10, 10**6, 10**9, np.dtype("float32")))
    assert not list(tmp_path.iterdir())


# ---- One file per window


def test_windows_with_a_file_are_told_by_its_name(tmp_path: Path) -> None:
    for name in ("hidden_states_10.npy", "hidden_states_2.npy", "hidden_states_0.npy"):
        (tmp_path / name).write_text("")
    for name in ("hidden_states_07.npy", ".hidden_states_3.npy.tmp", "hidden_states_x.npy", "token_probs_4.json"):
        (tmp_path / name).write_text("")
    assert windows_with_hidden_states(tmp_path) == [0, 2, 10]


def damaged_npy(array: np.ndarray, damage: str, path: Path) -> None:
    if damage in ("cut", "header cut", "empty"):
        content = path.read_bytes()
        path.write_bytes(content[: {"cut": -4, "header cut": 20, "empty": 0}[damage]])
    elif damage == "missing":
        path.unlink()
    elif damage == "pickled":
        np.save(path, np.array([{}, None], dtype=object), allow_pickle=True)
    else:
        other = {
            "NaN": np.where(np.arange(HIDDEN_SIZE) == 2, np.nan, array).astype(array.dtype),
            "infinite": array * np.float32(np.inf),
            "other length": array[1:],
            "other hidden size": array[:, 1:],
            "other dtype": array.astype("float64"),
            "integers": array.astype(int),
            "one row": array[0],
        }
        np.save(path, other[damage])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "is cut off or not a .npy file"),
        ("header cut", "is cut off or not a .npy file"),
        ("empty", "is cut off or not a .npy file"),
        ("missing", "does not exist"),
        ("pickled", "is cut off or not a .npy file"),
        ("NaN", "holds NaN or infinity"),
        ("infinite", "holds NaN or infinity"),
        ("other length", r"is float32 \(4, 6\), expected float32 \(5, 6\)"),
        ("other hidden size", r"is float32 \(5, 5\), expected float32 \(5, 6\)"),
        ("other dtype", r"is float64 \(5, 6\), expected float32 \(5, 6\)"),
        ("integers", r"is cut off or not a \.npy file \(expected a 2-D float array"),
        ("one row", r"is cut off or not a \.npy file \(expected a 2-D float array"),
    ],
)
def test_a_damaged_npy_is_named_and_leaves_no_h5(damage: str, message: str, tmp_path: Path) -> None:
    folder, shape, arrays = write_windows(tmp_path)
    path = hidden_states_path(folder, 2)
    damaged_npy(arrays[2], damage, path)
    with pytest.raises(InputError, match=f"^{path}: {message}"):
        make_h5(folder, shape)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train", "train.h5.part"]


def test_a_window_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder, _, arrays = write_windows(tmp_path, "float16")
    found = read_hidden_states(folder, 3)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, arrays[3])
    np.save(tmp_path / "plain.npy", arrays[3])
    assert hidden_states_path(folder, 3).read_bytes() == (tmp_path / "plain.npy").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no HDF5", "is cut off or not an .h5 of stage 2"),
        (None, "does not exist"),
        ({"other": np.zeros((2, 3), "f4")}, "is cut off or not an .h5 of stage 2"),
        ({"all_hidden_states": np.zeros((2, 3), "i4")}, "no float matrix"),
        ({"all_hidden_states": np.zeros(3, "f4")}, "no float matrix"),
    ],
)
def test_an_h5_that_is_not_stage_2s_is_refused(content: bytes | dict | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.h5"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with h5py.File(path, "w") as file:
            for name, values in content.items():
                file[name] = values
    with pytest.raises(InputError, match=f"^{path}: .*{message}"):
        map_all_hidden_states(path)


def test_an_h5_in_chunks_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_dataset("all_hidden_states", data=np.zeros((4, 3), "f4"), chunks=(2, 3))
    with pytest.raises(InputError, match="not contiguous"):
        map_all_hidden_states(tmp_path / "train.h5")


@pytest.mark.parametrize(
    "content", [{"0": 3, "2": 4}, {"0": -1}, {"0": "x"}, {"0": None}, {"0": 2**70}, [1, 2], {"0": [1]}, 7]
)
def test_an_index_map_that_does_not_cover_every_window_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_json(path, content)
    with pytest.raises(InputError, match=f"^{path}: .*; run stage 2 again"):
        read_index_map(path)
