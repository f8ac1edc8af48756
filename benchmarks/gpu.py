"""What a machine with a CUDA GPU does: the tests of the device's paths, then its speed at the shapes of known models.

Each step is a command of its own, with a share of the 12 minutes; one that fails or takes longer is said to, and the
others go on. The steps, in this order:

    device tests    every path that asks for the device against the host's
    decoding 1B     plain, chunk and verified decoding beside `generate` with a static cache and compilation
    decoding 7B     the same at the shape of Llama 2 7B
    retrieval       exact search of up to a million rows on the device
    stage 2         at the 1B shape, against a bare loop of forward passes
    chat            a real chat model on examples/chat_questions.json, where --model names one

Writes  OUTPUT   {"hardware": …, "steps": {name: {"status": done, failed or timed out, "seconds": …, "results": …}}}
Run     benchmarks/gpu.sh --output gpu.json
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import hardware, table, write_json
from utils.cli import Parser, run_script
from utils.files import InputError
from utils.json_io import read_json
from utils.lm.model import pick_device

DEVICE_TESTS = ("tests/test_devices.py", "tests/datastore/test_search.py", "tests/lm/test_model.py")
DRY_DEVICE_TESTS = ("tests/test_devices.py", "-k", "numbers or timed")


@dataclass(frozen=True)
class Step:
    """A command that writes a file, and the seconds that it may take."""

    name: str
    seconds: int
    command: Sequence[object]
    output: str


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a chat model, such as examples/get_smollm2.py makes")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--dry_run", action="store_true", help="the same steps, tiny and on the CPU, to try the command"
    )
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_device("cpu" if args.dry_run else "auto")
    if device.type != "cuda" and not args.dry_run:
        raise InputError("there is no CUDA device here; --dry_run tries the command on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(device.type, args.dry_run, args.model, Path(folder))
        unknown = sorted(set(args.steps or ()) - {step.name for step in steps})
        if unknown:
            raise InputError(
                f"--steps: there is no {unknown[0]!r}; expected of {', '.join(step.name for step in steps)}"
            )
        found = {step.name: run(step, Path(folder)) for step in steps if args.steps is None or step.name in args.steps}
    print(
        table(["step", "status", "seconds"], [[name, r["status"], f"{r['seconds']:.0f}"] for name, r in found.items()])
    )
    print(", ".join(f"{name} {value}" for name, value in hardware(device).items()))
    if args.output is not None:
        write_json(args.output, device, argv, {"steps": found})
    if any(result["status"] != "done" for result in found.values()):
        sys.exit(1)


def steps_of(device: str, dry_run: bool, model: Path | None, folder: Path) -> list[Step]:
    """All steps; folder: for their files."""
    python = sys.executable
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(DRY_DEVICE_TESTS if dry_run else DEVICE_TESTS)]
    common: list[object] = ["--device", device, "--output"]
    decoding: list[object] = [python, "benchmarks/decoding.py", "--temperatures", 0]
    peers = ["--peers", "generate*", "baseline", "chunk*", "verify tree sequence paying*"]
    short = ["--n_prompts", 2, "--max_new_tokens", 8, "--repeats", 1, "--batch_sizes", 1, "--rows", 100]
    of_1b = ["--n_prompts", 8, "--max_new_tokens", 64, "--repeats", 3, "--batch_sizes", 1, 8, "--rows", 10_000]
    of_7b = ["--n_prompts", 4, "--max_new_tokens", 64, "--repeats", 3, "--batch_sizes", 1, "--rows", 100_000]
    retrieval: list[object] = [python, "benchmarks/retrieval.py"]
    sizes = ["--rows", 100, "--dims", 64, "--repeats", 3] if dry_run else ["--rows", 10_000, 100_000, 1_000_000]
    sizes += [] if dry_run else ["--dims", 2048, "--vectors", "hidden", "--repeats", 11, "--max_memory_gb", 32]
    extraction: list[object] = [python, "benchmarks/extraction_speed.py", "--memory_passages", 0]
    extraction += ["--models", "llama-tiny" if dry_run else "llama-1b", "--passages", 2 if dry_run else 60]
    extraction += ["--repeats", 1 if dry_run else 3]
    steps = [Step("device tests", 180, [python, *tests, "--junitxml"], "tests.xml")]
    for name, shape, how in (("1B", "llama-1b", of_1b), ("7B", "llama-7b", of_7b)):
        of_shape = ["--workload", "llama-tiny", *short] if dry_run else ["--workload", shape, *how]
        steps.append(Step(f"decoding {name}", 150, [*decoding, *of_shape, *peers, *common], f"{name}.json"))
    steps += [
        Step("retrieval", 60, [*retrieval, *sizes, *common], "retrieval.json"),
        Step("stage 2", 120, [*extraction, *common], "extraction.json"),
    ]
    if model is not None:
        chat: list[object] = [python, "benchmarks/paper/efficiency.py", "--work", folder / "chat", "--model_gen", model]
        chat += ["--prompt_file", "examples/chat_questions.json", "--chat", "--tok_prob_thresholds", 0.1]
        chat += ["--similarity_thresholds", 0.8, "--min_first_token_probs", 0.5, "--reject_repeats"]
        chat += ["--min_chunk_length", 2, "--seeds", 0, 1]
        chat += ["--n_prompts", 2, "--n_answers", 1, "--max_new_tokens", 8] if dry_run else ["--n_answers", 3]
        steps.append(Step("chat", 60, [*chat, *common], "chat.json"))
    return steps


def run(step: Step, folder: Path) -> dict[str, Any]:
    """Run a step to its end or its limit. What it prints is shown; what it wrote is among the results."""
    print(f"== {step.name}, at most {step.seconds} s", flush=True)
    path, started, status = folder / step.output, time.perf_counter(), "done"
    try:
        command = [*map(str, step.command), str(path)]
        if subprocess.run(command, cwd=ROOT, timeout=step.seconds, check=False).returncode:
            status = "failed"
    except subprocess.TimeoutExpired:
        status = "timed out"
    seconds = time.perf_counter() - started
    return {"status": status, "seconds": seconds, "results": results_of(path) if path.exists() else None}


def results_of(path: Path) -> Any:
    """What a step wrote: JSON, or the counts of pytest's report."""
    if path.suffix == ".json":
        return read_json(path)["results"]
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    counts = {name: int(value) for name, value in suite.attrib.items() if value.isdigit()}
    failed = [f"{case.get('classname')}.{case.get('name')}" for case in suite if case.find("failure") is not None]
    return counts | {"failed": failed}


if __name__ == "__main__":
    run_script(main)
