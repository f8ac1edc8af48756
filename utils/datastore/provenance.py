"""Where chunks come from: the text around them in the windows of stage 2, which stage 3's list keeps.

The list has one window a line (`utils.chunk_lists`), so it is read once, line by line, and only the lines that are asked
for are taken apart.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.datastore.chunk_lists import ChunkListPaths
from utils.datastore.trie_files import MANIFEST, STAGE
from utils.files import InputError
from utils.manifest import read_finished


@dataclass(frozen=True)
class SourceWindow:
    """token_ids (L,) int64; probabilities (L,) float64 that `model_ds` gave each, the first 0."""

    token_ids: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Segment:
    """Tokens `first` to `end` of a window."""

    window: int
    first: int
    end: int


def find_windows(trie_folder: Path) -> Path:
    """The list of windows that a trie folder's chunks were cut from; raises InputError where it is missing."""
    tries = read_finished(trie_folder / MANIFEST, STAGE)
    names = ("dataset_name", "model_ds", "partition", "tok_prob_threshold")
    paths = ChunkListPaths(trie_folder.parent.parent, *(tries.arguments[name] for name in names))
    if not paths.token_prob_list.is_file():
        raise InputError(f"{paths.token_prob_list}: is not there any more; run {STAGE} again to have it")
    lists = read_finished(paths.manifest, STAGE)
    if lists.inputs.get("windows_fingerprint") != tries.inputs.get("windows_fingerprint"):
        raise InputError(f"{paths.token_prob_list}: is of another text than {trie_folder}; run {STAGE} for that text")
    return paths.token_prob_list


def read_windows(path: Path, wanted: Iterable[int]) -> dict[int, SourceWindow]:
    """The windows with these numbers; raises InputError where a line is damaged or missing."""
    left = set(wanted)
    found: dict[int, SourceWindow] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=-1):  # the first line opens the list
            if not left:
                break
            if number in left:
                left.remove(number)
                found[number] = _parse(path, number, line)
    if left:
        raise InputError(f"{path}: has no window {min(left)}; run {STAGE} again")
    return found


def _parse(path: Path, number: int, line: bytes) -> SourceWindow:
    try:
        _, probabilities, numbers, positions, token_ids = zip(*json.loads(line.strip().rstrip(b",")), strict=True)
        is_sound = set(numbers) == {number} and positions == tuple(range(len(positions)))
        window = SourceWindow(np.array(token_ids, dtype=np.int64), np.array(probabilities, dtype=np.float64))
    except (TypeError, ValueError, OverflowError):
        is_sound = False
    if not is_sound:
        raise InputError(f"{path}: line {number + 2} is not window {number}; run {STAGE} again")
    return window


def segments_around(windows: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> tuple[list[Segment], np.ndarray]:
    """The fewest segments that cover some ranges of tokens, and which of them covers each.

    windows, firsts, ends (n,) int64: tokens firsts[i] >= 0 to ends[i] of windows[i]. The second is (n,) int64.
    """
    segments: list[Segment] = []
    holder = np.zeros(len(windows), dtype=np.int64)
    for i in np.lexsort((ends, firsts, windows)).tolist():
        window, first, end = int(windows[i]), int(firsts[i]), int(ends[i])
        if segments and segments[-1].window == window and first <= segments[-1].end:
            segments[-1] = Segment(window, segments[-1].first, max(segments[-1].end, end))
        else:
            segments.append(Segment(window, first, end))
        holder[i] = len(segments) - 1
    return segments, holder
