"""What stage 2 is asked for, what lies in its output folder, and what is left to do.

The disk is asked, not the manifest alone: a file that a later stage found damaged, and the user deleted, is made again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.extraction.hidden_states import (
    HiddenStateShape,
    PartialH5,
    hidden_states_path,
    map_all_hidden_states,
    read_index_map,
    windows_with_hidden_states,
)
from utils.extraction.token_probs import token_probs_path, windows_with_token_probs
from utils.files import InputError
from utils.text.expert_spans import expert_spans_are_written, expert_spans_path


@dataclass(frozen=True)
class ExtractionFiles:
    """Where stage 2's output of one partition lies."""

    output_dir: Path
    partition: str

    @property
    def folder(self) -> Path:
        """The folder of the files of each window."""
        return self.output_dir / self.partition

    @property
    def h5(self) -> Path:
        return self.output_dir / f"{self.partition}.h5"

    @property
    def part(self) -> Path:
        """The `.h5` while it is written."""
        return self.output_dir / f"{self.partition}.h5.part"

    @property
    def dat(self) -> Path:
        return self.output_dir / f"{self.partition}.dat"

    @property
    def index_to_seqlen(self) -> Path:
        return self.output_dir / f"{self.partition}_index_to_seqlen.json"

    @property
    def index_to_acc_index(self) -> Path:
        return self.output_dir / f"{self.partition}_index_to_acc_index.json"

    @property
    def manifest(self) -> Path:
        return self.output_dir / f"{self.partition}_manifest.json"

    @property
    def plan(self) -> Path:
        """The plan of the windows, which all processes and shards share until the output is whole."""
        return self.output_dir / f"{self.partition}_plan.npy"

    @property
    def outputs(self) -> list[Path]:
        """The files that are not of one window alone, whether or not they are there."""
        return [self.dat, self.h5, self.index_to_seqlen, self.index_to_acc_index, expert_spans_path(self.folder)]


@dataclass(frozen=True)
class RequestedOutputs:
    """The outputs that a run is asked for beside the token probabilities, and the dtype of hidden states on disk."""

    hidden_states: bool  # a .npy per window
    memmap: bool  # the .h5 and its maps
    dat: bool
    dtype: np.dtype

    def shape(self, results: dict[str, Any]) -> HiddenStateShape:
        """The shape of all hidden states, by the results of a finished run."""
        return HiddenStateShape(results["n_windows"], results["n_tokens"], results["hidden_size"], self.dtype)


