"""Hidden states on disk: one `.npy` per window, all of them in one `.dat` and one `.h5`, and the maps into these.

{folder}/{partition}/hidden_states_{i}.npy    (L, D) of window i
{folder}/{partition}.dat                      (T, D) raw, the windows one after the other
{folder}/{partition}.h5                       dataset `all_hidden_states` (T, D), contiguous, so it can be memory-mapped
{folder}/{partition}_index_to_seqlen.json     {"i": L}
{folder}/{partition}_index_to_acc_index.json  {"i": first row of window i}
"""

from pathlib import Path

import h5py
import numpy as np

from utils.files import InputError, read_json, replacing, require_file

DATASET = "all_hidden_states"


def hidden_states_path(folder: Path, window: int) -> Path:
    return folder / f"hidden_states_{window}.npy"


def write_hidden_states(folder: Path, window: int, hidden_states: np.ndarray) -> None:
    """hidden_states (L, D) float16 or float32."""
    with replacing(hidden_states_path(folder, window)) as temporary, open(temporary, "wb") as file:
        np.save(file, hidden_states)


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
