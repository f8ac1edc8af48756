"""The paper's heat maps: how perplexity and forward passes saved depend on γ and θ (KCD; sections 6.1 and 6.2).

For each γ a datastore is made. Perplexity of the test split is that of the default map of each θ, an exact sum over
segmentations; beside it stand, of each γ, the best constant q and the map fitted to the validation split. FPS is that
of chunk mode, which accepts from similarity θ on, on prompts, mean over seeds.

Writes  OUTPUT   "results": {"gammas": [γ, …], "thetas": [θ, …], "base": figures of the base LM,
                  "perplexity", "perplexity_lower", "perplexity_upper", "fps", "fps_lower", "fps_upper",
                  "from_chunks", "generated_perplexity": [[of each θ, …] of each γ, …],
                  "constant": [figures of each γ, …], "fitted": [figures of each γ, …], "rows": [of each γ, …],
                  "similarity_quantiles": [[5%, 25%, 50%, 75%, 95%] of each γ, …]}; intervals are 95%:
                  perplexity's by bootstrap over windows, FPS's Student's over seeds; figures are as eval.py's
Run     python benchmarks/paper/sensitivity.py --output sensitivity.json
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.common import table, write_json
from benchmarks.paper.common import CONSTANT, FITTED, Interval, Reader, add_windows, cdlm_rows, without_windows
from benchmarks.paper.datastores import SMALL, add_work, work_of
from benchmarks.paper.generating import (
    Asking,
    add_generation,
    forward_passes_saved,
    over_seeds,
    perplexity_under,
    share_from_chunks,
)
from utils.cli import COSINE, Parser, Range, run_script
from utils.datastore.store import Datastore, open_datastore
from utils.decoding.acceptance import Acceptance
from utils.evaluation.perplexity import Setting, base_figures, fit_maps
from utils.files import InputError
from utils.lm.model import CausalLM

GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
THETAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
RATIO = ("ratio", "ratio_lower", "ratio_upper")
QUANTILES = (5, 25, 50, 75, 95)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_work(parser, model_gen=SMALL)
    add_windows(parser)
    add_generation(parser, temperature=0.7, max_new_tokens=60, batch_size=8)
    parser.add_argument(
        "--gammas", type=Range(float, least=0, below=1), nargs="+", default=list(GAMMAS), metavar="γ", help="in [0, 1)"
    )
    parser.add_argument("--thetas", type=COSINE, nargs="+", default=list(THETAS), metavar="θ", help="in [-1, 1)")
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if max(args.thetas) >= 1:
        raise InputError("--thetas: 1 disables retrieval; expected cosine similarities below 1")
    args.gammas, args.thetas = sorted(set(args.gammas)), sorted(set(args.thetas))
    work = work_of(args)
    reader, asking = Reader.of(work, args), Asking.of(args, work)
    lm = asking.lm
    base = base_figures(reader.proposals(lm, None, reader.test), reader.test.size)
    by_gamma = []
    for gamma in args.gammas:
        datastore = open_datastore(work.tries(gamma), device=lm.device, max_bytes=int(args.trie_cache_gb * 10**9))
        by_gamma.append(perplexities(reader, lm, datastore, args.thetas) | generated(asking, datastore, args.thetas))
    results = {"gammas": args.gammas, "thetas": args.thetas, "base": base}
    results |= {key: [of_gamma[key] for of_gamma in by_gamma] for key in by_gamma[0]}
    report(results, args)
    if args.output is not None:
        write_json(args.output, lm.device, argv, results)


def perplexities(reader: Reader, lm: CausalLM, datastore: Datastore, thetas: Sequence[float]) -> dict[str, Any]:
    """One γ: perplexity of the test split at each θ, and with what is fitted to the validation split."""
    fitted, constant = fit_maps(
        reader.validation.path, reader.proposals(lm, datastore, reader.validation), reader.args.q_max
    )
    settings: dict[str, Setting] = {f"{theta}": Acceptance(theta, "bernoulli", reader.args.q_max) for theta in thetas}
    settings |= {CONSTANT: constant, FITTED: fitted}
    proposals = reader.proposals(lm, datastore, reader.test)
    rows = without_windows(cdlm_rows(settings, proposals, reader.test.size))
    of_theta = [rows[f"{theta}"] for theta in thetas]
    keys = ("perplexity", "perplexity_lower", "perplexity_upper")
    return {key: [row[key] for row in of_theta] for key in keys} | {
        "constant": rows[CONSTANT],
        "fitted": rows[FITTED],
        "rows": sum(datastore.n_rows.values()),
        "similarity_quantiles": np.nanpercentile(proposals.similarities, QUANTILES).tolist(),
    }


def generated(asking: Asking, datastore: Datastore, thetas: Sequence[float]) -> dict[str, list[float]]:
    """One γ: chunk mode at each θ."""
    ways = {f"{theta}": partial(asking.chunk_mode, datastore, Acceptance(theta)) for theta in thetas}
    by_theta = [list(of_seeds.values()) for of_seeds in asking.generate(ways).values()]
    fps = [over_seeds([forward_passes_saved(texts) for texts in of_seeds]) for of_seeds in by_theta]
    return {
        "fps": [each.value for each in fps],
        "fps_lower": [each.lower for each in fps],
        "fps_upper": [each.upper for each in fps],
        "from_chunks": [float(np.mean([share_from_chunks(texts) for texts in of_seeds])) for of_seeds in by_theta],
        "generated_perplexity": [
            float(np.mean([perplexity_under(asking.lm, texts) for texts in of_seeds])) for of_seeds in by_theta
        ],
    }


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    base = results["base"]
    thetas = [f"θ {theta:g}" for theta in results["thetas"]]

    def grid(key: str, decimals: int, scale: float = 1.0, others: dict[str, list[str]] | None = None) -> str:
        others = others or {}
        rows = [
            [
                f"γ {gamma:g}",
                *(f"{scale * value:.{decimals}f}" for value in values),
                *(more[i] for more in others.values()),
            ]
            for i, (gamma, values) in enumerate(zip(results["gammas"], results[key], strict=True))
        ]
        return table(["", *thetas, *others], rows)

    beside = {
        name: [f"{row['perplexity']:.3f}" for row in results[key]]
        for key, name in (("constant", CONSTANT), ("fitted", FITTED))
    }
    ratios = (Interval(*(row[key] for key in RATIO)) for row in results["fitted"])
    beside["fitted map to base LM"] = [ratio.text(3) for ratio in ratios]
    beside["rows"] = [f"{n:,}" for n in results["rows"]]
    beside["median similarity"] = [f"{quantiles[2]:.3f}" for quantiles in results["similarity_quantiles"]]
    shown = f"{base['perplexity']:.3f} ({base['perplexity_lower']:.3f} to {base['perplexity_upper']:.3f})"
    print(f"Perplexity of the test split, {base['tokens']:,} tokens; base LM: {shown}")
    print(grid("perplexity", 2, others=beside))
    print(f"\nForward passes saved by chunk mode, %, mean of {len(args.seeds)} seeds; temperature {args.temperature:g}")
    print(grid("fps", 1, 100))
    print("\nPerplexity of what chunk mode wrote, under the base LM")
    print(grid("generated_perplexity", 2))


if __name__ == "__main__":
    run_script(main)
