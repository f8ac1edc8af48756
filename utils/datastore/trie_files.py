"""Token tries on disk: all chunks of one entry token, where each stands in the text, and each one's context vector.

    {output_dir}/token_trie_{dataset}_DS{model_ds}_H{model_gen}/{partition}_{γ}/    the trie folder
        {id}.json          {depth: [[entry, c1, …], …]}, token ids; depth = tokens with the entry
        tok_pos_{id}.json  {depth: [[window, position], …]}, of the entry token, row for row
        {id}.h5            group `hidden_states`, one dataset (rows, D) per depth, row for row
        manifest.json, hidden_states_manifest.json

Depths ascend; within a depth rows are prefix-sorted, equal ones by window and position.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from utils.files import InputError, replacing, require_file, require_folder
from utils.hdf5 import create_h5, h5_is_whole, read_places
from utils.json_io import read_json
from utils.manifest import FileSum, Manifest, SummedFile, read_finished, summed

MANIFEST = "manifest.json"
HIDDEN_STATES_MANIFEST = "hidden_states_manifest.json"
STAGE = "save_token_trie_info.py"
HIDDEN_STATES_STAGE = "make_token_trie.py"
GROUP = "hidden_states"
DIGITS, BRACKETS_TO_SPACES = b"0123456789", bytes.maketrans(b"[],", b"   ")
_DEPTH_LINE = re.compile(rb'"(\d{1,9})": \[\[([0-9, \[\]]*)\]\],?')
_TRIE_NAME = re.compile(r"(0|[1-9]\d{0,9})\.json")


@dataclass(frozen=True)
class TrieRows:
    """The N rows of one token trie as they stand in its files, without the context vectors."""

    entry_token_id: int
    chunk_ids: np.ndarray  # (M,) int32, the chunks one after the other, the entry token not among them
    chunk_offsets: np.ndarray  # (N + 1,) int64: row n's chunk is chunk_ids[chunk_offsets[n]:chunk_offsets[n + 1]]
    windows: np.ndarray  # (N,) int64
    positions: np.ndarray  # (N,) int64, of the entry token in its window

    @property
    def depths(self) -> dict[int, int]:
        """Rows by depth, ascending."""
        depths, n_rows = np.unique(np.diff(self.chunk_offsets) + 1, return_counts=True)
        return dict(zip(depths.tolist(), n_rows.tolist(), strict=True))


# ---- Names


def trie_path(folder: Path, entry_token_id: int) -> Path:
    return folder / f"{_checked(entry_token_id)}.json"


def positions_path(folder: Path, entry_token_id: int) -> Path:
    return folder / f"tok_pos_{_checked(entry_token_id)}.json"


def vectors_path(folder: Path, entry_token_id: int) -> Path:
    return folder / f"{_checked(entry_token_id)}.h5"


def _checked(entry_token_id: int) -> int:
    # What is read from a file becomes part of a path only here.
    if not isinstance(entry_token_id, (int, np.integer)) or not 0 <= entry_token_id < 2**31:
        raise ValueError(f"{entry_token_id!r} is no token id")
    return int(entry_token_id)


def sanitize_label(label: str) -> str:
    """A label as part of a file's name."""
    return label.replace("/", "_")


def trie_folder_path(
    output_dir: Path, dataset: str, model_ds: str, model_gen: str, partition: str, tok_prob_threshold: float
) -> Path:
    """Where the trie folder of these labels lies below stage 3's `--output_dir`, whether or not there is one."""
    models = f"token_trie_{sanitize_label(dataset)}_DS{sanitize_label(model_ds)}_H{sanitize_label(model_gen)}"
    return output_dir / models / f"{sanitize_label(partition)}_{float(tok_prob_threshold)}"


