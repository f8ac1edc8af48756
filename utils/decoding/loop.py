"""The decode loop: chunk mode, verified and plain generation, over any number of sequences at once (paper section 3).

Each step appends to every sequence a retrieved chunk or one token drawn from the LM, then runs one forward pass over
just those tokens on the KV cache. Plain generation is the loop without a retriever.

With a drafter the forward pass also covers a tree of drafted tokens. At each node that is reached the next token is
drawn from the LM; as long as it is a child of that node, the pass has covered it already. What is drawn is what plain
generation would have drawn.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from utils.decoding.draft import NOTHING, Drafter, DraftTree
from utils.decoding.draft_policy import DraftPolicy
from utils.decoding.retriever import Proposal, ProposalSearch, Retriever
from utils.decoding.timing import StepTimer
from utils.decoding.types import (
    AcceptedChunk,
    DraftCounts,
    Generation,
    GenerationStats,
    ProposalRecord,
    Request,
    StepRecord,
    Trace,
)
from utils.files import InputError
from utils.lm.kv_cache import Block, KVCache, make_kv_cache
from utils.lm.model import CausalLM, to_host
from utils.lm.sampling import ACCEPTANCE_STREAM, CHUNK_STREAM, NO_DISTRIBUTION, TOKEN_STREAM, Sampler, uniforms

# Slots that a draft may take beyond the text.
MAX_DRAFT_TOKENS = 256


@dataclass(frozen=True)
class Decoding:
    """How to generate: chunks from a retriever, verified drafts from a drafter, or plain text with neither.

    on_tokens(index, token ids, chunk or None) is called with what each step appends. stops(index, token ids) is called
    after every new token, with the prompt's tokens first, and returns whether the text ends with it.
    """

    sampler: Sampler
    eos_token_ids: frozenset[int]
    retriever: Retriever | None = None
    batch_size: int = 1
    drafter: Drafter | None = None
    draft_policy: DraftPolicy | None = None  # None: every draft is verified whole
    cache: KVCache | None = None  # one to reuse, whose rows take the place of batch_size; None: `decode` makes one
    on_tokens: Callable[[int, list[int], Proposal | None], None] | None = None
    stops: Callable[[int, list[int]], bool] | None = None
    # Compute everything a step may need and copy it to the host at once, instead of waiting for the device for each
    # thing that it does need; None: on CUDA only.
    prefetch_all: bool | None = None


@dataclass
class _Sequence:
    """One sequence in progress: its text, hidden state and logits at its last token, and its costs."""

    request: Request
    token_ids: list[int]
    hidden_state: Tensor  # (D,)
    logits: Tensor  # (V,)
    timers: list[StepTimer]  # of its steps
    forward_passes: int = 1
    chunks: list[AcceptedChunk] = field(default_factory=list)
    drafts: DraftCounts = field(default_factory=DraftCounts)
    proposals: list[ProposalRecord] = field(default_factory=list)
    steps: list[tuple[int, int, int]] = field(default_factory=list)  # timers, tokens and draft tokens after each step
    uncached_tokens: list[int] = field(default_factory=list)  # the last tokens, which are not in the KV cache yet
    has_ended: bool = False
    drawn: int | None = None  # the next token, where it has been drawn already
    search: tuple[float, float] | None = None  # hint and seconds of the last search for a draft; None: there was none
    token_uniforms: list[float] = field(init=False)
    acceptance_uniforms: list[float] = field(init=False)
    chunk_uniforms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        seed, index, n = self.request.seed, self.request.index, self.request.max_new_tokens + 1
        self.token_uniforms = uniforms(seed, index, TOKEN_STREAM, n).tolist()
        self.acceptance_uniforms = uniforms(seed, index, ACCEPTANCE_STREAM, n).tolist()
        self.chunk_uniforms = uniforms(seed, index, CHUNK_STREAM, n).tolist()

    @property
    def n_new(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def record_step(self) -> None:
        self.steps.append((len(self.timers), len(self.token_ids), self.drafts.draft_tokens))

    def trace(self) -> Trace:
        """Its steps with the seconds up to each; to be called when the sequence has ended."""
        parts = [(0.0, 0.0, 0.0), *(timer.share() for timer in self.timers)]
        seconds, lm_seconds, retrieval_seconds = np.cumsum(parts, axis=0).T
        # On CUDA a pass may still run when its step has ended, so the difference can shrink from step to step.
        rest_seconds = np.maximum.accumulate((seconds - lm_seconds - retrieval_seconds).clip(min=0))
        steps = [
            StepRecord(
                n_tokens, float(lm_seconds[n]), float(retrieval_seconds[n]), float(rest_seconds[n]), draft_tokens
            )
            for n, n_tokens, draft_tokens in self.steps
        ]
        return Trace(steps, self.proposals)

    def take_drawn(self) -> int:
        token_id, self.drawn = self.drawn, None
        assert token_id is not None
        _require_token(token_id, self.request)
        return token_id


def decode(lm: CausalLM, requests: Iterable[Request], decoding: Decoding) -> Iterator[Generation]:
    """Generate for every request and yield each as it ends; its row in the batch goes to the next request.

    Raises ValueError for a prompt without a token, or one that with its new tokens does not fit the model's positions.
    """
    waiting = list(requests)[::-1]
    for request in waiting:
        _require_room(lm, request)
    if not waiting:
        return
    with torch.inference_mode():
        cache = decoding.cache
        if cache is None:
            n_rows = min(decoding.batch_size, len(waiting))
            cache = make_kv_cache(lm, n_rows, n_slots_for(waiting, uses_drafts=decoding.drafter is not None))
        loop = _Loop(lm, decoding, cache)
    while waiting or loop.sequences:
        # The caller's code between two yields must not find itself in inference mode.
        with torch.inference_mode():
            while waiting and loop.room:
                loop.start(_of_one_length(waiting, loop.room))
            ended = loop.step()
        yield from ended


def n_slots_for(requests: Sequence[Request], uses_drafts: bool) -> int:
    """The slots that the longest of these sequences may take, drafts included."""
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    return longest + (MAX_DRAFT_TOKENS if uses_drafts else 0)


def _of_one_length(waiting: list[Request], room: int) -> list[Request]:
    """Take the next requests, the last of the list first, as long as their prompts are of one length."""
    taken = [waiting.pop()]
    while waiting and len(taken) < room and len(waiting[-1].prompt_ids) == len(taken[0].prompt_ids):
        taken.append(waiting.pop())
    return taken


def _require_room(lm: CausalLM, request: Request) -> None:
    if not request.prompt_ids or request.max_new_tokens < 1:
        raise ValueError(f"prompt {request.index}: generation starts from at least one token and adds at least one")
    n_tokens = len(request.prompt_ids) + request.max_new_tokens
    if lm.n_positions is not None and n_tokens > lm.n_positions:
        raise ValueError(f"prompt {request.index} and its new tokens are {n_tokens}, {lm.name} reads {lm.n_positions}")


def _require_token(token_id: int, request: Request) -> None:
    if token_id == NO_DISTRIBUTION:
        message = f"prompt {request.index}: the model computed NaN, or ruled out every token"
        raise InputError(f"{message}; use another --dtype, such as float32, or another --temperature")


class _Loop:
    """The sequences in progress, one for each of the cache's first rows."""

    def __init__(self, lm: CausalLM, decoding: Decoding, cache: KVCache) -> None:
        self.sequences: list[_Sequence] = []
        self._events: list[tuple[int, list[int], Proposal | None]] = []
        self._lm, self._decoding, self._cache = lm, decoding, cache
        self._prefetch_all = lm.device.type == "cuda" if decoding.prefetch_all is None else decoding.prefetch_all
        self._timer = StepTimer(1, lm.device)

    @property
    def room(self) -> int:
        return self._cache.n_rows - len(self.sequences)

    def start(self, requests: list[Request]) -> None:
        """Read prompts of one length into the next rows."""
        drafter = self._decoding.drafter
        timer = StepTimer(len(requests), self._lm.device)
        prompts = [request.prompt_ids for request in requests]
        with timer.lm:
            hidden_states, logits = self._cache.prefill(len(self.sequences), prompts, drafter is not None)
            if drafter is not None:
                (hidden_states,) = to_host(hidden_states)
        for i, request in enumerate(requests):
            if drafter is not None:
                with timer.retrieval:
                    drafter.observe(request.index, request.prompt_ids, hidden_states[i])
            self.sequences.append(
                _Sequence(request, list(request.prompt_ids), hidden_states[i][-1], logits[i], [timer])
            )
        timer.stop()

    def step(self) -> list[Generation]:
        """Append a chunk or a token to every sequence, then run a forward pass; returns the sequences that ended."""
        for sequence in self.sequences:
            sequence.record_step()
        self._start_timer()
        for sequence, chunk in zip(self.sequences, self._decide(), strict=True):
            self._append(sequence, chunk.token_ids if chunk else [sequence.take_drawn()], chunk)
        ended = self._take_ended()
        if ended:
            self._start_timer()  # those that ended have no share in the forward pass
        if self.sequences and self._decoding.drafter is None:
            self._read()
        elif self.sequences:
            self._verify(self._drafts())
            ended += self._take_ended()
        self._timer.stop()
        self._emit()
        return [self._generation(sequence) for sequence in ended]

    def _start_timer(self) -> None:
        self._timer.stop()
        if self.sequences:
            self._timer = StepTimer(len(self.sequences), self._lm.device)
            for sequence in self.sequences:
                sequence.timers.append(self._timer)

    def _emit(self) -> None:
        """Call `on_tokens`, outside the timers: what the caller does with the tokens is not decoding."""
        if self._decoding.on_tokens is not None:
            for index, token_ids, chunk in self._events:
                self._decoding.on_tokens(index, token_ids, chunk)
        self._events.clear()

    def _decide(self) -> list[Proposal | None]:
        """The accepted chunk of each sequence; None where its next token is drawn from the LM instead."""
        retriever, sequences = self._decoding.retriever, self.sequences
        if retriever is None:
            self._draw(sequences)
            return [None] * len(sequences)
        with self._timer.retrieval:
            searches = [
                retriever.start_search(each.token_ids[-1], each.hidden_state, each.logits) for each in sequences
            ]
            pending = [search for search in searches if search is not None and search.is_pending]
            results = retriever.results(pending) if pending else None
        values = iter(() if results is None else self._fetch(results))
        with self._timer.retrieval:
            chunks = [
                None if search is None else self._accepted(sequence, search, values)
                for sequence, search in zip(sequences, searches, strict=True)
            ]
        self._draw([sequence for sequence, chunk in zip(sequences, chunks, strict=True) if chunk is None])
        return chunks

    def _fetch(self, results: Tensor) -> list[list[float]]:
        """The results of searches on the host; with `prefetch_all` the next tokens too, in the same copy."""
        if not self._prefetch_all:
            return results.tolist()
        with self._timer.lm:
            drawn = self._next_tokens(self.sequences)
            found, tokens = to_host(results, drawn)
        for sequence, token_id in zip(self.sequences, tokens.tolist(), strict=True):
            sequence.drawn = token_id
        return found.tolist()

    def _accepted(self, sequence: _Sequence, search: ProposalSearch, values: Iterator[list[float]]) -> Proposal | None:
        assert self._decoding.retriever is not None
        of_place = sequence.acceptance_uniforms[sequence.n_new], sequence.chunk_uniforms[sequence.n_new]
        found = next(values) if search.is_pending else None
        proposal = self._decoding.retriever.proposal(search, found, of_place, sequence.token_ids)
        if proposal is None:
            return None
        place = len(sequence.token_ids)
        sequence.proposals.append(ProposalRecord(place, proposal.row, proposal.similarity, proposal.first_token_prob))
        if not proposal.accepted:
            return None
        sequence.drawn = None
        return proposal

    def _draw(self, sequences: list[_Sequence]) -> None:
        """Draw the next token of each sequence from the LM, where it has not been drawn already."""
        lacking = [sequence for sequence in sequences if sequence.drawn is None]
        if not lacking:
            return
        with self._timer.lm:
            drawn = self._next_tokens(lacking).tolist()
        for sequence, token_id in zip(lacking, drawn, strict=True):
            sequence.drawn = token_id

    def _next_tokens(self, sequences: list[_Sequence]) -> Tensor:
        """(n,) int64: the next tokens, drawn from the LM."""
        logits = sequences[0].logits[None] if len(sequences) == 1 else torch.stack([s.logits for s in sequences])
        drawn_at = [sequence.token_uniforms[sequence.n_new] for sequence in sequences]
        return self._decoding.sampler.tokens(
            logits, drawn_at, lambda i: (sequences[i].request.index, sequences[i].token_ids)
        )

    def _append(self, sequence: _Sequence, token_ids: list[int], chunk: Proposal | None) -> None:
        """Append tokens to the text, up to the first that ends it."""
        at = len(sequence.token_ids)
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            if self._ends(sequence):
                sequence.has_ended = True
                break
        sequence.uncached_tokens = sequence.token_ids[at:]
        if chunk is not None:
            sequence.chunks.append(AcceptedChunk(at, sequence.uncached_tokens, chunk.similarity))
        self._events.append((sequence.request.index, sequence.uncached_tokens, chunk))

    def _ends(self, sequence: _Sequence) -> bool:
        """Whether the text ends: with EOS, at `max_new_tokens`, or where the caller stops it."""
        decoding = self._decoding
        return (
            sequence.n_new == sequence.request.max_new_tokens
            or sequence.token_ids[-1] in decoding.eos_token_ids
            or (decoding.stops is not None and decoding.stops(sequence.request.index, sequence.token_ids))
        )

    def _take_ended(self) -> list[_Sequence]:
        """Remove the sequences that have ended; the cache's last rows move into their places."""
        ended = []
        for row in reversed(range(len(self.sequences))):
            sequence = self.sequences[row]
            if not sequence.has_ended:
                continue
            ended.append(sequence)
            last = self.sequences.pop()
            if last is not sequence:
                self._cache.move(len(self.sequences), row)
                self.sequences[row] = last
        return ended[::-1]

    def _read(self) -> None:
        """One forward pass over the uncached tokens of every sequence."""
        with self._timer.lm:
            blocks = [Block(sequence.uncached_tokens) for sequence in self.sequences]
            hidden_states, logits = self._cache.forward(blocks, keep_all=False)
        for row, sequence in enumerate(self.sequences):
            self._cache.commit(row, list(range(len(sequence.uncached_tokens))))
            sequence.hidden_state, sequence.logits = hidden_states[row][-1], logits[row][-1]
            sequence.forward_passes += 1

    # ---- Verified generation

    def _drafts(self) -> list[DraftTree]:
        """A draft for every sequence, cut to what pays."""
        policy = self._decoding.draft_policy
        with self._timer.retrieval:
            trees = [self._draft(sequence) for sequence in self.sequences]
            return trees if policy is None else policy.paying_parts(trees)

    def _draft(self, sequence: _Sequence) -> DraftTree:
        drafter, policy = self._decoding.drafter, self._decoding.draft_policy
        assert drafter is not None
        hint = drafter.hint(sequence.token_ids) if policy is not None else 1.0
        if policy is not None and not policy.should_draft(hint):
            sequence.search = None
            return NOTHING
        started = time.perf_counter()
        # A node past the last token could never be accepted.
        room = sequence.request.max_new_tokens - sequence.n_new
        tree = drafter.draft(sequence.request.index, sequence.token_ids, sequence.hidden_state, room)
        tree = tree if self._cache.takes_trees else tree.heaviest_line()
        sequence.search = hint, time.perf_counter() - started
        return tree

    def _verify(self, trees: list[DraftTree]) -> None:
        """One forward pass over the last token of every sequence and its tree; accepted tokens become text."""
        blocks = [
            Block(sequence.uncached_tokens + tree.token_ids, [-1, *(parent + 1 for parent in tree.parents)])
            for sequence, tree in zip(self.sequences, trees, strict=True)
        ]
        started = time.perf_counter()
        with self._timer.lm:
            hidden_states, logits = self._cache.forward(blocks, keep_all=True)
            paths, drawn, hidden_states = self._walk(blocks, hidden_states, logits)
        policy, longest = self._decoding.draft_policy, max(len(block.token_ids) for block in blocks)
        if policy is not None:
            policy.record_pass(len(blocks), longest, time.perf_counter() - started)
        for row, (sequence, block) in enumerate(zip(self.sequences, blocks, strict=True)):
            path = self._accept(sequence, block, paths[row])
            if policy is not None and trees[row].token_ids:
                policy.record_draft(trees[row], [node - 1 for node in path[1:]])
            if policy is not None and sequence.search is not None:
                hint, seconds = sequence.search
                policy.record_search(hint, len(blocks), longest, len(path) - 1, seconds)
            self._cache.commit(row, path)
            sequence.hidden_state = hidden_states[row][path[-1]]
            sequence.drawn = drawn[row] if len(path) == len(paths[row]) else None
            sequence.forward_passes += 1
            with self._timer.retrieval:
                self._observe(sequence, path, hidden_states[row])

    def _walk(
        self, blocks: list[Block], hidden_states: list[Tensor], logits: list[Tensor]
    ) -> tuple[list[list[int]], list[int], list[Tensor]]:
        """Follow what the LM draws through each block, from its first node on.

        Returns the nodes of each block's path, the token drawn after its last node, which no child has, and the hidden
        states, on the host with `prefetch_all`.
        """
        depths = [block.depths() for block in blocks]
        tokens_at = partial(self._tokens_at, blocks, depths, logits)
        known: dict[tuple[int, int], int] = {}
        if self._prefetch_all:
            nodes = [(row, node) for row, block in enumerate(blocks) for node in range(len(block.token_ids))]
            tokens, joined = to_host(tokens_at(nodes), torch.cat(hidden_states))
            known = dict(zip(nodes, tokens.tolist(), strict=True))
            hidden_states = list(joined.split([len(block.token_ids) for block in blocks]))
        children = [block.children() for block in blocks]
        paths, drawn = [[0] for _ in blocks], [0] * len(blocks)
        reached = [(row, 0) for row in range(len(blocks))]
        while reached:
            tokens_after = [known[node] for node in reached] if known else tokens_at(reached).tolist()
            going_on = []
            for (row, node), token_id in zip(reached, tokens_after, strict=True):
                _require_token(token_id, self.sequences[row].request)
                drawn[row] = token_id
                if (child := children[row].get((node, token_id))) is not None:
                    paths[row].append(child)
                    going_on.append((row, child))
            reached = going_on
        return paths, drawn, hidden_states

    def _tokens_at(
        self, blocks: list[Block], depths: list[list[int]], logits: list[Tensor], nodes: list[tuple[int, int]]
    ) -> Tensor:
        """(n,) int64: the tokens drawn from the LM after some nodes, each given by its row and block index."""
        sequences = self.sequences
        # A token after the last new one is not used, so any uniform number will do there.
        places = [
            min(sequences[row].n_new + depths[row][node], sequences[row].request.max_new_tokens) for row, node in nodes
        ]
        drawn_at = [sequences[row].token_uniforms[place] for (row, _), place in zip(nodes, places, strict=True)]

        def context(i: int) -> tuple[int, list[int]]:
            row, node = nodes[i]
            sequence = sequences[row]
            return sequence.request.index, sequence.token_ids[:-1] + blocks[row].path_to(node)

        at_nodes = torch.cat(logits) if self._prefetch_all else torch.stack([logits[row][node] for row, node in nodes])
        return self._decoding.sampler.tokens(at_nodes, drawn_at, context)

    def _accept(self, sequence: _Sequence, block: Block, path: list[int]) -> list[int]:
        """Append the drafted tokens of the path; returns the path up to the end of the text."""
        n_before = len(sequence.token_ids)
        if len(path) > 1:
            self._append(sequence, [block.token_ids[node] for node in path[1:]], None)
        path = path[: 1 + len(sequence.token_ids) - n_before]
        sequence.drafts.add(block.depths()[1:], len(path) - 1)
        return path

    def _observe(self, sequence: _Sequence, path: list[int], hidden_states: Tensor) -> None:
        assert self._decoding.drafter is not None
        read = sequence.token_ids[len(sequence.token_ids) - len(path) :]
        kept = hidden_states[: len(path)] if path[-1] == len(path) - 1 else hidden_states[path]
        self._decoding.drafter.observe(sequence.request.index, read, kept)

    # ---- The end

    def _generation(self, sequence: _Sequence) -> Generation:
        if self._decoding.drafter is not None:
            self._decoding.drafter.end(sequence.request.index)
        sequence.record_step()
        trace = sequence.trace()
        end = trace.steps[-1]
        stats = GenerationStats(
            forward_passes=sequence.forward_passes,
            seconds=end.lm_seconds + end.retrieval_seconds + end.rest_seconds,
            lm_seconds=end.lm_seconds,
            retrieval_seconds=end.retrieval_seconds,
            drafts=sequence.drafts if self._decoding.drafter is not None else None,
        )
        request = sequence.request
        new_token_ids = sequence.token_ids[len(request.prompt_ids) :]
        return Generation(request.index, request.prompt_ids, new_token_ids, sequence.chunks, stats, trace)
