"""`token_probs_{i}.json`: what the LM thought of each token of window i, the file that chunks are cut from.

A list of `[token_text, probability, chunk_id, position, token_id]`, one row per token, the first token's probability 0
(nothing stands before it). `chunk_id` is the window's number i; the text is for people to read, the id is what counts.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.files import InputError, replacing, require_folder
from utils.json_io import read_json_and_bytes
from utils.manifest import Manifest, read_finished

STAGE = "extract_token_probs_and_memmap.py"
_NAME = re.compile(r"token_probs_(0|[1-9][0-9]*)\.json")


def read_extraction(path: Path) -> Manifest:
    """Stage 2's manifest of a partition, with what later stages ask of it.

    Raises InputError where stage 2 has not run there to its end, or the manifest lacks something.
    """
    manifest = read_finished(path, STAGE)
    numbers = [manifest.results.get(name) for name in ("n_windows", "n_tokens", "hidden_size")]
    numbers += [manifest.arguments.get(name) for name in ("chunk_size", "stride")]
    texts = [
        manifest.results.get("windows_fingerprint"),
        manifest.inputs.get("model"),
        manifest.inputs.get("tokenizer"),
    ]
    if not all(isinstance(n, int) and n > 0 for n in numbers) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: is not a complete manifest of {STAGE}; delete it and run {STAGE} again")
    return manifest


def find_token_probs(given: Path, partition: str) -> tuple[Path, Manifest]:
    """Stage 2's folder of the partition, where no window lacks its file, and its manifest."""
    given = require_folder(given, "extract_token_probs_and_memmap.py wrote").absolute()
    name = f"{partition}_manifest.json"
    folder = given if given.name == partition and (given.parent / name).is_file() else given / partition
    if not (folder.parent / name).is_file():
        expected = f"stage 2's folder of the partition {partition}, with {name} beside it"
        raise InputError(f"{given}: expected {expected}; give that folder, or run stage 2 first")
    extraction = read_extraction(folder.parent / name)
    require_folder(folder, "extract_token_probs_and_memmap.py wrote")
    n_windows = extraction.results["n_windows"]
    there = [window for window in windows_with_token_probs(folder) if window < n_windows]
    if n_missing := n_windows - len(there):
        first = next((i for i, window in enumerate(there) if i != window), len(there))
        got = f"token_probs_{first}.json is missing, {n_missing} of {n_windows} windows are"
        raise InputError(f"{folder}: {got}; run stage 2 again, it goes on where it was")
    return folder, extraction


def token_probs_path(folder: Path, window: int) -> Path:
    return folder / f"token_probs_{window}.json"


def windows_with_token_probs(folder: Path) -> list[int]:
    """The numbers of the windows that have a file in the folder, ascending."""
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def write_token_probs(
    folder: Path, window: int, token_ids: np.ndarray, probabilities: np.ndarray, token_texts: list[str]
) -> None:
    """token_ids (L,) integer; probabilities (L,) float in [0, 1], the first 0; token_texts L strings."""
    n = len(token_texts)
    rows = zip(token_texts, probabilities.tolist(), [window] * n, range(n), token_ids.tolist(), strict=True)
    with replacing(token_probs_path(folder, window)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        # Not json.dump, which encodes value by value in Python: several times slower.
        file.write(json.dumps(list(rows), ensure_ascii=False))


@dataclass(frozen=True)
class WindowTokenProbs:
    """What a window's file says of its L tokens, and its JSON on one line, which saves encoding it again."""

    texts: list[str]
    token_ids: np.ndarray  # (L,) int32
    probabilities: np.ndarray  # (L,) float64
    json: bytes

    @property
    def row_texts(self) -> list[bytes]:
        """The JSON of each row without its brackets."""
        between = "], ["
        pieces = self.json[2:-2].split(between.encode())
        # No text holds what stands between rows, so where it stands as often as rows meet, it stands there alone.
        is_plain = self.json.startswith(b"[[") and self.json.endswith(b"]]")
        if is_plain and len(pieces) == len(self.texts) and between not in "\n".join(self.texts):
            return pieces
        rows = [json.dumps(row, ensure_ascii=False)[1:-1] for row in json.loads(self.json)]
        return [row.encode(errors="backslashreplace") for row in rows]


def read_token_probs(folder: Path, window: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, token ids (L,) int32 and probabilities (L,) float64 of a window; raises InputError as `read_window`."""
    read = read_window(folder, window)
    return read.texts, read.token_ids, read.probabilities


def read_window(folder: Path, window: int) -> WindowTokenProbs:
    """What a window's file holds.

    Raises InputError where it is missing, damaged, of another window or holds something that is no probability.
    """
    path = token_probs_path(folder, window)
    rows, text = read_json_and_bytes(path)
    try:
        texts, probabilities, windows, positions, token_ids = zip(*rows, strict=True)
        probs = np.array(probabilities, dtype=np.float64)
        ids = np.array(token_ids)
        is_sound = positions == tuple(range(len(rows))) and set(windows) == {window}
        is_sound &= (
            ids.dtype == np.int64
            and bool(ids.min() >= 0)
            and bool(ids.max() < 2**31)
            and bool(((probs >= 0) & (probs <= 1)).all())
        )
    except (TypeError, ValueError, OverflowError):
        is_sound = False
    if not is_sound:
        rows_of = f"[text, probability in [0, 1], {window}, position, token id]"
        raise InputError(f"{path}: is not a list of {rows_of} rows in order; delete it and run stage 2 again")
    # A line break in JSON is never part of a value.
    line = text.strip().replace(b"\r", b" ").replace(b"\n", b" ")
    return WindowTokenProbs(list(texts), ids.astype(np.int32), probs, line)
