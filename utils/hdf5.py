"""HDF5 files of contiguous datasets, whose rows are written and read past HDF5: at their place in the file.

So many processes can write one file, rows can be memory-mapped, and a full disk is an error where it happens; HDF5
itself reports it when the file is closed, and again at the end of the process.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np


class DatasetPlace(NamedTuple):
    """What a dataset is and where in the file its first row begins; offset None: it is not in one piece."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None


def create_h5(
    path: Path, shapes: Mapping[str, tuple[int, int]], dtype: np.dtype, group: str | None = None
) -> list[int]:
    """Make a file of datasets whose rows are still to be written; returns where in the file each begins.

    group: the group that holds the datasets; None: the root. Raises OSError where the file cannot be written.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same bytes whenever it is written
    access = _access()
    # The oldest layout: the same bytes with every h5py, and a head that `h5_is_whole` can read.
    access.set_libver_bounds(h5py.h5f.LIBVER_EARLIEST, h5py.h5f.LIBVER_LATEST)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    kind, offsets = h5py.h5t.py_create(dtype), []
    try:
        # h5py's low-level calls: its File and Group objects take half as long again for a small trie.
        file = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fapl=access)
        try:
            parent = file if group is None else h5py.h5g.create(file, group.encode())
            for name, shape in shapes.items():
                space = h5py.h5s.create_simple(shape)
                dataset = h5py.h5d.create(parent, name.encode(), kind, space, dcpl=properties)
                offsets.append(int(dataset.get_offset()))
        finally:
            file.close()
    except RuntimeError as error:
        raise OSError(str(error)) from error  # how h5py says at close that the disk is full
    return offsets


def read_places(path: Path, group: str = "/") -> dict[str, DatasetPlace]:
    """The datasets of a group by name. Raises OSError, ValueError, KeyError or RuntimeError where there is none."""
    # h5py's low-level calls again; they close what they opened when it is no longer used.
    file = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, fapl=_access())
    parent, places = h5py.h5g.open(file, group.encode()), {}
    for name in parent:
        dataset = h5py.h5d.open(parent, name)
        places[name.decode()] = DatasetPlace(dataset.shape, dataset.dtype, dataset.get_offset())
    return places


def _access() -> h5py.h5p.PropFAID:
    """HDF5's own locks are left out, which some network drives refuse: the stages' locks keep runs apart."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_file_locking(False, True)
    return access


# Bytes of an HDF5 superblock of version 0, and where it says at which byte the file ends.
SUPERBLOCK_BYTES, END_OF_FILE_AT = 48, 40


def h5_is_whole(path: Path) -> bool:
    """Whether a file of `create_h5` ends where its head says; opening it as HDF5 takes ten times longer."""
    with open(path, "rb") as file:
        head = file.read(SUPERBLOCK_BYTES)
        n_bytes = int.from_bytes(head[END_OF_FILE_AT:], "little")
        return head.startswith(b"\x89HDF\r\n\x1a\n\0") and n_bytes == os.fstat(file.fileno()).st_size
