"""Ask for facts that a person marked in a text: of the LM alone, with the text in its prompt, and with expert chunks.

Reads   DIRECTORY   [{"text", "spans", "name", "fact", "questions": {kind: prompt}}, ...], as examples/staff_directory.json
Writes  OUTPUT_DIR/data, extracted, tries    stages 1 to 4, one datastore of all marked spans
        OUTPUT_DIR/expert_facts.json         counts, 95% intervals, every answer
Run     python examples/expert_facts.py --output_dir output/expert_facts

An answer is right where the fact stands in its tokens, and false where other facts of the directory do instead. θ is
chosen on the people held out, the first ones of the directory; the others are reported.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import NON_NEGATIVE_INT, POSITIVE_INT, Parser, Range, add_model, run_script
from utils.datastore.trie_files import trie_folder_path
from utils.files import InputError, exclusive_lock, make_folder, require_file
from utils.json_io import write_json
from utils.manifest import package_versions

if TYPE_CHECKING:
    from examples.fact_questions import Count, Question

MODEL, DIRECTORY = "examples/models/large", "examples/staff_directory.json"
PARTITION, THRESHOLD = "train", 0.5  # the threshold decides nothing about marked spans, but names the folder
LABELS = ("staff", "lm", "lm", PARTITION)
RESULTS = "expert_facts.json"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model(parser, default=MODEL)
    parser.add_argument("--directory", type=Path, help=f"the facts, marked, with questions (default: {DIRECTORY})")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the datastore and the results")
    parser.add_argument("--n_held_out", type=POSITIVE_INT, default=16, help="people on whom θ is chosen")
    parser.add_argument("--max_new_tokens", type=POSITIVE_INT, default=20, help="tokens of an answer")
    parser.add_argument(
        "--temperature", type=Range(float, least=0), default=0.0, help="of the LM's tokens; 0 is greedy"
    )
    parser.add_argument("--seed", type=NON_NEGATIVE_INT, default=0, help="of the drawing of tokens")
    parser.add_argument(
        "--min_first_token_prob", type=Range(float, least=0, most=1), default=0.0, metavar="δ", help="as eval.py's"
    )
    args = parser.parse_args(argv)
    args.model_path = args.model_path or str(ROOT / MODEL)
    args.directory = args.directory or ROOT / DIRECTORY
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require_file(args.directory, "holds the facts")
    from examples.fact_questions import read_questions

    questions = read_questions(args.directory)
    names = list(dict.fromkeys(question.name for question in questions))
    if len(names) <= args.n_held_out:
        raise InputError(f"{args.directory}: is about {len(names)} people; give a smaller --n_held_out")
    make_folder(args.output_dir)
    with exclusive_lock(args.output_dir, "expert_facts"):
        build_datastore(args)
        held_out = [question for question in questions if question.name in names[: args.n_held_out]]
        reported = [question for question in questions if question.name not in names[: args.n_held_out]]
        measure(args, held_out, reported)


def build_datastore(args: argparse.Namespace) -> None:
    """Stages 1 to 4, as from the command line; what is there already is not made again."""
    data, extracted, tries = (args.output_dir / name for name in ("data", "extracted", "tries"))
    model: list[object] = ["--model_path", args.model_path, "--device", args.device, "--dtype", args.dtype]
    cache: list[object] = ["--cache_dir", args.cache_dir] if args.cache_dir else []
    labels: list[object] = ["--partition", PARTITION, "--tok_prob_threshold", THRESHOLD]
    labels += ["--dataset_name", LABELS[0], "--model_ds", LABELS[1], "--model_gen", LABELS[2]]
    flags: list[object] = ["--input_files", args.directory, "--validation_fraction", 0, "--test_fraction", 0]
    stage("preprocess_dataset.py", "--dataset", "local", *flags, "--output_dir", data)
    flags = [*model, *cache, "--data_dir", data, "--output_dir", extracted, "--partition", PARTITION]
    flags += ["--min_length", 1, "--construct_memmap", "--discard_intermediates"]
    stage("extract_token_probs_and_memmap.py", *flags)
    flags = ["--token_prob_dir", extracted / PARTITION, "--output_dir", tries, "--model_name", args.model_path, *cache]
    stage("save_token_trie_info.py", *flags, *labels, "--chunk_source", "expert")
    flags = ["--idx_to_seqlen_path", extracted / f"{PARTITION}_index_to_seqlen.json"]
    flags += ["--index_to_acc_index_path", extracted / f"{PARTITION}_index_to_acc_index.json"]
    flags += ["--all_hidden_states_path", extracted / f"{PARTITION}.h5", "--save_dir", tries]
    stage("make_token_trie.py", *labels, *flags)


def stage(script: str, *flags: object) -> None:
    """Run a script; what it prints goes where progress goes."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def measure(args: argparse.Namespace, held_out: list["Question"], reported: list["Question"]) -> None:
    from examples.fact_questions import WAYS, WITH_CHUNKS, Asker, best_threshold, count
    from utils.datastore.store import open_datastore
    from utils.lm.model import load_lm, load_tokenizer

    lm = load_lm(args.model_path, args.device, args.dtype, args.cache_dir)
    tries = trie_folder_path(args.output_dir / "tries", *LABELS, THRESHOLD)
    datastore = open_datastore(tries, device=lm.device, max_bytes=10**9)
    tokenizer = load_tokenizer(args.model_path, args.cache_dir)
    how = (args.max_new_tokens, args.temperature, args.seed, args.min_first_token_prob)
    asker = Asker(lm, tokenizer, datastore, *how)
    facts = {question.fact for question in (*held_out, *reported)}
    by_threshold = {
        threshold: count(zip(held_out, asker.ask(held_out, WITH_CHUNKS, threshold), strict=True), facts)
        for threshold in asker.thresholds(held_out)
    }
    threshold = best_threshold(by_threshold)
    answers = {way: asker.ask(reported, way, threshold) for way in WAYS}
    kinds = [*dict.fromkeys(question.kind for question in reported), "all"]
    table = {
        (way, kind): count(
            [(q, a) for q, a in zip(reported, answers[way], strict=True) if kind in (q.kind, "all")], facts
        )
        for way in WAYS
        for kind in kinds
    }
    print(f"θ = {threshold}, the best of {len(by_threshold)} for {args.n_held_out} people held out: ", end="")
    print(f"{by_threshold[threshold].right} of {by_threshold[threshold].n} right")
    print(f"{'':24}{'asked in':14}{'right':>12} {'share':>7} {'95% interval':>17} {'false':>6}")
    for (way, kind), found in table.items():
        print(f"{way:24}{kind:14}{row(found)}")
    save(args, reported, answers, threshold, by_threshold, table)


