"""Hidden states on disk: one `.npy` per window, all of them in one `.h5`, and the maps into it.

{folder}/{partition}/hidden_states_{i}.npy    (L, D) of window i
{folder}/{partition}.h5                       dataset `all_hidden_states` (T, D), contiguous, so it can be memory-mapped
{folder}/{partition}_index_to_seqlen.json     {"i": L}
{folder}/{partition}_index_to_acc_index.json  {"i": first row of window i}
{folder}/{partition}.dat                      (T, D) raw, only where it is asked for: the rows of the `.h5` once more

Every row's place in the `.h5` is known before it is computed. So rows are written there at once, by any number of
processes, into `{partition}.h5.part`: the `.h5` as it will be, then a byte per window, 1 where its rows are written.
"""

import math
import os
import re
import shutil
from dataclasses import dataclass
from operator import index
from pathlib import Path

import h5py
import numpy as np

from utils.files import InputError, read_json, replacing, require_file, write_json
from utils.progress import ProgressBar

DATASET = "all_hidden_states"
COPY_BYTES = 1 << 24
PAGE_BYTES = 4096

_NAME = re.compile(r"hidden_states_(0|[1-9][0-9]*)\.npy")
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>]f[248])', 'fortran_order': False, 'shape': \(([0-9]{1,18}), ([0-9]{1,9})\), \} *\n"
)


@dataclass(frozen=True)
class HiddenStateFiles:
    """Where the hidden states of one partition lie."""

    output_dir: Path
    partition: str

    @property
    def folder(self) -> Path:
        """The folder of the `.npy` files."""
        return self.output_dir / self.partition

    @property
    def dat(self) -> Path:
        return self.output_dir / f"{self.partition}.dat"

    @property
    def h5(self) -> Path:
        return self.output_dir / f"{self.partition}.h5"

    @property
    def part(self) -> Path:
        """The `.h5` while it is written."""
        return self.output_dir / f"{self.partition}.h5.part"

    @property
    def index_to_seqlen(self) -> Path:
        return self.output_dir / f"{self.partition}_index_to_seqlen.json"

    @property
    def index_to_acc_index(self) -> Path:
        return self.output_dir / f"{self.partition}_index_to_acc_index.json"


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
        # As np.save does, but that hides why a write failed.
        rows = np.ascontiguousarray(hidden_states)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
        file.write(rows.data)


def read_hidden_states(folder: Path, window: int) -> np.ndarray:
    """The (L, D) array of a window; raises InputError where the file is missing, cut off or holds no float array."""
    path = require_file(hidden_states_path(folder, window), "stage 2 writes with --save_hidden_states")
    try:
        return _read_matrix(path)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: is cut off or no .npy file ({error}); delete it and run stage 2 again") from error


def _read_matrix(path: Path) -> np.ndarray:
    """The array of a .npy file; raises ValueError before it takes the memory that a damaged header asks for."""
    # Not np.load, which also reads archives and pickles, and lets errors of Python's tokenizer out.
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        match = _NPY_HEADER.fullmatch(file.read(int.from_bytes(file.read(2), "little")))
        if version != (1, 0) or not match:
            raise ValueError("expected a 2-D float array in a version 1.0 header")
        dtype, shape = np.dtype(match[1].decode()), (int(match[2]), int(match[3]))
        n_bytes = os.fstat(file.fileno()).st_size - file.tell()
        if shape[0] * shape[1] * dtype.itemsize != n_bytes:
            raise ValueError(f"{n_bytes} bytes follow the header of {dtype} {shape}")
        return np.fromfile(file, dtype, shape[0] * shape[1]).reshape(shape)


# ---- All windows in one file


def begin_h5(files: HiddenStateFiles, shape: HiddenStateShape) -> None:
    """Make the `.h5.part`, without rows, where there is none of this shape yet.

    Raises InputError where the disk has no room for it.
    """
    if files.part.exists():
        try:
            UnfinishedH5(files, shape).close()
            return
        except InputError:
            files.part.unlink()
    free = shutil.disk_usage(files.output_dir).free
    if free < shape.n_bytes:
        got = f"takes {shape.n_bytes / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free on its disk"
        raise InputError(f"{files.h5}: {got}; free space or choose another folder")
    with replacing(files.part) as temporary:
        offset = _create_h5(temporary, shape)
        # A hole without blocks on disk until the rows are written.
        os.truncate(temporary, offset + shape.n_bytes + shape.n_windows)


