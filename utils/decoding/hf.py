"""The decode loop inside `generate` of transformers: `model.generate(…, custom_generate=chunk_generate, datastore=…)`.

It honours what `generate` prepares: logits processors (for every token drawn from the LM), stopping criteria, lengths
and padding. A processor is called for one sequence at a time, with what `generate` would call it with: the ids of all
rows with the padding on the left, of which the row in question is right, and its result is taken from that row. Random
numbers follow `torch.manual_seed`. The model stays as it was, also where it is in training mode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance, NeighborMixture, Policy
from utils.decoding.draft import DraftSettings, RetrievalDrafter
from utils.decoding.draft_policy import DraftPolicy
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Proposal, Retriever
from utils.decoding.types import Request
from utils.lm.model import CausalLM, eos_token_ids
from utils.lm.sampling import READ_LOGITS_ALONE, Process, Sampler, run_processors

DecodingMode = Literal["chunk", "verify"]
# They keep a state that goes with `generate`'s own steps.
STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
NOT_RETURNED = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


def chunk_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    datastore: Datastore | None = None,
    decoding: DecodingMode = "chunk",
    similarity_threshold: float = 0.5,
    acceptance: Policy = "threshold",
    min_first_token_prob: float = 0.0,
    reject_repeats: bool = False,
    neighbors: NeighborMixture | None = None,
    draft_settings: DraftSettings | None = None,
    text_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Token ids (B, longest), the prompts' first, padded on the right; give it to `generate` as `custom_generate`.

    input_ids (B, T) int64, padded on the left where the attention mask is 0. datastore: as `open_datastore` returns it;
    None generates plain text. `chunk` emits what is retrieved from similarity_threshold θ on, and where the LM gives its
    first token min_first_token_prob δ of what it gives its likeliest, with reject_repeats but for chunks that would make
    the text repeat itself; neighbors: how several rows propose, None for the most similar one. `verify` lets the LM
    confirm drafts, so that the text is the LM's own. text_streamer: a streamer of transformers, for one prompt; `generate`
    itself passes none on under the name `streamer`. Raises ValueError for what cannot be honoured: beams, scores and the
    like to return, `inputs_embeds`, processors with a state of their own; and for a prompt that with its new tokens does
    not fit the model's positions.
    """
    config = generation_config or model.generation_config
    processors = logits_processor or LogitsProcessorList()
    _require_supported(config, processors, model_kwargs, decoding, acceptance)
    _require_in_range(similarity_threshold, min_first_token_prob)
    if text_streamer is not None and len(input_ids) > 1:
        raise ValueError(f"text_streamer prints one text, not {len(input_ids)}; give one prompt at a time")
    lm = CausalLM(model, model.name_or_path or type(model).__name__)
    if datastore is not None and datastore.n_rows and datastore.hidden_size != lm.hidden_size:
        raise ValueError(f"the datastore's vectors have size {datastore.hidden_size}, the model's {lm.hidden_size}")
    # Were it a parameter, `generate` would pass it twice.
    prompts = _without_padding(input_ids, model_kwargs.get("attention_mask"))
    # `generate` has made the number of new tokens into a length, padding counted.
    n_new = int(config.max_length) - input_ids.shape[1]
    seed = int(torch.randint(2**62, ()))
    requests = [Request(index, prompt, n_new, seed) for index, prompt in enumerate(prompts)]
    retriever = drafter = None
    if decoding == "verify":
        drafter = RetrievalDrafter(datastore, draft_settings or DraftSettings())
    elif datastore is not None:
        rule = Acceptance(
            similarity_threshold,
            acceptance,
            min_first_token_prob=min_first_token_prob,
            reject_repeats=reject_repeats,
            neighbors=neighbors,
        )
        retriever = Retriever(datastore, rule)
    padded = _Padded(input_ids, prompts)
    loop = Decoding(
        sampler=_sampler(processors, config, padded),
        eos_token_ids=eos_token_ids(config),
        retriever=retriever,
        drafter=drafter,
        draft_policy=DraftPolicy() if drafter is not None else None,
        batch_size=len(requests),
        stops=_stops(stopping_criteria, padded),
        on_tokens=_streaming(text_streamer, input_ids),
    )
    with _in_evaluation_mode(model):
        new = {generation.index: generation.new_token_ids for generation in decode(lm, requests, loop)}
    if text_streamer is not None:
        text_streamer.end()
    sequences: Any = _padded_on_the_right(input_ids, [new[index] for index in range(len(prompts))], config)
    return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences


