"""Hidden states on disk: one `.npy` per window, all of them in one `.h5`, and the maps into it.

    {partition}/hidden_states_{i}.npy     (L, D) of window i
    {partition}.h5                        dataset `all_hidden_states` (T, D), contiguous, so that it can be memory-mapped
    {partition}_index_to_seqlen.json      {"i": L}
    {partition}_index_to_acc_index.json   {"i": first row of window i}
    {partition}.dat                       (T, D) raw, with --keep_dat: the rows of the `.h5` once more

The place of every row in the `.h5` is known before the row is computed. So any number of processes write rows into
`{partition}.h5.part`: the `.h5` as it will be, then one byte per window, 1 where the window's rows are written.
"""

import math
import os
import re
import shutil
from dataclasses import dataclass
from operator import index
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.lib import format as npy

from utils.files import InputError, replacing, require_file
from utils.hdf5 import create_h5, read_places
from utils.json_io import read_json, write_json
from utils.progress import ProgressBar

DATASET = "all_hidden_states"
COPY_BYTES = 1 << 24
PAGE_BYTES = 4096

_NAME = re.compile(r"hidden_states_(0|[1-9][0-9]*)\.npy")


@dataclass(frozen=True)
class HiddenStateShape:
    """What all windows' hidden states are together: how many windows, rows (tokens) and columns, of which dtype."""

    n_windows: int
    n_rows: int
    hidden_size: int
    dtype: np.dtype

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.hidden_size * self.dtype.itemsize


# ---- One file per window


def hidden_states_path(folder: Path, window: int) -> Path:
    return folder / f"hidden_states_{window}.npy"


def windows_with_hidden_states(folder: Path) -> list[int]:
    """The numbers of the windows that have a file in the folder, ascending."""
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def write_hidden_states(folder: Path, window: int, hidden_states: np.ndarray) -> None:
    """hidden_states (L, D) float16 or float32."""
    with replacing(hidden_states_path(folder, window)) as temporary, open(temporary, "wb") as file:
        # As np.save does, which however hides why a write failed.
        rows = np.ascontiguousarray(hidden_states)
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(rows))
        file.write(rows.data)


def read_hidden_states(folder: Path, window: int) -> np.ndarray:
    """The (L, D) array of a window; raises InputError where the file is missing, cut off or holds no float array."""
    path = require_file(hidden_states_path(folder, window), "stage 2 writes with --save_hidden_states")
    try:
        # Mapped, so that a damaged header cannot ask for more memory than the file has bytes.
        mapped = npy.open_memmap(path, mode="r")
        n_bytes = path.stat().st_size - mapped.offset
        if mapped.ndim != 2 or mapped.dtype.kind != "f" or not mapped.flags.c_contiguous or n_bytes != mapped.nbytes:
            raise ValueError(f"expected a 2-D float array, found {mapped.dtype} {mapped.shape} in {n_bytes} bytes")
        return np.array(mapped)
    except (ValueError, TypeError, OSError, EOFError, TokenError, SyntaxError, OverflowError) as error:
        raise InputError(f"{path}: is cut off or not a .npy file ({error}); delete it and run stage 2 again") from error


# ---- All windows in one file


