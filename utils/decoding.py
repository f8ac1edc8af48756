"""The decode loop: chunk mode, plain and verified generation in one, over any number of sequences at once (section 3).

Each step appends to every sequence what it has decided on, a retrieved chunk or one token drawn from the LM, and runs
one forward pass over just those tokens on the KV cache. Plain generation is the loop without a retriever. With a
drafter the pass also reads a tree of drafted tokens; at each node reached the next token is drawn from the LM, and as
long as it is a child of that node it is read already. What is drawn is what plain generation would have drawn.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.draft_costs import DraftCosts
from utils.drafting import NOTHING, Drafter, DraftTree
from utils.generation import AcceptedChunk, DraftCounts, Generation, GenerationStats, Moment, Seen, Trace
from utils.kv_cache import Block, Rows, open_rows
from utils.models import CausalLM
from utils.retrieval import Proposal, Retriever
from utils.sampling import ACCEPTANCE_STREAM, TOKEN_STREAM, Sampler, uniforms

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


@dataclass
class _Sequence:
    """One sequence in progress: its text, what the LM said at its last token, and what it has cost."""

    request: Request
    token_ids: list[int]
    hidden_state: Tensor  # (D,)
    logits: Tensor  # (V,)
    lm_seconds: float
    retrieval_seconds: float = 0.0
    rest_seconds: float = 0.0
    forward_passes: int = 1
    chunks: list[AcceptedChunk] = field(default_factory=list)
    drafts: DraftCounts = field(default_factory=DraftCounts)
    trace: Trace = field(default_factory=Trace)
    unread: list[int] = field(default_factory=list)  # the last tokens, which the LM has not read yet
    has_ended: bool = False
    drawn: int | None = None  # the next token, where verification has drawn it already
    search_seconds: float | None = None  # what the last draft took to find; None: none was looked for
    token_uniforms: list[float] = field(init=False)
    acceptance_uniforms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        seed, index, n = self.request.seed, self.request.index, self.request.max_new_tokens
        self.token_uniforms = uniforms(seed, index, TOKEN_STREAM, n).tolist()
        self.acceptance_uniforms = uniforms(seed, index, ACCEPTANCE_STREAM, n).tolist()

    @property
    def n_new(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def note_moment(self) -> None:
        seconds = (self.lm_seconds, self.retrieval_seconds, self.rest_seconds)
        self.trace.moments.append(Moment(len(self.token_ids), *seconds, self.drafts.draft_tokens))

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

    @property
    def room(self) -> int:
        return self._rows.n_rows - len(self.sequences)

    def start(self, requests: list[Request]) -> None:
        """Read prompts of one length into the next rows."""
        drafter = self._decoding.drafter
        started = time.perf_counter()
        prompts = [request.prompt_ids for request in requests]
        hidden_states, logits = self._rows.prefill(len(self.sequences), prompts, drafter is not None)
        self._finish_on_device()
        seconds = (time.perf_counter() - started) / len(requests)
        for i, request in enumerate(requests):
            sequence = _Sequence(request, list(request.prompt_ids), hidden_states[i][-1], logits[i], seconds)
            if drafter is not None:
                with _charged(sequence, "retrieval_seconds"):
                    drafter.observe(request.index, request.prompt_ids, hidden_states[i])
            self.sequences.append(sequence)

    def step(self) -> list[Generation]:
        """Append a chunk or a token to every sequence, read it where the text goes on; returns those that ended."""
        for sequence in self.sequences:
            sequence.note_moment()
        proposals = [self._propose(sequence) for sequence in self.sequences]
        self._draw([sequence for sequence, chunk in zip(self.sequences, proposals, strict=True) if not chunk])
        for sequence, chunk in zip(self.sequences, proposals, strict=True):
            with _charged(sequence, "rest_seconds"):
                self._append(sequence, chunk.token_ids if chunk else [sequence.take_drawn()], chunk)
        ended = self._take_ended()
        if self.sequences and self._decoding.drafter is None:
            self._read()
        elif self.sequences:
            self._verify(self._drafts())
            ended += self._take_ended()
        self._tell_news()
        return [self._generation(sequence) for sequence in ended]

    def _tell_news(self) -> None:
        """Outside the clock: what a caller does with the tokens is not decoding."""
        if self._decoding.on_tokens is not None:
            for index, token_ids, chunk in self._news:
                self._decoding.on_tokens(index, token_ids, chunk)
        self._news.clear()

    def _propose(self, sequence: _Sequence) -> Proposal | None:
        if self._decoding.retriever is None:
            return None
        with _charged(sequence, "retrieval_seconds"):
            uniform = sequence.acceptance_uniforms[sequence.n_new]
            proposal = self._decoding.retriever.propose(sequence.token_ids[-1], sequence.hidden_state, uniform)
        if proposal is None:
            return None
        sequence.trace.proposals.append(Seen(len(sequence.token_ids), proposal.row, proposal.similarity))
        return proposal if proposal.accepted else None

    def _draw(self, sequences: list[_Sequence]) -> None:
        """The next token of each sequence from the LM, where it has not been drawn."""
        lacking = [sequence for sequence in sequences if sequence.drawn is None]
        if not lacking:
            return
        with _charged_to_all(lacking, "lm_seconds"):
            logits = lacking[0].logits[None] if len(lacking) == 1 else torch.stack([s.logits for s in lacking])
            points = [sequence.token_uniforms[sequence.n_new] for sequence in lacking]
            drawn = self._decoding.sampler.draw(logits, points, lambda i: lacking[i].token_ids)
        for sequence, token_id in zip(lacking, drawn, strict=True):
            sequence.drawn = token_id

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
        with _charged_to_all(self.sequences, "lm_seconds"):
            blocks = [Block(sequence.unread) for sequence in self.sequences]
            hidden_states, logits = self._rows.forward(blocks, keep_all=False)
            self._finish_on_device()
        for row, sequence in enumerate(self.sequences):
            self._rows.commit(row, list(range(len(sequence.unread))))
            sequence.hidden_state, sequence.logits = hidden_states[row][-1], logits[row][-1]
            sequence.forward_passes += 1

    # ---- Verified generation

    def _drafts(self) -> list[DraftTree]:
        """A draft for every sequence, as far as it pays."""
        costs, n_rows = self._decoding.draft_costs, len(self.sequences)
        if costs is not None and not costs.asks(n_rows):
            for sequence in self.sequences:
                sequence.search_seconds = None
            return [NOTHING] * n_rows
        trees = [self._draft(sequence) for sequence in self.sequences]
        if costs is None:
            return trees
        with _charged_to_all(self.sequences, "retrieval_seconds"):
            return costs.paying_parts(trees)

    def _draft(self, sequence: _Sequence) -> DraftTree:
        drafter, room = self._decoding.drafter, sequence.request.max_new_tokens - sequence.n_new
        assert drafter is not None
        started = time.perf_counter()
        with _charged(sequence, "retrieval_seconds"):
            # A node past the last token could never be accepted.
            tree = drafter.draft(sequence.request.index, sequence.token_ids, sequence.hidden_state, room)
            tree = tree if self._rows.takes_trees else tree.heaviest_line()
        sequence.search_seconds = time.perf_counter() - started
        return tree

    def _verify(self, trees: list[DraftTree]) -> None:
        """One forward pass over the last token of every sequence and its tree; what is confirmed becomes text."""
        blocks = [
            Block(sequence.unread + tree.token_ids, [-1, *(parent + 1 for parent in tree.parents)])
            for sequence, tree in zip(self.sequences, trees, strict=True)
        ]
        depths = [block.depths() for block in blocks]
        started = time.perf_counter()
        with _charged_to_all(self.sequences, "lm_seconds"):
            hidden_states, logits = self._rows.forward(blocks, keep_all=True)
            drawn = self._draw_at_nodes(blocks, depths, logits)
        costs, longest = self._decoding.draft_costs, max(len(block.token_ids) for block in blocks)
        if costs is not None:
            costs.saw_pass(len(blocks), longest, time.perf_counter() - started)
        for row, (sequence, block) in enumerate(zip(self.sequences, blocks, strict=True)):
            with _charged(sequence, "rest_seconds"):
                path = self._accept(sequence, block, depths[row], _confirmed_path(block, drawn[row]))
                if costs is not None and trees[row].token_ids:
                    costs.saw_draft(trees[row], [node - 1 for node in path[1:]])
                if costs is not None and sequence.search_seconds is not None:
                    costs.saw_search(len(blocks), longest, len(path) - 1, sequence.search_seconds)
                self._rows.commit(row, path)
                sequence.hidden_state, sequence.drawn = hidden_states[row][path[-1]], drawn[row][path[-1]]
                sequence.forward_passes += 1
            self._observe(sequence, path, hidden_states[row])

    def _draw_at_nodes(self, blocks: list[Block], depths: list[list[int]], logits: list[Tensor]) -> list[list[int]]:
        """The token that the LM goes on with after each node, were it reached."""
        sequences, nodes = (
            self.sequences,
            [(row, node) for row, block in enumerate(blocks) for node in range(len(block.token_ids))],
        )
        # Past the last new token nothing is drawn any more; any number will do there.
        points = [(*sequence.token_uniforms, 0.0) for sequence in sequences]
        uniforms = [
            points[row][min(sequences[row].n_new + depths[row][node], len(points[row]) - 1)] for row, node in nodes
        ]

        def prefix(i: int) -> list[int]:
            row, node = nodes[i]
            return sequences[row].token_ids[:-1] + blocks[row].path_to(node)

        tokens = iter(self._decoding.sampler.draw(torch.cat(logits), uniforms, prefix))
        return [[next(tokens) for _ in block.token_ids] for block in blocks]

    def _accept(self, sequence: _Sequence, block: Block, depths: list[int], path: list[int]) -> list[int]:
        """Append the drafted tokens of the path; returns the path as far as the text goes."""
        n_before = len(sequence.token_ids)
        if len(path) > 1:
            self._append(sequence, [block.token_ids[node] for node in path[1:]], None)
        path = path[: 1 + len(sequence.token_ids) - n_before]
        sequence.drafts.add(depths[1:], len(path) - 1)
        return path

    def _observe(self, sequence: _Sequence, path: list[int], hidden_states: Tensor) -> None:
        assert self._decoding.drafter is not None
        with _charged(sequence, "retrieval_seconds"):
            read = sequence.token_ids[len(sequence.token_ids) - len(path) :]
            kept = hidden_states[: len(path)] if path[-1] == len(path) - 1 else hidden_states[path]
            self._decoding.drafter.observe(sequence.request.index, read, kept)

    # ---- The end

    def _generation(self, sequence: _Sequence) -> Generation:
        if self._decoding.drafter is not None:
            self._decoding.drafter.end(sequence.request.index)
        stats = GenerationStats(
            forward_passes=sequence.forward_passes,
            seconds=sequence.lm_seconds + sequence.retrieval_seconds + sequence.rest_seconds,
            lm_seconds=sequence.lm_seconds,
            retrieval_seconds=sequence.retrieval_seconds,
            drafts=sequence.drafts if self._decoding.drafter is not None else None,
        )
        request = sequence.request
        new_token_ids = sequence.token_ids[len(request.prompt_ids) :]
        sequence.note_moment()
        return Generation(request.index, request.prompt_ids, new_token_ids, sequence.chunks, stats, sequence.trace)

    def _finish_on_device(self) -> None:
        """Wait for the forward pass, so that its time is not counted as that of what reads its result first."""
        if self._lm.device.type == "cuda":
            torch.cuda.synchronize(self._lm.device)


def _confirmed_path(block: Block, drawn: list[int]) -> list[int]:
    """The nodes from the first on of which each is what the LM goes on with after the one before."""
    assert block.parents is not None
    path, children = (
        [0],
        {
            (parent, token): node
            for node, (parent, token) in enumerate(zip(block.parents, block.token_ids, strict=True))
        },
    )
    while (node := children.get((path[-1], drawn[path[-1]]))) is not None:
        path.append(node)
    return path


@contextmanager
def _charged_to_all(sequences: list[_Sequence], account: str) -> Iterator[None]:
    """Add the block's seconds to an account, in equal parts to each sequence."""
    started = time.perf_counter()
    yield
    seconds = (time.perf_counter() - started) / len(sequences)
    for sequence in sequences:
        setattr(sequence, account, getattr(sequence, account) + seconds)


def _charged(sequence: _Sequence, account: str) -> AbstractContextManager[None]:
    return _charged_to_all([sequence], account)
