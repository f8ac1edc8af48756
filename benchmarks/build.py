"""What building a datastore takes: each stage against the bare work in it, at several sizes of the text.

    stage 2      tokens/s of the LM's forward passes alone on the same windows (with --data_dir: it needs a text)
    stage 3      the time in which one process parses the same token_probs_*.json with `json`
    stage 4      copying as many bytes as all its .h5 have, from one file to another on the same disk
    flattening   copying as many bytes as all its .pkl have

Stages 3, 4 and flattening run as commands on synthetic output of stage 2 (benchmarks/synthetic.py), in turn with what
they are compared with. What a command takes on a text of one window, start and imports, is measured too and taken off.

    python benchmarks/build.py --data_dir output/python-docs/data --output build.json
    python benchmarks/build.py --synthetic_tokens 50000000 --hidden_size 16 --repeats 1
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # found from wherever the script is started
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import Spread, hardware, seconds_of, spread_text, table, write_json
from benchmarks.extraction_speed import measure_extraction
from benchmarks.memory import Usage, run_measured
from benchmarks.synthetic import CHUNK_SIZE, PARTITION, SyntheticExtraction, token_prob_files
from utils.cli import POSITIVE_INT, Parser, Range, run_script
from utils.datastore.trie_files import MANIFEST, trie_folder_path
from utils.json_io import read_json

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("stage 3", "stage 4", "flattening")
COPIED = {"stage 4": ".h5", "flattening": ".pkl"}
BLOCK_BYTES = 1 << 20
FLATTEN = """
import sys
from pathlib import Path
import torch
from utils.datastore.store import open_datastore
open_datastore(Path(sys.argv[1]), device=torch.device("cpu"), max_bytes=int(float(sys.argv[2]) * 1e9))
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/models/large", help="whose tokenizer is used")
    parser.add_argument(
        "--synthetic_tokens",
        type=POSITIVE_INT,
        nargs="+",
        default=[2**17, 2**19, 2**21],
        help="sizes of the text (default: 131072 and 4 and 16 times as many)",
    )
    parser.add_argument("--hidden_size", type=POSITIVE_INT, default=256, help="numbers of a hidden state, float32")
    parser.add_argument(
        "--tok_prob_threshold", type=Range(float, least=0, below=1), default=0.3, help="γ of the datastore"
    )
    parser.add_argument("--max_chunk_length", type=POSITIVE_INT, default=64, help="tokens at which a chunk is cut")
    parser.add_argument(
        "--max_memory_gb", type=Range(float, above=0), default=4, help="for stage 3 and for eval.py's tries"
    )
    parser.add_argument("--repeats", type=POSITIVE_INT, default=5, help="of each measurement")
    parser.add_argument(
        "--data_dir", type=Path, metavar="DIR", help="stage 1's output: measure stage 2 on its first passages too"
    )
    parser.add_argument("--n_passages", type=POSITIVE_INT, default=40, help="passages that stage 2 is measured on")
    parser.add_argument(
        "--work", type=Path, help="folder for what is built, on the disk to be measured (default: /tmp)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the figures, as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results: dict[str, Any] = {"sizes": []}
    with tempfile.TemporaryDirectory(dir=args.work, prefix="build_") as work:
        if args.data_dir is not None:
            folder = Path(work) / "stage_2"
            folder.mkdir()
            results["stage 2"] = measure_extraction(
                args.model, args.data_dir, folder, n_passages=args.n_passages, repeats=args.repeats
            )
            print(show_extraction(results["stage 2"]), flush=True)
        smallest = extraction(args, Path(work) / "one_window", CHUNK_SIZE)
        for n_tokens in args.synthetic_tokens:
            results["sizes"].append(measure_size(args, Path(work) / str(n_tokens), n_tokens, smallest))
            print(show_size(results["sizes"][-1]), flush=True)
    cpu = torch.device("cpu")
    print(", ".join(f"{name} {value}" for name, value in hardware(cpu).items()))
    if args.output:
        write_json(args.output, cpu, argv, results)


def extraction(args: argparse.Namespace, folder: Path, n_tokens: int) -> SyntheticExtraction:
    made = SyntheticExtraction(folder, str(args.model), n_tokens, args.hidden_size)
    made.write()
    return made


def measure_size(
    args: argparse.Namespace, folder: Path, n_tokens: int, smallest: SyntheticExtraction
) -> dict[str, Any]:
    """Every stage on a text of a size, repeat by repeat, with what it is compared with."""
    text = extraction(args, folder, n_tokens)
    n_bytes = {"stage 2": folder_bytes(text.output_dir)}
    runs = []
    # What is built stays until the end: where many files were just deleted, ext4 is slow to make new ones.
    for repeat in range(args.repeats):
        start = Build(args, smallest, smallest.output_dir / f"tries_{text.n_rows}_{repeat}").run()
        parse_s = seconds_of(lambda: parse_all(text.files.folder))
        build = Build(args, text, folder / f"tries_{repeat}")
        runs.append(Measured(start, parse_s, build.run(), build.copy_seconds()))
    n_bytes |= build.n_bytes()
    counts = read_json(build.trie_folder / MANIFEST)["results"]
    figures: dict[str, Any] = {"tokens": text.n_rows, "rows": counts["rows"], "entry_tokens": counts["entry_tokens"]}
    figures["bytes"] = n_bytes
    for stage in STAGES:
        net = Spread(tuple(run.usage[stage].seconds - run.start[stage].seconds for run in runs))
        bare = Spread(tuple(run.parse_s if stage == "stage 3" else run.copy_s[stage] for run in runs))
        figures[stage] = {
            "seconds": Spread(tuple(run.usage[stage].seconds for run in runs)).as_json(),
            "start_seconds": Spread(tuple(run.start[stage].seconds for run in runs)).as_json(),
            "bare_seconds": bare.as_json(),
            "net_to_bare": net.over(bare).as_json(),
            "tokens_per_s": text.n_rows / net.median,
            "bytes_per_s": n_bytes[stage] / net.median,
            "peak_bytes": max(run.usage[stage].peak_bytes for run in runs),
            "peak_anonymous_bytes": max(run.usage[stage].peak_anonymous_bytes for run in runs),
        }
    return figures


@dataclass(frozen=True)
class Measured:
    """One repeat: the stages on the smallest text and on the text, and the bare work."""

    start: dict[str, Usage]
    parse_s: float
    usage: dict[str, Usage]
    copy_s: dict[str, float]


@dataclass(frozen=True)
class Build:
    """A datastore that is built in a new folder."""

    args: argparse.Namespace
    text: SyntheticExtraction
    folder: Path

    @property
    def trie_folder(self) -> Path:
        labels = ("synthetic", "ds", "gen", PARTITION, self.args.tok_prob_threshold)
        return trie_folder_path(self.folder, *labels)

    def run(self) -> dict[str, Usage]:
        files = self.text.files
        labels = ["--dataset_name", "synthetic", "--model_ds", "ds", "--model_gen", "gen", "--partition", PARTITION]
        labels += ["--tok_prob_threshold", self.args.tok_prob_threshold, "--quiet"]
        of_stage_3 = ["--token_prob_dir", files.folder, "--output_dir", self.folder, "--model_name", self.args.model]
        of_stage_3 += ["--max_chunk_length", self.args.max_chunk_length, "--max_memory_gb", self.args.max_memory_gb]
        of_stage_4 = ["--save_dir", self.folder, "--all_hidden_states_path", files.h5]
        of_stage_4 += ["--idx_to_seqlen_path", files.index_to_seqlen]
        of_stage_4 += ["--index_to_acc_index_path", files.index_to_acc_index]
        commands = {
            "stage 3": [ROOT / "save_token_trie_info.py", *of_stage_3, *labels],
            "stage 4": [ROOT / "make_token_trie.py", *of_stage_4, *labels],
            "flattening": ["-c", FLATTEN, self.trie_folder, self.args.max_memory_gb],
        }
        environment = {"PYTHONPATH": str(ROOT)}
        return {stage: run_measured([sys.executable, *commands[stage]], environment) for stage in STAGES}

    def n_bytes(self) -> dict[str, int]:
        """What each stage left on the disk."""
        of_tries = {suffix: files_bytes(self.trie_folder, suffix) for suffix in (".json", ".h5")}
        lists = files_bytes(self.folder, ".json")
        flattened = files_bytes(self.trie_folder / "individual_flattened_tries", ".pkl")
        return {"stage 3": of_tries[".json"] + lists, "stage 4": of_tries[".h5"], "flattening": flattened}

    def copy_seconds(self) -> dict[str, float]:
        """Seconds in which as many bytes as a stage wrote are copied, once they lie in the system's memory."""
        return {stage: copy_seconds(self.folder, self.n_bytes()[stage]) for stage in COPIED}


def copy_seconds(folder: Path, n_bytes: int) -> float:
    source, target = folder / "copied", folder / "copy"
    block = os.urandom(BLOCK_BYTES)
    with open(source, "wb") as file:
        for first in range(0, n_bytes, BLOCK_BYTES):
            file.write(block[: n_bytes - first])
    seconds = seconds_of(lambda: shutil.copyfile(source, target))
    source.unlink()
    target.unlink()
    return seconds


def parse_all(folder: Path) -> None:
    for path in token_prob_files(folder):
        json.loads(path.read_bytes())


def files_bytes(folder: Path, suffix: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(suffix))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- What is shown


def show_extraction(figures: dict[str, Any]) -> str:
    rows = [[name, figure_text(value)] for name, value in figures.items() if isinstance(value, (dict, int, float))]
    return "stage 2\n" + table(["figure", "value"], rows)


def figure_text(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return spread_text(value)
    return ", ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.6g}"


def show_size(figures: dict[str, Any]) -> str:
    n_tokens, n_rows, n_tries = figures["tokens"], figures["rows"], figures["entry_tokens"]
    header = ["stage", "s", "of it start", "tokens/s", "MB/s", "bare work, s", "to bare work"]
    header += ["peak GB", "anonymous GB", "MB left per million tokens"]
    rows = []
    for stage in STAGES:
        found = figures[stage]
        rows.append(
            [
                stage,
                f"{found['seconds']['median']:.2f}",
                f"{found['start_seconds']['median']:.2f}",
                f"{found['tokens_per_s']:,.0f}",
                f"{found['bytes_per_s'] / 1e6:.0f}",
                f"{found['bare_seconds']['median']:.3f}",
                spread_text(found["net_to_bare"]),
                f"{found['peak_bytes'] / 1e9:.2f}",
                f"{found['peak_anonymous_bytes'] / 1e9:.2f}",
                f"{figures['bytes'][stage] / n_tokens:.1f}",
            ]
        )
    size = f"{n_tokens:,} tokens, {n_rows:,} chunks, {n_tries:,} tries of {n_rows / max(n_tries, 1):,.0f} rows"
    return f"\n{size}\n{table(header, rows)}"


if __name__ == "__main__":
    run_script(main)
