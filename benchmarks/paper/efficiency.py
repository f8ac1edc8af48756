"""The paper's table of efficiency: a model speeds itself up with chunks of its own answers (SCD, section 6.2).

eval.py generates some answers to each prompt and writes them as a corpus; stages 2 to 4 make a datastore of it; the
prompts are asked again with other seeds, plainly and with chunks at several θ, in one process and in turn.

FPS       1 - forward passes / new tokens
TTS       1 - seconds per new token / the baseline's, prompt and retrieval included, of the same seed
ROUGE-L   F1 of the longest common subsequence of words with the baseline's texts of the same prompt and the other seeds,
          mean over these and prompts; the baseline's own is how alike two samples of the model itself are
perplexity   of the new tokens under the base LM, exp(total nats / total tokens), and its ratio to the baseline's
repeated     mean share of a text's 4-grams of tokens that stand earlier in it

δ is the least probability of a chunk's first token under the LM, relative to its likeliest token's; 0 is the paper's rule.
"auto" is what eval.py --similarity_threshold auto chooses at a cost, by the datastore's own text.
Each figure is of one seed's texts; the mean over seeds is printed with Student's 95% interval.

Run     python benchmarks/paper/efficiency.py --output efficiency.json
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import hardware, table
from benchmarks.common import write_json as write_results
from benchmarks.paper.datastores import Work, add_work, work_of
from benchmarks.paper.datastores import run_script as run_stage
from benchmarks.paper.generating import (
    BASELINE,
    Asking,
    Generations,
    OverSeeds,
    add_generation,
    cells,
    figures_over_seeds,
    forward_passes_saved,
    open_whole,
    perplexity_under,
    prompt_file_of,
    repeated_ngrams,
    seconds_per_token,
    share_from_chunks,
)
from benchmarks.paper.rouge import require_rouge, rouge_l
from utils.cli import COSINE, POSITIVE_INT, Parser, Range, run_script
from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.types import Generation
from utils.evaluation.calibration import candidates_for, choose
from utils.files import file_fingerprint, make_folder
from utils.json_io import write_json
from utils.text.corpora import split_path
from utils.text.prompts import read_prompts

# The answers are windows of their own, each with its prompt in front as when it is asked again: no token is context only.
SKIP_FIRST_TOKENS = 0
HEADER = (
    "",
    "FPS %",
    "TTS %",
    "ROUGE-L",
    "perplexity",
    "to baseline",
    "repeated %",
    "from chunks %",
    "chunk length",
    "accepted %",
    "tokens/s",
)
COLUMNS = {
    "fps": (100.0, 1),
    "tts": (100.0, 1),
    "rouge_l": (1.0, 3),
    "perplexity": (1.0, 2),
    "perplexity_ratio": (1.0, 3),
    "repeated": (100.0, 1),
    "from_chunks": (100.0, 1),
    "chunk_length": (1.0, 2),
    "accepted": (100.0, 1),
    "tokens_per_second": (1.0, 0),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_work(parser)
    add_generation(parser, temperature=0.7)
    parser.add_argument("--n_answers", type=POSITIVE_INT, default=5, help="answers to a prompt that make the datastore")
    parser.add_argument(
        "--tok_prob_thresholds",
        type=Range(float, least=0, below=1),
        nargs="+",
        default=[0.9],
        metavar="γ",
        help="of the datastores, in [0, 1)",
    )
    parser.add_argument(
        "--similarity_thresholds",
        type=COSINE,
        nargs="+",
        default=[0.7, 0.8, 0.9, 0.95, 0.98, 0.99],
        metavar="θ",
        help="cosine similarities from which a chunk is accepted",
    )
    parser.add_argument(
        "--min_first_token_probs",
        type=Range(float, least=0, most=1),
        nargs="+",
        default=[0.0],
        metavar="δ",
        help="shares of the LM's likeliest token that a chunk's first token needs",
    )
    parser.add_argument("--reject_repeats", action="store_true", help="accept no chunk that repeats the text")
    parser.add_argument(
        "--min_chunk_length", type=POSITIVE_INT, default=1, help="of the chunks that may be proposed, in tokens"
    )
    parser.add_argument(
        "--max_costs",
        type=Range(float, above=0),
        nargs="+",
        default=[],
        metavar="NATS",
        help="also with θ and δ chosen at these costs a token",
    )
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require_rouge()
    work = work_of(args)
    work = work.of_models(work.model_gen, work.model_gen)
    asking = Asking.of(args, work)
    text = answers(args, work)
    folders = {
        gamma: text.tries(gamma, skip_first_tokens=SKIP_FIRST_TOKENS)
        for gamma in sorted(set(args.tok_prob_thresholds), reverse=True)
    }
    datastores = {gamma: open_whole(folder, asking.lm, args.min_chunk_length) for gamma, folder in folders.items()}
    settings = grid(args) + [
        setting for gamma in datastores for setting in chosen(asking, gamma, folders[gamma], datastores[gamma])
    ]
    ways = {each.name: partial(asking.chunk_mode, datastores[each.gamma], each.acceptance) for each in settings}
    generations = asking.generate({BASELINE: asking.decoding} | ways)
    rows = figures(asking, generations)
    print(table(HEADER, [cells(name, row, COLUMNS) for name, row in rows.items()]))
    n_rows = {f"{gamma:g}": sum(datastore.n_rows.values()) for gamma, datastore in datastores.items()}
    shown = ", ".join(f"γ {gamma} {n:,} rows" for gamma, n in n_rows.items())
    print(
        f"\n{len(asking.prompts)} prompts, {len(args.seeds)} seeds, at most {args.max_new_tokens} tokens each, ", end=""
    )
    chunks = (
        f"chunks of {args.min_chunk_length} tokens or more" if args.min_chunk_length > 1 else "chunks of any length"
    )
    print(f"temperature {args.temperature:g}; datastores of {args.n_answers} answers a prompt: {shown}; {chunks}")
    print(", ".join(f"{name} {value}" for name, value in hardware(asking.lm.device).items()))
    if args.output is not None:
        named = {name: {key: asdict(figure) for key, figure in row.items()} for name, row in rows.items()}
        described = {
            each.name: {"gamma": each.gamma, "auto": each.max_cost} | asdict(each.acceptance) for each in settings
        }
        results = {"rows": named, "settings": described, "datastore_rows": n_rows}
        write_results(args.output, asking.lm.device, argv, results)


def answers(args: argparse.Namespace, work: Work) -> Work:
    """The corpus of the model's own answers, as a text to make datastores of."""
    corpus = work.folder / "scd" / "corpus"
    flags: list[object] = ["--model_path", work.model_gen, "--gen_baseline_only", *work.model_flags, *work.cache_flags]
    # The prompts that are asked again, not what the file holds beyond them.
    prompts = make_folder(work.folder / "scd") / "prompts.json"
    write_json(prompts, [prompt.text for prompt in read_prompts(prompt_file_of(args, work))[: args.n_prompts]])
    flags += ["--prompt_file", prompts, "--num_return_sequences", args.n_answers, *(["--chat"] if args.chat else [])]
    flags += ["--max_new_tokens", args.max_new_tokens, "--temperature", args.temperature, "--batch_size", 8]
    flags += ["--seed", max(args.seeds) + 1, "--save_dir", work.folder / "scd" / "answers", "--overwrite"]
    run_stage("eval.py", *flags, "--save_as_corpus", corpus)
    name = f"scd/{file_fingerprint(split_path(corpus, 'train'))[:12]}"
    window_flags = (*work.window_flags, "--min_length", "1")
    return replace(work.of_text(corpus, name), dataset="answers", partition="train", window_flags=window_flags)