def find_trie_folder(
    directory: Path,
    dataset: str,
    model_ds: str,
    model_gen: str,
    partition: str,
    tok_prob_threshold: float,
    *,
    any_partition: bool = False,
) -> Path:
    """The trie folder of these labels in stage 3's `--output_dir`; `directory` may also be the trie folder itself.

    any_partition: `partition` decides only where there are several; where its folder is missing and there is just one
    of this γ, that one is taken. Raises InputError where there is none, stage 3 did not end, or a label differs.
    """
    require_folder(directory, f"{STAGE} wrote its tries to")
    folder = trie_folder_path(directory, dataset, model_ds, model_gen, partition, tok_prob_threshold)
    if not folder.is_dir() and is_trie_folder(directory):
        folder = directory
    elif not folder.is_dir() and any_partition:
        others = sorted(folder.parent.glob(f"*_{float(tok_prob_threshold)}/{MANIFEST}"))
        folder = others[0].parent if len(others) == 1 else folder
    if not folder.is_dir():
        there = sorted(str(path.parent.relative_to(directory)) for path in directory.glob(f"token_trie_*/*/{MANIFEST}"))
        got = f"there are {', '.join(there)}" if there else "there is no trie folder at all"
        expected = f"the trie folder {folder.relative_to(directory)}"
        raise InputError(
            f"{directory}: expected {expected}, but {got}; give the folder that {STAGE} wrote, or its labels"
        )
    wanted: dict[str, Any] = {"dataset_name": dataset, "model_ds": model_ds, "model_gen": model_gen}
    wanted |= {"tok_prob_threshold": tok_prob_threshold} | ({} if any_partition else {"partition": partition})
    _require_labels(folder / MANIFEST, wanted)
    return folder


def is_trie_folder(directory: Path) -> bool:
    """Whether stage 3 wrote its manifest here; other stages have one of this name too."""
    path = directory / MANIFEST
    if not path.is_file():
        return False
    fields = read_json(path)
    return isinstance(fields, dict) and fields.get("stage") == STAGE


def _require_labels(path: Path, wanted: dict[str, Any]) -> None:
    made_with = read_finished(path, STAGE).arguments
    for name, value in wanted.items():
        if made_with.get(name) != value:
            raise InputError(
                f"{path}: was made with {name} {made_with.get(name)!r}, this run has {value!r}; give that, or other tries"
            )


# ---- Which tries there are


def entry_token_ids(folder: Path) -> list[int]:
    """The entry tokens that have both files of stage 3, ascending."""
    names = _names(folder)
    matches = (_TRIE_NAME.fullmatch(name) for name in names)
    found = (int(match[1]) for match in matches if match and f"tok_pos_{match[1]}.json" in names)
    return sorted(token for token in found if token < 2**31)


def trie_files(folder: Path) -> list[Path]:
    """Both files of stage 3 of every entry token."""
    return [path(folder, token) for token in entry_token_ids(folder) for path in (trie_path, positions_path)]


def entry_tokens_with_vectors(folder: Path) -> list[int]:
    """The entry tokens whose `.h5` is there too and not cut off, ascending."""
    names = _names(folder)
    return [
        token for token in entry_token_ids(folder) if f"{token}.h5" in names and h5_is_whole(folder / f"{token}.h5")
    ]


def datastore_token_ids(folder: Path) -> list[int]:
    """The entry tokens of a finished datastore, ascending: all but those that stage 4 was told to leave out.

    Raises InputError where stage 4 did not end. One whose `.h5` went lost since is among them.
    """
    left_out = read_finished(folder / HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE).results.get("excluded", [])
    if not isinstance(left_out, list) or not all(type(token) is int for token in left_out):
        path = folder / HIDDEN_STATES_MANIFEST
        raise InputError(f"{path}: is damaged; delete it and run {HIDDEN_STATES_STAGE} again")
    return sorted(set(entry_token_ids(folder)).difference(left_out))


def finished_entry_token_ids(folder: Path, manifest: Manifest) -> list[int]:
    """The entry tokens of a trie folder, ascending; raises InputError where a trie of stage 3's manifest is gone."""
    found, expected = entry_token_ids(folder), manifest.results.get("entry_tokens")
    if len(found) != expected:
        remedy = f"run {STAGE} again" if len(found) < (expected or 0) else "delete the folder and make it anew"
        raise InputError(f"{folder}: holds {len(found)} tries, its manifest says {expected}; {remedy}")
    return found