class UnfinishedH5:
    """The `.h5.part`, open for writing rows, by several processes at once where each has its own windows."""

    def __init__(self, files: HiddenStateFiles, shape: HiddenStateShape) -> None:
        """Raises InputError where it is not there, damaged or of another shape."""
        self.files, self.shape = files, shape
        found = map_all_hidden_states(files.part)
        self._offset = int(found.offset)  # type: ignore[attr-defined]
        self._end = self._offset + shape.n_bytes
        is_right = found.shape == (shape.n_rows, shape.hidden_size) and found.dtype == shape.dtype
        if not is_right or files.part.stat().st_size not in (self._end, self._end + shape.n_windows):
            raise InputError(f"{files.part}: is of other windows or another size; delete it and run stage 2 again")
        self._file = open(files.part, "r+b", buffering=0)  # noqa: SIM115 (closed by close)

    def __enter__(self) -> "UnfinishedH5":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def has_rows(self) -> np.ndarray:
        """(N,) bool: the windows whose rows are written."""
        marks = os.pread(self._file.fileno(), self.shape.n_windows, self._end)
        if not marks:  # cut off where the file was about to be renamed: all are
            return np.ones(self.shape.n_windows, dtype=bool)
        return np.frombuffer(marks, dtype=np.uint8) == 1

    def lost_rows(self, lengths: np.ndarray) -> np.ndarray:
        """(N,) bool: the windows whose rows are marked as written, but in which a page of the file is all zero.

        A machine that loses power may keep the mark and lose the rows. Reads all that is there.
        """
        is_lost = np.zeros(self.shape.n_windows, dtype=bool)
        row_bytes = self.shape.hidden_size * self.shape.dtype.itemsize
        firsts = self._offset + (np.cumsum(lengths) - lengths) * row_bytes
        windows = np.flatnonzero(self.has_rows())
        for window in ProgressBar(windows.tolist(), desc=self.files.part.name, unit="window", disable=not len(windows)):
            first, n_bytes = int(firsts[window]), int(lengths[window]) * row_bytes
            is_set = np.frombuffer(os.pread(self._file.fileno(), n_bytes, first), dtype=np.uint8) != 0
            starts = np.arange(-(first % PAGE_BYTES), n_bytes, PAGE_BYTES).clip(min=0)
            is_lost[window] = len(is_set) < n_bytes or not np.logical_or.reduceat(is_set, starts).all()
        return is_lost

    def write(self, window: int, first_row: int, hidden_states: np.ndarray) -> None:
        """Write a window's rows (L, D), of the file's dtype, at their place; first_row: of the window."""
        row_bytes = self.shape.hidden_size * self.shape.dtype.itemsize
        try:
            self._write_at(self._offset + first_row * row_bytes, np.ascontiguousarray(hidden_states).data.cast("B"))
            self._write_at(self._end + window, memoryview(b"\1"))  # last: what is marked is whole
        except OSError as error:
            message = f"{self.files.part}: cannot be written ({error.strerror or error})"
            raise InputError(f"{message}; free space or fix the path") from error

    def _write_at(self, offset: int, content: memoryview) -> None:
        while content:
            n_written = os.pwrite(self._file.fileno(), content, offset)
            offset, content = offset + n_written, content[n_written:]

    def finish(self) -> None:
        """Make it the `.h5`, once all rows are written."""
        assert self.has_rows().all(), self.files.part
        try:
            os.truncate(self.files.part, self._end)
            os.replace(self.files.part, self.files.h5)
        except OSError as error:
            raise InputError(f"{self.files.h5}: cannot be written ({error.strerror}); fix the path") from error


def rows_to_write(files: HiddenStateFiles, lengths: np.ndarray, shape: HiddenStateShape) -> np.ndarray:
    """(N,) bool: the windows whose rows are neither in the `.h5` nor in a `.h5.part`; lengths (N,) tokens of each."""
    if h5_is_whole(files, shape):
        return np.zeros(shape.n_windows, dtype=bool)
    try:
        with UnfinishedH5(files, shape) as part:
            return ~part.has_rows() | part.lost_rows(lengths)
    except InputError:
        return np.ones(shape.n_windows, dtype=bool)


def construct_memmap(
    files: HiddenStateFiles, lengths: np.ndarray, shape: HiddenStateShape, keep_dat: bool = False
) -> None:
    """Make what is not whole yet of the `.h5`, the maps and, with keep_dat, the `.dat`, in bounded memory.

    Rows that are not in the `.h5.part` yet are read from the `.npy` files. lengths (N,) tokens of each window.
    Raises InputError where a `.npy` is cut off, holds NaN or has another shape, or the disk is full.
    """
    if not h5_is_whole(files, shape):
        begin_h5(files, shape)
        with UnfinishedH5(files, shape) as part:
            _copy_windows(part, lengths)
            part.finish()
    files.part.unlink(missing_ok=True)  # of a time when the .h5 was lost for a while
    if not _index_maps_are_whole(files, shape):
        for path, values in (
            (files.index_to_seqlen, lengths),
            (files.index_to_acc_index, np.cumsum(lengths) - lengths),
        ):
            write_json(path, {str(window): value for window, value in enumerate(values.tolist())})
    if keep_dat and not dat_is_whole(files, shape):
        _write_dat(files)


def memmap_is_whole(files: HiddenStateFiles, shape: HiddenStateShape) -> bool:
    """Whether the `.h5` and the maps are there and whole."""
    return h5_is_whole(files, shape) and _index_maps_are_whole(files, shape)


