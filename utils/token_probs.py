"""`token_probs_{i}.json`: what the LM thought of each token of window i, the file that chunks are cut from.

A list of `[token_text, probability, chunk_id, position, token_id]`, one row per token, the first token's probability 0
(nothing stands before it). `chunk_id` is the window's number i; the text is for people to read, the id is what counts.
"""

import json
import re
from pathlib import Path

import numpy as np

from utils.files import InputError, JsonText, Manifest, read_finished, read_json_and_text, replacing

STAGE = "extract_token_probs_and_memmap.py"
_NAME = re.compile(r"token_probs_(\d+)\.json")


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
        raise InputError(f"{path}: is no whole manifest of {STAGE}; delete it and run {STAGE} again")
    return manifest


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


def read_token_probs(folder: Path, window: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, token ids (L,) int32 and probabilities (L,) float64 of a window.

    Raises InputError where the file is missing, damaged, of another window or holds something that is no probability.
    """
    return read_token_probs_and_json(folder, window)[:3]


def read_token_probs_and_json(folder: Path, window: int) -> tuple[list[str], np.ndarray, np.ndarray, JsonText]:
    """What `read_token_probs` gives, and the file's JSON on one line, which saves encoding it again."""
    path = token_probs_path(folder, window)
    rows, text = read_json_and_text(path)
    try:
        texts, probabilities, windows, positions, token_ids = zip(*rows, strict=True)
        probs = np.array(probabilities, dtype=np.float64)
        ids = np.array(token_ids)
        is_sound = np.array_equal(positions, np.arange(len(rows))) and set(windows) == {window}
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
        raise InputError(f"{path}: is no list of {rows_of} rows in order; delete it and run stage 2 again")
    # A line break in JSON is never part of a value.
    line = JsonText(text.strip().replace("\r", " ").replace("\n", " "))
    return list(texts), ids.astype(np.int32), probs, line
