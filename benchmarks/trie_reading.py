"""Measure how fast stage 3's JSON files are read: by the reader of trie_files.py, and by `json` alone.

    python benchmarks/trie_reading.py

Both files of a trie of random chunks are read in turn, by the reader into arrays and by `json` into arrays. Chunks have 1 to 8 tokens, as those of the example at γ 0.1 do.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

from benchmarks.common import Spread, seconds_of, table
from utils.cli import POSITIVE_INT, Parser, run_script
from utils.datastore import trie_files
from utils.files import make_folder

ENTRY_TOKEN_ID = 7
HEADER = ("rows", "MB of JSON", "json, s", "reader, s", "json / reader")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=POSITIVE_INT, nargs="+", default=[100, 1000, 10_000, 100_000, 500_000])
    parser.add_argument("--repeats", type=POSITIVE_INT, default=7, help="of each measurement")
    return parser.parse_args(argv)


def write_random_trie(folder: Path, n_rows: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(1, 9, n_rows))
    chunk_ids = rng.integers(0, 50_000, lengths.sum()).astype(np.int32)
    places = np.stack([rng.integers(0, 200_000, n_rows), rng.integers(0, 512, n_rows)], axis=1)
    entry_ids = np.full(n_rows, ENTRY_TOKEN_ID)
    pieces = trie_files.trie_pieces(entry_ids, chunk_ids, np.cumsum(lengths) - lengths, lengths, places)
    trie_files.write_trie(folder, make_folder(folder / "scratch"), ENTRY_TOKEN_ID, pieces)


def read_with_json(folder: Path) -> list[np.ndarray]:
    paths = trie_files.trie_path(folder, ENTRY_TOKEN_ID), trie_files.positions_path(folder, ENTRY_TOKEN_ID)
    return [np.array(table) for path in paths for table in json.loads(path.read_bytes()).values()]


def main(argv: list[str] | None = None) -> None:
    args, rows = parse_args(argv), []
    for n_rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_random_trie(folder, n_rows)
            n_bytes = sum(path.stat().st_size for path in folder.glob("*.json"))
            ways: dict[str, Callable[[], object]] = {
                "json": partial(read_with_json, folder),
                "reader": partial(trie_files.read_trie_rows, folder, ENTRY_TOKEN_ID),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.repeats + 1):  # the first warms up
                for way, run in ways.items():
                    seconds[way].append(seconds_of(run))
        by_json, by_reader = (Spread(tuple(seconds[way][1:])) for way in ways)
        rows.append(
            (f"{n_rows:,}", f"{n_bytes / 1e6:.2f}", by_json.text(), by_reader.text(), by_json.over(by_reader).text())
        )
    print(table(HEADER, rows))


if __name__ == "__main__":
    run_script(main)
