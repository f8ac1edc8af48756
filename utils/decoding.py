"""The decode loop: one loop for chunk mode and plain generation, over any number of sequences at once (paper section 3).

Each step appends to every sequence what it has decided on, a retrieved chunk or one token drawn from the LM, and runs
one forward pass over just those tokens on the KV cache. Plain generation is the loop without a retriever.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.generation import AcceptedChunk, Generation, GenerationStats
from utils.kv_cache import Block, Rows, open_rows
from utils.models import CausalLM
from utils.retrieval import Proposal, Retriever
from utils.sampling import ACCEPTANCE_STREAM, TOKEN_STREAM, Sampler, uniforms


@dataclass(frozen=True)
class Request:
    """A prompt to go on from. `index` is the caller's name for it and, with the seed, decides its random numbers."""

    index: int
    prompt_ids: list[int]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Decoding:
    """How to generate. No retriever: plain generation. on_tokens(index, token ids, chunk or None) sees each step."""

    sampler: Sampler
    eos_token_ids: frozenset[int]
    retriever: Retriever | None = None
    batch_size: int = 1
    on_tokens: Callable[[int, list[int], Proposal | None], None] | None = None


@dataclass
class _Sequence:
    """One sequence in progress: its text, what the LM said at its last token, and what it has cost."""

    request: Request
    token_ids: list[int]
    token_uniforms: list[float]
    acceptance_uniforms: list[float]
    hidden_state: Tensor  # (D,)
    logits: Tensor  # (V,)
    lm_seconds: float
    retrieval_seconds: float = 0.0
    rest_seconds: float = 0.0
    forward_passes: int = 1
    chunks: list[AcceptedChunk] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)  # the last tokens, which the LM has not read yet

    @property
    def n_new(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)


def decode(lm: CausalLM, requests: Iterable[Request], decoding: Decoding) -> Iterator[Generation]:
    """Generate for every request and yield each as it ends; its place in the batch goes to the next request.

    Raises ValueError for a prompt without a token, or one that with its new tokens does not fit the model's positions.
    """
    waiting = list(requests)[::-1]
    for request in waiting:
        _require_room(lm, request)
    if not waiting:
        return
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in waiting)
    with torch.inference_mode():
        loop = _Loop(lm, decoding, open_rows(lm, min(decoding.batch_size, len(waiting)), longest))
    while waiting or loop.sequences:
        # The caller's code between two yields must not find itself in inference mode.
        with torch.inference_mode():
            while waiting and loop.has_room:
                loop.start(waiting.pop())
            ended = loop.step()
        yield from ended


def _require_room(lm: CausalLM, request: Request) -> None:
    if not request.prompt_ids or request.max_new_tokens < 1:
        raise ValueError(f"prompt {request.index}: generation starts from at least one token and adds at least one")
    n_tokens = len(request.prompt_ids) + request.max_new_tokens
    if lm.n_positions is not None and n_tokens > lm.n_positions:
        raise ValueError(f"prompt {request.index} and its new tokens are {n_tokens}, {lm.name} reads {lm.n_positions}")


