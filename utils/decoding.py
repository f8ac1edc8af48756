"""The decode loop: chunk mode, plain and verified generation in one, over any number of sequences at once (section 3).

Each step appends to every sequence what it has decided on, a retrieved chunk or one token drawn from the LM, and runs
one forward pass over just those tokens on the KV cache. Plain generation is the loop without a retriever. With a
drafter the pass also reads a tree of drafted tokens; at each node reached the next token is drawn from the LM, and as
long as it is a child of that node it is read already. What is drawn is what plain generation would have drawn.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from utils.draft_costs import DraftCosts
from utils.drafting import NOTHING, Drafter, DraftTree
from utils.generation import AcceptedChunk, DraftCounts, Generation, GenerationStats, Moment, Seen, Trace
from utils.kv_cache import Block, Rows, open_rows
from utils.models import CausalLM
from utils.retrieval import Lookup, Proposal, Retriever
from utils.sampling import ACCEPTANCE_STREAM, TOKEN_STREAM, Sampler, uniforms
from utils.step_costs import StepCost
from utils.transfers import to_host

# Slots that a draft may take beyond the text.
MAX_DRAFT_TOKENS = 256


@dataclass(frozen=True)
class Request:
    """A prompt to go on from. `index` is the caller's name for it and, with the seed, decides its random numbers."""

    index: int
    prompt_ids: list[int]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Decoding:
    """How to generate: chunks from a retriever, verified drafts from a drafter, or with neither plain text.

    on_tokens(index, token ids, chunk or None) sees what each step brings. stops(token ids) is asked after every new
    token, the prompt's tokens first, whether the text ends with it.
    """

    sampler: Sampler
    eos_token_ids: frozenset[int]
    retriever: Retriever | None = None
    batch_size: int = 1
    drafter: Drafter | None = None
    draft_costs: DraftCosts | None = None  # None: drafts are verified whole, whatever that costs
    rows: Rows | None = None  # a cache with room for the sequences, to use again; None: one is made for each call
    on_tokens: Callable[[int, list[int], Proposal | None], None] | None = None
    stops: Callable[[list[int]], bool] | None = None
    # Compute all that a step may need and bring it to the host at once, instead of what is needed bit by bit, each of
    # which waits for the device; None: on CUDA.
    at_once: bool | None = None


