"""HDF5 files of contiguous datasets: any reader finds the rows where they were said to be, and cut files are known."""

import os
import time
from fcntl import LOCK_EX, flock
from pathlib import Path

import h5py
import numpy as np
import pytest

from utils.hdf5 import create_h5, h5_is_whole, read_places

SHAPES = {"first": (3, 4), "second": (5, 2)}


def write(path: Path, dtype: str = "float32", group: str | None = None) -> dict[str, np.ndarray]:
    """A file whose rows are written past HDF5; returns them."""
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    offsets = create_h5(path, SHAPES, np.dtype(dtype), group)
    with open(path, "r+b") as file:
        for offset, array in zip(offsets, rows.values(), strict=True):
            os.pwrite(file.fileno(), array.tobytes(), offset)
    return rows


@pytest.mark.parametrize("group", [None, "layer"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_at_the_said_places_are_what_h5py_reads(dtype: str, group: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    rows = write(path, dtype, group)
    with h5py.File(path) as file:
        parent = file[group or "/"]
        assert set(parent) == set(SHAPES)
        for name, array in rows.items():
            assert parent[name].dtype == dtype
            assert parent[name].chunks is None
            np.testing.assert_array_equal(parent[name][:], array)
    places = read_places(path, group or "/")
    assert {name: place.shape for name, place in places.items()} == SHAPES
    for name, place in places.items():
        assert place.offset is not None
        found = np.fromfile(path, place.dtype, np.prod(place.shape), offset=place.offset).reshape(place.shape)
        np.testing.assert_array_equal(found, rows[name])


def test_a_dataset_that_is_not_in_one_piece_has_no_place(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=np.zeros((4, 3), "f4"), chunks=(2, 3))
    assert read_places(tmp_path / "a.h5") == {"a": ((4, 3), np.dtype("f4"), None)}


def test_hdf5_takes_no_locks_of_its_own_which_some_drives_refuse(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    with open(path, "rb") as holder:
        flock(holder, LOCK_EX)
        assert set(read_places(path)) == set(SHAPES)
        rows = write(path)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["first"][:], rows["first"])


def test_the_same_datasets_are_the_same_bytes_at_another_time(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    time.sleep(1.1)  # HDF5 notes times in whole seconds
    write(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_file_is_whole_at_its_full_length_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    content = path.read_bytes()
    assert h5_is_whole(path)
    for length in [*range(0, len(content), 97), len(content) - 1, len(content) + 1]:
        path.write_bytes((content + b"\0")[:length])
        assert not h5_is_whole(path), length
    path.write_bytes(b"x" + content[1:])
    assert not h5_is_whole(path)


def test_no_hdf5_file_or_group_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    with pytest.raises(ValueError, match="doesn't exist"):
        read_places(path, "none")
    path.write_bytes(b"no HDF5")
    with pytest.raises(OSError, match="signature"):
        read_places(path)
    with pytest.raises(OSError, match="No such file"):
        read_places(tmp_path / "none.h5")


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        create_h5(tmp_path / "none" / "a.h5", SHAPES, np.dtype("f4"))
    (tmp_path / "full.h5").symlink_to("/dev/full")
    with pytest.raises(OSError, match="errno = 28"):
        create_h5(tmp_path / "full.h5", SHAPES, np.dtype("f4"))
