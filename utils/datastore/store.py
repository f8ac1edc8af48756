"""The datastore as the decode loop reads it: token tries by entry token, loaded on demand under a memory bound.

Tries come from the pickles of `flattened.py`, which are made first where they are missing.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.datastore.flattened import FOLDER, flatten, flattened_arrays, pickle_path, read_arrays
from utils.datastore.search import VectorIndex
from utils.datastore.trie_files import HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE, MANIFEST, STAGE
from utils.files import InputError
from utils.manifest import read_finished
from utils.progress import ProgressBar

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenTrie:
    """All chunks of one entry token, prefix-sorted, each with the context vector of its entry token.

    context_vectors (N, D) float32 unit rows; chunk_ids int32, all chunks one after the other, row i's from
    chunk_offsets[i] to chunk_offsets[i + 1]; windows and positions (N,): where the entry token stands in the text.
    """

    entry_token_id: int
    context_vectors: Tensor
    chunk_ids: np.ndarray
    chunk_offsets: np.ndarray
    windows: np.ndarray
    positions: np.ndarray

    def chunk(self, row: int) -> list[int]:
        """The token ids of a row's chunk, the entry token not among them."""
        return self.chunk_ids[self.chunk_offsets[row] : self.chunk_offsets[row + 1]].tolist()

    def where(self, kept: np.ndarray) -> "TokenTrie | None":
        """The rows that are kept, (N,) bool; None where none is."""
        if kept.all():
            return self
        if not kept.any():
            return None
        lengths = np.diff(self.chunk_offsets)
        return TokenTrie(
            self.entry_token_id,
            self.context_vectors[torch.from_numpy(kept).to(self.context_vectors.device)],
            self.chunk_ids[np.repeat(kept, lengths)],
            np.concatenate([[0], np.cumsum(lengths[kept])]),
            self.windows[kept],
            self.positions[kept],
        )

    def chunk_lengths(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows),) int64."""
        return np.asarray(self.chunk_offsets[rows + 1] - self.chunk_offsets[rows])

    def rows_beginning_with(self, token_id: int) -> slice:
        """The rows whose chunk begins with a token: one range, since they are prefix-sorted."""
        first, last = np.searchsorted(self._first_ids, [token_id, token_id + 1])
        return slice(int(first), int(last))

    def continuations(self, rows: np.ndarray, n_tokens: int, first: int = 1) -> np.ndarray:
        """(len(rows), n_tokens) token ids of each chunk from its `first` on, -1 where it has ended."""
        starts, ends = self.chunk_offsets[rows] + first, self.chunk_offsets[rows + 1]
        places = starts[:, None] + np.arange(n_tokens)
        inside = places < ends[:, None]
        return np.where(inside, self.chunk_ids[np.minimum(places, len(self.chunk_ids) - 1)], -1)

    @cached_property
    def _first_ids(self) -> np.ndarray:
        return self.chunk_ids[self.chunk_offsets[:-1]]

    @cached_property
    def first_ids(self) -> Tensor:
        """(N,) int64: the first token of each row's chunk, on the context vectors' device."""
        return torch.from_numpy(self._first_ids.astype(np.int64)).to(self.context_vectors.device)

    @cached_property
    def index(self) -> VectorIndex:
        """Finds the row most similar to a query; what it makes to be faster counts into n_bytes."""
        return VectorIndex(self.context_vectors)

    @cached_property
    def _n_bytes_of_arrays(self) -> int:
        arrays = (self.chunk_ids, self.chunk_offsets, self.windows, self.positions)
        return self.context_vectors.nbytes + sum(array.nbytes for array in arrays)

    @property
    def n_bytes(self) -> int:
        return self._n_bytes_of_arrays + (self.index.n_bytes if "index" in self.__dict__ else 0)


class Datastore:
    """The token tries by entry token. An empty one proposes nothing."""

    def __init__(
        self,
        folder: Path,
        n_rows: dict[int, int],
        hidden_size: int,
        device: torch.device,
        max_bytes: int,
        min_chunk_length: int = 1,
    ) -> None:
        """n_rows: how many rows each entry token's trie has; max_bytes bounds the tries kept in memory.

        min_chunk_length: rows of shorter chunks are left out.
        """
        self.n_rows, self.hidden_size, self._min_chunk_length = n_rows, hidden_size, min_chunk_length
        self._folder, self._device, self._max_bytes = folder, device, max_bytes
        self._kept: OrderedDict[int, TokenTrie | None] = OrderedDict()
        self._n_bytes_of: dict[int, int] = {}  # as counted into the sum of all
        self._n_bytes_kept = 0

    @classmethod
    def of(cls, tries: list[TokenTrie], hidden_size: int) -> "Datastore":
        """A datastore that is in memory from the start, without files."""
        n_rows = {trie.entry_token_id: len(trie.windows) for trie in tries}
        datastore = cls(Path(), n_rows, hidden_size, torch.device("cpu"), 2**63)
        datastore._kept.update((trie.entry_token_id, trie) for trie in tries)
        return datastore

    def trie(self, entry_token_id: int) -> TokenTrie | None:
        """The trie of an entry token or None; the least recently used ones are dropped to keep under the bound."""
        if entry_token_id not in self.n_rows:
            return None
        if entry_token_id in self._kept:
            trie = self._kept[entry_token_id]
            self._kept.move_to_end(entry_token_id)
        else:
            whole = read_flattened(self._folder, entry_token_id, self.hidden_size, self._device)
            trie = whole.where(np.diff(whole.chunk_offsets) >= self._min_chunk_length)
            self._kept[entry_token_id] = trie
        # A trie that is asked often grows an index.
        n_bytes = 0 if trie is None else trie.n_bytes
        self._n_bytes_kept += n_bytes - self._n_bytes_of.get(entry_token_id, 0)
        self._n_bytes_of[entry_token_id] = n_bytes
        while self._n_bytes_kept > self._max_bytes and len(self._kept) > 1:
            self._n_bytes_kept -= self._n_bytes_of.pop(self._kept.popitem(last=False)[0])
        return trie

    def load_all(self) -> None:
        """Move every trie to the device and keep it there, whatever the bound."""
        self._max_bytes = 2**63
        for entry_token_id in ProgressBar(sorted(self.n_rows), desc="loading token tries", unit="trie"):
            self.trie(entry_token_id)


def open_datastore(
    trie_folder: Path,
    *,
    device: torch.device,
    max_bytes: int,
    excluded: frozenset[int] = frozenset(),
    max_rows: int | None = None,
    min_chunk_length: int = 1,
    reprocess: bool = True,
    verify: bool = False,
) -> Datastore:
    """The datastore of a trie folder, flattened first where that has not been done.

    excluded: entry tokens left out; max_rows: tries of more rows are left out, None for no bound; min_chunk_length: rows of
    shorter chunks are; reprocess False: the
    pickles must be there and up to date, InputError otherwise; verify: read all files that are to be used, and raise
    InputError where one is not what was written.
    """
    source = read_finished(trie_folder / HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE)
    n_rows = flatten(trie_folder, reprocess, verify, max_bytes)
    kept = {
        token_id: n
        for token_id, n in n_rows.items()
        if token_id not in excluded and (max_rows is None or n <= max_rows)
    }
    LOGGER.debug("%s: %s tries, %s chunks", trie_folder, len(kept), sum(kept.values()))
    hidden_size = source.inputs.get("hidden_size")
    if type(hidden_size) is not int or hidden_size < 1:
        raise InputError(f"{trie_folder / HIDDEN_STATES_MANIFEST}: names no hidden size; run make_token_trie.py again")
    return Datastore(trie_folder / FOLDER, kept, hidden_size, device, max_bytes, min_chunk_length)


def require_made_with(trie_folder: Path, model_path: str, tokenizer: str, model: str | None = None) -> None:
    """Raise InputError where the token ids are another tokenizer's, or the context vectors another model's.

    tokenizer and model: fingerprints of those at `model_path`; model None: only token ids are of interest.
    """
    name, stage = (MANIFEST, STAGE) if model is None else (HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE)
    path = trie_folder / name
    inputs = read_finished(path, stage).inputs
    if inputs.get("tokenizer") != tokenizer:
        raise InputError(
            f"{path}: the datastore was made with another tokenizer than {model_path}'s; build it again with this model"
        )
    if model is not None and inputs.get("model_gen") != model:
        raise InputError(
            f"{path}: its hidden states are those of another model than {model_path}; run stages 2 and 4 again with --model_path {model_path}"
        )


def reads_bos(trie_folder: Path) -> bool:
    """Whether the hidden states of a datastore are those of windows with BOS, or another prefix, before them."""
    extraction = read_finished(trie_folder / HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE).inputs["extraction"]
    return extraction.get("no_bos") is False


def flattened_trie(trie_folder: Path, token_id: int) -> TokenTrie:
    """One token trie from the files of stages 3 and 4, without a pickle; raises InputError where they are damaged."""
    arrays = flattened_arrays(trie_folder, token_id)
    return TokenTrie(token_id, torch.from_numpy(arrays.pop("context_vectors")), **arrays)


# ---- Reading


def read_flattened(folder: Path, entry_token_id: int, hidden_size: int, device: torch.device) -> TokenTrie:
    """One token trie from its pickle, its context vectors on the device.

    Raises InputError, which names the file, where it is missing, cut off, not arrays alone or not a trie's arrays.
    """
    path = pickle_path(folder, entry_token_id)
    arrays = read_arrays(path)
    _require_sound(path, arrays, hidden_size)
    vectors = torch.from_numpy(arrays.pop("context_vectors")).to(device)
    return TokenTrie(entry_token_id, vectors, **arrays)


def _require_sound(path: Path, arrays: dict[str, np.ndarray], hidden_size: int) -> None:
    vectors, ids, offsets = arrays["context_vectors"], arrays["chunk_ids"], arrays["chunk_offsets"]
    n_rows = len(arrays["windows"]) if arrays["windows"].ndim == 1 else -1
    if vectors.ndim == 2 and vectors.shape[1] != hidden_size:
        raise InputError(
            f"{path}: its vectors have size {vectors.shape[1]}, the datastore says {hidden_size}; make it anew"
        )
    is_sound = (
        vectors.shape == (n_rows, hidden_size)
        and vectors.dtype == np.float32
        and arrays["positions"].shape == (n_rows,)
        and ids.ndim == 1
        and ids.dtype.kind == offsets.dtype.kind == "i"
        and offsets.shape == (n_rows + 1,)
        and n_rows >= 1
        and offsets[0] == 0
        and offsets[-1] == len(ids)
        and bool((np.diff(offsets) >= 1).all())
        and bool((ids >= 0).all())
        and bool(np.isfinite(vectors).all())
    )
    if not is_sound:
        raise InputError(
            f"{path}: its arrays do not fit each other or hold NaN; delete {path.parent} and run eval.py again"
        )