def _require_supported(
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
    decoding: str,
    acceptance: str,
) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams is {config.num_beams}; chunks and drafts are decoded without beams, so leave it at 1"
        )
    for name in NOT_RETURNED:
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"{name} is set, but only the sequences are returned; leave it out")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds has no token ids to look chunks up with; give input_ids")
    for processor in processors:
        if isinstance(processor, STATEFUL):
            raise ValueError(f"{type(processor).__name__} keeps a state that goes with one token a step; leave it out")
    for name, value, expected in (
        ("decoding", decoding, get_args(DecodingMode)),
        ("acceptance", acceptance, get_args(Policy)),
    ):
        if value not in expected:
            raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, expected))}")


def _require_in_range(similarity_threshold: float, min_first_token_prob: float) -> None:
    if not -1 <= similarity_threshold <= 1:
        raise ValueError(f"similarity_threshold is {similarity_threshold}; expected a cosine similarity in [-1, 1]")
    if not 0 <= min_first_token_prob <= 1:
        raise ValueError(f"min_first_token_prob is {min_first_token_prob}; expected a share in [0, 1]")


@contextmanager
def _in_evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout while the block runs; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


class _Padded:
    """The texts as `generate` has them: (B, T + new tokens) ids with the prompts' padding on the left."""

    def __init__(self, input_ids: Tensor, prompts: list[list[int]]) -> None:
        self._input_ids, self._n_prompt = input_ids, [len(prompt) for prompt in prompts]

    def rows(self, row: int, token_ids: list[int]) -> Tensor:
        """All rows, each with the text of one of them, whose ids without padding these are."""
        new = self._input_ids.new_tensor([token_ids[self._n_prompt[row] :]])
        return torch.cat([self._input_ids[row : row + 1], new], dim=1).expand(len(self._input_ids), -1)


def _sampler(processors: LogitsProcessorList, config: GenerationConfig, padded: _Padded) -> Sampler:
    if all(isinstance(processor, READ_LOGITS_ALONE) for processor in processors):
        return Sampler(processors, greedy=not config.do_sample)

    def process(row: int, token_ids: list[int], logits: Tensor) -> Tensor:
        input_ids = padded.rows(row, token_ids)
        # A copy: processors may write into what they are given.
        return run_processors(processors, input_ids, logits.repeat(len(input_ids), 1))[row : row + 1]

    found: Process = process
    return Sampler(LogitsProcessorList(), greedy=not config.do_sample, process=found)


def _stops(criteria: StoppingCriteriaList | None, padded: _Padded) -> Callable[[int, list[int]], bool] | None:
    """A function that tells whether a text ends, by the criteria that the loop does not check itself; None: there are
    none."""
    others = StoppingCriteriaList(
        each for each in criteria or () if not isinstance(each, MaxLengthCriteria | EosTokenCriteria)
    )
    if not others:
        return None
    no_scores: Any = None
    return lambda row, token_ids: bool(others(padded.rows(row, token_ids), no_scores)[row])


def _streaming(
    streamer: BaseStreamer | None, input_ids: Tensor
) -> Callable[[int, list[int], Proposal | None], None] | None:
    if streamer is None:
        return None
    streamer.put(input_ids.cpu())
    return lambda _, token_ids, __: streamer.put(torch.tensor(token_ids))


def _padded_on_the_right(input_ids: Tensor, new: list[list[int]], config: GenerationConfig) -> Tensor:
    pad = config.pad_token_id
    if pad is None:
        pad = min(eos_token_ids(config), default=0)
    longest = max(map(len, new))
    rows = [tokens + [pad] * (longest - len(tokens)) for tokens in new]
    return torch.cat([input_ids, input_ids.new_tensor(rows)], dim=1)
