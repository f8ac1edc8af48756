"""Tiny random models of many architectures, made in memory, for what must hold for any causal LM."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from utils.lm.model import CausalLM

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "sliding_window": 4}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (
        hf.GPT2Config,
        {"vocab_size": 100, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
    ),
    "five tokens": (hf.LlamaConfig, {**GROUPED, "vocab_size": 5, "initializer_range": 0.5}),
    "llama": (hf.LlamaConfig, GROUPED),
    "llama of another size": (hf.LlamaConfig, {**GROUPED, "hidden_size": 48}),
    "long llama": (hf.LlamaConfig, {**GROUPED, "max_position_embeddings": 1024}),
    "mistral": (hf.MistralConfig, WINDOWED),
    "qwen2": (hf.Qwen2Config, {**WINDOWED, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma2": (hf.Gemma2Config, {**WINDOWED, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3": (
        hf.Gemma3TextConfig,
        {**WINDOWED, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "opt": (
        hf.OPTConfig,
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "init_std": 0.2,
        },
    ),
    "cohere": (hf.CohereConfig, GROUPED),
    "granite": (hf.GraniteConfig, GROUPED),
    "neox": (hf.GPTNeoXConfig, SIZES),
    "bloom": (
        hf.BloomConfig,
        {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    ),
    "mamba": (hf.MambaConfig, {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}


def tiny_lm(name: str) -> CausalLM:
    """A model of the architecture with seeded random weights; no end-of-text token."""
    kind, sizes = CONFIGS[name]
    config = kind(**sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return CausalLM(model.eval(), name)


class Scripted(CausalLM):
    """A model whose hidden states and logits the test changes."""

    def __init__(self, lm: CausalLM, change: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__(lm.model, lm.name)
        self.change = change

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, logits = super().forward(*args, **kwargs)
        self.change(hidden_states, logits)
        return hidden_states, logits
