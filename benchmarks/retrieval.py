"""Time exact search for the nearest context vector, each way of it, against torch.mv and the memory's bandwidth.

Each search is of another query. `torch.mv` is the bare float32 product of all rows with a query, without finding its
largest. `ours` is what a datastore does after many searches: the way that was found to be the fastest. Vectors are

    hidden   in a cone around one direction with a spectrum that falls like 1/i, as hidden states are: of those of the
             example model at one token, 63 directions leave a length of 0.1, here too
    random   alike in all directions, where no bound helps
    FILE     the hidden states of stage 2's {partition}.h5, of all tokens together, the queries from its end

Run     OMP_NUM_THREADS=2 python benchmarks/retrieval.py --output retrieval.json
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Spread, cache_flusher, copy_bandwidth, hardware, measure, table, write_json
from utils.cli import POSITIVE_INT, Parser, run_script
from utils.datastore.search import VectorIndex, Way
from utils.files import InputError, require_file

N_QUERIES = 64
BLOCK_ROWS = 16_384
WAYS: tuple[Way, ...] = ("product", "half", "bounded")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=POSITIVE_INT, nargs="+", default=[1000, 10_000, 100_000], help="of an index")
    parser.add_argument("--dims", type=POSITIVE_INT, nargs="+", default=[256, 768, 2048], help="of a row")
    parser.add_argument("--vectors", nargs="+", default=["hidden", "random"], help="hidden, random or an .h5 file")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="beside what the index chooses itself")
    parser.add_argument("--caches", choices=("cold", "hot"), default="cold", help="cold: as a forward pass leaves them")
    parser.add_argument("--repeats", type=POSITIVE_INT, default=21, help="of each search")
    parser.add_argument("--max_memory_gb", type=POSITIVE_INT, default=8, help="sizes that need more are left out")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Case:
    """One index to be: which vectors, how many, of how many dimensions."""

    vectors: str
    n_rows: int
    n_dimensions: int

    @property
    def needed_bytes(self) -> int:
        # The rows, their float16 copy twice, the columns of the bounds twice, and what a search makes of each row.
        return self.n_rows * (8 * self.n_dimensions + 600)


def cases(args: argparse.Namespace) -> list[Case]:
    """Raises InputError for vectors that are neither known nor a file."""
    found = []
    for name in args.vectors:
        dims = args.dims
        if name not in ("hidden", "random"):
            import h5py

            with h5py.File(require_file(Path(name), "stage 2 makes, or hidden or random"), "r") as file:
                if "all_hidden_states" not in file:
                    raise InputError(f"{name}: holds no all_hidden_states; expected an .h5 file of stage 2")
                n_vectors, dims = file["all_hidden_states"].shape[0], [file["all_hidden_states"].shape[1]]
            if max(args.rows) + N_QUERIES > n_vectors:
                raise InputError(f"{name}: holds {n_vectors} vectors; ask for at most {n_vectors - N_QUERIES} --rows")
        found += [Case(name, n, d) for d in dims for n in args.rows]
    return [case for case in found if case.needed_bytes <= args.max_memory_gb * 2**30]


def vectors_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit rows (N, D) and queries (N_QUERIES, D), float32."""
    n_all, d = case.n_rows + N_QUERIES, case.n_dimensions
    generator = torch.Generator().manual_seed(0)
    if case.vectors == "random":
        spectrum, center = torch.ones(d), torch.zeros(d)
    elif case.vectors == "hidden":
        spectrum, center = 1 / torch.arange(1, d + 1), torch.zeros(d).index_fill(0, torch.tensor([d - 1]), 1.0)
    else:
        return _vectors_of_file(case, device)
    rows = torch.empty(n_all, d, device=device)
    for block in rows.split(BLOCK_ROWS):
        drawn = torch.randn(block.shape, generator=generator) * spectrum + center
        block.copy_(torch.nn.functional.normalize(drawn.double(), dim=1))
    return rows[: case.n_rows], rows[case.n_rows :]