def row(found: "Count") -> str:
    low, high = found.interval
    return f"{found.right:>4} of {found.n:<4} {found.share:7.1%} [{low:6.1%}, {high:6.1%}] {found.false:>6}"


def save(
    args: argparse.Namespace,
    questions: list["Question"],
    answers: dict[str, list[str]],
    threshold: float,
    by_threshold: dict[float, "Count"],
    table: dict[tuple[str, str], "Count"],
) -> None:
    results: dict[str, Any] = {
        "arguments": {name: None if value is None else str(value) for name, value in vars(args).items()},
        "versions": package_versions(),
        "similarity_threshold": threshold,
        "held_out": [{"similarity_threshold": t, **asdict(found)} for t, found in by_threshold.items()],
        "table": [
            {"way": way, "asked_in": kind, **asdict(found), "share": found.share, "interval_95": found.interval}
            for (way, kind), found in table.items()
        ],
        "answers": [
            {"name": q.name, "fact": q.fact, "asked_in": q.kind, "prompt": q.prompt}
            | {way: texts[n] for way, texts in answers.items()}
            for n, q in enumerate(questions)
        ],
    }
    write_json(args.output_dir / RESULTS, results, indent=2)
    print(f"Every answer: {args.output_dir / RESULTS}")


if __name__ == "__main__":
    run_script(main)