def refuse_files_without_manifest(folder: Path) -> None:
    """Raise InputError where tries lie in a folder without a manifest: nothing says what they were made from."""
    if not (folder / MANIFEST).exists() and folder.is_dir():
        strays = [name for name in _names(folder) if name.endswith((".json", ".h5"))]
        if strays:
            raise InputError(f"{folder}: holds files of unknown origin ({min(strays)}) but no {MANIFEST}; delete it")


def read_token_id_list(path: Path) -> list[int]:
    """The token ids in a JSON list, ascending; raises InputError where an entry is none."""
    token_ids = read_json(path)
    if not isinstance(token_ids, list) or any(type(token) is not int or not 0 <= token < 2**31 for token in token_ids):
        raise InputError(f"{path}: is not a list of token ids; expected [5, 17, …]")
    return sorted(set(token_ids))


def _names(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


# ---- Chunks and positions


class TriePiece(NamedTuple):
    """Some rows of one entry token and depth as they stand in its two files: "[1, 2], [3, 4]"."""

    entry_token_id: int
    depth: int
    chunks: str
    places: str


def trie_pieces(
    entry_ids: np.ndarray, chunk_ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, places: np.ndarray
) -> list[TriePiece]:
    """The content of some rows' files, by entry token and depth; rows of one keep their order.

    entry_ids, starts, lengths (n,): row i's chunk is chunk_ids[starts[i]:starts[i] + lengths[i]]; places (n, 2): window
    and position.
    """
    pieces = []
    by_length = np.argsort(lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[by_length], prepend=0, append=0)).tolist()
    for rows in (by_length[first:end] for first, end in pairwise(bounds)):
        length = int(lengths[rows[0]])
        chunks = chunk_ids[starts[rows][:, None] + np.arange(length)]
        id_rows = np.concatenate([entry_ids[rows][:, None], chunks], axis=1)  # (n, depth)
        firsts = np.flatnonzero(np.diff(entry_ids[rows], prepend=-1))
        texts = zip(_json_of_rows(id_rows, firsts), _json_of_rows(places[rows], firsts), strict=True)
        for token, (ids, positions) in zip(entry_ids[rows][firsts].tolist(), texts, strict=True):
            pieces.append(TriePiece(token, length + 1, ids, positions))
    return sorted(pieces)


def _json_of_rows(table: np.ndarray, firsts: np.ndarray) -> Iterator[str]:
    """The rows of a table (n, k) from each of `firsts` to the next as "[1, 2], [3, 4]"."""
    # Python writes lists of integers as JSON does, and best a whole table at once; where a row begins is counted.
    text = str(table.tolist())[1:-1]
    n_digits = np.ones(table.shape, dtype=np.int64)
    power = 10
    while power <= table.max():
        n_digits += table >= power
        power *= 10
    ends = np.cumsum(n_digits.sum(axis=1) + 2 * table.shape[1] + 2)
    bounds = np.append(0, ends)[np.append(firsts, len(table))].tolist()
    return (text[first : end - 2] for first, end in pairwise(bounds))


def write_trie(folder: Path, scratch: Path, entry_token_id: int, pieces: Iterable[TriePiece]) -> dict[str, FileSum]:
    """Write both files of an entry token, a depth a line; returns each one's sum by name.

    scratch: a folder on the same disk for unfinished files; pieces: by depth, then in the order of the rows.
    """
    trie, positions = trie_path(folder, entry_token_id), positions_path(folder, entry_token_id)
    with summed(trie, scratch) as chunks_file, summed(positions, scratch) as places_file:
        before_depth, last = "{\n", 0
        for piece in pieces:
            before = ", " if piece.depth == last else f'{before_depth}"{piece.depth}": ['
            chunks_file.write((before + piece.chunks).encode())
            places_file.write((before + piece.places).encode())
            before_depth, last = "],\n", piece.depth
        chunks_file.write(b"]\n}\n")
        places_file.write(b"]\n}\n")
    return {trie.name: chunks_file.sum, positions.name: places_file.sum}