def _vectors_of_file(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    import h5py

    with h5py.File(case.vectors, "r") as file:
        states = file["all_hidden_states"]
        rows, queries = torch.from_numpy(states[: case.n_rows]), torch.from_numpy(states[-N_QUERIES:])
    return tuple(torch.nn.functional.normalize(v.double(), dim=1).float().to(device) for v in (rows, queries))  # type: ignore[return-value]


def measure_case(case: Case, args: argparse.Namespace, bandwidth: Spread) -> dict[str, Any]:
    """Seconds, bytes and ratios of each way."""
    device = torch.device(args.device)
    rows, queries = vectors_of(case, device)
    indexes: dict[str, VectorIndex] = {}
    build_seconds = {}
    for way in args.ways:
        started = time.perf_counter()
        indexes[way] = VectorIndex(rows, way)
        build_seconds[way] = time.perf_counter() - started
    indexes["ours"] = VectorIndex(rows)
    for query in queries.repeat(3, 1):
        indexes["ours"].nearest(query)
    runs = {"torch.mv": _in_turn(lambda query: torch.mv(rows, query), queries)}
    runs |= {name: _in_turn(index.nearest, queries) for name, index in indexes.items()}
    before = cache_flusher(device) if args.caches == "cold" else None
    times = measure(runs, repeats=args.repeats, warm_up=3, before=before, device=device)
    batches = {f"{n}, batch": lambda index=index: index.nearest_batch(queries) for n, index in indexes.items()}
    batch_times = measure(batches, repeats=3, before=before, device=device)
    product, full_bytes = times["torch.mv"], rows.nbytes
    return {
        "vectors": case.vectors,
        "rows": case.n_rows,
        "dimensions": case.n_dimensions,
        "bytes": full_bytes,
        "reading_all_at_copy_bandwidth_seconds": full_bytes / bandwidth.median,
        "seconds": {name: spread.as_json() for name, spread in times.items()},
        "ratio_to_torch_mv": {name: spread.over(product).as_json() for name, spread in times.items()},
        "batch_seconds_per_query": {
            name: Spread(tuple(s / N_QUERIES for s in spread.values)).as_json() for name, spread in batch_times.items()
        },
        "index_bytes": {name: index.n_bytes for name, index in indexes.items()},
        "build_seconds": build_seconds,
        "text": [
            [
                f"{case.vectors} {case.n_rows:,} x {case.n_dimensions}",
                name,
                f"{1e3 * times[name].median:.3g}",
                times[name].over(product).text(digits=2),
                f"{full_bytes / times[name].median / bandwidth.median:.2f}",
                f"{1e3 * batch_times[f'{name}, batch'].median / N_QUERIES:.3g}" if name in indexes else "",
                f"{indexes[name].n_bytes / full_bytes:.2f}" if name in indexes else "",
                f"{1e3 * build_seconds[name]:.3g}" if name in build_seconds else "",
            ]
            for name in times
        ],
    }


def _in_turn(search: Callable[[Tensor], object], queries: Tensor) -> Callable[[], object]:
    """A function that searches with the next query each time it is called."""
    n_calls = 0

    def run() -> object:
        nonlocal n_calls
        n_calls += 1
        return search(queries[n_calls % len(queries)])

    return run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    todo = cases(args)
    device = torch.device(args.device)
    with torch.inference_mode():
        bandwidth = copy_bandwidth(device)
        results = [measure_case(case, args, bandwidth) for case in tqdm(todo, desc="searching", unit="index")]
    lines = [line for result in results for line in result.pop("text")]
    header = ["vectors", "way", "ms", "/ torch.mv", "bandwidth", "batch ms", "+ bytes", "build ms"]
    print(table(header, lines))
    words = ", ".join(f"{name} {value}" for name, value in hardware(device).items())
    print(f"\ncopying: {bandwidth.text(1e-9)} GB/s; caches {args.caches}; {words}")
    if args.output is not None:
        found = {"copy_bytes_per_second": bandwidth.as_json(), "caches": args.caches, "cases": results}
        write_json(args.output, device, argv, found)


if __name__ == "__main__":
    run_script(main)