@dataclass
class _Sequence:
    """One sequence in progress: its text, what the LM said at its last token, and what it has cost."""

    request: Request
    token_ids: list[int]
    hidden_state: Tensor  # (D,)
    logits: Tensor  # (V,)
    costs: list[StepCost]
    forward_passes: int = 1
    chunks: list[AcceptedChunk] = field(default_factory=list)
    drafts: DraftCounts = field(default_factory=DraftCounts)
    proposals: list[Seen] = field(default_factory=list)
    moments: list[tuple[int, int, int]] = field(default_factory=list)  # costs, tokens, draft tokens up to then
    unread: list[int] = field(default_factory=list)  # the last tokens, which the LM has not read yet
    has_ended: bool = False
    drawn: int | None = None  # the next token, where it has been drawn already
    search: tuple[float, float] | None = None  # the last draft's hint and seconds; None: none was looked for
    token_uniforms: list[float] = field(init=False)
    acceptance_uniforms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        seed, index, n = self.request.seed, self.request.index, self.request.max_new_tokens + 1
        self.token_uniforms = uniforms(seed, index, TOKEN_STREAM, n).tolist()
        self.acceptance_uniforms = uniforms(seed, index, ACCEPTANCE_STREAM, n).tolist()

    @property
    def n_new(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def note_moment(self) -> None:
        self.moments.append((len(self.costs), len(self.token_ids), self.drafts.draft_tokens))

    def trace(self) -> Trace:
        """Its moments with the seconds up to then; to be called when it is over."""
        parts = [(0.0, 0.0, 0.0), *(cost.part() for cost in self.costs)]
        seconds, lm_seconds, retrieval_seconds = np.cumsum(parts, axis=0).T
        # On CUDA a pass may still run when its step is over, so that what is left of the steps' seconds can shrink.
        rest_seconds = np.maximum.accumulate((seconds - lm_seconds - retrieval_seconds).clip(min=0))
        moments = [
            Moment(n_tokens, float(lm_seconds[n]), float(retrieval_seconds[n]), float(rest_seconds[n]), draft_tokens)
            for n, n_tokens, draft_tokens in self.moments
        ]
        return Trace(moments, self.proposals)

    def take_drawn(self) -> int:
        token_id, self.drawn = self.drawn, None
        assert token_id is not None
        return token_id


def decode(lm: CausalLM, requests: Iterable[Request], decoding: Decoding) -> Iterator[Generation]:
    """Generate for every request and yield each as it ends; its place in the batch goes to the next request.

    Raises ValueError for a prompt without a token, or one that with its new tokens does not fit the model's positions.
    """
    waiting = list(requests)[::-1]
    for request in waiting:
        _require_room(lm, request)
    if not waiting:
        return
    with torch.inference_mode():
        rows = decoding.rows or open_rows(lm, min(decoding.batch_size, len(waiting)), n_slots_for(waiting, decoding))
        loop = _Loop(lm, decoding, rows)
    while waiting or loop.sequences:
        # The caller's code between two yields must not find itself in inference mode.
        with torch.inference_mode():
            while waiting and loop.room:
                loop.start(_of_one_length(waiting, loop.room))
            ended = loop.step()
        yield from ended


def n_slots_for(requests: list[Request], decoding: Decoding) -> int:
    """The slots that the longest of these sequences may take, drafts included."""
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    return longest + (MAX_DRAFT_TOKENS if decoding.drafter is not None else 0)


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


class _Loop:
    """The sequences in progress, one for each of the cache's first rows."""

    def __init__(self, lm: CausalLM, decoding: Decoding, rows: Rows) -> None:
        self.sequences: list[_Sequence] = []
        self._news: list[tuple[int, list[int], Proposal | None]] = []
        self._lm, self._decoding, self._rows = lm, decoding, rows
        self._at_once = lm.device.type == "cuda" if decoding.at_once is None else decoding.at_once
        self._cost = StepCost(1, lm.device)

    @property
    def room(self) -> int:
        return self._rows.n_rows - len(self.sequences)

    def start(self, requests: list[Request]) -> None:
        """Read prompts of one length into the next rows."""
        drafter = self._decoding.drafter
        cost = StepCost(len(requests), self._lm.device)
        prompts = [request.prompt_ids for request in requests]
        with cost.lm:
            hidden_states, logits = self._rows.prefill(len(self.sequences), prompts, drafter is not None)
            if drafter is not None:
                (hidden_states,) = to_host(hidden_states)
        for i, request in enumerate(requests):
            if drafter is not None:
                with cost.retrieval:
                    drafter.observe(request.index, request.prompt_ids, hidden_states[i])
            self.sequences.append(_Sequence(request, list(request.prompt_ids), hidden_states[i][-1], logits[i], [cost]))
        cost.close()

    def step(self) -> list[Generation]:
        """Append a chunk or a token to every sequence, read it where the text goes on; returns those that ended."""
        for sequence in self.sequences:
            sequence.note_moment()
        self._begin_cost()
        for sequence, chunk in zip(self.sequences, self._decide(), strict=True):
            self._append(sequence, chunk.token_ids if chunk else [sequence.take_drawn()], chunk)
        ended = self._take_ended()
        if ended:
            self._begin_cost()  # they take no part in what comes now
        if self.sequences and self._decoding.drafter is None:
            self._read()
        elif self.sequences:
            self._verify(self._drafts())
            ended += self._take_ended()
        self._cost.close()
        self._tell_news()
        return [self._generation(sequence) for sequence in ended]

    def _begin_cost(self) -> None:
        self._cost.close()
        if self.sequences:
            self._cost = StepCost(len(self.sequences), self._lm.device)
            for sequence in self.sequences:
                sequence.costs.append(self._cost)

    def _tell_news(self) -> None:
        """Outside the clock: what a caller does with the tokens is not decoding."""
        if self._decoding.on_tokens is not None:
            for index, token_ids, chunk in self._news:
                self._decoding.on_tokens(index, token_ids, chunk)
        self._news.clear()

    def _decide(self) -> list[Proposal | None]:
        """The chunk that each sequence goes on with; where there is none, its next token is drawn."""
        retriever, sequences = self._decoding.retriever, self.sequences
        if retriever is None:
            self._draw(sequences)
            return [None] * len(sequences)
        with self._cost.retrieval:
            lookups = [retriever.look_up(each.token_ids[-1], each.hidden_state) for each in sequences]
        on_device = [lookup.values for lookup in lookups if lookup is not None and lookup.values is not None]
        values: Iterator[list[float]] = iter(())
        if on_device:
            values = iter(self._fetch(on_device))
        with self._cost.retrieval:
            chunks = [
                None if lookup is None else self._accepted(sequence, lookup, values)
                for sequence, lookup in zip(sequences, lookups, strict=True)
            ]
        self._draw([sequence for sequence, chunk in zip(sequences, chunks, strict=True) if chunk is None])
        return chunks

    def _fetch(self, values: list[Tensor]) -> list[list[float]]:
        """What searches came to, with the next tokens, were they needed, in one copy."""
        if not self._at_once:
            return torch.stack(values).tolist()
        with self._cost.lm:
            drawn = self._next_tokens(self.sequences)
            found, tokens = to_host(torch.stack(values), drawn)
        for sequence, token_id in zip(self.sequences, tokens.tolist(), strict=True):
            sequence.drawn = token_id
        return found.tolist()

    def _accepted(self, sequence: _Sequence, lookup: Lookup, values: Iterator[list[float]]) -> Proposal | None:
        assert self._decoding.retriever is not None
        uniform = sequence.acceptance_uniforms[sequence.n_new]
        found = None if lookup.values is None else next(values)
        proposal = self._decoding.retriever.proposal(lookup, found, uniform)
        sequence.proposals.append(Seen(len(sequence.token_ids), proposal.row, proposal.similarity))
        if not proposal.accepted:
            return None
        sequence.drawn = None
        return proposal

    def _draw(self, sequences: list[_Sequence]) -> None:
        """The next token of each sequence from the LM, where it has not been drawn."""
        lacking = [sequence for sequence in sequences if sequence.drawn is None]
        if not lacking:
            return
        with self._cost.lm:
            drawn = self._next_tokens(lacking).tolist()
        for sequence, token_id in zip(lacking, drawn, strict=True):
            sequence.drawn = token_id

    def _next_tokens(self, sequences: list[_Sequence]) -> Tensor:
        """(n,) int64: what the LM goes on with."""
        logits = sequences[0].logits[None] if len(sequences) == 1 else torch.stack([s.logits for s in sequences])
        points = [sequence.token_uniforms[sequence.n_new] for sequence in sequences]
        return self._decoding.sampler.tokens(logits, points, lambda i: sequences[i].token_ids)

    def _append(self, sequence: _Sequence, token_ids: list[int], chunk: Proposal | None) -> None:
        """Add tokens to the text up to the first that ends it, and note whether one did."""
        at = len(sequence.token_ids)
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            if self._ends(sequence):
                sequence.has_ended = True
                break
        sequence.unread = sequence.token_ids[at:]
        if chunk is not None:
            sequence.chunks.append(AcceptedChunk(at, sequence.unread, chunk.similarity))
        self._news.append((sequence.request.index, sequence.unread, chunk))

    def _ends(self, sequence: _Sequence) -> bool:
        """Whether the last token is the last: the end of text, the last one asked for, or where the caller stops."""
        decoding = self._decoding
        return (
            sequence.n_new == sequence.request.max_new_tokens
            or sequence.token_ids[-1] in decoding.eos_token_ids
            or (decoding.stops is not None and decoding.stops(sequence.token_ids))
        )

    def _take_ended(self) -> list[_Sequence]:
        """Remove the sequences that have ended; the last rows of the cache move into their places."""
        ended = []
        for row in reversed(range(len(self.sequences))):
            sequence = self.sequences[row]
            if not sequence.has_ended:
                continue
            ended.append(sequence)
            last = self.sequences.pop()
            if last is not sequence:
                self._rows.move(len(self.sequences), row)
                self.sequences[row] = last
        return ended[::-1]

    def _read(self) -> None:
        """One forward pass over the unread tokens of every sequence."""
        with self._cost.lm:
            blocks = [Block(sequence.unread) for sequence in self.sequences]
            hidden_states, logits = self._rows.forward(blocks, keep_all=False)
        for row, sequence in enumerate(self.sequences):
            self._rows.commit(row, list(range(len(sequence.unread))))
            sequence.hidden_state, sequence.logits = hidden_states[row][-1], logits[row][-1]
            sequence.forward_passes += 1

    # ---- Verified generation

    def _drafts(self) -> list[DraftTree]:
        """A draft for every sequence, as far as it pays."""
        costs = self._decoding.draft_costs
        with self._cost.retrieval:
            trees = [self._draft(sequence) for sequence in self.sequences]
            return trees if costs is None else costs.paying_parts(trees)

    def _draft(self, sequence: _Sequence) -> DraftTree:
        drafter, costs = self._decoding.drafter, self._decoding.draft_costs
        assert drafter is not None
        hint = drafter.hint(sequence.token_ids) if costs is not None else 1.0
        if costs is not None and not costs.asks(hint):
            sequence.search = None
            return NOTHING
        started = time.perf_counter()
        # A node past the last token could never be accepted.
        room = sequence.request.max_new_tokens - sequence.n_new
        tree = drafter.draft(sequence.request.index, sequence.token_ids, sequence.hidden_state, room)
        tree = tree if self._rows.takes_trees else tree.heaviest_line()
        sequence.search = hint, time.perf_counter() - started
        return tree

    def _verify(self, trees: list[DraftTree]) -> None:
        """One forward pass over the last token of every sequence and its tree; what is confirmed becomes text."""
        blocks = [
            Block(sequence.unread + tree.token_ids, [-1, *(parent + 1 for parent in tree.parents)])
            for sequence, tree in zip(self.sequences, trees, strict=True)
        ]
        started = time.perf_counter()
        with self._cost.lm:
            hidden_states, logits = self._rows.forward(blocks, keep_all=True)
            paths, drawn, hidden_states = self._walk(blocks, hidden_states, logits)
        costs, longest = self._decoding.draft_costs, max(len(block.token_ids) for block in blocks)
        if costs is not None:
            costs.saw_pass(len(blocks), longest, time.perf_counter() - started)
        for row, (sequence, block) in enumerate(zip(self.sequences, blocks, strict=True)):
            path = self._accept(sequence, block, paths[row])
            if costs is not None and trees[row].token_ids:
                costs.saw_draft(trees[row], [node - 1 for node in path[1:]])
            if costs is not None and sequence.search is not None:
                hint, seconds = sequence.search
                costs.saw_search(hint, len(blocks), longest, len(path) - 1, seconds)
            self._rows.commit(row, path)
            sequence.hidden_state = hidden_states[row][path[-1]]
            sequence.drawn = drawn[row] if len(path) == len(paths[row]) else None
            sequence.forward_passes += 1
            with self._cost.retrieval:
                self._observe(sequence, path, hidden_states[row])

    def _walk(
        self, blocks: list[Block], hidden_states: list[Tensor], logits: list[Tensor]
    ) -> tuple[list[list[int]], list[int], list[Tensor]]:
        """Of each block the nodes of which each is what the LM goes on with after the one before, from the first on;
        what it goes on with after the last of them; and the hidden states where the drafter can read them.
        """
        depths = [block.depths() for block in blocks]
        tokens_at = partial(self._tokens_at, blocks, depths, logits)
        known: dict[tuple[int, int], int] = {}
        if self._at_once:
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
                drawn[row] = token_id
                if (child := children[row].get((node, token_id))) is not None:
                    paths[row].append(child)
                    going_on.append((row, child))
            reached = going_on
        return paths, drawn, hidden_states

    def _tokens_at(
        self, blocks: list[Block], depths: list[list[int]], logits: list[Tensor], nodes: list[tuple[int, int]]
    ) -> Tensor:
        """(n,) int64: the tokens that the LM goes on with after some nodes, each given by its row and its place."""
        sequences = self.sequences
        # Past the last new token what is drawn is not used; any number will do there.
        places = [
            min(sequences[row].n_new + depths[row][node], sequences[row].request.max_new_tokens) for row, node in nodes
        ]
        points = [sequences[row].token_uniforms[place] for (row, _), place in zip(nodes, places, strict=True)]

        def prefix(i: int) -> list[int]:
            row, node = nodes[i]
            return sequences[row].token_ids[:-1] + blocks[row].path_to(node)

        at_nodes = torch.cat(logits) if self._at_once else torch.stack([logits[row][node] for row, node in nodes])
        return self._decoding.sampler.tokens(at_nodes, points, prefix)

    def _accept(self, sequence: _Sequence, block: Block, path: list[int]) -> list[int]:
        """Append the drafted tokens of the path; returns the path as far as the text goes."""
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
        sequence.note_moment()
        trace = sequence.trace()
        end = trace.moments[-1]
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