@dataclass(frozen=True)
class Setting:
    """A datastore's γ and how its chunks are accepted; max_cost: at which that was chosen, None for one of the grid."""

    gamma: float
    acceptance: Acceptance
    max_cost: float | None = None

    @property
    def name(self) -> str:
        rule, chosen_at = self.acceptance, self.max_cost
        least = f", δ {rule.min_first_token_prob:g}" if rule.min_first_token_prob else ""
        if chosen_at is not None:
            return f"γ {self.gamma:g}, auto {chosen_at:g} (θ {rule.similarity_threshold:g}{least})"
        repeats = ", no repeats" if rule.reject_repeats else ""
        return f"γ {self.gamma:g}, θ {rule.similarity_threshold:g}{least}{repeats}"


def grid(args: argparse.Namespace) -> list[Setting]:
    """Chunk mode at each γ, δ and θ."""
    return [
        Setting(gamma, Acceptance(theta, min_first_token_prob=least, reject_repeats=args.reject_repeats))
        for gamma in sorted(set(args.tok_prob_thresholds), reverse=True)
        for least in sorted(set(args.min_first_token_probs))
        for theta in sorted(set(args.similarity_thresholds))
    ]


def chosen(asking: Asking, gamma: float, trie_folder: Path, datastore: Datastore) -> list[Setting]:
    """What auto chooses for a datastore, at each cost."""
    costs, temperature = sorted(set(asking.args.max_costs)), asking.args.temperature
    if not costs:
        return []
    folder = asking.args.work
    candidates = candidates_for(asking.lm, asking.tokenizer, datastore, trie_folder, temperature, None, folder)
    found = []
    for max_cost in costs:
        choice = choose(candidates, max_cost)
        found.append(Setting(gamma, choice.applied_to(Acceptance(1.0)), max_cost))
        expected = f"{choice.saved:.1%} of the passes at {choice.cost:.3f} nats a token"
        print(f"{found[-1].name}, expected: {expected}")
    return found


