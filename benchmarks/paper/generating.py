"""What the tables of generated text share: prompts, ways of decoding them in turn, and figures over seeds."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.paper.common import Interval
from benchmarks.paper.datastores import EXAMPLE_DATASET, ROOT, Work, run_script
from utils.cli import NON_NEGATIVE_INT, POSITIVE_INT, Parser, Range
from utils.datastore.store import Datastore, open_datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.loop import Decoding, Request, decode
from utils.decoding.retriever import Retriever
from utils.decoding.types import Generation
from utils.files import InputError
from utils.lm.model import CausalLM, eos_token_ids, load_config, load_lm, load_tokenizer, max_positions
from utils.lm.sampling import Sampler
from utils.lm.scoring import negative_log_likelihood
from utils.progress import ProgressBar
from utils.text.prompts import encode_prompts, read_prompts, require_room

BASELINE = "baseline"
WARM_UP_TOKENS = 8
# Student's t at 97.5%, by how many seeds there are.
STUDENT_T = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2))

# By way and seed: a generation of each prompt, in their order.
Generations = dict[str, dict[int, list[Generation]]]


def add_generation(parser: Parser, *, temperature: float, max_new_tokens: int = 100, batch_size: int = 1) -> None:
    """The flags of what is generated."""
    group = parser.add_argument_group("generation")
    default = "examples/prompts.json for python-docs, else cut from the test split"
    group.add_argument("--prompt_file", type=Path, help=f"prompts, as eval.py reads them (default: {default})")
    group.add_argument("--n_prompts", type=POSITIVE_INT, default=16, help="prompts, at most")
    group.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    group.add_argument("--max_new_tokens", type=POSITIVE_INT, default=max_new_tokens, help="tokens of each, at most")
    group.add_argument(
        "--temperature", type=Range(float, least=0), default=temperature, help="of the LM's tokens; 0 is greedy"
    )
    group.add_argument("--prompt_batch_size", type=POSITIVE_INT, default=batch_size, help="prompts decoded together")
    add_seeds(group)


def add_seeds(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "--seeds", type=NON_NEGATIVE_INT, nargs="+", default=[0, 1, 2], help="two to ten, all else being equal"
    )


def require_seeds(seeds: Sequence[int]) -> None:
    """Raise InputError where no interval can be given over these."""
    if len(seeds) not in STUDENT_T or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))}: expected two to ten different ones, for an interval")


@dataclass(frozen=True)
class OverSeeds(Interval):
    """The mean of a figure over seeds and Student's 95% interval of it."""

    by_seed: tuple[float, ...]


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """values: of two seeds to ten."""
    mean = float(np.mean(values))
    half = STUDENT_T[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return OverSeeds(mean, mean - half, mean + half, tuple(values))


def figures_over_seeds(values: Sequence[Mapping[str, float]]) -> dict[str, OverSeeds]:
    """The figures of each seed, by name, together."""
    return {name: over_seeds([of_seed[name] for of_seed in values]) for name in values[0]}


def cells(name: str, row: Mapping[str, Interval], columns: Mapping[str, tuple[float, int]]) -> list[str]:
    """A row of a table; columns: by figure the factor it is shown with, and decimals."""
    shown = (row[key].text(decimals, scale) if key in row else "-" for key, (scale, decimals) in columns.items())
    return [name, *shown]


def prompt_file_of(args: argparse.Namespace, work: Work) -> Path:
    """The prompts that the flags ask for, cut from the test split where there are none."""
    if args.prompt_file is not None:
        return Path(args.prompt_file)
    if work.dataset == EXAMPLE_DATASET:
        return ROOT / "examples" / "prompts.json"
    path = work.folder / "prompts.json"
    run_script("examples/make_prompts.py", "--data_file", work.split("test"), "--output_file", path)
    return path


@dataclass(frozen=True)
class Asking:
    """A model and the prompts that it goes on from, once for each seed."""

    lm: CausalLM
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    args: argparse.Namespace

    @classmethod
    def of(cls, args: argparse.Namespace, work: Work) -> "Asking":
        """Raises InputError where the seeds are too few or a prompt has no room."""
        require_seeds(args.seeds)
        prompts = read_prompts(prompt_file_of(args, work))[: args.n_prompts]
        tokenizer = load_tokenizer(work.model_gen, args.cache_dir)
        encoded = encode_prompts(prompts, tokenizer, chat=args.chat)
        n_positions = max_positions(load_config(work.model_gen, args.cache_dir))
        require_room(prompts, encoded, tokenizer, n_positions, args.max_new_tokens)
        return cls(load_lm(work.model_gen, args.device, args.dtype, args.cache_dir), tokenizer, encoded, args)

    def decoding(self) -> Decoding:
        """Plain generation, which other ways are made from."""
        args = self.args
        sampler = Sampler.from_settings(args.temperature, None, None)
        return Decoding(
            sampler, eos_token_ids(self.lm.model.generation_config, self.tokenizer), batch_size=args.prompt_batch_size
        )

    def chunk_mode(self, datastore: Datastore, acceptance: Acceptance) -> Decoding:
        """With chunks of a datastore."""
        return replace(self.decoding(), retriever=Retriever(datastore, acceptance))

    def generate(self, ways: Mapping[str, Callable[[], Decoding]]) -> Generations:
        """Go on from every prompt in every way, a batch at a time, the order of the ways reversed from batch to batch.

        So what else the machine does meets all alike. ways: each makes its decoding anew.
        """
        decodings = {name: make() for name, make in ways.items()}
        for decoding in decodings.values():  # first calls pay for what later ones do not
            list(
                decode(self.lm, [Request(0, self.prompts[0], min(WARM_UP_TOKENS, self.args.max_new_tokens))], decoding)
            )
        found: Generations = {name: {seed: [] for seed in self.args.seeds} for name in ways}
        with ProgressBar(
            total=len(self.args.seeds) * len(ways) * len(self.prompts), desc="generating", unit="text"
        ) as bar:
            for n_turn, (seed, batch) in enumerate(self._batches()):
                for name in ways if n_turn % 2 == 0 else reversed(list(ways)):
                    ended = sorted(decode(self.lm, batch, decodings[name]), key=lambda each: each.index)
                    found[name][seed] += ended
                    bar.update(len(ended))
        return found

    def _batches(self) -> Iterator[tuple[int, list[Request]]]:
        args = self.args
        for seed in args.seeds:
            requests = [Request(i, prompt, args.max_new_tokens, seed) for i, prompt in enumerate(self.prompts)]
            for start in range(0, len(requests), args.prompt_batch_size):
                yield seed, requests[start : start + args.prompt_batch_size]

    def text(self, generation: Generation) -> str:
        """What was written after the prompt."""
        return str(self.tokenizer.decode(generation.new_token_ids, skip_special_tokens=True))


def open_whole(trie_folder: Path, lm: CausalLM, min_chunk_length: int = 1) -> Datastore:
    """A datastore with all its tries in memory, on the model's device."""
    datastore = open_datastore(trie_folder, device=lm.device, max_bytes=2**63, min_chunk_length=min_chunk_length)
    datastore.load_all()
    return datastore


def n_new(generations: Sequence[Generation]) -> int:
    return sum(len(generation.new_token_ids) for generation in generations)


def forward_passes_saved(generations: Sequence[Generation]) -> float:
    """FPS: 1 - forward passes / new tokens."""
    return 1 - sum(generation.stats.forward_passes for generation in generations) / n_new(generations)


def seconds_per_token(generations: Sequence[Generation]) -> float:
    return sum(generation.stats.seconds for generation in generations) / n_new(generations)


def share_from_chunks(generations: Sequence[Generation]) -> float:
    """Share of the new tokens that chunks brought."""
    return sum(len(chunk.token_ids) for each in generations for chunk in each.chunks) / n_new(generations)


def repeated_ngrams(generations: Sequence[Generation], n: int = 4) -> float:
    """Mean share of a text's n-grams of new tokens that stand earlier in it; texts that are too short count as 0."""
    shares = []
    for each in generations:
        ids = each.new_token_ids
        ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return float(np.mean(shares))


def perplexity_under(lm: CausalLM, generations: Sequence[Generation]) -> float:
    """Of the new tokens, given their prompts: exp(total nats / total tokens)."""
    nll = sum(negative_log_likelihood(lm, each.prompt_ids, each.new_token_ids) for each in generations)
    return float(np.exp(nll / n_new(generations)))
