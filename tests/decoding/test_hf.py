"""`model.generate(custom_generate=chunk_generate)` keeps what `generate` promises."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import tiny_lm
from decoding_cases import PROMPTS, datastore_near_text
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from utils.datastore.store import Datastore
from utils.decoding.draft import DraftSettings
from utils.decoding.hf import chunk_generate

LM = tiny_lm("llama")
PROMPT = torch.tensor([PROMPTS[0]])


@pytest.fixture(scope="module")
def store() -> Datastore:
    return datastore_near_text(LM, PROMPTS, 20)


def test_without_a_datastore_it_equals_plain_generation():
    got = LM.model.generate(PROMPT, custom_generate=chunk_generate, do_sample=False, max_new_tokens=20)
    assert torch.equal(got, LM.model.generate(PROMPT, do_sample=False, max_new_tokens=20))


def test_verified_text_equals_generate_for_padding_and_processors(store):
    longest = max(map(len, PROMPTS))
    batch = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    how = {
        "do_sample": False,
        "max_new_tokens": 20,
        "attention_mask": mask,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "pad_token_id": 0,
    }
    drafts = {
        "custom_generate": chunk_generate,
        "datastore": store,
        "decoding": "verify",
        "draft_settings": DraftSettings(max_tokens=6),
    }
    got = LM.model.generate(batch, **how, **drafts)
    # Not with each prompt alone: in some versions processors see the padding.
    assert torch.equal(got, LM.model.generate(batch, **how))


def test_chunks_at_or_above_the_threshold_are_emitted(store):
    n_read: list[int] = []
    handle = LM.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: n_read.append(inputs[0].numel())
    )
    how = {"custom_generate": chunk_generate, "datastore": store, "do_sample": False, "max_new_tokens": 16}
    LM.model.generate(PROMPT, similarity_threshold=0.9, **how)
    n_read.clear()
    LM.model.generate(PROMPT, similarity_threshold=0.9, **how)
    handle.remove()
    assert len(n_read) < 16
    got = LM.model.generate(PROMPT, similarity_threshold=1.0, **how)
    assert torch.equal(got, LM.model.generate(PROMPT, do_sample=False, max_new_tokens=16))


def test_the_gate_lets_no_chunk_in_that_the_lm_would_not_begin():
    wrong = datastore_near_text(LM, PROMPTS, 20, wrong=True)
    how = {"custom_generate": chunk_generate, "datastore": wrong, "do_sample": False, "max_new_tokens": 16}
    got = LM.model.generate(PROMPT, similarity_threshold=-1.0, min_first_token_prob=1.0, **how)
    without = LM.model.generate(PROMPT, similarity_threshold=-1.0, **how)
    assert not torch.equal(got, without)
    first = PROMPT.shape[1]
    # Greedy, and every chunk begins with the likeliest token: the first new token is the plain one.
    assert got[0, first] == LM.model.generate(PROMPT, do_sample=False, max_new_tokens=1)[0, first]


class AfterToken(StoppingCriteria):
    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token_id


@pytest.mark.parametrize("decoding", ["chunk", "verify"])
def test_stopping_criteria_and_eos_cut_inside_chunks_and_drafts(store, decoding):
    plain = LM.model.generate(PROMPT, do_sample=False, max_new_tokens=20)[0].tolist()
    how = {"custom_generate": chunk_generate, "datastore": store, "decoding": decoding, "similarity_threshold": 0.97}
    whole = LM.model.generate(PROMPT, do_sample=False, max_new_tokens=20, **how)[0].tolist()
    last = whole[9]
    cut = whole[: whole.index(last, len(PROMPTS[0])) + 1]
    criteria = StoppingCriteriaList([AfterToken(last)])
    got = LM.model.generate(PROMPT, do_sample=False, max_new_tokens=20, stopping_criteria=criteria, **how)
    assert got[0].tolist() == cut
    got = LM.model.generate(PROMPT, do_sample=False, max_new_tokens=20, eos_token_id=last, **how)
    assert got[0].tolist() == cut
    if decoding == "verify":
        assert whole == plain


def test_the_callers_logits_processors_are_applied():
    forbid = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(5.0)])
    how = {"do_sample": False, "max_new_tokens": 15, "logits_processor": forbid}
    got = LM.model.generate(PROMPT, custom_generate=chunk_generate, **how)
    assert torch.equal(got, LM.model.generate(PROMPT, **how))


def test_the_torch_seed_decides_samples_and_return_sequences_differ():
    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        how = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3}
        return LM.model.generate(PROMPT, custom_generate=chunk_generate, **how)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert len({tuple(row) for row in sample(1).tolist()}) == 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 2}, "num_beams is 2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is set, but only the sequences"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is set"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds has no token ids"),
        ({"decoding": "verfy"}, "decoding is 'verfy'; expected 'chunk' or 'verify'"),
        ({"acceptance": "always"}, "acceptance is 'always'; expected 'threshold' or 'bernoulli'"),
        ({"similarity_threshold": 1.5}, "similarity_threshold is 1.5; expected a cosine similarity"),
        ({"similarity_threshold": float("nan")}, "similarity_threshold is nan"),
        ({"min_first_token_prob": -0.1}, "min_first_token_prob is -0.1; expected a share"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor keeps a state"),
    ],
)
def test_what_cannot_be_honoured_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LM.model.generate(PROMPT, custom_generate=chunk_generate, max_new_tokens=4, **how)


def test_a_dict_is_returned_on_request():
    how = {"do_sample": False, "max_new_tokens": 5}
    got = LM.model.generate(PROMPT, custom_generate=chunk_generate, return_dict_in_generate=True, **how)
    assert torch.equal(got.sequences, LM.model.generate(PROMPT, **how))


def test_a_datastore_of_another_hidden_size_is_refused(store):
    other = tiny_lm("llama of another size")
    with pytest.raises(ValueError, match="size 32"):
        other.model.generate(PROMPT, custom_generate=chunk_generate, datastore=store, max_new_tokens=3)


# ---- The model that is lent


def new_model() -> PreTrainedModel:
    return tiny_lm("llama").model


def greedy(model: PreTrainedModel, **how: Any) -> torch.Tensor:
    return model.generate(PROMPT, do_sample=False, max_new_tokens=12, **how)


def test_each_module_stays_in_the_mode_that_it_was_in() -> None:
    model = new_model()
    expected = greedy(model)
    model.config.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(greedy(model, custom_generate=chunk_generate), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="meta"):
        model.generate(PROMPT.to("meta"), custom_generate=chunk_generate, max_new_tokens=3)
    assert [module.training for module in model.modules()] == modes


def test_a_model_is_freed_with_its_last_reference() -> None:
    model = new_model()
    for _ in range(3):
        greedy(model, custom_generate=chunk_generate)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_head_may_be_replaced_between_two_calls() -> None:
    model = new_model()
    before = greedy(model, custom_generate=chunk_generate)
    torch.manual_seed(3)
    model.lm_head = torch.nn.Linear(32, 100, bias=False)
    after = greedy(model, custom_generate=chunk_generate)
    assert torch.equal(after, greedy(model))
    assert not torch.equal(after, before)


class Int8Head(torch.nn.Module):
    """A head whose weights are no parameters, as those of dynamically quantised layers."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = head.weight.detach().abs().max() / 127
        self.levels = (head.weight.detach() / self.scale).round().to(torch.int8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ (self.levels.float() * self.scale).T


def test_a_quantised_head_decodes(store: Datastore) -> None:
    model = new_model()
    model.lm_head = Int8Head(model.lm_head)
    assert torch.equal(greedy(model, custom_generate=chunk_generate), greedy(model))
    how = {"datastore": store, "decoding": "verify"}
    assert torch.equal(greedy(model, custom_generate=chunk_generate, **how), greedy(model))


def test_threads_may_share_a_model(store: Datastore) -> None:
    model, how = new_model(), {"datastore": store, "custom_generate": chunk_generate, "decoding": "verify"}
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS] * 6
    expected = [model.generate(prompt, do_sample=False, max_new_tokens=12).tolist() for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda prompt: model.generate(prompt, do_sample=False, max_new_tokens=12, **how), prompts)
    assert [each.tolist() for each in found] == expected


