"""Time the perplexity of CD-LM against the LM's own forward passes: finding all proposals, and ten settings of the sum.

The model has the shape of GPT-2 small and random weights, the text is random tokens that are as unequally frequent as
words are (Zipf), and so are the entry tokens of the datastore's rows: a frequent token is asked for often and has many
rows. Context vectors lie around the model's hidden states, chunks are random. The windows are read in some equal parts;
each ratio is taken part by part. What is compared:

    LM         the forward passes alone, hidden states and logits
    proposals  the nearest row of each position's token trie, and how far its chunk agrees with the text
    sum        acceptance probabilities and log-likelihoods of all windows under all settings
    figures    the same with everything that a table of perplexity shows: intervals, shares, posteriors

Run     OMP_NUM_THREADS=1 python benchmarks/perplexity_speed.py --output perplexity_speed.json
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Spread, hardware, table, write_json
from utils.cli import POSITIVE_INT, Parser, run_script
from utils.datastore.flattened import unit_rows
from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.acceptance import Acceptance
from utils.evaluation.marginal import Proposals
from utils.evaluation.perplexity import Positions, TextSize, cdlm_figures, fill_in_nearest, setting_log_likelihoods
from utils.lm.model import CausalLM, pick_device
from utils.progress import ProgressBar

ZIPF_SHIFT = 2.7  # frequency of the r-th most frequent token: 1 / (r + this), as Mandelbrot found it of words
CHUNK_TOKENS = 4
N_STATES, NOISE = 2048, 0.5  # hidden states that rows lie around, and how far from them, relative to their length
SETTINGS = tuple(np.linspace(0.5, 0.95, 10).tolist())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--windows", type=POSITIVE_INT, default=500, help="of the text")
    parser.add_argument("--window", type=POSITIVE_INT, default=512, help="tokens of each")
    parser.add_argument("--rows", type=POSITIVE_INT, default=500_000, help="of the datastore")
    parser.add_argument("--parts", type=POSITIVE_INT, default=5, help="that the windows are read in")
    parser.add_argument("--batch_size", type=POSITIVE_INT, default=8, help="windows that the LM reads together")
    parser.add_argument("--layers", type=POSITIVE_INT, default=12, help="of the model; other than 12 is no GPT-2 small")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args(argv)


def random_model(n_layers: int, device: torch.device) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(GPT2LMHeadModel(GPT2Config(n_layer=n_layers)).to(device).eval(), "gpt2-small")  # type: ignore[arg-type]


def zipf(n_ids: int) -> np.ndarray:
    """(n_ids,) float64 probabilities, the most frequent first."""
    weights = 1 / (np.arange(n_ids) + 1 + ZIPF_SHIFT)
    return weights / weights.sum()


def synthetic_datastore(lm: CausalLM, n_rows: int, rng: np.random.Generator) -> Datastore:
    n_ids = lm.model.config.vocab_size
    counts = rng.multinomial(n_rows, zipf(n_ids))
    states = hidden_states_of_random_text(lm, rng)
    tries = []
    for entry in ProgressBar(np.flatnonzero(counts).tolist(), desc="making tries", unit="trie"):
        n = int(counts[entry])
        vectors = states[rng.integers(0, len(states), n)]
        noise = rng.standard_normal(vectors.shape, dtype=np.float32)
        noise *= NOISE * np.linalg.norm(vectors, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        rows = torch.from_numpy(unit_rows(vectors + noise)).to(lm.device)
        chunks = np.sort(rng.integers(0, n_ids, (n, CHUNK_TOKENS), dtype=np.int32), axis=0)
        offsets = np.arange(n + 1) * CHUNK_TOKENS
        tries.append(TokenTrie(entry, rows, chunks.ravel(), offsets, np.zeros(n, np.int64), np.zeros(n, np.int32)))
    return Datastore.of(tries, lm.hidden_size)


@torch.inference_mode()
def hidden_states_of_random_text(lm: CausalLM, rng: np.random.Generator) -> np.ndarray:
    """(N_STATES, D) float32."""
    ids = rng.choice(lm.model.config.vocab_size, (N_STATES // 512, 512), p=zipf(lm.model.config.vocab_size))
    states = lm.forward(torch.from_numpy(ids).to(lm.device))[0]
    return states.float().cpu().numpy().reshape(-1, lm.hidden_size)


@torch.inference_mode()
def timed_reading(lm: CausalLM, token_ids: np.ndarray, batch_size: int) -> tuple[Positions, float]:
    """What the LM says of some windows (W, L), and the seconds of its forward passes alone."""
    hidden, seconds = [], 0.0
    for ids in torch.from_numpy(token_ids).to(lm.device).split(batch_size):
        started = time.perf_counter()
        states, logits = lm.forward(ids)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        seconds += time.perf_counter() - started
        del logits
        hidden.append(states[:, :-1].float().cpu().numpy().reshape(-1, lm.hidden_size))
    n_windows, n = token_ids.shape[0], token_ids.shape[1] - 1
    places = np.arange(n_windows * n)
    # What the LM gives to each token has no bearing on the time: one probability for all.
    log_probs, left = np.full(len(places), -10.0), np.tile(np.arange(n, 0, -1), n_windows)
    before = np.tile(np.arange(n), n_windows)
    entries, following = token_ids[:, :-1].ravel(), token_ids[:, 1:].ravel()
    return Positions(entries, places, np.concatenate(hidden), following, log_probs, left, before), seconds


def measure_part(lm: CausalLM, datastore: Datastore, token_ids: np.ndarray, batch_size: int) -> dict[str, float]:
    """Seconds of each step for some windows."""
    positions, seconds = timed_reading(lm, token_ids, batch_size)
    n = len(positions.places)
    lengths = np.full(len(token_ids), token_ids.shape[1] - 1)
    found = Proposals(lengths, np.zeros(n), np.full(n, np.nan), *np.zeros((2, n), dtype=np.int64))
    started = time.perf_counter()
    fill_in_nearest(found, datastore, positions)
    found_at = time.perf_counter()
    found = replace(found, log_probs=positions.log_probs)
    settings = [Acceptance(t, "bernoulli") for t in SETTINGS]
    setting_log_likelihoods(settings, found)
    summed_at = time.perf_counter()
    cdlm_figures(found, settings, TextSize(n, n))
    return {
        "LM": seconds,
        "proposals": found_at - started,
        "sum": summed_at - found_at,
        "figures": time.perf_counter() - summed_at,
        "coverage": float((~np.isnan(found.similarities)).mean()),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_device(args.device)
    rng = np.random.default_rng(0)
    lm = random_model(args.layers, device)
    datastore = synthetic_datastore(lm, args.rows, rng)
    n_ids = lm.model.config.vocab_size
    token_ids = rng.choice(n_ids, (args.windows, args.window), p=zipf(n_ids))
    parts = [part for part in np.array_split(token_ids, args.parts) if len(part)]
    bar = ProgressBar(parts, desc="reading parts", unit="part")
    measured = [measure_part(lm, datastore, part, args.batch_size) for part in bar]
    steps = ("LM", "proposals", "sum", "figures")
    seconds = {step: Spread(tuple(part[step] for part in measured)) for step in steps}
    rows = [
        [step, f"{sum(spread.values):.3g}", spread.over(seconds["LM"]).text() if step != "LM" else "1"]
        for step, spread in seconds.items()
    ]
    print(table(["step", "seconds", "/ LM"], rows))
    coverage = float(np.mean([part["coverage"] for part in measured]))
    n_tries, largest = len(datastore.n_rows), max(datastore.n_rows.values())
    print(
        f"\n{args.windows} windows of {args.window} tokens in {len(parts)} parts; {args.rows:,} rows in {n_tries:,} tries, "
        f"the largest of {largest:,}; proposals at {coverage:.1%} of the positions; {len(SETTINGS)} settings"
    )
    print(", ".join(f"{name} {value}" for name, value in hardware(device).items()))
    if args.output is not None:
        results: dict[str, Any] = {
            "seconds": {step: sum(spread.values) for step, spread in seconds.items()},
            "ratio_to_lm": {step: spread.over(seconds["LM"]).as_json() for step, spread in seconds.items()},
            "coverage": coverage,
            "tries": n_tries,
            "largest_trie_rows": largest,
        }
        write_json(args.output, device, argv, results)


if __name__ == "__main__":
    run_script(main)
