"""The paper's table of expert facts: how often the right one is generated (ECD, section 6.3), over seeds.

Each seed invents a staff directory (examples/make_staff_directory.py) and has examples/expert_facts.py ask for its
facts, of the LM alone, of the LM with the person's profile in the prompt, and with the marked facts as chunks; θ is
chosen on people held out. With --directory the facts are those of all seeds, and seeds are of the drawing of tokens
alone. Printed are shares of right and of false answers, the mean over seeds with Student's 95% interval.

Run     python benchmarks/paper/expert.py --output expert.json
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import table, write_json
from benchmarks.paper.datastores import LARGE, add_work_folder
from benchmarks.paper.datastores import run_script as run_example
from benchmarks.paper.generating import OverSeeds, add_seeds, cells, figures_over_seeds, require_seeds
from utils.cli import POSITIVE_INT, Parser, Range, add_model, run_script
from utils.files import make_folder, require_file
from utils.json_io import read_json
from utils.lm.model import pick_device

HEADER = ("", "asked in", "right %", "false %")
COLUMNS = {"right": (100.0, 1), "false": (100.0, 1)}
# What the example asks in each run: by way and by how it is asked.
Shares = dict[tuple[str, str], dict[str, float]]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model(parser, default="examples/models/large")
    add_work_folder(parser)
    parser.add_argument(
        "--directory", type=Path, help="your facts, as examples/staff_directory.json (default: invented)"
    )
    parser.add_argument("--n_held_out", type=POSITIVE_INT, default=16, help="people on whom θ is chosen")
    parser.add_argument("--max_new_tokens", type=POSITIVE_INT, default=20, help="tokens of an answer")
    parser.add_argument(
        "--temperatures",
        type=Range(float, least=0),
        nargs="+",
        default=[0.0, 1.0],
        help="of the LM's tokens; 0 is greedy",
    )
    parser.add_argument(
        "--min_first_token_prob", type=Range(float, least=0, most=1), default=0.0, metavar="δ", help="as eval.py's"
    )
    add_seeds(parser)
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    args = parser.parse_args(argv)
    args.model_path = args.model_path or LARGE
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require_seeds(args.seeds)
    if args.directory is not None:
        require_file(args.directory, "holds the facts")
    results = []
    for temperature in args.temperatures:
        runs = [ask(args, seed, temperature) for seed in args.seeds]
        thresholds = [run["similarity_threshold"] for run in runs]
        rows = figures([shares(run) for run in runs])
        print(f"Temperature {temperature:g}; θ of the seeds: {', '.join(map(str, thresholds))}")
        print(table(HEADER, [[way, *cells(kind, row, COLUMNS)] for (way, kind), row in rows.items()]), "\n")
        named = [{"way": w, "asked_in": k} | {n: asdict(f) for n, f in row.items()} for (w, k), row in rows.items()]
        results.append({"temperature": temperature, "similarity_thresholds": thresholds, "rows": named})
    n_asked = next(row["n"] for row in runs[0]["table"] if row["asked_in"] == "all")
    print(f"{n_asked} questions a seed, {len(args.seeds)} seeds")
    if args.output is not None:
        write_json(args.output, pick_device(args.device), argv, results)


def ask(args: argparse.Namespace, seed: int, temperature: float) -> dict[str, Any]:
    """What examples/expert_facts.py finds with a seed."""
    folder = args.work / "expert" / ("given" if args.directory else f"invented_{seed}")
    directory = args.directory
    if directory is None:
        directory = make_folder(args.work / "expert") / f"directory_{seed}.json"
        run_example("examples/make_staff_directory.py", "--output_file", directory, "--seed", seed)
    flags: list[object] = ["--model_path", args.model_path, "--device", args.device, "--dtype", args.dtype]
    flags += ["--cache_dir", args.cache_dir] if args.cache_dir else []
    flags += ["--n_held_out", args.n_held_out, "--max_new_tokens", args.max_new_tokens]
    flags += ["--min_first_token_prob", args.min_first_token_prob]
    flags += ["--temperature", temperature, "--seed", seed, "--directory", directory, "--output_dir", folder]
    run_example("examples/expert_facts.py", *flags)
    found: dict[str, Any] = read_json(folder / "expert_facts.json")
    return found


def shares(run: dict[str, Any]) -> Shares:
    """Right and false answers of a run, as shares of the questions."""
    return {
        (row["way"], row["asked_in"]): {"right": row["share"], "false": row["false"] / row["n"]} for row in run["table"]
    }


def figures(runs: list[Shares]) -> dict[tuple[str, str], dict[str, OverSeeds]]:
    """By way and by how it is asked, the shares over seeds."""
    return {key: figures_over_seeds([run[key] for run in runs]) for key in runs[0]}


if __name__ == "__main__":
    run_script(main)
