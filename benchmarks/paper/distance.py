"""How far generated text is from the LM's own distribution, in chunk mode and in verified mode.

Be P the LM's distribution of a text that goes on from a prompt, at the sampling temperature, and Q the mode's. Chunk
mode with the policy `threshold` goes step by step: after an accepted proposal the chunk is certain, else a token is
drawn from P. Which of the two it is follows from the text so far, so that by the chain rule

    KL(Q || P) = E_Q[ sum over the accepted chunks of -log P(chunk | text before it) ]

and tokens that the LM drew add nothing. The table gives the mean of that over texts, in nats per new token. Verified
mode draws each token from P, so it is 0 by construction, as is the baseline's. What is measured of all alike:

surprise - entropy   mean over new tokens of -log P(token) - H(P), whose expectation is 0 for text drawn from P, after
                     any text before it; chunks of likely tokens make it negative
same text            share of the texts that are the baseline's of the same prompt and seed
distinct-n           different n-grams over all n-grams, of one seed's texts together
repeated             share of a text's 4-grams that it held before, mean over texts

Each figure is of one seed's texts; the mean over seeds is printed with Student's 95% interval.

Run     python benchmarks/paper/distance.py --output distance.json
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import table, write_json
from benchmarks.paper.datastores import add_work, work_of
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
)
from utils.cli import COSINE, Parser, Range, run_script
from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.draft import DraftSettings, RetrievalDrafter
from utils.decoding.loop import Decoding
from utils.decoding.types import Generation
from utils.files import InputError
from utils.lm.model import CausalLM

VERIFY = "verify"
LENGTHS = (1, 2, 3, 4)
REPEATED_LENGTH = 4
HEADER = ("", "KL, nats/token", "surprise - entropy", "same text %", "perplexity", "FPS %")
COLUMNS = {"kl": (1.0, 4), "surprise": (1.0, 3), "same_text": (100.0, 1), "perplexity": (1.0, 2), "fps": (100.0, 1)}
DIVERSITY_HEADER = ("", *(f"distinct-{n}" for n in LENGTHS), "repeated %")
# Positions whose logits are float64 at a time.
SLICE_POSITIONS = 256
DIVERSITY_COLUMNS = {f"distinct_{n}": (1.0, 3) for n in LENGTHS} | {"repeated": (100.0, 1)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_work(parser)
    add_generation(parser, temperature=1.0, batch_size=8)
    parser.add_argument(
        "--tok_prob_threshold", type=Range(float, least=0, below=1), default=0.1, help="γ of the datastore, in [0, 1)"
    )
    parser.add_argument(
        "--similarity_thresholds",
        type=COSINE,
        nargs="+",
        default=[0.5, 0.7, 0.8, 0.9, 0.95],
        metavar="θ",
        help="cosine similarities from which a chunk is accepted",
    )
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.temperature == 0:
        raise InputError("--temperature 0: greedy text has no distribution to be far from; give one above 0")
    work = work_of(args)
    asking = Asking.of(args, work)
    datastore = open_whole(work.tries(args.tok_prob_threshold), asking.lm)
    generations = asking.generate(ways(asking, datastore, args.similarity_thresholds))
    rows = figures(asking, generations)
    print(table(HEADER, [cells(name, row, COLUMNS) for name, row in rows.items()]))
    print(f"\n{table(DIVERSITY_HEADER, [cells(name, row, DIVERSITY_COLUMNS) for name, row in rows.items()])}")
    print(
        f"\n{len(asking.prompts)} prompts, {len(args.seeds)} seeds, at most {args.max_new_tokens} tokens each, ", end=""
    )
    print(f"temperature {args.temperature:g}, γ {args.tok_prob_threshold:g}")
    if args.output is not None:
        results = {name: {key: asdict(figure) for key, figure in row.items()} for name, row in rows.items()}
        write_json(args.output, asking.lm.device, argv, results)


def ways(asking: Asking, datastore: Datastore, thresholds: Sequence[float]) -> dict[str, Callable[[], Decoding]]:
    """Plain, chunk mode at each θ, and verified with drafts of the same datastore, which do not alter what is drawn."""

    def verify() -> Decoding:
        return replace(asking.decoding(), drafter=RetrievalDrafter(datastore, DraftSettings()))

    chunks = {
        f"chunk, θ {threshold:g}": partial(asking.chunk_mode, datastore, Acceptance(threshold))
        for threshold in sorted(thresholds)
    }
    return {BASELINE: asking.decoding} | chunks | {VERIFY: verify}


# ---- Figures


def figures(asking: Asking, generations: Generations) -> dict[str, dict[str, OverSeeds]]:
    """By way, each figure by its name."""
    baseline = generations[BASELINE]
    return {
        name: figures_over_seeds([of_seed(asking, texts, baseline[seed]) for seed, texts in runs.items()])
        for name, runs in generations.items()
    }


def of_seed(asking: Asking, texts: list[Generation], baseline: list[Generation]) -> dict[str, float]:
    scored = [score(asking.lm, each, asking.args.temperature) for each in texts]
    log_probs, entropies = (np.concatenate(column) for column in zip(*scored, strict=True))
    written = [each.new_token_ids for each in texts]
    same = [a.new_token_ids == b.new_token_ids for a, b in zip(texts, baseline, strict=True)]
    return {
        "kl": sum(chunk_nats(each, log_p) for each, (log_p, _) in zip(texts, scored, strict=True)) / len(log_probs),
        "surprise": float((-log_probs - entropies).mean()),
        "same_text": float(np.mean(same)),
        "perplexity": perplexity_under(asking.lm, texts),
        "fps": forward_passes_saved(texts),
        "repeated": float(np.mean([repeated_share(token_ids, REPEATED_LENGTH) for token_ids in written])),
    } | {f"distinct_{n}": distinct_share(written, n) for n in LENGTHS}


@torch.inference_mode()
def score(lm: CausalLM, generation: Generation, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) float64 log P of each new token at the temperature, and (n,) the entropy of P where it was drawn, in nats."""
    token_ids = torch.tensor([generation.token_ids], device=lm.device)
    n_new = len(generation.new_token_ids)
    _, logits = lm.forward(token_ids[:, :-1], logits_to_keep=n_new)
    log_probs, entropies = [], []
    for start in range(0, n_new, SLICE_POSITIONS):
        log_p = (logits[0, start : start + SLICE_POSITIONS].float() / temperature).log_softmax(dim=-1).double()
        targets = token_ids[0, -n_new:][start : start + SLICE_POSITIONS, None]
        log_probs.append(log_p.gather(1, targets)[:, 0].cpu().numpy())
        entropies.append(torch.special.entr(log_p.exp()).sum(dim=-1).cpu().numpy())
    return np.concatenate(log_probs), np.concatenate(entropies)


def chunk_nats(generation: Generation, log_probs: np.ndarray) -> float:
    """-log P of the tokens that chunks brought; log_probs (n,) of all new tokens."""
    total = 0.0
    for chunk in generation.chunks:
        first = chunk.position - len(generation.prompt_ids)
        total -= float(log_probs[first : first + len(chunk.token_ids)].sum())
    return total


def distinct_share(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over n-grams, of all texts together; 0 where none is long enough."""
    grams = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_share(text: Sequence[int], n: int) -> float:
    """Of a text's n-grams, those that stood before in it; 0 for a text that is shorter."""
    grams = n_grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def n_grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


if __name__ == "__main__":
    run_script(main)