class _Loop:
    """The sequences in progress, one for each of the cache's first rows."""

    def __init__(self, lm: CausalLM, decoding: Decoding, rows: Rows) -> None:
        self.sequences: list[_Sequence] = []
        self._lm, self._decoding, self._rows = lm, decoding, rows

    @property
    def has_room(self) -> bool:
        return len(self.sequences) < self._rows.n_rows

    def start(self, request: Request) -> None:
        """Read a prompt into the next row."""
        started = time.perf_counter()
        hidden_state, logits = self._rows.prefill(len(self.sequences), request.prompt_ids)
        self._finish_on_device()
        n = request.max_new_tokens
        self.sequences.append(
            _Sequence(
                request=request,
                token_ids=list(request.prompt_ids),
                token_uniforms=uniforms(request.seed, request.index, TOKEN_STREAM, n).tolist(),
                acceptance_uniforms=uniforms(request.seed, request.index, ACCEPTANCE_STREAM, n).tolist(),
                hidden_state=hidden_state,
                logits=logits,
                lm_seconds=time.perf_counter() - started,
            )
        )

    def step(self) -> list[Generation]:
        """Append a chunk or a token to every sequence, read it where the text goes on; returns those that ended."""
        taking_part = list(self.sequences)
        started = time.perf_counter()
        proposals = [self._propose(sequence) for sequence in taking_part]
        proposed = time.perf_counter()
        tokens = self._draw([sequence for sequence, chunk in zip(taking_part, proposals, strict=True) if not chunk])
        drawn = time.perf_counter()
        for sequence, chunk in zip(taking_part, proposals, strict=True):
            self._append(sequence, chunk.token_ids if chunk else [next(tokens)], chunk)
        ended = self._take_ended()
        appended = time.perf_counter()
        if self.sequences:
            self._read()
        read = time.perf_counter()
        for sequence in taking_part:
            sequence.retrieval_seconds += (proposed - started) / len(taking_part)
            sequence.lm_seconds += (drawn - proposed) / len(taking_part)
            sequence.rest_seconds += (appended - drawn) / len(taking_part)
        for sequence in self.sequences:
            sequence.lm_seconds += (read - appended) / len(self.sequences)
        return [_generation(sequence) for sequence in ended]

    def _propose(self, sequence: _Sequence) -> Proposal | None:
        if self._decoding.retriever is None:
            return None
        uniform = sequence.acceptance_uniforms[sequence.n_new]
        return self._decoding.retriever.chunk(sequence.token_ids[-1], sequence.hidden_state, uniform)

    def _draw(self, sequences: list[_Sequence]) -> Iterator[int]:
        """The next token of each sequence from the LM."""
        if not sequences:
            return iter(())
        logits = sequences[0].logits[None] if len(sequences) == 1 else torch.stack([s.logits for s in sequences])
        points = [sequence.token_uniforms[sequence.n_new] for sequence in sequences]
        return iter(self._decoding.sampler.draw(logits, points, lambda i: sequences[i].token_ids))

    def _append(self, sequence: _Sequence, token_ids: list[int], chunk: Proposal | None) -> None:
        """Add tokens to the text, cut at the first end-of-text token and at the number of new tokens asked for."""
        token_ids = token_ids[: sequence.request.max_new_tokens - sequence.n_new]
        for i, token_id in enumerate(token_ids):
            if token_id in self._decoding.eos_token_ids:
                token_ids = token_ids[: i + 1]
                break
        if chunk is not None:
            sequence.chunks.append(AcceptedChunk(len(sequence.token_ids), token_ids, chunk.similarity))
        sequence.token_ids += token_ids
        sequence.unread = token_ids
        if self._decoding.on_tokens is not None:
            self._decoding.on_tokens(sequence.request.index, token_ids, chunk)

    def _take_ended(self) -> list[_Sequence]:
        """Remove the sequences that have ended; the last rows of the cache move into their places."""
        ended = []
        for row in reversed(range(len(self.sequences))):
            sequence = self.sequences[row]
            if not self._has_ended(sequence):
                continue
            ended.append(sequence)
            last = self.sequences.pop()
            if last is not sequence:
                self._rows.move(len(self.sequences), row)
                self.sequences[row] = last
        return ended[::-1]

    def _has_ended(self, sequence: _Sequence) -> bool:
        return (
            sequence.n_new == sequence.request.max_new_tokens or sequence.token_ids[-1] in self._decoding.eos_token_ids
        )

    def _read(self) -> None:
        """One forward pass over the unread tokens of every sequence."""
        blocks = [Block(sequence.unread) for sequence in self.sequences]
        hidden_states, logits = self._rows.forward(blocks, keep_all=False)
        self._finish_on_device()
        for row, sequence in enumerate(self.sequences):
            self._rows.commit(row, list(range(len(sequence.unread))))
            sequence.hidden_state, sequence.logits = hidden_states[row][-1], logits[row][-1]
            sequence.forward_passes += 1

    def _finish_on_device(self) -> None:
        """Wait for the forward pass, so that its time is not counted as that of what reads its result first."""
        if self._lm.device.type == "cuda":
            torch.cuda.synchronize(self._lm.device)


def _generation(sequence: _Sequence) -> Generation:
    stats = GenerationStats(
        forward_passes=sequence.forward_passes,
        seconds=sequence.lm_seconds + sequence.retrieval_seconds + sequence.rest_seconds,
        lm_seconds=sequence.lm_seconds,
        retrieval_seconds=sequence.retrieval_seconds,
    )
    request = sequence.request
    return Generation(
        request.index, request.prompt_ids, sequence.token_ids[len(request.prompt_ids) :], sequence.chunks, stats
    )
