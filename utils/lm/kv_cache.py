"""KV caches of sequences that advance by different numbers of tokens, as chunks and accepted drafts make them.

`SlotKVCache` keeps every sequence of a batch in one cache in which slot = position: the keys and values of a token go to
the slot of its position, and a mask lets a query see the slots of its own text only. Rolling back is not advancing the
length: stale slots lie after every query and are overwritten first. The nodes of a draft tree lie in consecutive slots;
the mask lets each see its ancestors, and the accepted path moves to where it belongs. `SingleSequenceCache` is the
model's own cache with one sequence, for architectures whose attention does not fit slots. `make_kv_cache` tries both.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from utils.files import InputError
from utils.lm.model import CausalLM, upload

# How far logits with and without a cache may differ by kernel rounding, as a share of the logits' standard deviation.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

# Lengths that passes of fixed shape are padded to.
FIXED_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
N_WARM_UP_PASSES = 3
LOGGER = logging.getLogger(__name__)
_SLOTS_FIT: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # the probe's result, once per model


@dataclass(frozen=True)
class Block:
    """The tokens of one sequence in one forward pass: tokens of the text, then a draft tree after the last of them.

    parents[i] is the block index of the token before token i, always less than i; -1 is the text so far. A line where
    parents is None: each token follows the one before it.
    """

    token_ids: list[int]
    parents: list[int] | None = None

    @property
    def is_line(self) -> bool:
        return self.parents is None or self.parents == list(range(-1, len(self.parents) - 1))

    def depths(self) -> list[int]:
        """Position of each token in the text, counted from the first position of the block."""
        if self.parents is None:
            return list(range(len(self.token_ids)))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def path_to(self, node: int) -> list[int]:
        """Token ids from the block's first position on to a node."""
        if self.parents is None:
            return self.token_ids[: node + 1]
        path = []
        while node >= 0:
            path.append(self.token_ids[node])
            node = self.parents[node]
        return path[::-1]

    def children(self) -> dict[tuple[int, int], int]:
        """The token after a node: by the node's block index and the child's token id, the child's block index."""
        parents = self.parents or range(-1, len(self.token_ids) - 1)
        return {
            (parent, token_id): node
            for node, (parent, token_id) in enumerate(zip(parents, self.token_ids, strict=True))
        }

    def visibility(self) -> np.ndarray:
        """(T, T) bool: whether token i (row) sees token j: itself and its ancestors."""
        n_tokens = len(self.token_ids)
        if self.parents is None:
            return np.tri(n_tokens, dtype=bool)
        seen = np.eye(n_tokens, dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                seen[i] |= seen[parent]
        return seen


class KVCache(Protocol):
    """Sequences on a KV cache, one a row; `lengths` counts the tokens of each whose keys and values are kept."""

    n_rows: int
    takes_trees: bool
    lengths: list[int]

    def prefill(self, row: int, texts: list[list[int]], all_hidden: bool = False) -> tuple[Tensor, Tensor]:
        """Start sequences of one length in consecutive rows.

        Hidden states (B, 1, D) of the last tokens, or (B, T, D) of all, and logits (B, V) of the last.
        """
        ...

    def forward(self, blocks: list[Block], keep_all: bool) -> tuple[list[Tensor], list[Tensor]]:
        """One pass over the blocks of rows 0 … n-1: each row's hidden states (K, D) and logits (K, V), K = T or 1."""
        ...

    def commit(self, row: int, path: list[int]) -> None:
        """Keep these tokens of the row's last block, a path from its first token on, and drop the others."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy the sequence in row `source` to row `target`."""
        ...


def make_kv_cache(lm: CausalLM, n_rows: int, n_slots: int, graphs: bool = False) -> KVCache:
    """A cache for `n_rows` sequences of at most `n_slots` tokens, drafts included; for one sequence where slots do not fit.

    graphs: run passes of a few fixed lengths, each captured as a CUDA graph and replayed. Raises InputError where
    neither cache gives the logits that the model gives without one.
    """
    if lm.model not in _SLOTS_FIT:
        _SLOTS_FIT[lm.model] = _slots_fit(lm)
        if not _SLOTS_FIT[lm.model]:
            _require_cache(lm, SingleSequenceCache(lm))
            LOGGER.warning("%s: its attention takes one sequence at a time and no draft trees", lm.name)
    if not _SLOTS_FIT[lm.model]:
        return SingleSequenceCache(lm)
    return GraphedKVCache(lm, n_rows, n_slots) if graphs else SlotKVCache(lm, n_rows, n_slots)


# ---- Slots


class SlotKVCache:
    """Any number of sequences in one preallocated cache; takes draft trees."""

    takes_trees = True

    def __init__(self, lm: CausalLM, n_rows: int, n_slots: int) -> None:
        self.n_rows, self.lengths = n_rows, [0] * n_rows
        self._lm, self._device = lm, lm.device
        # The last slot takes the padding's keys and values and is never looked at.
        self._placement = _Placement(n_rows, n_slots + 1)
        make_layer: Any = partial(_SlotLayer, self._placement)
        self._cache = Cache(layer_class_to_replicate=make_layer)
        config = lm.model.config.get_text_config()
        self._layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
        self._window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self._additive = config._attn_implementation == "eager"

    def prefill(self, row: int, texts: list[list[int]], all_hidden: bool = False) -> tuple[Tensor, Tensor]:
        rows, length = slice(row, row + len(texts)), len(texts[0])
        self._placement.place_line(rows, 0, length)
        hidden_states, logits = self._lm.forward(
            upload(texts, self._device),
            logits_to_keep=1,
            all_hidden=all_hidden,
            cache=self._cache,
        )
        self.lengths[rows] = [length] * len(texts)
        return hidden_states, logits[:, -1]

    def forward(self, blocks: list[Block], keep_all: bool) -> tuple[list[Tensor], list[Tensor]]:
        n_tokens = [len(block.token_ids) for block in blocks]
        hidden_states, logits = self._pass(blocks, n_tokens, keep_all)
        kept = n_tokens if keep_all else [1] * len(blocks)
        pairs = [(hidden_states[row, -n:], logits[row, -n:]) for row, n in enumerate(kept)]
        return [hidden for hidden, _ in pairs], [logit for _, logit in pairs]

    def _pass(self, blocks: list[Block], n_tokens: list[int], keep_all: bool) -> tuple[Tensor, Tensor]:
        """Hidden states (B, K, D) and logits (B, K, V), each row's last token the last of K."""
        longest, lengths = max(n_tokens), self.lengths[: len(blocks)]
        is_even = min(n_tokens) == longest and min(lengths) == max(lengths)
        if is_even and all(block.is_line for block in blocks):
            self._placement.place_line(slice(0, len(blocks)), lengths[0], longest)
        else:
            self._placement.place(lengths, n_tokens, longest, self._device)
        kwargs: dict[str, Any] = {}
        if not (is_even and longest == 1 and self._in_window(lengths[0])):
            positions, masks = self._positions_and_masks(blocks, n_tokens, longest)
            kwargs = {"position_ids": positions, "attention_mask": masks}
        ids = self._padded(blocks, longest)
        return self._lm.forward(ids, cache=self._cache, logits_to_keep=0 if keep_all else 1, **kwargs)

    def _padded(self, blocks: list[Block], width: int) -> Tensor:
        """(B, width) token ids, padding on the left."""
        padded = [[0] * (width - len(block.token_ids)) + block.token_ids for block in blocks]
        return upload(padded, self._device)

    def commit(self, row: int, path: list[int]) -> None:
        start = self.lengths[row]
        if path != list(range(len(path))):
            source = upload([start + node for node in path], self._device)
            for stored in self._stored():
                stored[row, :, start : start + len(path)] = stored[row, :, source]
        self.lengths[row] = start + len(path)

    def move(self, source: int, target: int) -> None:
        for stored in self._stored():
            stored[target] = stored[source]
        self.lengths[target] = self.lengths[source]

    def _stored(self) -> Iterator[Tensor]:
        """Every layer's keys and values, (rows, heads, slots, head size) each."""
        for layer in self._cache.layers:
            assert isinstance(layer, _SlotLayer)
            yield from layer.stored()

    def _in_window(self, length: int) -> bool:
        return self._window is None or length < self._window

    def _positions_and_masks(self, blocks: list[Block], n_tokens: list[int], longest: int) -> tuple[Tensor, Any]:
        """position_ids (B, T) and the attention mask (B, 1, T, kv), or one for each layer type.

        Padding stands on the left, so that each row's last token is the last column; it sees slot 0 alone.
        """
        n_rows, kv_length = len(blocks), self._placement.kv_length
        query_positions = np.zeros((n_rows, longest), dtype=np.int64)
        key_positions = np.broadcast_to(np.arange(kv_length), (n_rows, kv_length)).copy()
        allowed = np.zeros((n_rows, longest, kv_length), dtype=bool)
        allowed[:, :, 0] = True
        for row, (block, n, length) in enumerate(zip(blocks, n_tokens, self.lengths, strict=False)):
            depths = np.array(block.depths())
            query_positions[row, -n:] = length + depths
            key_positions[row, length : length + n] = length + depths
            allowed[row, -n:, :length] = True
            allowed[row, -n:, length : length + n] = block.visibility()
        positions = upload(query_positions, self._device)
        full = self._as_mask(allowed)
        if self._window is None:
            return positions, dict.fromkeys(self._layer_types, full) or full
        near = key_positions[:, None, :] > query_positions[:, :, None] - self._window
        # A padding query far behind slot 0 must still see something.
        near[:, :, 0] |= ~allowed[:, :, 1:].any(axis=2)
        sliding = self._as_mask(allowed & near)
        if not self._layer_types:
            return positions, sliding
        return positions, {kind: full if kind == "full_attention" else sliding for kind in self._layer_types}

    def _as_mask(self, allowed: np.ndarray) -> Tensor:
        mask = upload(allowed, self._device)[:, None]
        if not self._additive:
            return mask
        lowest = torch.finfo(self._lm.dtype).min
        return torch.zeros(mask.shape, dtype=self._lm.dtype, device=mask.device).masked_fill_(~mask, lowest)


class _Placement:
    """Where the next forward pass puts its keys and values, and how many slots it looks at; shared by all layers."""

    def __init__(self, n_rows: int, n_slots: int) -> None:
        self.n_rows, self.n_slots = n_rows, n_slots
        self.rows = slice(0, n_rows)
        self.start = 0
        self.kv_length = 0
        # Row numbers (B, 1) and slots (B, T) of the tokens; None: `start`, `start` + 1, … in every row.
        self.index: tuple[Tensor, Tensor] | None = None

    def place_line(self, rows: slice, start: int, n_tokens: int) -> None:
        self.rows, self.start, self.kv_length, self.index = rows, start, start + n_tokens, None

    def place(self, lengths: list[int], n_tokens: list[int], width: int, device: torch.device) -> None:
        """Each row's tokens behind its own text, in the last columns; what stands before them goes to the last slot."""
        starts, counts = np.array(lengths)[:, None], np.array(n_tokens)[:, None]
        offsets = np.arange(width) - (width - counts)
        slots = upload(np.where(offsets >= 0, starts + offsets, self.n_slots - 1), device)
        self.rows, self.start = slice(0, len(lengths)), max(lengths)
        self.index = torch.arange(len(lengths), device=device)[:, None], slots
        self.kv_length = int((starts + counts).max())


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, slots, head size)."""

    def __init__(self, placement: _Placement) -> None:
        super().__init__()
        self._placement = placement

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        sizes = (self._placement.n_rows, self._placement.n_slots)
        self.keys = key_states.new_zeros(sizes[0], key_states.shape[1], sizes[1], key_states.shape[3])
        self.values = value_states.new_zeros(sizes[0], value_states.shape[1], sizes[1], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, stored: Tensor | None, new: Tensor) -> Tensor:
        assert stored is not None
        placement = self._placement
        rows = stored[placement.rows]
        if placement.index is None:
            rows[:, :, placement.start : placement.start + new.shape[2]] = new
        else:
            row_numbers, slots = placement.index
            rows[row_numbers, :, slots] = new.transpose(1, 2)
        return rows[:, :, : placement.kv_length]

    def stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._placement.kv_length, 0

    def get_seq_length(self) -> int:
        return self._placement.start

    def get_max_length(self) -> int:
        return self._placement.n_slots


# ---- Passes of fixed shape


class GraphedKVCache(SlotKVCache):
    """Slots, with every pass padded to one of a few lengths and looking at all slots, so that nothing changes shape.

    On CUDA the pass of each number of rows and tokens is captured as a graph once and replayed: a step costs the
    kernels' time, not that of launching them one by one. Elsewhere the same passes run as they are.
    """

    def __init__(self, lm: CausalLM, n_rows: int, n_slots: int) -> None:
        super().__init__(lm, n_rows, n_slots)
        self._passes: dict[tuple[int, int], _FixedPass] = {}

    def _pass(self, blocks: list[Block], n_tokens: list[int], keep_all: bool) -> tuple[Tensor, Tensor]:
        if max(n_tokens) > FIXED_LENGTHS[-1]:  # a chunk that was not cut: too rare to be worth a graph
            return super()._pass(blocks, n_tokens, keep_all)
        width = next(length for length in FIXED_LENGTHS if length >= max(n_tokens))
        self._placement.place(self.lengths[: len(blocks)], n_tokens, width, self._device)
        # Every slot, that of the padding too, which no mask lets be seen.
        self._placement.kv_length = self._placement.n_slots
        positions, masks = self._positions_and_masks(blocks, n_tokens, width)
        key = len(blocks), width
        if key not in self._passes:
            self._passes[key] = _FixedPass(self._lm, self._cache, self._placement)
        return self._passes[key].run(self._padded(blocks, width), positions, masks)


class _FixedPass:
    """One forward pass of fixed shape on its own buffers; on CUDA it is captured at its first run."""

    def __init__(self, lm: CausalLM, cache: Cache, placement: _Placement) -> None:
        self._lm, self._cache, self._placement = lm, cache, placement
        self._inputs: list[Tensor] = []
        self._masks: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None

    def run(self, input_ids: Tensor, positions: Tensor, masks: Any) -> tuple[Tensor, Tensor]:
        assert self._placement.index is not None
        row_numbers, slots = self._placement.index
        given = [input_ids, positions, slots, *(masks.values() if isinstance(masks, dict) else [masks])]
        if not self._inputs:
            self._inputs = [tensor.clone() for tensor in given]
            buffers = self._inputs[3:]
            self._masks = dict(zip(masks, buffers, strict=True)) if isinstance(masks, dict) else buffers[0]
        for buffer, tensor in zip(self._inputs, given, strict=True):
            buffer.copy_(tensor)
        self._placement.index = row_numbers, self._inputs[2]
        if self._lm.device.type != "cuda":
            return self._forward()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._outputs is not None
        self._graph.replay()
        # The next replay writes over the outputs.
        return self._outputs[0].clone(), self._outputs[1].clone()

    def _capture(self) -> None:
        side = torch.cuda.Stream(self._lm.device)
        side.wait_stream(torch.cuda.current_stream(self._lm.device))
        with torch.cuda.stream(side):
            # Kernels are chosen and memory is taken before the capture; writing the same slots again changes nothing.
            for _ in range(N_WARM_UP_PASSES):
                self._forward()
        torch.cuda.current_stream(self._lm.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._forward()

    def _forward(self) -> tuple[Tensor, Tensor]:
        return self._lm.forward(
            self._inputs[0],
            cache=self._cache,
            position_ids=self._inputs[1],
            attention_mask=self._masks,
        )


# ---- The model's own cache


class SingleSequenceCache:
    """One sequence on the cache that the model makes itself; drafts are lines."""

    n_rows, takes_trees = 1, False

    def __init__(self, lm: CausalLM) -> None:
        self.lengths = [0]
        self._lm = lm
        self._cache: Any = None
        self._n_fed = 0

    def prefill(self, row: int, texts: list[list[int]], all_hidden: bool = False) -> tuple[Tensor, Tensor]:
        (input_ids,) = texts
        self._cache, self.lengths = DynamicCache(config=self._lm.model.config), [0]
        self._cache.activate_past_recording()
        (hidden_states,), (logits,) = self._forward(input_ids, logits_to_keep=1, all_hidden=all_hidden)
        self.commit(0, list(range(len(input_ids))))
        return hidden_states[None], logits[-1:]

    def forward(self, blocks: list[Block], keep_all: bool) -> tuple[list[Tensor], list[Tensor]]:
        (block,) = blocks
        assert block.is_line
        return self._forward(block.token_ids, logits_to_keep=0 if keep_all else 1)

    def _forward(self, token_ids: list[int], **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        self._n_fed = len(token_ids)
        ids = upload([token_ids], self._lm.device)
        hidden_states, logits = self._lm.forward(ids, cache=self._cache, **kwargs)
        return [hidden_states[0]], [logits[0]]

    def commit(self, row: int, path: list[int]) -> None:
        n_dropped = self._n_fed - len(path)
        if n_dropped and not self._cache.is_croppable:
            raise InputError(f"{self._lm.name}: its state cannot go back over rejected drafts; use --decoding chunk")
        if self._cache.is_croppable:
            self._cache.crop(-n_dropped)
        self.lengths[0] += len(path)

    def move(self, source: int, target: int) -> None:
        raise AssertionError("there is only one row")


# ---- Which cache fits


@torch.inference_mode()
def _slots_fit(lm: CausalLM) -> bool:
    """Whether rows of different lengths and a tree give the logits that the same texts give without a cache."""
    texts = [_probe_text(lm, 5), _probe_text(lm, 3)]
    tree, line = Block(_probe_text(lm, 3), parents=[-1, 0, 0]), Block(_probe_text(lm, 2))
    try:
        cache = SlotKVCache(lm, 2, 5 + 3)
        for row, text in enumerate(texts):
            cache.prefill(row, [text])
        _, (over_tree, over_line) = cache.forward([tree, line], keep_all=True)
    except torch.OutOfMemoryError as error:  # says nothing of the architecture
        raise InputError(
            f"{lm.name}: leaves no memory on {lm.device} for a KV cache; free some, or give another --device"
        ) from error
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return False
    root, first, second = tree.token_ids
    return (
        _is_as_uncached(lm, over_tree[1], [*texts[0], root, first])
        and _is_as_uncached(lm, over_tree[2], [*texts[0], root, second])
        and _is_as_uncached(lm, over_line[1], texts[1] + line.token_ids)
    )


@torch.inference_mode()
def _require_cache(lm: CausalLM, cache: SingleSequenceCache) -> None:
    """Raise InputError where continuing from the model's own cache does not give the logits of the whole text."""
    # So long that a recurrent state matters: transformers' Mamba drops it where it reads several tokens at a time.
    text, more = _probe_text(lm, 16), _probe_text(lm, 2)
    cache.prefill(0, [text])
    _, (logits,) = cache.forward([Block(more)], keep_all=False)
    if not _is_as_uncached(lm, logits[-1], text + more):
        message = "continuing from its cache does not give what the whole text gives, so it cannot be decoded here"
        raise InputError(f"{lm.name}: {message}; give a model with attention")


def _probe_text(lm: CausalLM, n_tokens: int) -> list[int]:
    vocabulary = lm.model.config.get_text_config().vocab_size
    return [(7 * i + 3) % vocabulary for i in range(n_tokens)]


def _is_as_uncached(lm: CausalLM, logits: Tensor, text: list[int]) -> bool:
    _, wanted = lm.forward(torch.tensor([text], device=lm.device), logits_to_keep=1)
    difference = (logits.float() - wanted[0, -1].float()).abs().max()
    # NaN compares false.
    return bool(difference <= PROBE_TOLERANCE[lm.dtype] * (wanted.float().std() + 1e-6))
