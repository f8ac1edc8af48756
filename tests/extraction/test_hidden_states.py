"""Hidden states on disk: what is read is what was written, each file is whole or not there, and damage is named."""

import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import utils.extraction.hidden_states
from utils.files import InputError
from utils.json_io import write_json
from utils.extraction.hidden_states import HiddenStateFiles, HiddenStateShape, UnfinishedH5, begin_h5, construct_memmap, dat_is_whole, discard_intermediates, hidden_states_path, map_all_hidden_states, memmap_is_whole, read_hidden_states, read_index_map, rows_to_write, windows_with_hidden_states, write_hidden_states

LENGTHS = np.array([3, 1, 5, 2])
HIDDEN_SIZE = 6


def write_windows(folder: Path, dtype: str = "float32") -> tuple[HiddenStateFiles, HiddenStateShape, list[np.ndarray]]:
    files = HiddenStateFiles(folder, "train")
    files.folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((length, HIDDEN_SIZE)).astype(dtype) for length in LENGTHS]
    for window, array in enumerate(arrays):
        write_hidden_states(files.folder, window, array)
    return files, HiddenStateShape(len(LENGTHS), int(LENGTHS.sum()), HIDDEN_SIZE, np.dtype(dtype)), arrays


def construct(files: HiddenStateFiles, shape: HiddenStateShape, keep_dat: bool = True) -> None:
    construct_memmap(files, LENGTHS, shape, keep_dat)
    assert not files.part.exists()


def bytes_of(files: HiddenStateFiles) -> list[bytes]:
    return [getattr(files, name).read_bytes() for name in FILES]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("copy_bytes", [24, 1 << 24])
def test_all_rows_stand_in_the_windows_order(
    dtype: str, copy_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils.hidden_states, "COPY_BYTES", copy_bytes)
    files, shape, arrays = write_windows(tmp_path, dtype)
    construct(files, shape)
    rows = np.concatenate(arrays)
    np.testing.assert_array_equal(map_all_hidden_states(files.h5), rows)
    np.testing.assert_array_equal(np.fromfile(files.dat, dtype=dtype).reshape(11, HIDDEN_SIZE), rows)
    with h5py.File(files.h5) as file:  # as any other program reads it
        assert list(file) == ["all_hidden_states"]
        assert file["all_hidden_states"].chunks is None
        assert file["all_hidden_states"].dtype == dtype
        np.testing.assert_array_equal(file["all_hidden_states"][:], rows)
    assert read_index_map(files.index_to_seqlen).tolist() == [3, 1, 5, 2]
    assert read_index_map(files.index_to_acc_index).tolist() == [0, 3, 4, 9]
    assert files.index_to_acc_index.read_text() == '{"0": 0, "1": 3, "2": 4, "3": 9}\n'
    assert memmap_is_whole(files, shape)


def test_the_same_rows_give_the_same_bytes_at_another_time(tmp_path: Path) -> None:
    first, shape, _ = write_windows(tmp_path / "a")
    construct(first, shape)
    second, shape, _ = write_windows(tmp_path / "b")
    time.sleep(1.1)  # HDF5 notes times in whole seconds
    construct(second, shape)
    assert bytes_of(first) == bytes_of(second)


FILES = ("dat", "h5", "index_to_seqlen", "index_to_acc_index")


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, damage) for name in FILES for damage in ("cut", "missing", "empty")), ("dat", "longer")],
)
def test_a_half_written_file_is_made_again(name: str, damage: str, tmp_path: Path) -> None:
    files, shape, _ = write_windows(tmp_path)
    construct(files, shape)
    whole = bytes_of(files)
    path: Path = getattr(files, name)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-7], "empty": b"", "longer": content + b"1234567"}[damage])
    assert not (memmap_is_whole(files, shape) and dat_is_whole(files, shape))
    construct(files, shape)
    assert bytes_of(files) == whole


def test_what_is_whole_is_not_written_again(tmp_path: Path) -> None:
    files, shape, _ = write_windows(tmp_path)
    construct(files, shape)
    before = files.h5.stat().st_mtime_ns, files.dat.stat().st_mtime_ns
    construct(files, shape)
    assert (files.h5.stat().st_mtime_ns, files.dat.stat().st_mtime_ns) == before


def test_there_is_a_dat_only_where_it_is_asked_for(tmp_path: Path) -> None:
    files, shape, _ = write_windows(tmp_path)
    construct(files, shape, keep_dat=False)
    assert memmap_is_whole(files, shape)
    assert not files.dat.exists()
    for window in range(len(LENGTHS)):
        hidden_states_path(files.folder, window).unlink()
    construct(files, shape)  # from the .h5
    assert dat_is_whole(files, shape)


def test_rows_that_are_written_in_any_order_give_the_same_h5_as_npy_files(tmp_path: Path) -> None:
    files, shape, arrays = write_windows(tmp_path / "npy")
    construct(files, shape)
    direct = HiddenStateFiles(tmp_path / "direct", "train")
    direct.folder.mkdir(parents=True)
    begin_h5(direct, shape)
    firsts = np.cumsum(LENGTHS) - LENGTHS
    with UnfinishedH5(direct, shape) as one, UnfinishedH5(direct, shape) as other:
        for part, window in ((one, 2), (other, 0), (other, 3)):
            part.write(window, firsts[window], arrays[window])
    assert rows_to_write(direct, LENGTHS, shape).tolist() == [False, True, False, False]
    begin_h5(direct, shape)  # as a run that goes on does
    assert rows_to_write(direct, LENGTHS, shape).tolist() == [False, True, False, False]
    write_hidden_states(direct.folder, 1, arrays[1])  # read from there
    construct_memmap(direct, LENGTHS, shape)
    assert not rows_to_write(direct, LENGTHS, shape).any()
    assert direct.h5.read_bytes() == files.h5.read_bytes()


