"""Hidden states on disk: one `.npy` per window, all of them in one `.dat` and one `.h5`, and the maps into these.

{folder}/{partition}/hidden_states_{i}.npy    (L, D) of window i
{folder}/{partition}.dat                      (T, D) raw, the windows one after the other
{folder}/{partition}.h5                       dataset `all_hidden_states` (T, D), contiguous, so it can be memory-mapped
{folder}/{partition}_index_to_seqlen.json     {"i": L}
{folder}/{partition}_index_to_acc_index.json  {"i": first row of window i}
"""

import re
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from utils.files import InputError, read_json, replacing, require_file, write_json
from utils.progress import ProgressBar

DATASET = "all_hidden_states"
COPY_BYTES = 1 << 24

_NAME = re.compile(r"hidden_states_(\d+)\.npy")


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
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: is cut off or no .npy file ({error}); delete it and run stage 2 again") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(f"{path}: expected a 2-D float array; delete it and run stage 2 again")
    return array


# ---- All windows in one file


def construct_memmap(files: HiddenStateFiles, lengths: np.ndarray, shape: HiddenStateShape, keep_dat: bool) -> None:
    """Write what is not whole yet of the `.dat`, the `.h5` and the maps, from the `.npy` files, in bounded memory.

    lengths (N,) tokens of each window. keep_dat: the `.dat` is wanted for itself, not only as a step to the `.h5`.
    Raises InputError where a `.npy` or the `.dat` is cut off, holds NaN or has another shape, or the disk is full.
    """
    is_h5_whole = h5_is_whole(files, shape)
    if not dat_is_whole(files, shape) and (keep_dat or not is_h5_whole):
        _write_dat(files, lengths, shape)
    if not is_h5_whole:
        _write_h5(files, shape)
    if not _index_maps_are_whole(files, shape):
        for path, values in (
            (files.index_to_seqlen, lengths),
            (files.index_to_acc_index, np.cumsum(lengths) - lengths),
        ):
            write_json(path, {str(window): value for window, value in enumerate(values.tolist())})


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
    """Delete the `.npy` files and the `.dat`. Only once the `.h5` and the maps are whole: they hold the same."""
    assert memmap_is_whole(files, shape), files.h5
    for window in windows_with_hidden_states(files.folder):
        hidden_states_path(files.folder, window).unlink(missing_ok=True)
    files.dat.unlink(missing_ok=True)


def _write_dat(files: HiddenStateFiles, lengths: np.ndarray, shape: HiddenStateShape) -> None:
    bar = ProgressBar(total=shape.n_bytes, desc=files.dat.name, unit="B", unit_scale=True)
    with bar, replacing(files.dat) as temporary, open(temporary, "wb") as file:
        for window, length in enumerate(lengths.tolist()):
            array = read_hidden_states(files.folder, window)
            expected = ((length, shape.hidden_size), shape.dtype)
            if (array.shape, array.dtype) != expected:
                got = f"is {array.dtype} {array.shape}, expected {expected[1]} {expected[0]}"
                raise InputError(f"{hidden_states_path(files.folder, window)}: {got}; delete it and run stage 2 again")
            _require_finite(array, hidden_states_path(files.folder, window))
            file.write(np.ascontiguousarray(array).data)
            bar.update(array.nbytes)


def _write_h5(files: HiddenStateFiles, shape: HiddenStateShape) -> None:
    bar = ProgressBar(total=shape.n_bytes, desc=files.h5.name, unit="B", unit_scale=True)
    with bar, replacing(files.h5) as temporary:
        offset = _create_h5(temporary, shape)
        # The rows are written past HDF5, whose errors on a full disk leave its file open and surface at exit.
        with open(files.dat, "rb") as source, open(temporary, "r+b") as target:
            target.seek(offset)
            while block := source.read(COPY_BYTES):
                _require_finite(np.frombuffer(block, dtype=shape.dtype), files.dat)
                target.write(block)
                bar.update(len(block))


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


def _require_finite(array: np.ndarray, path: Path) -> None:
    if not np.isfinite(array).all():
        raise InputError(f"{path}: holds NaN or infinity; delete it and run stage 2 again")


def map_all_hidden_states(path: Path) -> np.ndarray:
    """A read-only memory map (T, D) of the `.h5`'s dataset, nothing read yet.

    Raises InputError where the file is no HDF5 file, lacks the dataset, or is cut off.
    """
    require_file(path, "stage 2 writes with --construct_memmap")
    try:
        with h5py.File(path, "r") as file:
            dataset = file[DATASET]
            shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
    except (OSError, KeyError, AttributeError, RuntimeError) as error:
        reason = str(error).strip("'\"")
        raise InputError(f"{path}: is cut off or no .h5 of stage 2 ({reason}); run stage 2 again") from error
    is_whole = offset is not None and offset + int(np.prod(shape)) * dtype.itemsize <= path.stat().st_size
    if len(shape) != 2 or dtype.kind != "f" or not is_whole:
        raise InputError(f"{path}: its dataset is cut off, not contiguous or no float matrix; run stage 2 again")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def read_index_map(path: Path) -> np.ndarray:
    """An index map as an int64 array over the windows 0, 1, …; raises InputError where a window is missing."""
    found = read_json(path)
    try:
        values = np.array([found[str(window)] for window in range(len(found))], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        message = f'{path}: is no map {{"0": n, "1": n, …}} of every window ({error!r}); run stage 2 again'
        raise InputError(message) from error
    if values.ndim != 1 or (values < 0).any():
        raise InputError(f"{path}: holds a value that is no count; run stage 2 again")
    return values
