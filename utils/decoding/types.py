"""What the decode loop is given and what it returns: requests; generations with chunks, counts and seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Token ids to text, as a tokenizer's `decode`.
Detokenize = Callable[[list[int]], str]
# How many preceding tokens decide whether a token's text begins with a space or completes a character.
CONTEXT_TOKENS = 4


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `index` is the caller's number of it and, with the seed, decides its random numbers."""

    index: int
    prompt_ids: list[int]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class AcceptedChunk:
    """A retrieved chunk as it was emitted, cut where --max_new_tokens or EOS cuts it.

    position: of its first token in the flat list of all token ids, the prompt's first; similarity: cosine in [-1, 1].
    """

    position: int
    token_ids: list[int]
    similarity: float


@dataclass
class DraftCounts:
    """The drafts of verified generation. drafted[d] and accepted[d]: how many drafts reached d + 1 tokens ahead, and in
    how many of them the token there was accepted; draft_tokens counts all nodes of the trees."""

    n_drafts: int = 0
    draft_tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, depths: list[int], n_accepted: int) -> None:
        """Add a draft: the depth of each node, 1 for the first drafted token, and how many tokens were accepted."""
        self.n_drafts += bool(depths)
        self.draft_tokens += len(depths)
        deepest = max(depths, default=0)
        for counts in (self.drafted, self.accepted):
            counts += [0] * (deepest - len(counts))
        for ahead in range(deepest):
            self.drafted[ahead] += 1
            self.accepted[ahead] += ahead < n_accepted

    @property
    def accepted_tokens(self) -> int:
        return sum(self.accepted)


class StepRecord(NamedTuple):
    """A generation after a step: tokens so far, the prompt's included, seconds so far, nodes of drafts so far."""

    n_tokens: int
    lm_seconds: float
    retrieval_seconds: float
    rest_seconds: float
    draft_tokens: int


class ProposalRecord(NamedTuple):
    """A proposal, accepted or not: where its chunk would begin in the flat list, its row and cosine similarity.

    first_token_prob: what the LM gives to the chunk's first token, relative to its likeliest; None: it was not asked.
    """

    position: int
    row: int
    similarity: float
    first_token_prob: float | None = None


@dataclass(frozen=True)
class Trace:
    """A generation step by step. steps: when the prompt was read, and after each step."""

    steps: list[StepRecord] = field(default_factory=list)
    proposals: list[ProposalRecord] = field(default_factory=list)


@dataclass(frozen=True)
class GenerationStats:
    """What one generation cost. forward_passes includes the prompt's; seconds includes those of LM and retrieval.

    drafts: those of verified generation; None in the other modes.
    """

    forward_passes: int
    seconds: float
    lm_seconds: float
    retrieval_seconds: float
    drafts: DraftCounts | None = None


@dataclass(frozen=True)
class Generation:
    """What was generated for one request. new_token_ids: without the prompt's.

    trace: None where it was not recorded.
    """

    index: int
    prompt_ids: list[int]
    new_token_ids: list[int]
    chunks: list[AcceptedChunk]
    stats: GenerationStats
    trace: Trace | None = None

    @property
    def token_ids(self) -> list[int]:
        """The flat list, the prompt's first."""
        return self.prompt_ids + self.new_token_ids


# ---- From token ids to text


def text_pieces(token_ids: Sequence[int], borders: Sequence[int], decode: Detokenize) -> list[str]:
    """The text cut at token borders (ascending): len(borders) + 1 pieces that join to the text of all token ids.

    Each cut is where the text up to the border agrees with the whole. Pieces that are decoded one by one would lose
    leading spaces, and would have replacement characters where a border divides a character.
    """
    whole = decode(list(token_ids))
    cuts = [0]
    for border in borders:
        before = decode(list(token_ids[:border]))
        differing = (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
        cuts.append(max(cuts[-1], next(differing, min(len(before), len(whole)))))
    ends = [*cuts[1:], len(whole)]
    return [whole[start:end] for start, end in zip(cuts, ends, strict=True)]


class TokenTexts:
    """Cuts texts at every token. It remembers the text of each token alone, which for most texts is all it needs."""

    def __init__(self, decode: Detokenize) -> None:
        self._decode = decode
        self._alone: dict[int, str] = {}

    def cut(self, token_ids: Sequence[int]) -> list[str]:
        """One piece for each token; they join to the text of all, as those of `text_pieces` do."""
        ids = list(token_ids)
        whole = self._decode(ids)
        for token_id in set(ids).difference(self._alone):
            self._alone[token_id] = self._decode([token_id])
        pieces = [self._alone[token_id] for token_id in ids]
        if "".join(pieces) == whole or "".join(pieces := self._incremental(ids)) == whole:
            return pieces
        # The first piece is the text before the first border, which is empty unless there is no token.
        return text_pieces(ids, range(1, len(ids)), self._decode) if ids else []

    def _incremental(self, ids: list[int]) -> list[str]:
        """Each piece is what its token adds to the few before it, but for a character that the token only begins.

        This is how the streamers of vLLM and Hugging Face decode.
        """
        pieces: list[str] = []
        first, known = 0, ""  # the text of the tokens from `first` on that is in earlier pieces
        for end in range(1, len(ids) + 1):
            text = self._decode(ids[first:end])
            pieces.append((text if end == len(ids) else text.rstrip("\ufffd"))[len(known) :])
            first = max(end - CONTEXT_TOKENS, 0)
            known = self._decode(ids[first:end]).rstrip("\ufffd")
        return pieces
