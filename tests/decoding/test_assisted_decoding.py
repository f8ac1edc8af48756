"""An independent lossless implementation agrees: transformers' assisted decoding over the same drafts."""

import inspect

import pytest
import torch
from architectures import tiny_lm
from decoding_cases import PROMPTS, datastore_near_text, generate
from transformers import GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator

from utils.decoding.draft import DraftSettings, RetrievalDrafter

LOOP = inspect.getsource(GenerationMixin._assisted_decoding) if hasattr(GenerationMixin, "_assisted_decoding") else ""
NEEDED = ("_get_candidate_generator(", "requires_model_outputs", "model_kwargs_overrides", "n_last_matches=")
pytestmark = pytest.mark.skipif(
    not all(part in LOOP for part in NEEDED), reason="this transformers drives candidate generators another way"
)


class DatastoreCandidates(CandidateGenerator):
    """The drafter's line for the token that the model has just drawn."""

    requires_model_outputs = True

    def __init__(self, drafter: RetrievalDrafter, max_length: int) -> None:
        self.model_kwargs_overrides = {"output_hidden_states": -1}
        self.drafter, self.max_length = drafter, max_length
        self.n_drafted, self.n_passes = 0, 0

    def get_candidates(self, input_ids, model_outputs=None, n_last_matches=0, **kwargs):
        self.n_passes += 1
        if model_outputs is None:
            return input_ids, None
        # The last pass read the drafts after the last certain token; the entry token is the last that was accepted.
        at = int(n_last_matches) - self.n_drafted - 1
        hidden_state = model_outputs.hidden_states[-1][0, at]
        text = input_ids[0].tolist()
        tree = self.drafter.draft(0, text, hidden_state, self.max_length - len(text))
        self.n_drafted = len(tree.token_ids)
        return torch.cat([input_ids, input_ids.new_tensor([tree.token_ids]).long()], dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        """Drafts are as long as their settings say."""


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_assisted_decoding_gives_the_same_text_in_as_many_passes(name, monkeypatch):
    lm = tiny_lm(name)
    settings = DraftSettings(shape="line", live="off", max_tokens=6)
    for wrong in (False, True):
        store = datastore_near_text(lm, PROMPTS, 24, wrong)
        ours = generate(lm, PROMPTS, 24, drafter=RetrievalDrafter(store, settings))
        for prompt, generation in zip(PROMPTS, ours, strict=True):
            theirs = DatastoreCandidates(RetrievalDrafter(store, settings), len(prompt) + 24)
            monkeypatch.setattr(lm.model, "_get_candidate_generator", lambda *_, found=theirs, **__: found)
            how = {"do_sample": False, "max_new_tokens": 24, "prompt_lookup_num_tokens": 1}
            text = lm.model.generate(torch.tensor([prompt]), **how)[0].tolist()
            assert text == prompt + generation.new_token_ids
            # Theirs reads the prompt alone, then as ours does.
            assert theirs.n_passes == generation.stats.forward_passes
        assert wrong or sum(generation.stats.forward_passes for generation in ours) < 5 * 24