def read_trie_rows(folder: Path, entry_token_id: int) -> TrieRows:
    """The rows of an entry token; raises InputError where a file is missing, damaged or not row for row the other."""
    path = trie_path(folder, entry_token_id)
    tables = _read_by_depth(path, None)
    windows, positions, depths = read_trie_positions(folder, entry_token_id)
    if depths != {depth: len(table) for depth, table in tables.items()}:
        other = positions_path(folder, entry_token_id)
        raise InputError(f"{path}: has other rows than {other.name}; delete both and run {STAGE} again")
    if any((table[:, 0] != entry_token_id).any() for table in tables.values()):
        raise InputError(f"{path}: holds rows of another entry token; delete it and run {STAGE} again")
    lengths = np.repeat([depth - 1 for depth in depths], list(depths.values()))
    return TrieRows(
        entry_token_id=entry_token_id,
        chunk_ids=np.concatenate([table[:, 1:].ravel() for table in tables.values()]).astype(np.int32),
        chunk_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        windows=windows,
        positions=positions,
    )


def read_trie_positions(folder: Path, entry_token_id: int) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Windows (N,) and positions (N,) int64 of an entry token's rows in their order, and rows by depth.

    Raises InputError where the file is missing or damaged.
    """
    tables = _read_by_depth(positions_path(folder, entry_token_id), 2)
    places = np.concatenate(list(tables.values()))
    return places[:, 0], places[:, 1], {depth: len(table) for depth, table in tables.items()}


def _read_by_depth(path: Path, n_columns: int | None) -> dict[int, np.ndarray]:
    """(n, n_columns) int64 by depth; n_columns None: as many as the depth."""
    require_file(path, f"{STAGE} writes")
    try:
        tables = _parse_own_json(path.read_bytes(), n_columns)
        tables = tables or {int(depth): np.array(table) for depth, table in read_json(path).items()}
        is_sound = bool(tables) and list(tables) == sorted(tables) and min(tables) >= 2
        for depth, table in tables.items():
            is_sound &= table.dtype == np.int64 and table.ndim == 2 and table.shape[1] == (n_columns or depth)
            is_sound = is_sound and len(table) > 0 and int(table.min()) >= 0 and int(table.max()) < 2**31
    except (AttributeError, TypeError, ValueError, OverflowError):
        is_sound = False
    if not is_sound:
        columns = f"{n_columns} numbers" if n_columns else "depth token ids"
        raise InputError(f"{path}: is not a map of depths to rows of {columns}; delete it and run {STAGE} again")
    return tables


def _parse_own_json(text: bytes, n_columns: int | None) -> dict[int, np.ndarray]:
    """What `_read_by_depth` returns; empty where the text is not exactly as `write_trie` writes it.

    Without Python lists on the way, a large file is read 6 to 8 times faster (benchmarks/trie_reading.py).
    """
    tables: dict[int, np.ndarray] = {}
    first, *lines = text.split(b"\n")
    if first != b"{" or lines[-2:] != [b"}", b""]:
        return {}
    for line in lines[:-2]:
        match = _DEPTH_LINE.fullmatch(line)
        if not match:
            return {}
        depth, numbers = int(match[1]), match[2]
        n_rows, n = numbers.count(b"[") + 1, n_columns or depth
        between = b", " * (n - 1)
        # Without its digits the text is the same for all tables of a shape.
        if numbers.translate(None, DIGITS) != (between + b"], [") * (n_rows - 1) + between:
            return {}
        values = np.fromstring(numbers.translate(BRACKETS_TO_SPACES), dtype=np.int64, sep=" ")
        if len(values) != n_rows * n:
            return {}
        tables[depth] = values.reshape(n_rows, n)
    return tables


# ---- Context vectors


def write_context_vectors(
    folder: Path,
    entry_token_id: int,
    depths: dict[int, int],
    vector_type: tuple[int, np.dtype],
    take: Callable[[int, int], np.ndarray],
    n_block: int,
) -> dict[str, FileSum]:
    """Write an entry token's `.h5`, a block of rows at a time; returns its sum by name.

    depths: rows by depth, ascending; vector_type: hidden size D and dtype; take(a, b) returns the vectors (b - a, D) of
    rows a to b, contiguous and of that dtype, and is called for `n_block` rows at most.
    """
    path, (hidden_size, dtype) = vectors_path(folder, entry_token_id), vector_type
    with replacing(path) as temporary:
        shapes = {str(depth): (n_rows, hidden_size) for depth, n_rows in depths.items()}
        offsets = create_h5(temporary, shapes, dtype, GROUP)
        with open(temporary, "r+b", buffering=0) as file:
            held = SummedFile(file)
            bounds = pairwise([0, *accumulate(depths.values())])
            for offset, (first, end) in sorted(zip(offsets, bounds, strict=True)):
                held.read_to(offset)
                for row in range(first, end, n_block):
                    held.write(take(row, min(row + n_block, end)))
            held.read_to(None)
    return {path.name: held.sum}


class ContextVectors:
    """The context vectors of a trie's rows, in the files' float dtype, mapped into memory: they may be many."""

    def __init__(self, folder: Path, rows: TrieRows) -> None:
        """Raises InputError where the `.h5` is missing, cut off or not row for row the trie."""
        self._path = require_file(vectors_path(folder, rows.entry_token_id), f"{HIDDEN_STATES_STAGE} writes")
        try:
            tables = _map_tables(self._path)
        except (OSError, KeyError, AttributeError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip("'\"")
            self._refuse(f"is cut off or not an .h5 of {HIDDEN_STATES_STAGE} ({reason})", error)
        if any(table.ndim != 2 or table.dtype.kind != "f" for table in tables.values()):
            self._refuse("expected a float matrix per depth")
        n_rows = {depth: len(tables[depth]) for depth in sorted(tables)}
        if n_rows != rows.depths:
            self._refuse(f"its rows by depth are {n_rows}, those of the trie {rows.depths}")
        if len({(table.shape[1], table.dtype) for table in tables.values()}) != 1:
            self._refuse("its vectors have different sizes")
        self._tables = [tables[depth] for depth in n_rows]
        self._firsts = np.cumsum([0, *n_rows.values()])

    def _refuse(self, what: str, error: Exception | None = None) -> NoReturn:
        raise InputError(f"{self._path}: {what}; delete it and run {HIDDEN_STATES_STAGE} again") from error

    @property
    def shape(self) -> tuple[int, int]:
        return int(self._firsts[-1]), self._tables[0].shape[1]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors (n, D) of rows (n,); raises InputError where one holds NaN or infinity."""
        vectors = np.empty((len(rows), self.shape[1]), self._tables[0].dtype)
        of_rows = np.searchsorted(self._firsts, rows, side="right") - 1
        for i in np.unique(of_rows):
            own = np.flatnonzero(of_rows == i)
            vectors[own] = self._tables[i][rows[own] - self._firsts[i]]
        if not np.isfinite(vectors).all():
            self._refuse("holds NaN or infinity")
        return vectors


def _map_tables(path: Path) -> dict[int, np.ndarray]:
    """The datasets of an `.h5` by depth; raises ValueError where one is not in one piece."""
    data, tables = np.asarray(np.memmap(path, np.uint8, "r")), {}
    for name, (shape, dtype, offset) in read_places(path, GROUP).items():
        if 0 in shape:
            offset = 0
        if offset is None:  # compressed rows could be any number, those of another file anything
            raise ValueError(f"the rows of depth {int(name)} are not in one piece")
        n_bytes = math.prod(shape) * dtype.itemsize
        tables[int(name)] = data[offset : offset + n_bytes].view(dtype).reshape(shape)
    return tables


def read_context_vectors(folder: Path, entry_token_id: int, rows: TrieRows) -> np.ndarray:
    """All context vectors (N, D) of a trie; raises InputError as `ContextVectors` does."""
    assert rows.entry_token_id == entry_token_id
    vectors = ContextVectors(folder, rows)
    return vectors.take(np.arange(vectors.shape[0]))
