"""`model.generate(custom_generate=chunk_generate)` keeps what `generate` promises."""

import gc
import weakref

import pytest
import torch
from architectures import tiny_lm
from decoding_cases import PROMPTS, datastore_near_text
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from utils.datastore.store import Datastore
from utils.decoding import hf
from utils.decoding.draft import DraftSettings
from utils.decoding.hf import chunk_generate
from utils.lm.model import CausalLM

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
    for row, prompt in zip(got, PROMPTS, strict=True):
        alone = LM.model.generate(torch.tensor([prompt]), **{key: how[key] for key in how if key != "attention_mask"})
        assert row[longest:].tolist() == alone[0][len(prompt) :].tolist()


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


def test_beams_and_scores_are_refused():
    with pytest.raises(ValueError, match="num_beams is 2"):
        LM.model.generate(PROMPT, custom_generate=chunk_generate, num_beams=2, max_new_tokens=4)
    how = {"return_dict_in_generate": True, "output_scores": True}
    with pytest.raises(ValueError, match="sequences alone"):
        LM.model.generate(PROMPT, custom_generate=chunk_generate, max_new_tokens=4, **how)


def test_a_dict_is_returned_on_request():
    how = {"do_sample": False, "max_new_tokens": 5}
    got = LM.model.generate(PROMPT, custom_generate=chunk_generate, return_dict_in_generate=True, **how)
    assert torch.equal(got.sequences, LM.model.generate(PROMPT, **how))


def test_a_datastore_of_another_hidden_size_is_refused(store):
    other = tiny_lm("llama of another size")
    with pytest.raises(ValueError, match="size 32"):
        other.model.generate(PROMPT, custom_generate=chunk_generate, datastore=store, max_new_tokens=3)


def test_a_model_is_wrapped_once_and_freed_with_its_last_reference(monkeypatch):
    wrapped: list[str] = []

    def wrap(model: PreTrainedModel, name: str) -> CausalLM:
        wrapped.append(name)
        return CausalLM(model, name)

    monkeypatch.setattr(hf, "CausalLM", wrap)
    model = tiny_lm("llama").model
    for _ in range(3):
        model.generate(PROMPT, custom_generate=chunk_generate, do_sample=False, max_new_tokens=2)
    assert len(wrapped) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
