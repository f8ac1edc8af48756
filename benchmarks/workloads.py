"""What `decoding.py` decodes: a model, prompts and datastores, made or found.

`example` is the embedded model on prompts from documents it has not seen, with two datastores of its training text: one
for chunk mode (γ 0.1) and one for drafts (γ 0, chunks of at most 16 tokens). The others have random weights in the
shape of a known model: their text means nothing, so they tell about speed alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.paper.datastores import LARGE, ROOT, Work
from utils.datastore.store import Datastore, TokenTrie, open_datastore
from utils.decoding.acceptance import Acceptance, AcceptanceMap
from utils.decoding.loop import Decoding, Request, decode
from utils.files import InputError
from utils.json_io import read_json
from utils.lm.model import CausalLM, load_lm, load_tokenizer, pick_device
from utils.lm.sampling import Sampler
from utils.manifest import read_finished
from utils.text.prompts import encode_prompts, read_prompts

CHUNK_THRESHOLD, DRAFT_THRESHOLD, DRAFT_CHUNK_LENGTH = 0.1, 0.0, 16
# Chunk mode's rule: that of the example's pipeline; for synthetic tries one that nothing passes, so that every step
# searches and no text is skipped.
EXAMPLE_ACCEPTANCE, NO_ACCEPTANCE = Acceptance(0.9), Acceptance(0.99999)
# At the 7B shape one proposal in so many is accepted, whatever it is like, so that there are passes to save.
SOMETIMES = Acceptance(0.5, "bernoulli", fitted=AcceptanceMap((-1.0, 1.0), (1 / 30, 1 / 30)))
PROMPT_TOKENS, CHUNK_TOKENS, FIRST_TOKENS = 64, 16, 8
# Hidden states that synthetic context vectors lie around, and how far from them, relative to their length.
N_STATES, NOISE = 512, 0.5
BLOCK_ROWS = 16_384
INDEX_SEARCHES = 200  # more than an index waits before it makes itself faster


@dataclass(frozen=True)
class Stores:
    """The datastores of one comparison: what chunk mode and what drafts read, and the text they came from."""

    name: str  # empty where there is one comparison only
    chunks: Datastore
    drafts: Datastore
    acceptance: Acceptance  # of chunk mode
    corpus: list[list[int]]


@dataclass(frozen=True)
class Workload:
    """A model, prompts as token ids and the datastores to decode with."""

    name: str
    lm: CausalLM
    prompts: list[list[int]]
    stores: list[Stores]
    text_is_random: bool


def load_workload(
    name: str, device: str, dtype: str, n_prompts: int, rows: Sequence[int] | None, folder: Path
) -> Workload:
    """One of WORKLOADS. folder: the work folder of the example's datastores."""
    if name == "example":
        return _example(device, dtype, n_prompts, folder)
    rows = rows or (LARGE_ROWS if name == "llama-7b" else ROWS)
    if name == "llama-7b":
        _require_room_for_7b(device, rows)
    lm = CausalLM(random_model(name, device, dtype).eval(), name)
    n_ids = lm.model.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, n_ids, (n_prompts, PROMPT_TOKENS)).tolist()
    written = _greedy_token_ids(lm, prompts)
    acceptance = SOMETIMES if name == "llama-7b" else NO_ACCEPTANCE
    return Workload(name, lm, prompts, [_synthetic_stores(lm, n, written, acceptance) for n in rows], True)


WORKLOADS = ("example", "gpt2-small", "llama-tiny", "llama-1b", "llama-7b")
# Of synthetic tries, where the command says nothing else.
ROWS, LARGE_ROWS = (1000, 10_000, 100_000), (100_000, 1_000_000)


# ---- The example


def _example(device: str, dtype: str, n_prompts: int, folder: Path) -> Workload:
    work = Work(folder, model_flags=("--device", device, "--dtype", dtype))
    folders = (work.tries(CHUNK_THRESHOLD), work.tries(DRAFT_THRESHOLD, DRAFT_CHUNK_LENGTH))
    lm = load_lm(LARGE, device, dtype)
    prompts = read_prompts(ROOT / "examples" / "prompts.json")[:n_prompts]
    encoded = encode_prompts(prompts, load_tokenizer(LARGE))
    chunks, drafts = (open_datastore(each, device=lm.device, max_bytes=2**63) for each in folders)
    for datastore in (chunks, drafts):
        datastore.load_all()
    stores = Stores("", chunks, drafts, EXAMPLE_ACCEPTANCE, _passages(work.extracted(LARGE) / work.partition))
    return Workload("example", lm, encoded, [stores], False)


def _passages(folder: Path) -> list[list[int]]:
    """The texts of stage 2's windows, each without what it shares with the window before."""
    manifest = read_finished(folder.parent / f"{folder.name}_manifest.json", "extract_token_probs_and_memmap.py")
    overlap = manifest.arguments["chunk_size"] - manifest.arguments["stride"]
    texts: list[list[int]] = []
    for window in range(manifest.results["n_windows"]):
        token_ids = [entry[4] for entry in read_json(folder / f"token_probs_{window}.json")]
        if texts and token_ids[:overlap] == texts[-1][-overlap:]:
            texts[-1] += token_ids[overlap:]
        else:
            texts.append(token_ids)
    return texts


