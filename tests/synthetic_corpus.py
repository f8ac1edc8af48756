"""What stage 2 leaves on disk, made of random windows instead of a model, with the library's own writers; and what
stages 3 and 4 must make of it, by loops."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils.datastore.chunks import ChunkRows
from utils.extraction.hidden_states import DATASET, write_hidden_states
from utils.extraction.token_probs import STAGE, write_token_probs
from utils.json_io import write_json
from utils.lm.fingerprint import tokenizer_fingerprint
from utils.lm.model import load_tokenizer
from utils.manifest import begin_stage, finish_stage
from utils.text.windows import window_bytes

Row = tuple[int, tuple[int, ...], int, int]  # entry id, chunk ids, window, position
LABELS = {"dataset_name": "toy", "model_ds": "org/large", "model_gen": "small", "partition": "train"}
TRIE_FOLDER = "token_trie_toy_DSorg_large_Hsmall/train_0.5"  # where stage 3 writes its tries
LENGTHS = [12, 7, 1, 12, 3, 9, 12, 12]  # of windows: whole ones, short ones and one of a single token


@dataclass(frozen=True)
class Corpus:
    """Windows of token ids and probabilities, the hidden states of all of them, and where they lie."""

    output_dir: Path
    model: Path
    ids: list[np.ndarray]
    probabilities: list[np.ndarray]
    hidden_states: np.ndarray  # (T, D)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids))

    def hidden_state(self, window: int, position: int) -> np.ndarray:
        return self.hidden_states[sum(map(len, self.ids[:window])) + position]

    def stage_3_flags(self, into: Path, **others: object) -> list[object]:
        flags = {"token_prob_dir": self.output_dir / "train", "output_dir": into, "model_name": self.model}
        return as_flags({**flags, **LABELS, "tok_prob_threshold": 0.5, **others})

    def stage_4_flags(self, into: Path, **others: object) -> list[object]:
        flags = {
            "save_dir": into,
            "idx_to_seqlen_path": self.output_dir / "train_index_to_seqlen.json",
            "index_to_acc_index_path": self.output_dir / "train_index_to_acc_index.json",
            "all_hidden_states_path": self.output_dir / "train.h5",
        }
        return as_flags({**flags, **LABELS, "tok_prob_threshold": 0.5, "max_workers": 1, **others})


def as_flags(values: dict[str, object]) -> list[object]:
    """Command-line flags; the value None drops one, True leaves it without a value."""
    flags: list[object] = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}"] if value is True else [f"--{name}", value]
    return flags


def write_corpus(output_dir: Path, model: Path, lengths: list[int], n_ids: int, **options: Any) -> Corpus:
    """Write random windows of ids below n_ids, of which about half the tokens are likely.

    options: seed, hidden_size, dtype, skip (chunk size less stride), above (share of tokens with p > 0.5).
    """
    rng = np.random.default_rng(options.get("seed", 0))
    ids = [rng.integers(0, n_ids, length, dtype=np.int32) for length in lengths]
    probabilities = [np.where(rng.random(n) < options.get("above", 0.6), 0.75, 0.25) for n in lengths]
    hidden = rng.standard_normal((sum(lengths), options.get("hidden_size", 6))).astype(options.get("dtype", "float32"))
    (output_dir / "train").mkdir(parents=True)
    for window, (token_ids, probs) in enumerate(zip(ids, probabilities, strict=True)):
        probs[0] = 0
        write_token_probs(output_dir / "train", window, token_ids, probs, [f"<{i}>\n🙂" for i in token_ids.tolist()])
    corpus = Corpus(output_dir, model, ids, probabilities, hidden)
    write_memmap(corpus)
    write_manifest(corpus, options.get("skip", 2))
    return corpus


def write_memmap(corpus: Corpus) -> None:
    lengths = [len(ids) for ids in corpus.ids]
    with h5py.File(corpus.output_dir / "train.h5", "w") as file:
        file.create_dataset(DATASET, data=corpus.hidden_states)
    firsts = (np.cumsum(lengths) - lengths).tolist()
    for name, values in (("seqlen", lengths), ("acc_index", firsts)):
        write_json(corpus.output_dir / f"train_index_to_{name}.json", {str(i): n for i, n in enumerate(values)})
    for window, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        write_hidden_states(corpus.output_dir / "train", window, corpus.hidden_states[first : first + length])


def write_manifest(corpus: Corpus, skip: int = 2) -> None:
    tokenizer = tokenizer_fingerprint(load_tokenizer(str(corpus.model)))
    arguments = {"partition": "train", "chunk_size": 12, "stride": 12 - skip, "dtype": "float32"}
    path = corpus.output_dir / "train_manifest.json"
    manifest = begin_stage(path, STAGE, arguments, {"text": "t", "model": "m", "tokenizer": tokenizer})
    digest = hashlib.sha256()
    for token_ids in corpus.ids:
        digest.update(window_bytes(token_ids))
    results = {"n_windows": len(corpus.ids), "n_tokens": corpus.n_tokens, "hidden_size": corpus.hidden_states.shape[1]}
    finish_stage(path, manifest, {**results, "windows_fingerprint": digest.hexdigest()})


def expected_rows(corpus: Corpus, threshold: float = 0.5, skip: int = 2, bound: int = 64) -> list[Row]:
    """All chunks by DESIGN's words, with loops: sorted by entry token, chunk length, chunk, window, position."""
    found = []
    for window, (ids, probs) in enumerate(zip(corpus.ids, corpus.probabilities, strict=True)):
        for j in range(skip, len(ids) - 1):
            end = j + 1
            while end < len(ids) and probs[end] > threshold:
                end += 1
            if chunk := tuple(ids[j + 1 : end].tolist()):
                found.append((int(ids[j]), chunk[:bound] if bound else chunk, window, j))
    return sorted(found, key=lambda row: (row[0], len(row[1]), *row[1:]))


def as_tuples(rows: ChunkRows) -> list[Row]:
    chunks = [
        tuple(rows.token_ids[start : start + length].tolist())
        for start, length in zip(rows.starts, rows.lengths, strict=True)
    ]
    return list(zip(rows.entry_ids.tolist(), chunks, rows.windows.tolist(), rows.positions.tolist(), strict=True))


def make_tries(corpus: Corpus, output_dir: Path, **flags: object) -> Path:
    """Run stage 3; returns its --output_dir."""
    import save_token_trie_info

    save_token_trie_info.main([str(flag) for flag in corpus.stage_3_flags(output_dir, **flags)])
    return output_dir


def rows_on_disk(folder: Path) -> list[Row]:
    """Every row of a trie folder in the order of the files, read without the library."""
    found = []
    for path in sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem)):
        chunks = json.loads(path.read_text())
        places = json.loads(path.with_name(f"tok_pos_{path.name}").read_text())
        assert list(chunks) == list(places) == sorted(chunks, key=int)
        for depth, rows in chunks.items():
            assert {len(row) for row in rows} == {int(depth)}
            for (entry, *chunk), (window, position) in zip(rows, places[depth], strict=True):
                assert entry == int(path.stem)
                found.append((entry, tuple(chunk), window, position))
    return found


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the locks, by relative name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
