"""The KV cache gives at every step what the same text gives without one, for uneven rows, trees and dropped drafts."""

import pytest
import torch
from architectures import Scripted, tiny_lm

from utils.files import InputError
from utils.lm.kv_cache import Block, GraphedKVCache, KVCache, SingleSequenceCache, SlotKVCache, make_kv_cache
from utils.lm.model import CausalLM

SLOTTED = ["gpt2", "llama", "mistral", "qwen2", "gemma2", "gemma3", "opt", "cohere", "granite", "neox"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def uncached(lm: CausalLM, text: list[int]) -> torch.Tensor:
    """Hidden state and logits of the last token, side by side."""
    hidden_states, logits = lm.forward(torch.tensor([text]))
    return torch.cat([hidden_states[0, -1], logits[0, -1]])


def close(hidden_state: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(torch.cat([hidden_state, logits]), wanted, atol=2e-4, rtol=1e-4)


def prefills(cache: KVCache, row: int, text: list[int], lm: CausalLM) -> bool:
    hidden_states, logits = cache.prefill(row, [text])
    return close(hidden_states[0][-1], logits[0], uncached(lm, text))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", SLOTTED)
def test_uneven_rows_give_what_each_text_gives_alone(name, graphs):
    lm = tiny_lm(name)
    cache = make_kv_cache(lm, 3, 40, graphs)
    assert isinstance(cache, GraphedKVCache if graphs else SlotKVCache)
    texts = [[5, 6, 7, 8, 9, 10, 11], [50], [20, 21, 22]]
    for row, text in enumerate(texts):
        assert prefills(cache, row, text, lm)
    for blocks in (
        [[1], [2, 3, 4], [5, 6]],
        [[7], [8], [9]],
        [[1, 2, 3, 4, 5, 6], [1], [2, 3]],
        [[3, 4], [4, 5], [6, 7]],
    ):
        hidden_states, logits = cache.forward([Block(ids) for ids in blocks], keep_all=False)
        for row, ids in enumerate(blocks):
            texts[row] += ids
            cache.commit(row, list(range(len(ids))))
            assert close(hidden_states[row][-1], logits[row][-1], uncached(lm, texts[row]))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", SLOTTED)
def test_each_tree_node_sees_the_text_and_its_ancestors_alone(name, graphs):
    lm = tiny_lm(name)
    cache = make_kv_cache(lm, 2, 40, graphs)
    texts = [[5, 6, 7, 8, 9], [20, 21]]
    for row, text in enumerate(texts):
        cache.prefill(row, [text])
    #  11 ─┬─ 12 ─┬─ 14 ── 16
    #      └─ 13  └─ 15
    tree = Block([11, 12, 13, 14, 15, 16], parents=[-1, 0, 0, 1, 1, 3])
    paths = [[11], [11, 12], [11, 13], [11, 12, 14], [11, 12, 15], [11, 12, 14, 16]]
    hidden_states, logits = cache.forward([tree, Block([30, 31])], keep_all=True)
    for node, path in enumerate(paths):
        assert close(hidden_states[0][node], logits[0][node], uncached(lm, texts[0] + path))
    assert close(hidden_states[1][1], logits[1][1], uncached(lm, [20, 21, 30, 31]))
    # The path 11, 12, 15 is accepted, and of the other row's block the first token.
    cache.commit(0, [0, 1, 4])
    cache.commit(1, [0])
    hidden_states, logits = cache.forward([Block([40, 41]), Block([42])], keep_all=False)
    assert close(hidden_states[0][-1], logits[0][-1], uncached(lm, [*texts[0], 11, 12, 15, 40, 41]))
    assert close(hidden_states[1][-1], logits[1][-1], uncached(lm, [20, 21, 30, 42]))


def test_texts_of_one_length_start_together():
    lm = tiny_lm("mistral")
    cache = make_kv_cache(lm, 3, 20)
    cache.prefill(0, [[1, 2]])
    texts = [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    hidden_states, logits = cache.prefill(1, texts, all_hidden=True)
    assert hidden_states.shape == (2, 6, lm.hidden_size)
    for row, text in enumerate(texts):
        assert close(hidden_states[row][-1], logits[row], uncached(lm, text))
    hidden_states, logits = cache.forward([Block([5]), Block([6]), Block([7])], keep_all=False)
    for row, text in enumerate([[1, 2, 5], [*texts[0], 6], [*texts[1], 7]]):
        assert close(hidden_states[row][0], logits[row][0], uncached(lm, text))


def test_a_moved_row_goes_on_where_it_was_and_a_freed_one_starts_anew():
    lm = tiny_lm("llama")
    cache = make_kv_cache(lm, 2, 20)
    cache.prefill(0, [[1, 2, 3, 4, 5, 6]])
    cache.prefill(1, [[7, 8]])
    cache.move(1, 0)
    assert prefills(cache, 1, [9], lm)
    hidden_states, logits = cache.forward([Block([10]), Block([11])], keep_all=False)
    assert close(hidden_states[0][0], logits[0][0], uncached(lm, [7, 8, 10]))
    assert close(hidden_states[1][0], logits[1][0], uncached(lm, [9, 11]))


def test_an_architecture_that_slots_do_not_fit_decodes_one_row_alone():
    lm = tiny_lm("bloom")
    cache = make_kv_cache(lm, 4, 40)
    assert isinstance(cache, SingleSequenceCache)
    assert cache.n_rows == 1
    text = [5, 6, 7]
    assert prefills(cache, 0, text, lm)
    cache.forward([Block([1, 2, 3])], keep_all=True)
    cache.commit(0, [0])
    hidden_states, logits = cache.forward([Block([9, 10])], keep_all=True)
    assert close(hidden_states[0][1], logits[0][1], uncached(lm, [5, 6, 7, 1, 9, 10]))


def test_a_model_whose_cached_text_differs_from_the_uncached_is_refused():
    """transformers' Mamba reads several tokens at a time as if nothing stood before them."""
    with pytest.raises(InputError, match="mamba: continuing from its cache does not give what the whole text gives"):
        make_kv_cache(tiny_lm("mamba"), 1, 40)


def test_block_depths_and_visibility_follow_the_parents():
    tree = Block([1, 2, 3, 4], parents=[-1, 0, 0, 2])
    assert tree.depths() == [0, 1, 1, 2]
    assert tree.visibility().astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert Block([1, 2]).visibility().astype(int).tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("n_tokens", [513, 700])
def test_a_block_longer_than_any_graph_is_read_without_one(n_tokens: int) -> None:
    lm = tiny_lm("long llama")
    cache = make_kv_cache(lm, 2, 800, graphs=True)
    text, more = [5, 6, 7], [8 + i % 90 for i in range(n_tokens)]
    assert prefills(cache, 0, text, lm)
    hidden_states, logits = cache.forward([Block(more)], keep_all=False)
    assert close(hidden_states[0][-1], logits[0][-1], uncached(lm, text + more))


def test_out_of_memory_in_the_probe_says_nothing_of_the_architecture() -> None:
    is_full = [True]

    def fill(hidden_states: torch.Tensor, logits: torch.Tensor) -> None:
        if is_full[0]:
            raise torch.OutOfMemoryError

    lm = Scripted(tiny_lm("llama"), fill)
    with pytest.raises(InputError, match="llama: leaves no memory on cpu for a KV cache"):
        make_kv_cache(lm, 4, 40)
    is_full[0] = False
    assert isinstance(make_kv_cache(lm, 4, 40), SlotKVCache)