# ---- Figures


def figures(asking: Asking, generations: Generations) -> dict[str, dict[str, OverSeeds]]:
    """By way, each figure by its name."""
    baseline = generations[BASELINE]
    return {
        name: figures_over_seeds([of_seed(asking, runs[seed], baseline, seed, name) for seed in asking.args.seeds])
        for name, runs in generations.items()
    }


def of_seed(
    asking: Asking, texts: list[Generation], baseline: dict[int, list[Generation]], seed: int, name: str
) -> dict[str, float]:
    """The figures of one seed's texts; baseline: its texts by seed."""
    rouge = [mean_rouge(asking, texts, others) for other, others in baseline.items() if other != seed]
    found = {"perplexity": perplexity_under(asking.lm, texts), "repeated": repeated_ngrams(texts)}
    found |= {"rouge_l": float(np.mean(rouge)), "tokens_per_second": 1 / seconds_per_token(texts)}
    if name == BASELINE:
        return found
    chunks = [chunk for each in texts for chunk in each.chunks]
    n_proposals = sum(len(each.trace.proposals) for each in texts if each.trace)
    return found | {
        "fps": forward_passes_saved(texts),
        "tts": 1 - seconds_per_token(texts) / seconds_per_token(baseline[seed]),
        "perplexity_ratio": found["perplexity"] / perplexity_under(asking.lm, baseline[seed]),
        "from_chunks": share_from_chunks(texts),
        "chunk_length": float(np.mean([len(chunk.token_ids) for chunk in chunks])) if chunks else 0.0,
        "accepted": len(chunks) / n_proposals if n_proposals else 0.0,
    }


def mean_rouge(asking: Asking, texts: list[Generation], references: list[Generation]) -> float:
    pairs = zip(texts, references, strict=True)
    return float(np.mean([rouge_l(asking.text(a), asking.text(b)) for a, b in pairs]))


if __name__ == "__main__":
    run_script(main)
