"""What stage 2 leaves on disk, taken together: which of its outputs are there and whole, and what is left to do.

The disk is asked, not only the manifest: a file that a later stage found damaged and the user deleted is made again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.expert_spans import expert_spans_are_written, expert_spans_path
from utils.files import InputError
from utils.hidden_states import (
    HiddenStateFiles,
    HiddenStateShape,
    dat_is_whole,
    h5_is_whole,
    hidden_states_path,
    memmap_is_whole,
    rows_to_write,
    windows_with_hidden_states,
)
from utils.token_probs import token_probs_path, windows_with_token_probs


@dataclass(frozen=True)
class Wanted:
    """The outputs that a run is asked for beside the token probabilities, and the dtype of hidden states on disk."""

    hidden_states: bool  # a .npy per window
    memmap: bool  # the .h5 and its maps
    dat: bool
    dtype: np.dtype

    def shape(self, results: dict[str, Any]) -> HiddenStateShape:
        return HiddenStateShape(results["n_windows"], results["n_tokens"], results["hidden_size"], self.dtype)


def require_manifest(manifest_path: Path, files: HiddenStateFiles, *, may_forget: bool = True) -> bool:
    """Whether there is a manifest that speaks for output; one that speaks for none is deleted, so that all flags go.

    may_forget: whether it may be deleted: another shard may have just written it, and no output yet. Raises
    InputError where there is output without a manifest: nobody knows what it was made from.
    """
    outputs = [path for path in _single_files(files) if path.exists()]
    if windows_with_token_probs(files.folder) or windows_with_hidden_states(files.folder):
        outputs.append(files.folder)
    if not outputs and may_forget:
        files.part.unlink(missing_ok=True)  # rows of windows whose files were deleted
        manifest_path.unlink(missing_ok=True)
        return False
    outputs += [files.part] if files.part.exists() else []
    if outputs and not manifest_path.exists():
        message = f"{outputs[0]}: lies there without the manifest that says what it was made from"
        raise InputError(f"{message}; delete it or choose another folder")
    return manifest_path.exists()


def _single_files(files: HiddenStateFiles) -> list[Path]:
    return [files.dat, files.h5, files.index_to_seqlen, files.index_to_acc_index, expert_spans_path(files.folder)]


def output_files(files: HiddenStateFiles, outputs: list[str]) -> list[Path]:
    """All files that lie there, those of the windows' hidden states where they are among `outputs`."""
    found = [path for path in _single_files(files) if path.exists()]
    found += [token_probs_path(files.folder, window) for window in windows_with_token_probs(files.folder)]
    if "hidden_states" in outputs:
        found += [hidden_states_path(files.folder, window) for window in windows_with_hidden_states(files.folder)]
    return found


def output_is_whole(files: HiddenStateFiles, results: dict[str, Any], wanted: Wanted) -> bool:
    """Whether all that is wanted is there and noted; results: a finished run's, empty where none has finished."""
    if not results or _windows_without_files(files, results["n_windows"], results, wanted).any():
        return False
    if not expert_spans_are_written(files.folder, results):
        return False
    noted = {"token_probs"} | ({"memmap"} if wanted.memmap else set())
    noted |= {"hidden_states"} if keeps_hidden_states(files, results, wanted) else set()
    if not noted.issubset(results["outputs"]):
        return False
    shape = wanted.shape(results)
    return (not wanted.memmap or memmap_is_whole(files, shape)) and (not wanted.dat or dat_is_whole(files, shape))


def windows_to_do(
    files: HiddenStateFiles, lengths: np.ndarray, hidden_size: int | None, results: dict[str, Any], wanted: Wanted
) -> np.ndarray:
    """(N,) bool: the windows that the model is to read, since they lack a file that is wanted, or their rows.

    A file that is there is whole: it was renamed into place. lengths (N,) tokens of each window; hidden_size: None where
    no run has begun here. Raises InputError where there are files of more windows than there should be.
    """
    to_do = _windows_without_files(files, len(lengths), results, wanted)
    if wanted.memmap and hidden_size is not None:
        shape = HiddenStateShape(len(lengths), int(lengths.sum()), hidden_size, wanted.dtype)
        if not h5_is_whole(files, shape):
            # The rows of a window that has its .npy are copied from there.
            has_npy = _has_file(windows_with_hidden_states(files.folder), len(lengths), files.folder)
            to_do |= rows_to_write(files, lengths, shape) & ~has_npy
    return to_do


def _windows_without_files(
    files: HiddenStateFiles, n_windows: int, results: dict[str, Any], wanted: Wanted
) -> np.ndarray:
    """(N,) bool: the windows that lack a file of their own that is wanted."""
    to_do = ~_has_file(windows_with_token_probs(files.folder), n_windows, files.folder)
    if keeps_hidden_states(files, results, wanted):
        to_do |= ~_has_file(windows_with_hidden_states(files.folder), n_windows, files.folder)
    return to_do


def keeps_hidden_states(files: HiddenStateFiles, results: dict[str, Any], wanted: Wanted) -> bool:
    """Whether every window is to have its `.npy`."""
    return wanted.hidden_states and not is_discarded(files, results, wanted)


def is_discarded(files: HiddenStateFiles, results: dict[str, Any], wanted: Wanted) -> bool:
    """Whether the `.npy` files were given up for the `.h5`, and that still holds them."""
    outputs = results.get("outputs", [])
    was_discarded = "memmap" in outputs and "hidden_states" not in outputs
    return was_discarded and memmap_is_whole(files, wanted.shape(results))


def whole_outputs(files: HiddenStateFiles, results: dict[str, Any], wanted: Wanted) -> list[str]:
    """The names of what lies there whole, for the manifest: of token_probs, hidden_states and memmap."""
    n_windows = results["n_windows"]
    is_whole = {
        "token_probs": len(windows_with_token_probs(files.folder)) == n_windows,
        "hidden_states": len(windows_with_hidden_states(files.folder)) == n_windows,
        "memmap": memmap_is_whole(files, wanted.shape(results)),
    }
    return [name for name, whole in is_whole.items() if whole]


def _has_file(windows: list[int], n_windows: int, folder: Path) -> np.ndarray:
    if windows and windows[-1] >= n_windows:
        got = f"holds a file of window {windows[-1]}, but the text has only {n_windows}"
        raise InputError(f"{folder}: {got}; delete the folder's files and run again")
    has_file = np.zeros(n_windows, dtype=bool)
    has_file[windows] = True
    return has_file
