"""`token_probs_{i}.json`: what the LM thought of each token of window i, the file that chunks are cut from.

A list of `[token_text, probability, chunk_id, position, token_id]`, one row per token, the first token's probability 0
(nothing stands before it). `chunk_id` is the window's number i; the text is for people to read, the id is what counts.
"""

import json
import re
from pathlib import Path

import numpy as np

from utils.files import InputError, read_json, replacing

_NAME = re.compile(r"token_probs_(\d+)\.json")


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
    rows = zip(token_texts, probabilities.tolist(), token_ids.tolist(), strict=True)
    entries = [[text, probability, window, position, token] for position, (text, probability, token) in enumerate(rows)]
    with replacing(token_probs_path(folder, window)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(entries, file, ensure_ascii=False)


def read_token_probs(folder: Path, window: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, token ids (L,) int32 and probabilities (L,) float64 of a window.

    Raises InputError where the file is missing, damaged, of another window or holds something that is no probability.
    """
    path = token_probs_path(folder, window)
    rows = read_json(path)
    try:
        texts, probabilities, windows, positions, token_ids = zip(*rows, strict=True)
        probs = np.array(probabilities, dtype=np.float64)
        ids = np.array(token_ids, dtype=np.int64)
        is_sound = np.array_equal(positions, np.arange(len(rows))) and set(windows) == {window}
        is_sound &= bool(ids.min() >= 0) and bool(ids.max() < 2**31) and bool(((probs >= 0) & (probs <= 1)).all())
    except (TypeError, ValueError, OverflowError):
        is_sound = False
    if not is_sound:
        rows_of = f"[text, probability in [0, 1], {window}, position, token id]"
        raise InputError(f"{path}: is no list of {rows_of} rows in order; delete it and run stage 2 again")
    return list(texts), ids.astype(np.int32), probs
