"""How likely the LM finds a text."""

import torch

from utils.models import CausalLM

# Positions whose logits are turned into float32 probabilities at a time.
SLICE_POSITIONS = 256


@torch.inference_mode()
def negative_log_likelihood(lm: CausalLM, prompt_ids: list[int], new_token_ids: list[int]) -> float:
    """-log p(new tokens | prompt) in nats, from one pass over the whole text; the prompt must hold a token."""
    token_ids = torch.tensor([prompt_ids + new_token_ids], device=lm.device)
    _, logits = lm.forward(token_ids[:, :-1], logits_to_keep=len(new_token_ids), use_cache=False)
    targets = token_ids[0, -len(new_token_ids) :]
    total = 0.0
    for start in range(0, len(targets), SLICE_POSITIONS):
        part = slice(start, start + SLICE_POSITIONS)
        losses = torch.nn.functional.cross_entropy(logits[0, part].float(), targets[part], reduction="none")
        total += float(losses.double().sum())
    return total
