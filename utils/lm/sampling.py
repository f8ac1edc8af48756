"""Drawing the next token: greedy, or from the LM's distribution after its logits processors.

A draw is the inverse of the cumulative distribution at a uniform number that belongs to the sequence and to the place
of the token in it (`uniforms`). So the text of a seed depends neither on the batch a prompt is in nor on how many
tokens a step brings, and verified decoding draws what plain decoding would have drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from utils.lm.model import upload

# Streams of uniform numbers of one sequence.
TOKEN_STREAM, ACCEPTANCE_STREAM, CHUNK_STREAM = 0, 1, 2
# In the place of a token where the LM gives no distribution: its logits are NaN, or all of them are -inf.
NO_DISTRIBUTION = -1
# Processors that read the logits alone, so that all nodes of a draft can be processed at once.
READ_LOGITS_ALONE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# What a generation config may ask of `generate` that goes with its own steps, so that it is not done here; and the
# values under which `generate` does not do it either.
NOT_HONOURED = {"num_beams": 1, **dict.fromkeys(("guidance_scale", "watermarking_config", "stop_strings", "max_time"))}
# What a generation config says that is no matter of logits processors, or that our flags say.
NOT_OF_PROCESSORS = {
    *NOT_HONOURED,
    *("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "cache_implementation"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("num_return_sequences", "trust_remote_code", "chat_format", "assistant_early_exit"),
}

# From a request's index, the ids before the token and logits (1, V) to processed logits (1, V).
Process = Callable[[int, list[int], Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """How logits become tokens.

    warpers read nothing but the logits. process: applied before them, row by row, where processors read the text.
    """

    warpers: LogitsProcessorList
    greedy: bool
    process: Process | None = None

    @classmethod
    def from_settings(cls, temperature: float, top_k: int | None, top_p: float | None) -> "Sampler":
        """temperature >= 0, where 0 is greedy; top_k and top_p None: no cut."""
        if temperature == 0:
            return cls(LogitsProcessorList(), greedy=True)
        warpers = LogitsProcessorList()
        if temperature != 1:
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        return cls(warpers, greedy=False)

    def tokens(
        self, logits: Tensor, uniforms: Sequence[float], context: Callable[[int], tuple[int, list[int]]]
    ) -> Tensor:
        """One token (N,) int64 for each row of logits (N, V), at the uniform numbers in [0, 1), on the logits' device.

        context(i): the request's index of row i and the ids before its token. NO_DISTRIBUTION where there is none.
        """
        if self.process is not None:
            rows = [self.process(*context(i), row[None].float()) for i, row in enumerate(logits)]
            logits = torch.cat(rows)
        if self.warpers:
            logits = run_processors(self.warpers, logits.new_zeros(len(logits), 1, dtype=torch.long), logits.float())
        if self.greedy:
            return logits.argmax(dim=-1).masked_fill_(_lacks_distribution(logits.amax(dim=-1)), NO_DISTRIBUTION)
        cumulative = logits.float().softmax(dim=-1).double().cumsum(dim=-1)
        points = upload(np.array(uniforms)[:, None], logits.device) * cumulative[:, -1:]
        # Right of equal values: a token of probability 0 adds nothing to the sum and is never the one.
        drawn = torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)[:, 0]
        return drawn.masked_fill_(cumulative[:, -1].isnan(), NO_DISTRIBUTION)


def _lacks_distribution(largest: Tensor) -> Tensor:
    return largest.isnan() | largest.isneginf()


def run_processors(processors: LogitsProcessorList, input_ids: Any, logits: Any) -> Tensor:
    """logits (N, V) after the processors. The library's annotations name tensor classes that no tensor is of."""
    return processors(input_ids, logits)


def uniforms(seed: int, sequence: int, stream: int, n: int) -> np.ndarray:
    """(n,) float64 in [0, 1): the first n numbers of a sequence's stream, whatever n is."""
    return np.random.default_rng([seed, sequence, stream]).random(n)


# ---- The model's generation config


def config_of_processors(config: GenerationConfig) -> dict[str, Any]:
    """What a generation config asks of logits processors beyond temperature, top-k and top-p."""
    said = config.to_diff_dict()
    return {name: value for name, value in said.items() if name not in NOT_OF_PROCESSORS and value is not None}


def not_honoured(config: GenerationConfig) -> list[str]:
    """The names of what a generation config asks for that is not done here."""
    said = config.to_diff_dict()
    return [name for name in NOT_HONOURED if said.get(name) not in (None, 1)]


def processors_of(
    model: PreTrainedModel, prompt_ids: list[int], max_new_tokens: int, greedy: bool
) -> LogitsProcessorList:
    """The processors that `generate` would use for a prompt, but for those of temperature, top-k and top-p.

    Raises ValueError or TypeError where the generation config is not one that `generate` takes.
    """
    found: list[LogitsProcessorList] = []

    def record(model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **_: Any) -> Tensor:
        found.append(logits_processor)
        return input_ids

    input_ids = upload([prompt_ids], model.device)
    drawing = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    generate: Any = model.generate
    generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        custom_generate=record,
        max_new_tokens=max_new_tokens,
        max_length=None,
        num_return_sequences=1,
        cache_implementation=None,  # none is needed
        **drawing,
        **NOT_HONOURED,
    )
    return found[0]