def dat_is_whole(files: HiddenStateFiles, shape: HiddenStateShape) -> bool:
    return files.dat.is_file() and files.dat.stat().st_size == shape.n_bytes


def h5_is_whole(files: HiddenStateFiles, shape: HiddenStateShape) -> bool:
    try:
        found = map_all_hidden_states(files.h5)
    except InputError:
        return False
    return found.shape == (shape.n_rows, shape.hidden_size) and found.dtype == shape.dtype


def _index_maps_are_whole(files: HiddenStateFiles, shape: HiddenStateShape) -> bool:
    try:
        lengths, first_rows = read_index_map(files.index_to_seqlen), read_index_map(files.index_to_acc_index)
    except InputError:
        return False
    is_right_size = len(lengths) == shape.n_windows and lengths.sum() == shape.n_rows
    return bool(is_right_size) and np.array_equal(first_rows, np.cumsum(lengths) - lengths)


def discard_intermediates(files: HiddenStateFiles, shape: HiddenStateShape) -> None:
    """Delete what `.npy` files and `.dat` there are. Only once the `.h5` and the maps are whole: they hold the same."""
    assert memmap_is_whole(files, shape), files.h5
    for window in windows_with_hidden_states(files.folder):
        hidden_states_path(files.folder, window).unlink(missing_ok=True)
    files.dat.unlink(missing_ok=True)


def _copy_windows(part: UnfinishedH5, lengths: np.ndarray) -> None:
    """Write the rows that are only in `.npy` files."""
    shape, folder = part.shape, part.files.folder
    windows = np.flatnonzero(~part.has_rows())
    firsts = np.cumsum(lengths) - lengths
    name = part.files.h5.name
    for window in ProgressBar(windows.tolist(), desc=name, unit="window", disable=not len(windows)):
        array, path = read_hidden_states(folder, window), hidden_states_path(folder, window)
        expected = ((int(lengths[window]), shape.hidden_size), shape.dtype)
        if (array.shape, array.dtype) != expected:
            got = f"is {array.dtype} {array.shape}, expected {expected[1]} {expected[0]}"
            raise InputError(f"{path}: {got}; delete it and run stage 2 again")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: holds NaN or infinity; delete it and run stage 2 again")
        part.write(window, int(firsts[window]), array)


def _write_dat(files: HiddenStateFiles) -> None:
    rows = map_all_hidden_states(files.h5)
    n_rows = max(COPY_BYTES // max(rows[:1].nbytes, 1), 1)
    bar = ProgressBar(total=rows.nbytes, desc=files.dat.name, unit="B", unit_scale=True)
    with bar, replacing(files.dat) as temporary, open(temporary, "wb") as file:
        for first in range(0, len(rows), n_rows):
            file.write(rows[first : first + n_rows].data)
            bar.update(rows[first : first + n_rows].nbytes)


def _create_h5(path: Path, shape: HiddenStateShape) -> int:
    """Make an `.h5` whose dataset has its place but no rows yet; returns where in the file the first row belongs."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same bytes whenever it is written
    space = h5py.h5s.create_simple((shape.n_rows, shape.hidden_size))
    try:
        with h5py.File(path, "w") as file:
            dataset = h5py.h5d.create(
                file.id, DATASET.encode(), h5py.h5t.py_create(shape.dtype), space, dcpl=properties
            )
            return int(dataset.get_offset())
    except RuntimeError as error:
        raise OSError(str(error)) from error  # how h5py says at close that the disk is full


def map_all_hidden_states(path: Path) -> np.ndarray:
    """A read-only memory map (T, D) of the `.h5`'s dataset, nothing read yet.

    Raises InputError where the file is no HDF5 file, lacks the dataset, or is cut off.
    """
    require_file(path, "stage 2 writes with --construct_memmap")
    try:
        with h5py.File(path, "r") as file:
            dataset = file[DATASET]
            shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
    except (OSError, KeyError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip("'\"")
        raise InputError(f"{path}: is cut off or no .h5 of stage 2 ({reason}); run stage 2 again") from error
    is_whole = shape and offset is not None and offset + math.prod(shape) * dtype.itemsize <= path.stat().st_size
    if len(shape or ()) != 2 or dtype.kind != "f" or not is_whole:
        raise InputError(f"{path}: its dataset is cut off, not contiguous or no float matrix; run stage 2 again")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def read_index_map(path: Path) -> np.ndarray:
    """An index map as an int64 array over the windows 0, 1, …; raises InputError where a window is missing."""
    found = read_json(path)
    try:
        values = np.array([index(found[str(window)]) for window in range(len(found))], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        message = f'{path}: is no map {{"0": n, "1": n, …}} of every window ({error!r}); run stage 2 again'
        raise InputError(message) from error
    if values.ndim != 1 or (values < 0).any():
        raise InputError(f"{path}: holds a value that is no count; run stage 2 again")
    return values
