"""What stage 2 would leave of a long text, made of random numbers: as many tokens as wanted, in minutes.

Token ids follow Zipf's law and the windows overlap as stage 2's do. The LM is sure in runs: whether a token's
probability is high depends on the one before it. Hidden states are random. Files, formats and manifest are stage 2's.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import h5py
import numpy as np

from utils.extraction.hidden_states import DATASET, write_index_maps
from utils.extraction.state import ExtractionFiles
from utils.extraction.token_probs import STAGE, token_probs_path
from utils.lm.fingerprint import tokenizer_fingerprint
from utils.lm.model import load_tokenizer
from utils.manifest import begin_stage, finish_stage
from utils.text.windows import window_bytes
from utils.workers import in_processes, n_cores

CHUNK_SIZE, STRIDE = 512, 448
PARTITION = "train"
ZIPF_EXPONENT = 1.1
# How likely a token is above 0.3 after one that is not, and after one that is: runs of 2.5 tokens on average.
SHARE_THAT_BEGINS, SHARE_THAT_GOES_ON = 0.2, 0.6
WINDOWS_PER_TASK = 256
BLOCK_ROWS = 1 << 16
N_VALUES = 1 << 15


@dataclass(frozen=True)
class SyntheticExtraction:
    """Stage 2's output of about `n_tokens` tokens, for the tokenizer of a model, in a folder of its own."""

    output_dir: Path
    model: str
    n_tokens: int
    hidden_size: int
    dtype: str = "float32"

    @property
    def files(self) -> ExtractionFiles:
        return ExtractionFiles(self.output_dir, PARTITION)

    @property
    def n_windows(self) -> int:
        return max(self.n_tokens // CHUNK_SIZE, 1)

    @property
    def n_rows(self) -> int:
        return self.n_windows * CHUNK_SIZE

    def write(self) -> None:
        """Write what is read by stages 3 and 4; the tokens of all processes are the same whatever their number."""
        self.files.folder.mkdir(parents=True)
        digest = hashlib.sha256()
        tasks = [
            range(a, min(a + WINDOWS_PER_TASK, self.n_windows)) for a in range(0, self.n_windows, WINDOWS_PER_TASK)
        ]
        texts = self._quoted_texts()
        prepare = partial(_WindowWriter, self.files.folder, texts)
        for added in in_processes(prepare, tasks, n_cores(), where=str(self.output_dir), in_order=True):
            digest.update(added)
        lengths = np.full(self.n_windows, CHUNK_SIZE)
        write_index_maps(self.files.index_to_seqlen, self.files.index_to_acc_index, lengths)
        self._write_hidden_states()
        self._write_manifest(digest.hexdigest())

    def _quoted_texts(self) -> list[str]:
        tokenizer = load_tokenizer(self.model)
        n_ids = max(tokenizer.get_vocab().values()) + 1
        return [json.dumps(tokenizer.decode([i]), ensure_ascii=False) for i in range(n_ids)]

    def _write_hidden_states(self) -> None:
        rng = np.random.default_rng(0)
        with h5py.File(self.files.h5, "w") as file:
            rows = file.create_dataset(DATASET, (self.n_rows, self.hidden_size), self.dtype)
            for first in range(0, self.n_rows, BLOCK_ROWS):
                n = min(BLOCK_ROWS, self.n_rows - first)
                rows[first : first + n] = rng.standard_normal((n, self.hidden_size), dtype=np.float32)

    def _write_manifest(self, fingerprint: str) -> None:
        arguments = {"partition": PARTITION, "chunk_size": CHUNK_SIZE, "stride": STRIDE, "dtype": self.dtype}
        tokenizer = tokenizer_fingerprint(load_tokenizer(self.model))
        inputs = {"text": "synthetic", "model": "synthetic", "tokenizer": tokenizer}
        path = self.output_dir / f"{PARTITION}_manifest.json"
        counts = {"n_windows": self.n_windows, "n_tokens": self.n_rows, "hidden_size": self.hidden_size}
        manifest = begin_stage(path, STAGE, arguments, inputs)
        finish_stage(path, manifest, {**counts, "windows_fingerprint": fingerprint})


@dataclass(frozen=True)
class _WindowWriter:
    """Writes the `token_probs_{i}.json` of some windows; texts: of each token id, as JSON."""

    folder: Path
    texts: list[str]

    def __call__(self, windows: range) -> bytes:
        """Returns what the windows add to the fingerprint."""
        rng = np.random.default_rng(windows.start)
        shape = (len(windows), CHUNK_SIZE)
        token_ids = np.searchsorted(self._zipf, rng.random(shape)).astype(np.int32)
        probabilities = _probabilities(rng, shape)
        overlap = CHUNK_SIZE - STRIDE
        # A window begins with the tokens that the one before it ends with.
        token_ids[1:, :overlap] = token_ids[:-1, -overlap:]
        values, texts = self._values, self.texts
        for window, ids, probs in zip(windows, token_ids.tolist(), probabilities.tolist(), strict=True):
            rows = [
                f"[{texts[token]}, {values[k]}, {window}, {position}, {token}]"
                for position, (token, k) in enumerate(zip(ids, probs, strict=True))
            ]
            token_probs_path(self.folder, window).write_bytes(f"[{', '.join(rows)}]".encode())
        return b"".join(map(window_bytes, token_ids))

    @cached_property
    def _values(self) -> list[str]:
        """Probabilities as JSON, with as many digits as an LM's; drawing from some is faster than writing each."""
        drawn = np.random.default_rng(0).random(N_VALUES, dtype=np.float32)
        probabilities = np.concatenate([0.3 + 0.7 * drawn, 0.3 * drawn**3, [0]]).astype(np.float32)
        return list(map(repr, probabilities.astype(np.float64).tolist()))

    @cached_property
    def _zipf(self) -> np.ndarray:
        weights = 1 / np.arange(1, len(self.texts) + 1) ** ZIPF_EXPONENT
        return np.cumsum(weights) / weights.sum()


def _probabilities(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Indices into `_WindowWriter._values`: its first half is above 0.3, the others below, the last 0."""
    is_sure = np.zeros(shape, dtype=bool)
    drawn = rng.random(shape)
    for position in range(1, shape[1]):
        share = np.where(is_sure[:, position - 1], SHARE_THAT_GOES_ON, SHARE_THAT_BEGINS)
        is_sure[:, position] = drawn[:, position] < share
    indices = rng.integers(0, N_VALUES, shape) + np.where(is_sure, 0, N_VALUES)
    indices[:, 0] = 2 * N_VALUES
    return indices


def token_prob_files(folder: Path) -> Iterator[Path]:
    """The `token_probs_{i}.json` of a folder in the order of their windows."""
    n_windows = sum(1 for _ in folder.glob("token_probs_*.json"))
    return (token_probs_path(folder, window) for window in range(n_windows))
