"""What a datastore holds, as figures: its size, its tries, its chunks, how similar they are, what it would propose.

Nothing here writes a file: tries are read as stages 3 and 4 left them, not as stage 5 flattens them.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.datastore import FOLDER, TokenTrie, flattened_trie
from utils.files import InputError, read_finished, require_folder
from utils.models import CausalLM
from utils.progress import ProgressBar
from utils.token_trie import (
    HIDDEN_STATES_MANIFEST,
    HIDDEN_STATES_STAGE,
    MANIFEST,
    STAGE,
    datastore_token_ids,
    entry_token_ids,
    is_trie_folder,
    read_trie_positions,
    read_trie_rows,
    trie_path,
)

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
N_GROUPS = 5  # of the similarities, equally large


def find_datastore(directory: Path) -> Path:
    """The trie folder that `directory` is or holds; raises InputError where there is none, or more than one."""
    require_folder(directory, f"{STAGE} wrote its tries to")
    if is_trie_folder(directory):
        return directory
    folders = sorted(path.parent for path in directory.glob(f"**/{MANIFEST}") if is_trie_folder(path.parent))
    if not folders:
        raise InputError(f"{directory}: holds no datastore; give the --output_dir of {STAGE}, or a trie folder in it")
    if len(folders) > 1:
        raise InputError(f"{directory}: holds {len(folders)} datastores, {', '.join(map(str, folders))}; give one")
    return folders[0]


# ---- Sizes


@dataclass(frozen=True)
class Overview:
    """What all tries of a datastore come to. hidden: what stage 4 said; None where it has not ended."""

    arguments: dict[str, Any]
    counts: dict[str, Any]
    hidden: dict[str, Any] | None
    n_bytes: dict[str, int]  # by kind of file
    rows: np.ndarray  # (E,) of each entry token
    entry_token_ids: np.ndarray  # (E,) ascending
    chunk_lengths: np.ndarray  # (L,) ascending, the lengths that there are
    chunks_of_length: np.ndarray  # (L,) rows of each

    @property
    def largest(self) -> np.ndarray:
        """Indices (E,) of the tries, those with the most rows first."""
        return np.lexsort((self.entry_token_ids, -self.rows))


def survey(folder: Path) -> Overview:
    """Read where every row stands; raises InputError where stage 3 did not end or a file is damaged."""
    manifest = read_finished(folder / MANIFEST, STAGE)
    hidden = None
    if has_context_vectors(folder):
        hidden = read_finished(folder / HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE).inputs
    token_ids = entry_token_ids(folder)
    rows = np.zeros(len(token_ids), dtype=np.int64)
    by_depth: dict[int, int] = {}
    for i, token_id in enumerate(ProgressBar(token_ids, desc="reading token tries", unit="trie", leave=False)):
        depths = read_trie_positions(folder, token_id)[2]
        rows[i] = sum(depths.values())
        for depth, n_rows in depths.items():
            by_depth[depth] = by_depth.get(depth, 0) + n_rows
    lengths = np.array(sorted(by_depth), dtype=np.int64)
    return Overview(
        arguments=manifest.arguments,
        counts=manifest.results,
        hidden=hidden,
        n_bytes=_bytes_by_kind(folder),
        rows=rows,
        entry_token_ids=np.array(token_ids, dtype=np.int64),
        chunk_lengths=lengths - 1,
        chunks_of_length=np.array([by_depth[depth] for depth in lengths.tolist()], dtype=np.int64),
    )


def has_context_vectors(folder: Path) -> bool:
    """Whether stage 4 has begun here."""
    return (folder / HIDDEN_STATES_MANIFEST).is_file()


def _bytes_by_kind(folder: Path) -> dict[str, int]:
    n_bytes = dict.fromkeys(("chunks", "positions", "context vectors", "flattened for stage 5", "other"), 0)
    for entry in os.scandir(folder):
        if entry.is_file():
            n_bytes[_kind(entry.name)] += entry.stat().st_size
    if (folder / FOLDER).is_dir():
        n_bytes["flattened for stage 5"] = sum(entry.stat().st_size for entry in os.scandir(folder / FOLDER))
    return n_bytes


def _kind(name: str) -> str:
    if name.endswith(".h5"):
        return "context vectors"
    if name.startswith("tok_pos_"):
        return "positions"
    return "chunks" if name.endswith(".json") and not name.endswith(MANIFEST) else "other"


def weighted_quantiles(values: np.ndarray, counts: np.ndarray) -> list[int]:
    """`QUANTILES` of values (n,) ascending that are there counts (n,) times; n >= 1."""
    ends = np.cumsum(counts)
    places = np.ceil(np.array(QUANTILES) * ends[-1]).clip(1)
    return values[np.searchsorted(ends, places)].tolist()


# ---- Similarities within tries


@dataclass(frozen=True)
class Neighbors:
    """For some rows drawn at random: the most similar other row of the same entry token. Arrays are of length n."""

    n_drawn: int
    similarities: np.ndarray  # of those that are not alone in their trie
    begins_alike: np.ndarray  # bool: its chunk begins with the same token
    fits: np.ndarray  # bool: its chunk is the same, or one begins with the other

    def groups(self) -> Iterator[tuple[float, float, int, float, float]]:
        """From the least similar: lowest and highest similarity, how many, shares that begin alike and that fit."""
        order = np.argsort(self.similarities, kind="stable")
        for part in np.array_split(order, N_GROUPS):
            if len(part):
                found = self.similarities[part]
                alike, fits = (float(which[part].mean()) for which in (self.begins_alike, self.fits))
                yield float(found.min()), float(found.max()), len(part), alike, fits


def sample_neighbors(folder: Path, overview: Overview, n_sampled: int, seed: int = 0) -> Neighbors:
    """Draw at most n_sampled rows of tries with context vectors, without replacement."""
    kept = np.isin(overview.entry_token_ids, datastore_token_ids(folder))
    token_ids, ends = overview.entry_token_ids[kept], np.cumsum(overview.rows[kept])
    n_rows = int(ends[-1]) if len(ends) else 0
    drawn = np.sort(np.random.default_rng(seed).choice(n_rows, min(n_sampled, n_rows), replace=False))
    tries = np.searchsorted(ends, drawn, side="right")
    starts = ends - overview.rows[kept]
    found: list[tuple[float, bool, bool]] = []
    bar = ProgressBar(np.unique(tries).tolist(), desc="comparing chunks", unit="trie", leave=False)
    for i in bar:
        if overview.rows[kept][i] > 1:
            trie = flattened_trie(folder, int(token_ids[i]))
            found += [_neighbor(trie, row) for row in (drawn[tries == i] - starts[i]).tolist()]
    similarities, alike, fits = zip(*found, strict=True) if found else ((), (), ())
    return Neighbors(len(drawn), np.array(similarities), np.array(alike, dtype=bool), np.array(fits, dtype=bool))


def _neighbor(trie: TokenTrie, row: int) -> tuple[float, bool, bool]:
    cosines = torch.mv(trie.context_vectors, trie.context_vectors[row])
    cosines[row] = -torch.inf
    nearest = int(cosines.argmax())
    chunk, other = trie.chunk(row), trie.chunk(nearest)
    n_common = min(len(chunk), len(other))
    return float(cosines[nearest]), chunk[0] == other[0], chunk[:n_common] == other[:n_common]


# ---- The chunks of one entry token


@dataclass
class Branch:
    """Tokens that chunks have in common after those above; n_rows pass here, n_ending end with its last token."""

    token_ids: list[int]
    n_rows: int
    n_ending: int
    branches: list["Branch"]


def read_chunks(folder: Path, entry_token_id: int, name: str) -> list[list[int]]:
    """The chunks of an entry token, prefix-sorted; raises InputError, which calls it `name`, where it has none."""
    if not trie_path(folder, entry_token_id).is_file():
        raise InputError(f"{folder}: no chunk follows {name}; give another token")
    rows = read_trie_rows(folder, entry_token_id)
    chunks = [ids.tolist() for ids in np.split(rows.chunk_ids, rows.chunk_offsets[1:-1])]
    return sorted(chunks)


def prefix_tree(chunks: list[list[int]]) -> list[Branch]:
    """Prefix-sorted chunks as a tree: a branch ends where a chunk does or where they part; the most frequent first."""
    return _branches(chunks, 0)


def _branches(chunks: list[list[int]], depth: int) -> list[Branch]:
    """Of prefix-sorted chunks that agree in their first `depth` tokens and are longer."""
    found = []
    first = 0
    while first < len(chunks):
        end = first
        while end < len(chunks) and chunks[end][depth] == chunks[first][depth]:
            end += 1
        group = chunks[first:end]
        # Prefix-sorted: what the first and the last have in common, all between have, and the first is no longer.
        n_common = depth
        while n_common < len(group[0]) and group[0][n_common] == group[-1][n_common]:
            n_common += 1
        longer = [chunk for chunk in group if len(chunk) > n_common]
        found.append(
            Branch(group[0][depth:n_common], len(group), len(group) - len(longer), _branches(longer, n_common))
        )
        first = end
    return sorted(found, key=lambda branch: -branch.n_rows)


def heaviest(branches: list[Branch], n_branches: int) -> set[int]:
    """The ids (Python's) of the branches with the most rows; a branch comes with those that it grows from."""
    everything = [(branch.n_rows, depth, branch) for depth, branch in _walk(branches)]
    everything.sort(key=lambda entry: (-entry[0], entry[1]))
    return {id(branch) for _, _, branch in everything[:n_branches]}


def _walk(branches: list[Branch], depth: int = 0) -> Iterator[tuple[int, Branch]]:
    for branch in branches:
        yield depth, branch
        yield from _walk(branch.branches, depth + 1)


# ---- What would be proposed in a text


@dataclass(frozen=True)
class Proposal:
    """What the datastore has after one token of a text. chunk_ids is empty, similarity NaN, where it has nothing.

    n_right: tokens of the chunk from its first on that the text goes on with; n_known: tokens of the chunk that the
    text is long enough for.
    """

    position: int
    entry_token_id: int
    similarity: float
    chunk_ids: list[int]
    n_right: int
    n_known: int


@torch.inference_mode()
def proposals_in(folder: Path, lm: CausalLM, token_ids: list[int]) -> list[Proposal]:
    """One proposal for each token of the text, which the LM reads in one pass; raises InputError where it is too long."""
    if lm.n_positions is not None and len(token_ids) > lm.n_positions:
        raise InputError(f"--text: is {len(token_ids)} tokens, {lm.name} reads {lm.n_positions} at most; shorten it")
    hidden_states, _ = lm.forward(torch.tensor([token_ids], device=lm.device), use_cache=False)
    queries = hidden_states[0].float().cpu()
    nearest: dict[int, tuple[float, list[int]]] = {}
    for token_id in sorted(set(token_ids) & set(datastore_token_ids(folder))):
        trie = flattened_trie(folder, token_id)
        for position in (n for n, other in enumerate(token_ids) if other == token_id):
            row, similarity = trie.index.nearest(queries[position])
            nearest[position] = similarity, trie.chunk(row)
    return [
        _proposal(token_ids, position, *nearest.get(position, (math.nan, []))) for position in range(len(token_ids))
    ]


def _proposal(token_ids: list[int], position: int, similarity: float, chunk: list[int]) -> Proposal:
    following = token_ids[position + 1 : position + 1 + len(chunk)]
    differing = (i for i, (a, b) in enumerate(zip(chunk, following, strict=False)) if a != b)
    n_right = next(differing, len(following))
    return Proposal(position, token_ids[position], similarity, chunk, n_right, len(following))
