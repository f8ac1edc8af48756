"""The decode loop inside `generate` of transformers: `model.generate(…, custom_generate=chunk_generate, datastore=…)`.

It honours what `generate` prepares: logits processors (for every token drawn from the LM), stopping criteria, lengths
and padding. Random numbers follow `torch.manual_seed`.
"""

from copy import copy
from typing import Any, Literal
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance, Policy
from utils.decoding.draft import DraftSettings, RetrievalDrafter
from utils.decoding.draft_policy import DraftPolicy
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Retriever
from utils.decoding.types import Request
from utils.lm.model import CausalLM, eos_token_ids
from utils.lm.sampling import Sampler

# Processors that read nothing but the logits, so that all nodes of a draft can be processed at once.
BLIND_TO_TEXT = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# The model's hook holds the CausalLM, which holds the model; a reference from here would keep both for good.
_WRAPPED: WeakKeyDictionary[PreTrainedModel, ReferenceType[CausalLM]] = WeakKeyDictionary()


def chunk_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    datastore: Datastore | None = None,
    decoding: Literal["chunk", "verify"] = "chunk",
    similarity_threshold: float = 0.5,
    acceptance: Policy = "threshold",
    draft_settings: DraftSettings | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Token ids (B, longest), the prompts' first, padded on the right; give it to `generate` as `custom_generate`.

    input_ids (B, T) int64, padded on the left where the attention mask is 0. datastore: as `open_datastore` returns it;
    None generates plain text. `chunk` emits what is retrieved from similarity_threshold θ on; `verify` lets the LM
    confirm drafts, so that the text is the LM's own. Raises ValueError for beam search and for a prompt that with its
    new tokens does not fit the model's positions.
    """
    config = generation_config or model.generation_config
    _require_supported(config)
    lm = _wrapped(model)
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
        retriever = Retriever(datastore, Acceptance(similarity_threshold, acceptance))
    loop = Decoding(
        sampler=_sampler(logits_processor or LogitsProcessorList(), config),
        eos_token_ids=eos_token_ids(config),
        retriever=retriever,
        drafter=drafter,
        draft_policy=DraftPolicy() if drafter is not None else None,
        batch_size=len(requests),
        stops=_stops(stopping_criteria, input_ids),
    )
    new = {generation.index: generation.new_token_ids for generation in decode(lm, requests, loop)}
    sequences: Any = _padded(input_ids, [new[index] for index in range(len(prompts))], config)
    return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences


def _require_supported(config: GenerationConfig) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams is {config.num_beams}; chunks and drafts are decoded without beams, so leave it at 1"
        )
    if config.return_dict_in_generate and (config.output_scores or config.output_logits or config.output_hidden_states):
        raise ValueError("scores, logits and hidden states are not returned; ask for the sequences alone")


def _wrapped(model: PreTrainedModel) -> CausalLM:
    found = _WRAPPED.get(model)
    lm = None if found is None else found()
    if lm is None:
        lm = CausalLM(model, model.name_or_path or type(model).__name__)
        _WRAPPED[model] = ref(lm)
    return lm


def _without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def _sampler(processors: LogitsProcessorList, config: GenerationConfig) -> Sampler:
    reads_text = not all(isinstance(processor, BLIND_TO_TEXT) for processor in processors)
    processors = LogitsProcessorList(_without_padding_lengths(processor) for processor in processors)
    return Sampler(processors, greedy=not config.do_sample, reads_text=reads_text)


def _without_padding_lengths(processor: Any) -> Any:
    """The repetition penalty knows each row's padding from `generate`; the texts here have none."""
    if not isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
        return processor
    processor = copy(processor)
    processor.prompt_ignore_length = None
    return processor


def _stops(criteria: StoppingCriteriaList | None, input_ids: Tensor) -> Any:
    """A function that tells whether a text ends, by the criteria that the loop does not check itself; None: there are none."""
    others = StoppingCriteriaList(
        each for each in criteria or () if not isinstance(each, MaxLengthCriteria | EosTokenCriteria)
    )
    if not others:
        return None
    no_scores: Any = None
    return lambda token_ids: bool(others(input_ids.new_tensor([token_ids]), no_scores).all())


def _padded(input_ids: Tensor, new: list[list[int]], config: GenerationConfig) -> Tensor:
    pad = config.pad_token_id
    if pad is None:
        pad = min(eos_token_ids(config), default=0)
    longest = max(map(len, new))
    rows = [tokens + [pad] * (longest - len(tokens)) for tokens in new]
    return torch.cat([input_ids, input_ids.new_tensor(rows)], dim=1)
