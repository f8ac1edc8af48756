"""The texts of this run, as verified generation drafts from them: where tokens stand in them, with what context.

A place is the position of an entry token. What followed it is known as soon as it was read, and its context vector
with it, so the running text and the texts before it are a datastore that costs nothing to make.
"""

import numpy as np
import torch
from torch import Tensor

# Between two texts and after the last token; no token id.
NO_TOKEN = -1
# Of a search: similarities (n,) to the query and continuations (n, depth), NO_TOKEN where the text ends.
Places = tuple[np.ndarray, np.ndarray]


class LiveTexts:
    """One text that grows, or texts one after the other."""

    def __init__(self) -> None:
        self.n_tokens = 0  # with those between texts
        self._token_ids = np.empty(0, dtype=np.int64)  # more than there are tokens, as are the vectors
        self._vectors = torch.empty(0, 0)
        self._after_pair: dict[tuple[int, int], list[int]] = {}  # entry token and the one after it: places
        self._before: dict[int, list[int]] = {}  # the token after the entry token: places

    def extend(self, token_ids: list[int], vectors: Tensor) -> None:
        """Go on with these tokens and their context vectors (n, D) on the host, of any length."""
        start, end = self.n_tokens, self.n_tokens + len(token_ids)
        self._make_room(end, vectors)
        self._token_ids[start:end] = token_ids
        self._vectors[start:end] = torch.nn.functional.normalize(vectors.float(), dim=1)
        last = int(self._token_ids[start - 1]) if start else NO_TOKEN
        for place, (entry, following) in enumerate(zip([last, *token_ids], token_ids, strict=False), start - 1):
            if entry != NO_TOKEN and following != NO_TOKEN:
                self._after_pair.setdefault((entry, following), []).append(place)
                self._before.setdefault(following, []).append(place)
        self.n_tokens = end

    def add_text(self, text: "LiveTexts", max_tokens: int) -> None:
        """Add a text that is over. Where that makes more than max_tokens, the oldest half goes, texts cut there."""
        end = text._vectors.new_zeros(1, text._vectors.shape[1])
        self.extend(
            [*text._token_ids[: text.n_tokens].tolist(), NO_TOKEN], torch.cat([text._vectors[: text.n_tokens], end])
        )
        if self.n_tokens > max_tokens:
            kept = slice(self.n_tokens - max_tokens // 2, self.n_tokens)
            token_ids, vectors = self._token_ids[kept].tolist(), self._vectors[kept].clone()
            self.__init__()  # type: ignore[misc]
            self.extend(token_ids, vectors)

    def after_pair(self, entry: int, following: int, query: Tensor, depth: int, n_best: int) -> Places:
        """Where these two tokens stand together: the n_best places most similar to the query, a unit vector (D,)."""
        return self._nearest(self._after_pair.get((entry, following), []), query, depth, n_best)

    def after_others(self, entry: int, following: int, query: Tensor, depth: int, n_best: int) -> Places:
        """Where the second of the tokens stands after another than the first."""
        places = [place for place in self._before.get(following, []) if self._token_ids[place] != entry]
        return self._nearest(places, query, depth, n_best)

    def _nearest(self, places: list[int], query: Tensor, depth: int, n_best: int) -> Places:
        at = np.array(places, dtype=np.int64)
        if len(at):
            # A place is of use from the moment that something is known to follow.
            is_known = at + 2 < self.n_tokens
            at = at[is_known & (self._token_ids[np.where(is_known, at + 2, 0)] != NO_TOKEN)]
        if not len(at):
            return np.empty(0, dtype=np.float32), np.empty((0, depth), dtype=np.int64)
        similarities = torch.mv(self._vectors[torch.from_numpy(at)], query).numpy()
        if len(at) > n_best:
            best = np.argpartition(-similarities, n_best - 1)[:n_best]
            at, similarities = at[best], similarities[best]
        positions = at[:, None] + np.arange(2, 2 + depth)
        following = self._token_ids[np.minimum(positions, self.n_tokens - 1)]
        has_ended = np.logical_or.accumulate((positions >= self.n_tokens) | (following == NO_TOKEN), axis=1)
        return similarities, np.where(has_ended, NO_TOKEN, following)

    def _make_room(self, n_tokens: int, vectors: Tensor) -> None:
        if n_tokens <= len(self._token_ids):
            return
        n_room = max(2 * n_tokens, 256)
        token_ids = np.full(n_room, NO_TOKEN, dtype=np.int64)
        token_ids[: self.n_tokens] = self._token_ids[: self.n_tokens]
        grown = torch.zeros(n_room, vectors.shape[1])
        if self.n_tokens:
            grown[: self.n_tokens] = self._vectors[: self.n_tokens]
        self._token_ids, self._vectors = token_ids, grown