# ---- Random weights


def random_model(name: str, device: str, dtype: str) -> Any:
    """Random weights in the shape of a known model; dtype auto: float32 on a CPU, else bfloat16."""
    where = pick_device(device)
    kind = ("float32" if where.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, kind))
    try:
        with where:
            return GPT2LMHeadModel(GPT2Config()) if name == "gpt2-small" else LlamaForCausalLM(LLAMAS[name])
    finally:
        torch.set_default_dtype(torch.float32)


LLAMAS = {
    # For trying a command out
    "llama-tiny": LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
    ),
    # Llama 3.2 1B
    "llama-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    # Llama 2 7B, whose sizes are the class's own
    "llama-7b": LlamaConfig(max_position_embeddings=4096),
}


def _require_room_for_7b(device: str, rows: Sequence[int]) -> None:
    """Raise InputError where there is no CUDA device, or not the memory for the model in bfloat16 and the tries."""
    where, name = pick_device(device), "--workload llama-7b"
    if where.type != "cuda":
        raise InputError(f"{name}: is measured on a CUDA device, and {where} is none; take llama-1b or gpt2-small here")
    # The rows in float32, with a copy in float16 until there are bounds; the cache and what a pass makes.
    needed = 2 * 6.8e9 + sum(rows) * LLAMAS["llama-7b"].hidden_size * 6 + 6e9
    free, _ = torch.cuda.mem_get_info(where)
    if free < needed:
        got = f"{free / 1e9:.0f} GB are free on {where}, of the {needed / 1e9:.0f} GB that it needs with these --rows"
        raise InputError(f"{name}: {got}; give fewer --rows")


class OneTrieForAll(Datastore):
    """Every entry token has the same trie, so that each step searches as many rows."""

    def __init__(self, trie: TokenTrie, n_ids: int) -> None:
        n_rows = dict.fromkeys(range(n_ids), len(trie.windows))
        super().__init__(Path(), n_rows, trie.context_vectors.shape[1], trie.context_vectors.device, 2**63)
        self._trie = trie

    def trie(self, entry_token_id: int) -> TokenTrie:
        return self._trie


def _greedy_token_ids(lm: CausalLM, prompts: list[list[int]]) -> list[int]:
    """The tokens, each once, that the model writes first after the prompts."""
    requests = [Request(index, prompt, FIRST_TOKENS) for index, prompt in enumerate(prompts)]
    greedy = Decoding(Sampler.from_settings(0, None, None), frozenset(), batch_size=len(prompts))
    return sorted({token for generation in decode(lm, requests, greedy) for token in generation.new_token_ids})


@torch.inference_mode()
def _synthetic_stores(lm: CausalLM, n_rows: int, first_ids: list[int], acceptance: Acceptance) -> Stores:
    """Context vectors around the model's hidden states over random text, and chunks of random tokens.

    first_ids: what the chunks begin with. With the tokens that the model writes, many rows have a vote, as in a real
    trie; what they vote for is random, so drafts cost what they cost and bring nothing.
    """
    generator = torch.Generator().manual_seed(n_rows)
    rng = np.random.default_rng(n_rows)
    n_ids = lm.model.config.vocab_size
    text = torch.from_numpy(rng.integers(0, n_ids, (1, N_STATES))).to(lm.device)
    states = torch.nn.functional.normalize(lm.forward(text)[0][0].float(), dim=1).cpu()
    vectors = torch.empty(n_rows, lm.hidden_size, device=lm.device)
    for block in vectors.split(BLOCK_ROWS):
        near = states[torch.randint(N_STATES, (len(block),), generator=generator)]
        noise = torch.nn.functional.normalize(torch.randn(near.shape, generator=generator), dim=1)
        block.copy_(torch.nn.functional.normalize(near + NOISE * noise, dim=1))
    chunks = rng.integers(0, n_ids, (n_rows, CHUNK_TOKENS))
    chunks[:, 0] = rng.choice(first_ids, n_rows)
    chunks = chunks[np.argsort(chunks[:, 0], kind="stable")]
    trie = TokenTrie(
        0,
        vectors,
        chunks.astype(np.int32).ravel(),
        np.arange(n_rows + 1) * CHUNK_TOKENS,
        np.zeros(n_rows, dtype=np.int64),
        np.zeros(n_rows, dtype=np.int32),
    )
    for query in states[torch.randint(N_STATES, (INDEX_SEARCHES,), generator=generator)].to(lm.device):
        trie.index.nearest(query)
    datastore = OneTrieForAll(trie, n_ids)
    return Stores(f"{n_rows:,} rows", datastore, datastore, acceptance, chunks.tolist())
