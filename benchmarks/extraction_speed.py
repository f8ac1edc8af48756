"""Measure stage 2 against a bare loop of `model(input_ids)` over the same windows, and what it takes of memory and disk.

Stage 2's time is that of the whole command, run in this process, less that of the same command on one passage: so it
counts what grows with the text (tokenising, forward passes, files, maps, checksums) and not what comes once (libraries,
the model). The bare loop keeps nothing, and reads the same windows in batches of the size that was fastest.

    example       the example's large model on its text
    gpt2-small, llama-1b    models of these shapes with random weights, on the same text

Two processes with one thread each, by torchrun, are measured against one with two by the rates that stage 2 prints;
memory by the peak of processes of their own on 1, 4 and 16 times the text, with a tiny model, which leaves the text's.

Run     OMP_NUM_THREADS=2 python benchmarks/extraction_speed.py --output extraction.json
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import extract_token_probs_and_memmap as stage_2
from benchmarks.common import Spread, measure, spread_text, table, write_json
from benchmarks.memory import run_measured
from benchmarks.workloads import random_model
from utils.cli import NON_NEGATIVE_INT, POSITIVE_INT, Parser, run_script
from utils.json_io import write_json_list
from utils.lm.model import load_lm, load_tokenizer, pick_device, upload
from utils.text.corpora import read_passages, split_path
from utils.text.windows import WindowShape, plan_batches, plan_windows

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "models" / "large"
MODELS = ("example", "gpt2-small", "llama-tiny", "llama-1b")
BATCH_SIZES = (1, 2, 4, 8)  # a few percent apart on a CPU; more only takes memory
GPU_BATCH_SIZES = (8, 32, 64)
SHAPE = WindowShape(512, 448, 64)
RATE = re.compile(r"([\d,]+) tokens/s")
MILLION = 1e6


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["example", "gpt2-small"], help="to measure the speed of"
    )
    parser.add_argument("--data_dir", type=Path, help="stage 1's output (default: python-docs is made)")
    parser.add_argument(
        "--passages", type=POSITIVE_INT, nargs="+", default=[150, 6], help="of the text, for each model"
    )
    parser.add_argument("--repeats", type=POSITIVE_INT, default=5, help="of each measurement")
    parser.add_argument(
        "--memory_passages",
        type=NON_NEGATIVE_INT,
        default=100,
        help="that are 1x of the text for memory; 0: not measured",
    )
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    args = parser.parse_args(argv)
    if len(args.passages) != len(args.models):
        parser.error(f"--passages: got {len(args.passages)} numbers for {len(args.models)} models; give one for each")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data_dir = args.data_dir or make_data(work / "docs")
        results: dict[str, Any] = {"speed": [], "growth": []}
        for name, n_passages in zip(args.models, args.passages, strict=True):
            model = model_folder(name, work)
            found = measure_extraction(
                model, data_dir, work, n_passages=n_passages, repeats=args.repeats, device=args.device
            )
            results["speed"].append({"model": name, **found})
            print(table(["", name], speed_rows(found)), end="\n\n", flush=True)
        if args.memory_passages:
            results["growth"] = measure_growth(data_dir, work, args.memory_passages)
            header = ["tokens", "peak memory, MB", "of it in no file", "disk, MB", "tokens/s"]
            print(table(header, growth_rows(results["growth"])))
    if args.output:
        write_json(args.output, pick_device(args.device), argv, results)


def make_data(folder: Path) -> Path:
    script, dataset = str(ROOT / "preprocess_dataset.py"), ["--dataset", "python-docs"]
    command = [sys.executable, script, *dataset, "--output_dir", str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def model_folder(name: str, work: Path) -> Path:
    """The example's model, or one with random weights and the example's tokenizer."""
    if name == "example":
        return EXAMPLE
    # The 1B shape in 16 bits, as it would be on the hub.
    random_model(name, "cpu", "bfloat16" if name == "llama-1b" else "float32").save_pretrained(work / name)
    load_tokenizer(str(EXAMPLE)).save_pretrained(work / name)
    return work / name


def write_text(data_dir: Path, folder: Path, n_passages: int, n_copies: int = 1) -> Path:
    """The first passages of a text that give windows, several times over."""
    folder.mkdir(parents=True, exist_ok=True)
    long = (passage.text for passage in read_passages(split_path(data_dir, "train")) if len(passage.text) > 1000)
    texts = list(islice(long, n_passages))
    write_json_list(folder / "train.json", ({"text": text} for _ in range(n_copies) for text in texts))
    return folder


# ---- Speed


def measure_extraction(
    model: Path,
    data_dir: Path,
    work: Path,
    *,
    n_passages: int,
    repeats: int,
    batch_size: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Stage 2's speed on the first passages of a text, as ratios, and the bytes that it leaves.

    model: a folder; work: a folder for temporary files; batch_size: stage 2's own, None: what it finds. Returns
    `to_bare_loop` (tokens/s of stage 2 to those of the bare loop at its best batch size: the text's share of the
    command), `extracting_to_bare_loop` (the same for the part that stage 2's printed rate is of: forward passes with
    what is written behind them), `two_processes` (printed tokens/s of two processes with a thread each to one with two;
    None on a GPU, and where this process may use one core only), each as median and quartiles over the repeats; and numbers:
    `tokens`, `bare_batch_size`, `bare_tokens_per_s`, `tokens_per_s`, `bytes_per_token` by kind of file.
    """
    text, one = write_text(data_dir, work / "text", n_passages), write_text(data_dir, work / "one_text", 1)
    flags = ["--model_path", str(model), "--partition", "train", "--construct_memmap", "--quiet", "--device", device]
    flags += ["--batch_size", str(batch_size)] if batch_size else []
    printed: list[float] = []

    def run(data: Path) -> None:
        with fresh(work / "out") as out, redirect_stdout(StringIO()) as said:
            stage_2.main([*flags, "--data_dir", str(data), "--output_dir", str(out)])
        printed.append(rate_of(said.getvalue()))

    size, bare, n_tokens = bare_loop(model, text, work, device)
    seconds = measure({"bare": bare, "stage": lambda: run(text), "start": lambda: run(one)}, repeats=repeats)
    n_of_one = windows_of(model, one, work)[1]
    of_text = [a - b for a, b in zip(seconds["stage"].values, seconds["start"].values, strict=True)]
    bare_rate = Spread(tuple(n_tokens / s for s in seconds["bare"].values))
    rate = Spread(tuple((n_tokens - n_of_one) / s for s in of_text))
    extracting = Spread(tuple(printed[2::2]))  # after the two of the warm-up: text, one, text, one
    return {
        "to_bare_loop": rate.over(bare_rate).as_json(),
        "extracting_to_bare_loop": extracting.over(bare_rate).as_json(),
        "two_processes": two_processes(flags, text, work, repeats) if device == "cpu" else None,
        "tokens": n_tokens,
        "bare_batch_size": size,
        "bare_tokens_per_s": bare_rate.as_json(),
        "tokens_per_s": rate.as_json(),
        "bytes_per_token": bytes_per_token(flags, text, work, n_tokens),
    }


