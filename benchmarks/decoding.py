"""Time our decoding against what others decode with: in one process, on the same prompts, for as many tokens.

Each repeat goes through the prompts, a batch at a time; each batch is decoded by every peer in turn, the order reversed
from one repeat to the next, so that what else the machine does meets all alike. Seconds hold the prompts' forward
passes. Ratios are taken repeat by repeat. No text ends before its last token.

Run     python benchmarks/decoding.py --workload example --output decoding.json
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import hardware, table, write_json
from benchmarks.paper.datastores import add_work_folder
from benchmarks.peers import (
    Generate,
    Make,
    OurLoop,
    Peer,
    SuffixCorpus,
    SuffixDrafter,
    SuffixSettings,
    Tally,
    verify_mode,
)
from benchmarks.results import HEADER, Result, differences
from benchmarks.workloads import LARGE_ROWS, ROWS, WORKLOADS, Stores, Workload, load_workload
from utils.cli import NON_NEGATIVE_INT, POSITIVE_INT, Parser, Range, run_script
from utils.decoding.draft import DraftSettings, RetrievalDrafter
from utils.decoding.loop import Request, n_slots_for
from utils.decoding.retriever import Retriever
from utils.lm.kv_cache import make_kv_cache
from utils.lm.sampling import Sampler

WARM_UP_TOKENS = 8
NO_SUFFIX_DECODING = "SuffixDecoding is left out: arctic-inference is not installed (see benchmarks/README.md)"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="example", help="model, prompts and datastores")
    add_work_folder(parser)
    parser.add_argument(
        "--rows", type=POSITIVE_INT, nargs="+", help=f"synthetic tries (default: {ROWS}; llama-7b: {LARGE_ROWS})"
    )
    parser.add_argument("--batch_sizes", type=POSITIVE_INT, nargs="+", default=[1, 8], help="prompts decoded together")
    parser.add_argument("--temperatures", type=Range(float, least=0), nargs="+", default=[0.0, 0.8], help="0 is greedy")
    parser.add_argument("--n_prompts", type=POSITIVE_INT, default=16, help="prompts, at most")
    parser.add_argument("--max_new_tokens", type=POSITIVE_INT, default=100, help="tokens of each")
    parser.add_argument("--max_draft_tokens", type=Range(int, least=1, most=256), default=16, help="of all that draft")
    parser.add_argument("--peers", nargs="+", default=["*"], help="names or patterns of those to compare")
    parser.add_argument("--repeats", type=POSITIVE_INT, default=5, help="passes over the prompts that count")
    parser.add_argument("--seed", type=NON_NEGATIVE_INT, default=0, help="of the drawing of tokens")
    parser.add_argument("--device", default="auto", help="torch device; auto: CUDA if there is one")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="weights'")
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Setting:
    """What all peers of one comparison have in common."""

    workload: Workload
    temperature: float
    batch_size: int
    max_new_tokens: int
    max_draft_tokens: int

    @property
    def sampler(self) -> Sampler:
        return Sampler.from_settings(self.temperature, None, None)


def peers_of(setting: Setting, wanted: Sequence[str]) -> list[Peer]:
    """The peers that the patterns name; the baseline is always among them, since ratios are to it."""
    lm = setting.workload.lm
    found: dict[str, Callable[[], Peer]] = {"generate": lambda: Generate("generate", lm, setting.temperature)}
    if setting.batch_size == 1:  # the library's own limit
        lookup: dict[str, Any] = {"prompt_lookup_num_tokens": setting.max_draft_tokens}
        found["prompt lookup"] = lambda: Generate("prompt lookup", lm, setting.temperature, **lookup)
    cache = None
    if lm.device.type == "cuda":
        found["generate static"] = lambda: Generate(
            "generate static", lm, setting.temperature, compiles=True, cache_implementation="static"
        )
        requests = [Request(i, prompt, setting.max_new_tokens) for i, prompt in enumerate(setting.workload.prompts)]
        n_slots = n_slots_for(requests, uses_drafts=True)
        with torch.inference_mode():
            cache = make_kv_cache(lm, setting.batch_size, n_slots, graphs=True)
    ours = partial(OurLoop, lm=lm, sampler=setting.sampler, batch_size=setting.batch_size, cache=cache)
    found["baseline"] = lambda: ours("baseline", make=dict)
    for stores in setting.workload.stores:
        for name, prepare in _with_stores(stores, setting.max_draft_tokens).items():
            name = f"{name}, {stores.name}" if stores.name else name
            is_exact = not name.startswith("chunk")
            found[name] = lambda name=name, prepare=prepare, is_exact=is_exact: ours(  # type: ignore[misc]
                name, make=prepare(), is_exact=is_exact
            )
    chosen = [n for n in found if n == "baseline" or any(fnmatch(n, pattern) for pattern in wanted)]
    return [found[name]() for name in chosen]


def _with_stores(stores: Stores, max_draft_tokens: int) -> dict[str, Callable[[], Make]]:
    """By name: prepares what a peer with datastores needs and returns what makes its decoding anew."""
    found: dict[str, Callable[[], Make]] = {}
    found["chunk"] = lambda: lambda: {"retriever": Retriever(stores.chunks, stores.acceptance)}
    for growth in ("full", "paying"):
        for shape in ("line", "tree"):
            for live in ("sequence", "session"):
                settings = DraftSettings(shape=shape, max_tokens=max_draft_tokens, live=live)
                found[f"verify {shape} {live} {growth}"] = partial(_verify, stores, settings, growth)
                if SuffixCorpus.is_available():
                    suffix = SuffixSettings(shape, max_draft_tokens)
                    found[f"suffix {shape} {live} {growth}"] = partial(_suffix, stores, suffix, live, growth)
    return found


def _verify(stores: Stores, settings: DraftSettings, growth: str) -> Make:
    return lambda: verify_mode(RetrievalDrafter(stores.drafts, settings), growth)


def _suffix(stores: Stores, settings: SuffixSettings, live: str, growth: str) -> Make:
    # A cache of its own: its responses are nobody else's to draft from.
    corpus = SuffixCorpus(stores.corpus)
    return lambda: verify_mode(SuffixDrafter(corpus, settings, live == "session"), growth)


def compare(setting: Setting, peers: list[Peer], args: argparse.Namespace, bar: Any) -> list[Result]:
    """Decode with every peer `repeats` times."""
    requests = [Request(i, p, args.max_new_tokens, args.seed) for i, p in enumerate(setting.workload.prompts)]
    batches = [requests[at : at + setting.batch_size] for at in range(0, len(requests), setting.batch_size)]
    short = [Request(r.index, r.prompt_ids, min(WARM_UP_TOKENS, r.max_new_tokens), r.seed) for r in batches[0]]
    for peer in peers:
        peer.begin()
        # What is compiled for the length of its cache must be so for that which counts.
        peer.run(batches[0] if peer.compiles else short)
    tallies: dict[str, list[Tally]] = {peer.name: [] for peer in peers}
    for repeat in range(args.repeats):
        for peer in peers:
            peer.begin()
            tallies[peer.name].append(Tally())
        for batch in batches:
            for peer in peers if repeat % 2 == 0 else reversed(peers):
                tallies[peer.name][-1].add(peer.run(batch))
                bar.update()
    lm, plain = setting.workload.lm, tallies["baseline"][0].new_token_ids
    return [
        Result(
            peer,
            setting.batch_size,
            setting.temperature,
            tallies[peer.name],
            differences(lm, requests, plain, tallies[peer.name], setting.temperature) if peer.is_exact else None,
        )
        for peer in peers
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    workload = load_workload(args.workload, args.device, args.dtype, args.n_prompts, args.rows, args.work)
    if not SuffixCorpus.is_available():
        print(NO_SUFFIX_DECODING)
    documents = []
    for temperature in args.temperatures:
        for batch_size in args.batch_sizes:
            setting = Setting(workload, temperature, batch_size, args.max_new_tokens, args.max_draft_tokens)
            peers = peers_of(setting, args.peers)
            n_steps = args.repeats * len(peers) * -(-len(workload.prompts) // batch_size)
            with tqdm(total=n_steps, desc=f"batch {batch_size}, T {temperature}", unit="batch") as bar:
                results = compare(setting, peers, args, bar)
            print(f"\n{args.workload}, batch {batch_size}, temperature {temperature:g}")
            print(table(HEADER, [result.row(results) for result in results]), flush=True)
            documents += [result.as_json(results) for result in results]
    words = ", ".join(f"{name} {value}" for name, value in hardware(workload.lm.device).items())
    print(f"\n{len(workload.prompts)} prompts, {args.max_new_tokens} tokens each; {args.repeats} repeats; {words}")
    if args.output is not None:
        write_json(args.output, workload.lm.device, argv, documents)


if __name__ == "__main__":
    run_script(main)