class PartialH5:
    """The `.h5.part`, open for writing rows; by several processes at once where each has its own windows."""

    def __init__(self, path: Path, shape: HiddenStateShape) -> None:
        """Raises InputError where the file is missing, damaged or of another shape."""
        self.path, self.shape = path, shape
        found = map_all_hidden_states(path)
        self._offset = int(found.offset)
        self._end = self._offset + shape.n_bytes
        is_right = found.shape == (shape.n_rows, shape.hidden_size) and found.dtype == shape.dtype
        if not is_right or path.stat().st_size not in (self._end, self._end + shape.n_windows):
            raise InputError(f"{path}: is of other windows or another size; delete it and run stage 2 again")
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (closed by close)

    def __enter__(self) -> "PartialH5":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def begin(path: Path, shape: HiddenStateShape) -> None:
        """Make the file, without rows, where there is none of this shape yet; raises InputError where it has no room."""
        if path.exists():
            try:
                PartialH5(path, shape).close()
                return
            except InputError:
                path.unlink()
        free = shutil.disk_usage(path.parent).free
        if free < shape.n_bytes:
            got = f"takes {shape.n_bytes / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free on its disk"
            raise InputError(f"{path.with_suffix('')}: {got}; free space or choose another folder")
        with replacing(path) as temporary:
            (offset,) = create_h5(temporary, {DATASET: (shape.n_rows, shape.hidden_size)}, shape.dtype)
            # A hole, without blocks on disk until the rows are written.
            os.truncate(temporary, offset + shape.n_bytes + shape.n_windows)

    def has_rows(self) -> np.ndarray:
        """(N,) bool: the windows whose rows are written."""
        marks = os.pread(self._file.fileno(), self.shape.n_windows, self._end)
        if not marks:  # cut off when the file was about to be renamed: all are
            return np.ones(self.shape.n_windows, dtype=bool)
        return np.frombuffer(marks, dtype=np.uint8) == 1

    def rows_left(self, lengths: np.ndarray) -> np.ndarray:
        """(N,) bool: the windows whose rows are not written, or were lost. Reads all that is there.

        A machine that loses power may keep a window's mark and lose its rows: then a page of them is all zero.
        """
        has_rows = self.has_rows()
        is_left = ~has_rows
        row_bytes = self.shape.hidden_size * self.shape.dtype.itemsize
        firsts = self._offset + (np.cumsum(lengths) - lengths) * row_bytes
        windows = np.flatnonzero(has_rows).tolist()
        for window in ProgressBar(windows, desc=self.path.name, unit="window", disable=not windows):
            first, n_bytes = int(firsts[window]), int(lengths[window]) * row_bytes
            is_set = np.frombuffer(os.pread(self._file.fileno(), n_bytes, first), dtype=np.uint8) != 0
            starts = np.arange(-(first % PAGE_BYTES), n_bytes, PAGE_BYTES).clip(min=0)
            is_left[window] = len(is_set) < n_bytes or not np.logical_or.reduceat(is_set, starts).all()
        return is_left

    def write(self, window: int, first_row: int, hidden_states: np.ndarray) -> None:
        """Write a window's rows (L, D), of the file's dtype, at their place; first_row: of the window."""
        row_bytes = self.shape.hidden_size * self.shape.dtype.itemsize
        try:
            self._write_at(self._offset + first_row * row_bytes, np.ascontiguousarray(hidden_states).data.cast("B"))
            self._write_at(self._end + window, memoryview(b"\1"))  # last: what is marked is whole
        except OSError as error:
            message = f"{self.path}: cannot be written ({error.strerror or error})"
            raise InputError(f"{message}; free space or fix the path") from error

    def _write_at(self, offset: int, content: memoryview) -> None:
        while content:
            n_written = os.pwrite(self._file.fileno(), content, offset)
            offset, content = offset + n_written, content[n_written:]

    def copy_rows(self, windows: list[int], folder: Path, lengths: np.ndarray) -> None:
        """Write the rows of some windows from the `.npy` files of a folder; lengths (N,) tokens of each window.

        Raises InputError where a file is missing or damaged, holds NaN or has another shape.
        """
        firsts = np.cumsum(lengths) - lengths
        bar = ProgressBar(windows, desc=self.path.with_suffix("").name, unit="window", disable=not windows)
        for window in bar:
            array, path = read_hidden_states(folder, window), hidden_states_path(folder, window)
            expected = ((int(lengths[window]), self.shape.hidden_size), self.shape.dtype)
            if (array.shape, array.dtype) != expected:
                got = f"is {array.dtype} {array.shape}, expected {expected[1]} {expected[0]}"
                raise InputError(f"{path}: {got}; delete it and run stage 2 again")
            if not np.isfinite(array).all():
                raise InputError(f"{path}: holds NaN or infinity; delete it and run stage 2 again")
            self.write(window, int(firsts[window]), array)

    def finish(self) -> None:
        """Make it the `.h5`, once all rows are written."""
        assert self.has_rows().all(), self.path
        target = self.path.with_suffix("")
        try:
            os.truncate(self.path, self._end)
            os.replace(self.path, target)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror}); fix the path") from error


def map_all_hidden_states(path: Path) -> np.memmap:
    """A read-only memory map (T, D) of the `.h5`'s dataset, nothing read yet.

    Raises InputError where the file is no HDF5 file, lacks the dataset, or is cut off.
    """
    require_file(path, "stage 2 writes with --construct_memmap")
    try:
        shape, dtype, offset = read_places(path)[DATASET]
    except (OSError, KeyError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip("'\"")
        raise InputError(f"{path}: is cut off or not an .h5 of stage 2 ({reason}); run stage 2 again") from error
    is_whole = shape and offset is not None and offset + math.prod(shape) * dtype.itemsize <= path.stat().st_size
    if len(shape or ()) != 2 or dtype.kind != "f" or not is_whole or offset is None:
        raise InputError(f"{path}: its dataset is cut off, not contiguous or no float matrix; run stage 2 again")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def write_dat(h5_path: Path, path: Path) -> None:
    """Write the rows of an `.h5` raw, a block at a time."""
    rows = map_all_hidden_states(h5_path)
    n_rows = max(COPY_BYTES // max(rows[:1].nbytes, 1), 1)
    bar = ProgressBar(total=rows.nbytes, desc=path.name, unit="B", unit_scale=True)
    with bar, replacing(path) as temporary, open(temporary, "wb") as file:
        for first in range(0, len(rows), n_rows):
            file.write(rows[first : first + n_rows].data)
            bar.update(rows[first : first + n_rows].nbytes)


# ---- The maps


def write_index_maps(seqlen_path: Path, acc_index_path: Path, lengths: np.ndarray) -> None:
    """Write each window's length, and the first of its rows in the `.h5`."""
    for path, values in ((seqlen_path, lengths), (acc_index_path, np.cumsum(lengths) - lengths)):
        write_json(path, {str(window): value for window, value in enumerate(values.tolist())})


def read_index_map(path: Path) -> np.ndarray:
    """An index map as an int64 array over the windows 0, 1, …; raises InputError where a window is missing."""
    found = read_json(path)
    try:
        values = np.array([index(found[str(window)]) for window in range(len(found))], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        message = f'{path}: is not a map {{"0": n, "1": n, …}} of every window ({error!r}); run stage 2 again'
        raise InputError(message) from error
    if values.ndim != 1 or (values < 0).any():
        raise InputError(f"{path}: holds a value that is not a count; run stage 2 again")
    return values