def windows_of(model: Path, text: Path, work: Path) -> tuple[Any, int]:
    plan = plan_windows(read_passages(split_path(text, "train")), load_tokenizer(str(model)), SHAPE, work)
    return plan, plan.n_tokens


def bare_loop(model: Path, text: Path, work: Path, device: str) -> tuple[int, Callable[[], None], int]:
    """The batch size at which reading the windows is fastest, a function that reads them so, and their tokens."""
    lm = load_lm(str(model), device)
    sizes = BATCH_SIZES if lm.device.type == "cpu" else GPU_BATCH_SIZES
    plan, n_tokens = windows_of(model, text, work)

    def read(batches: list[torch.Tensor]) -> None:
        with torch.inference_mode():
            for input_ids in batches:
                lm.model(upload(input_ids, lm.device))
            if lm.device.type == "cuda":
                torch.cuda.synchronize(lm.device)

    def batches_of(size: int, windows: np.ndarray) -> list[torch.Tensor]:
        planned = plan_batches(plan.lengths[windows], size)
        return [torch.from_numpy(plan.batch_token_ids(windows[batch]).astype(np.int64)) for batch in planned]

    whole = np.flatnonzero(plan.lengths == plan.lengths.max())[: sizes[-1]]
    tried = {size: batches_of(size, whole) for size in sizes if size <= len(whole)}
    seconds = measure({str(size): lambda b=b: read(b) for size, b in tried.items()}, repeats=2)  # type: ignore[misc]
    best = min(tried, key=lambda size: min(seconds[str(size)].values))
    batches = batches_of(best, np.arange(plan.n_windows))
    return best, lambda: read(batches), n_tokens