def test_a_run_that_is_cut_off_before_the_h5_is_renamed_goes_on(tmp_path: Path) -> None:
    files, shape, _ = write_windows(tmp_path)
    construct(files, shape)
    whole = files.h5.read_bytes()
    files.h5.rename(files.part)
    assert not rows_to_write(files, LENGTHS, shape).any()
    construct(files, shape)
    assert files.h5.read_bytes() == whole


def test_rows_that_a_power_cut_lost_are_found(tmp_path: Path) -> None:
    """As after a crash of the machine: the marks are on the disk, a page of the rows is not."""
    lengths = np.array([700, 400, 900])
    shape = HiddenStateShape(3, 2000, HIDDEN_SIZE, np.dtype("float32"))
    files = HiddenStateFiles(tmp_path, "train")
    begin_h5(files, shape)
    with UnfinishedH5(files, shape) as part:
        for window, first in enumerate((0, 700, 1100)):
            part.write(window, first, np.full((lengths[window], HIDDEN_SIZE), 0.5, dtype=np.float32))
    assert not rows_to_write(files, lengths, shape).any()
    with open(files.part, "r+b") as file:
        file.seek(8 * 4096)
        file.write(bytes(4096))
    assert rows_to_write(files, lengths, shape).tolist() == [False, False, True]


@pytest.mark.parametrize("damage", ["cut", "no HDF5", "other shape"])
def test_a_damaged_part_is_begun_anew(damage: str, tmp_path: Path) -> None:
    files, shape, _ = write_windows(tmp_path)
    begin_h5(files, shape if damage != "other shape" else HiddenStateShape(4, 12, HIDDEN_SIZE, shape.dtype))
    if damage != "other shape":
        content = files.part.read_bytes()
        files.part.write_bytes(content[:-40] if damage == "cut" else b"x" * len(content))
    assert rows_to_write(files, LENGTHS, shape).all()
    construct(files, shape)
    assert memmap_is_whole(files, shape)


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    files = HiddenStateFiles(tmp_path, "train")
    with pytest.raises(InputError, match=r"train.h5: takes 4,000,000.0 GB, but .* GB are free on its disk"):
        begin_h5(files, HiddenStateShape(10, 10**6, 10**9, np.dtype("float32")))
    assert not list(tmp_path.iterdir())


def test_a_memmap_of_another_shape_or_dtype_is_not_whole(tmp_path: Path) -> None:
    files, shape, _ = write_windows(tmp_path)
    construct(files, shape)
    for other in (
        HiddenStateShape(4, 12, HIDDEN_SIZE, shape.dtype),
        HiddenStateShape(5, 11, HIDDEN_SIZE, shape.dtype),
        HiddenStateShape(4, 11, HIDDEN_SIZE + 1, shape.dtype),
        HiddenStateShape(4, 11, HIDDEN_SIZE, np.dtype("float16")),
    ):
        assert not memmap_is_whole(files, other)


def test_intermediates_go_only_where_the_h5_is_whole(tmp_path: Path) -> None:
    files, shape, arrays = write_windows(tmp_path)
    with pytest.raises(AssertionError):
        discard_intermediates(files, shape)
    assert windows_with_hidden_states(files.folder) == [0, 1, 2, 3]
    construct(files, shape)
    (files.folder / "token_probs_0.json").write_text("[]")
    discard_intermediates(files, shape)
    assert [path.name for path in files.folder.iterdir()] == ["token_probs_0.json"]
    assert not files.dat.exists()
    np.testing.assert_array_equal(map_all_hidden_states(files.h5), np.concatenate(arrays))


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
        ("cut", "is cut off or no .npy file"),
        ("header cut", "is cut off or no .npy file"),
        ("empty", "is cut off or no .npy file"),
        ("missing", "does not exist"),
        ("pickled", "is cut off or no .npy file"),
        ("NaN", "holds NaN or infinity"),
        ("infinite", "holds NaN or infinity"),
        ("other length", r"is float32 \(4, 6\), expected float32 \(5, 6\)"),
        ("other hidden size", r"is float32 \(5, 5\), expected float32 \(5, 6\)"),
        ("other dtype", r"is float64 \(5, 6\), expected float32 \(5, 6\)"),
        ("integers", r"is cut off or no \.npy file \(expected a 2-D float array"),
        ("one row", r"is cut off or no \.npy file \(expected a 2-D float array"),
    ],
)
def test_a_damaged_npy_is_named_and_leaves_no_h5(damage: str, message: str, tmp_path: Path) -> None:
    files, shape, arrays = write_windows(tmp_path)
    path = hidden_states_path(files.folder, 2)
    damaged_npy(arrays[2], damage, path)
    with pytest.raises(InputError, match=f"^{path}: {message}"):
        construct(files, shape)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train", "train.h5.part"]


def test_a_window_is_read_as_it_was_written(tmp_path: Path) -> None:
    files, _, arrays = write_windows(tmp_path, "float16")
    found = read_hidden_states(files.folder, 3)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, arrays[3])
    np.save(tmp_path / "plain.npy", arrays[3])
    assert hidden_states_path(files.folder, 3).read_bytes() == (tmp_path / "plain.npy").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no HDF5", "is cut off or no .h5 of stage 2"),
        (None, "does not exist"),
        ({"other": np.zeros((2, 3), "f4")}, "is cut off or no .h5 of stage 2"),
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