# ---- Batches, padded on the left


LONGEST = max(map(len, PROMPTS))
BATCH = torch.tensor([[0] * (LONGEST - len(prompt)) + prompt for prompt in PROMPTS])
MASK = torch.tensor([[0] * (LONGEST - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])


class OneBanEachRow(LogitsProcessor):
    """Bans other tokens in each row, and more of them the longer the text is."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row in range(len(input_ids)):
            scores[row, row :: max(2, 40 - input_ids.shape[1])] = -torch.inf
        return scores


class RowEnds(StoppingCriteria):
    """Row r ends r tokens after the others could."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= LONGEST + 4 + row for row in range(len(input_ids))])


@pytest.mark.parametrize(
    "how",
    [
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(row, 100, 2 + len(ids) % 3))},
        {"min_new_tokens": 9, "eos_token_id": list(range(0, 100, 3))},
        {"min_length": LONGEST + 7, "eos_token_id": list(range(0, 100, 3))},
        {"forced_eos_token_id": 7, "eos_token_id": 7},
        {"begin_suppress_tokens": list(range(0, 100, 2))},
        {"exponential_decay_length_penalty": (3, 1.7), "eos_token_id": 11},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"logits_processor": LogitsProcessorList([OneBanEachRow()])},
        {"stopping_criteria": StoppingCriteriaList([RowEnds()]), "eos_token_id": 99},
    ],
    ids=lambda how: next(iter(how)),
)
@pytest.mark.parametrize("decoding", ["plain", "verify"])
def test_processors_and_criteria_see_each_row_as_generate_shows_it(
    how: dict[str, Any], decoding: str, store: Datastore
) -> None:
    shared = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    ours = {"datastore": store, "decoding": "verify"} if decoding == "verify" else {}
    got = LM.model.generate(BATCH, custom_generate=chunk_generate, **shared, **how, **ours)
    expected = LM.model.generate(BATCH, **shared, **how)
    assert not torch.equal(expected, LM.model.generate(BATCH, **shared))  # it does something
    assert got.tolist() == expected.tolist()


def test_a_text_streamer_gets_the_prompt_and_the_text() -> None:
    class Pieces(BaseStreamer):
        def __init__(self) -> None:
            self.token_ids: list[int] = []
            self.is_ended = False

        def put(self, value: torch.Tensor) -> None:
            self.token_ids += value.flatten().tolist()

        def end(self) -> None:
            self.is_ended = True

    streamer = Pieces()
    expected = greedy(LM.model, custom_generate=chunk_generate, text_streamer=streamer)
    assert streamer.token_ids == expected[0].tolist()
    assert streamer.is_ended
    with pytest.raises(ValueError, match="text_streamer prints one text, not 3"):
        LM.model.generate(BATCH[:3], custom_generate=chunk_generate, text_streamer=streamer, max_new_tokens=3)