def two_processes(flags: list[str], text: Path, work: Path, repeats: int) -> dict[str, Any] | None:
    """Printed tokens/s of two processes with one thread each, to those of one with two."""
    if len(os.sched_getaffinity(0)) < 2:
        return None
    script = [str(ROOT / stage_2.__file__), *flags, "--data_dir", str(text)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for n_processes, before in ((1, []), (2, launch)):
            with fresh(work / "out") as out:
                environment = os.environ | {"OMP_NUM_THREADS": str(2 // n_processes)}
                command = [sys.executable, *before, *script, "--output_dir", str(out)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                rates[n_processes].append(rate_of(done.stdout))
    one, two = (Spread(tuple(rates[n])) for n in (1, 2))
    return two.over(one).as_json() | {"tokens_per_s": two.as_json(), "of_one": one.as_json()}


def rate_of(said: str) -> float:
    found = RATE.search(said)
    assert found is not None, said
    return float(found[1].replace(",", ""))


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An output folder that is not there before, and not after."""
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder)


# ---- Disk and memory


def bytes_per_token(flags: list[str], text: Path, work: Path, n_tokens: int) -> dict[str, float]:
    """What the output takes on the disk, in blocks of it, by kind of file."""
    with fresh(work / "out") as out, redirect_stdout(StringIO()):
        stage_2.main([*flags, "--data_dir", str(text), "--output_dir", str(out)])
        found: dict[str, float] = {}
        for path in out.rglob("*"):
            kind = re.sub(r"_\d+", "_{i}", path.name)
            found[kind] = found.get(kind, 0) + path.stat().st_blocks * 512 / n_tokens
        return {kind: round(n, 1) for kind, n in sorted(found.items()) if n >= 0.1 and kind != "train"}


def measure_growth(
    data_dir: Path, work: Path, n_passages: int, copies: tuple[int, ...] = (1, 4, 16)
) -> list[dict[str, Any]]:
    """Peak memory of a process, and the disk it fills, with a tiny model on several times the same text."""
    model, found = model_folder("llama-tiny", work), []
    for n_copies in copies:
        text = write_text(data_dir, work / "copies", n_passages, n_copies)
        flags = ["--model_path", model, "--data_dir", text, "--partition", "train", "--construct_memmap", "--quiet"]
        with fresh(work / "out") as out:
            usage = run_measured([sys.executable, stage_2.__file__, *flags, "--output_dir", out])
            n_tokens = json.loads((out / "train_manifest.json").read_text())["results"]["n_tokens"]
            disk = sum(path.stat().st_blocks * 512 for path in out.rglob("*"))
        peaks = {"peak_bytes": usage.peak_bytes, "peak_anonymous_bytes": usage.peak_anonymous_bytes}
        found.append({"tokens": n_tokens, **peaks, "disk_bytes": disk, "seconds": usage.seconds})
    return found


# ---- Shown


def speed_rows(found: dict[str, Any]) -> list[list[str]]:
    def shown(spread: dict[str, Any] | None) -> str:
        return "-" if spread is None else spread_text(spread)

    two = found["two_processes"]
    return [
        ["tokens", f"{found['tokens']:,}"],
        ["bare loop's best batch", f"{found['bare_batch_size']}"],
        ["bare loop, tokens/s", shown(found["bare_tokens_per_s"])],
        ["stage 2, tokens/s", shown(found["tokens_per_s"])],
        ["stage 2 / bare loop", shown(found["to_bare_loop"])],
        ["extracting alone / bare loop", shown(found["extracting_to_bare_loop"])],
        ["two processes / one with two threads", shown(two)],
        *([f"bytes per token, {kind}", f"{n:,.1f}"] for kind, n in found["bytes_per_token"].items()),
    ]


def growth_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{one['tokens']:,}",
            f"{one['peak_bytes'] / MILLION:,.0f}",
            f"{one['peak_anonymous_bytes'] / MILLION:,.0f}",
            f"{one['disk_bytes'] / MILLION:,.0f}",
            f"{one['tokens'] / one['seconds']:,.0f}",
        ]
        for one in found
    ]


if __name__ == "__main__":
    run_script(main)