class ExtractionState:
    """What one scan of the output folder found, asked about the outputs that a run is to make.

    `results` are in every method those of a run that finished, as its manifest has them; empty where none has.
    """

    def __init__(self, files: ExtractionFiles, requested: RequestedOutputs) -> None:
        self.files, self.requested = files, requested
        self._token_probs = windows_with_token_probs(files.folder)  # windows with a file, ascending
        self._hidden_states = windows_with_hidden_states(files.folder)
        self._outputs = [path for path in files.outputs if path.exists()]
        self._h5 = self._scan_h5()  # (rows, columns, dtype)
        self._index_maps = self._scan_index_maps()  # (windows, rows)
        self._dat_bytes = files.dat.stat().st_size if files.dat in self._outputs else None

    def _scan_h5(self) -> tuple[int, int, np.dtype] | None:
        try:
            rows = map_all_hidden_states(self.files.h5)
        except InputError:  # missing, or damaged and therefore made again
            return None
        return rows.shape[0], rows.shape[1], rows.dtype

    def _scan_index_maps(self) -> tuple[int, int] | None:
        try:
            lengths, firsts = read_index_map(self.files.index_to_seqlen), read_index_map(self.files.index_to_acc_index)
        except InputError:
            return None
        return (len(lengths), int(lengths.sum())) if np.array_equal(firsts, np.cumsum(lengths) - lengths) else None

    @property
    def files_there(self) -> list[Path]:
        """What there is of outputs, a folder for those of the windows."""
        return self._outputs + ([self.files.folder] if self._token_probs or self._hidden_states else [])

    def has_h5(self, shape: HiddenStateShape) -> bool:
        """Whether the `.h5` is there and whole."""
        return self._h5 == (shape.n_rows, shape.hidden_size, shape.dtype)

    def has_index_maps(self, shape: HiddenStateShape) -> bool:
        return self._index_maps == (shape.n_windows, shape.n_rows)

    def has_dat(self, shape: HiddenStateShape) -> bool:
        return self._dat_bytes == shape.n_bytes

    def _has_memmap(self, shape: HiddenStateShape) -> bool:
        return self.has_h5(shape) and self.has_index_maps(shape)

    def wants_hidden_states(self, results: dict[str, Any]) -> bool:
        """Whether every window is to have its `.npy`: not where an earlier run gave them up for the `.h5`."""
        outputs = results.get("outputs", [])
        was_discarded = "memmap" in outputs and "hidden_states" not in outputs
        return self.requested.hidden_states and not (was_discarded and self._has_memmap(self.requested.shape(results)))

    def is_complete(self, results: dict[str, Any]) -> bool:
        """Whether all that is requested is there, and noted in the results."""
        if not results or self._lacks_file(results["n_windows"], results).any():
            return False
        if not expert_spans_are_written(self.files.folder, results):
            return False
        noted = {"token_probs"} | ({"memmap"} if self.requested.memmap else set())
        noted |= {"hidden_states"} if self.wants_hidden_states(results) else set()
        if not noted.issubset(results["outputs"]):
            return False
        shape = self.requested.shape(results)
        return (not self.requested.memmap or self._has_memmap(shape)) and (
            not self.requested.dat or self.has_dat(shape)
        )

    def windows_left(self, lengths: np.ndarray, hidden_size: int | None, results: dict[str, Any]) -> np.ndarray:
        """(N,) bool: the windows that the model is to read, since a file of theirs is missing, or their rows.

        A file that is there is whole: it was renamed into place. lengths (N,) tokens of each window; hidden_size: None
        where no run has begun here. Raises InputError where there are files of more windows than the text has.
        """
        is_left = self._lacks_file(len(lengths), results)
        if self.requested.memmap and hidden_size is not None:
            shape = HiddenStateShape(len(lengths), int(lengths.sum()), hidden_size, self.requested.dtype)
            if not self.has_h5(shape):
                # The rows of a window that has its .npy are copied from there.
                is_left |= self._lacks_rows(lengths, shape) & ~self._has_file(self._hidden_states, len(lengths))
        return is_left

    def _lacks_rows(self, lengths: np.ndarray, shape: HiddenStateShape) -> np.ndarray:
        try:
            with PartialH5(self.files.part, shape) as part:
                return part.rows_left(lengths)
        except InputError:
            return np.ones(shape.n_windows, dtype=bool)

    def _lacks_file(self, n_windows: int, results: dict[str, Any]) -> np.ndarray:
        """(N,) bool: the windows that lack a file of their own."""
        lacks_file = ~self._has_file(self._token_probs, n_windows)
        if self.wants_hidden_states(results):
            lacks_file |= ~self._has_file(self._hidden_states, n_windows)
        return lacks_file

    def _has_file(self, windows: list[int], n_windows: int) -> np.ndarray:
        if windows and windows[-1] >= n_windows:
            got = f"holds a file of window {windows[-1]}, but the text has only {n_windows}"
            raise InputError(f"{self.files.folder}: {got}; delete the folder's files and run again")
        has_file = np.zeros(n_windows, dtype=bool)
        has_file[windows] = True
        return has_file

    def whole_outputs(self, results: dict[str, Any]) -> list[str]:
        """The names of the outputs that are whole, for the manifest: of token_probs, hidden_states and memmap."""
        is_whole = {
            "token_probs": len(self._token_probs) == results["n_windows"],
            "hidden_states": len(self._hidden_states) == results["n_windows"],
            "memmap": self._has_memmap(self.requested.shape(results)),
        }
        return [name for name, whole in is_whole.items() if whole]

    def listed_files(self, outputs: list[str]) -> list[Path]:
        """The files that the manifest lists, those of the windows' hidden states where they are among `outputs`."""
        files = self._outputs + [token_probs_path(self.files.folder, window) for window in self._token_probs]
        if "hidden_states" in outputs:
            files += [hidden_states_path(self.files.folder, window) for window in self._hidden_states]
        return files
