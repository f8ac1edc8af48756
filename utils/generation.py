"""What a generation is, as the decode loop hands it to the results: token ids, accepted chunks, counts and seconds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AcceptedChunk:
    """A retrieved chunk as it was emitted (cut where --max_new_tokens or EOS cut it).

    position: of its first token in the flat list of all token ids, the prompt's first; similarity: cosine in [-1, 1].
    """

    position: int
    token_ids: list[int]
    similarity: float


@dataclass(frozen=True)
class GenerationStats:
    """What one generation cost. forward_passes counts the prompt's; seconds hold lm_seconds and retrieval_seconds."""

    forward_passes: int
    seconds: float
    lm_seconds: float
    retrieval_seconds: float


@dataclass(frozen=True)
class Generation:
    """One generation. index: of its prompt; new_token_ids: all after the prompt's, those of the chunks among them."""

    index: int
    prompt_token_ids: list[int]
    new_token_ids: list[int]
    chunks: list[AcceptedChunk]
    stats: GenerationStats

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.new_token_ids
