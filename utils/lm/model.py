"""One causal LM: load any from Hugging Face, run forward passes that give hidden states and logits.

The context vector of a position is what the LM head reads there: the last layer's hidden state after the final norm
(paper section 4). It is taken at the head's input, which is the right place in every architecture.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from utils.files import InputError
from utils.progress import phase


class CausalLM:
    """A causal LM in evaluation mode on its device, and what its config says."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model.eval(), name
        self.n_positions = max_positions(model.config)
        parameters = inspect.signature(model.forward).parameters
        self._slices_logits = "logits_to_keep" in parameters
        # transformers 5.24 renames the keyword, and warns about the old name.
        self._cache_keyword = "cache" if "cache" in parameters else "past_key_values"
        self._head_inputs: list[Tensor] = []
        self._is_reading = False  # the model may be used without this object, which then records nothing
        self._n_logits = 0  # of how many last positions the head computes logits; 0: of all it is given
        head = model.get_output_embeddings()
        # Not the config's: some models (OPT 350M) project down before the head.
        self.hidden_size: int = head.weight.shape[-1]
        head.register_forward_pre_hook(self._before_head)

    def _before_head(self, _: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._is_reading:
            self._head_inputs.append(inputs[0])
        if not self._n_logits or inputs[0].ndim < 3:
            return None
        return inputs[0][:, -self._n_logits :], *inputs[1:]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        all_hidden: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """One forward pass: hidden states (B, K, D) at the LM head's input and logits (B, K, V), in the model's dtype.

        input_ids (B, T) int64; cache: a KV cache to continue, None for none. K is T, or `logits_to_keep` last positions
        where that is not 0; with `all_hidden` the hidden states are those of all T positions nevertheless. Other
        keywords go to the model: attention_mask, position_ids.
        """
        if cache is not None:
            kwargs[self._cache_keyword] = cache
        if self._slices_logits:
            kwargs["logits_to_keep"] = 0 if all_hidden else logits_to_keep
        self._is_reading, self._n_logits = True, logits_to_keep if all_hidden else 0
        self._head_inputs.clear()
        try:
            logits = self.model(input_ids=input_ids, use_cache=cache is not None, **kwargs).logits
        finally:
            self._is_reading, self._n_logits = False, 0
        hidden_states = self._head_inputs.pop().view(len(input_ids), -1, self.hidden_size)
        if logits_to_keep and not all_hidden:
            hidden_states = hidden_states[:, -logits_to_keep:]
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return hidden_states, logits


def dtype_name(lm: CausalLM) -> str:
    return str(lm.dtype).removeprefix("torch.")


# ---- Tokenizer and config


def load_tokenizer(model_path: str, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises InputError where the folder or the hub has none."""
    _require_model_folder(model_path)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(model_path, cache_dir=cache_dir)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{model_path}: no tokenizer can be loaded ({_first_line(error)}); add its files") from error
    except Exception as error:
        # The Rust tokenizers raise a bare Exception for a damaged tokenizer.json.
        if type(error) is not Exception:
            raise
        raise InputError(f"{model_path}: its tokenizer is damaged ({_first_line(error)}); copy it anew") from error
    # Some kinds of tokenizer load without any files, and then have nothing but their special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{model_path}: its tokenizer has no tokens; add tokenizer.json or the vocabulary files")
    return tokenizer


def load_config(model_path: str, cache_dir: Path | None = None) -> Any:
    """The model's config, without its weights; raises InputError where there is none or it is no causal LM's."""
    _require_model_folder(model_path)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(model_path, cache_dir=cache_dir)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(f"{model_path}: no model config can be loaded ({_first_line(error)})") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise InputError(f"{model_path}: is a {config.model_type} model, not a causal LM; give a decoder-only LM")
    return config


def max_positions(config: Any) -> int | None:
    """The longest sequence that the model reads; None where positions are relative and have no bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def require_windows_fit(config: Any, model_path: str, chunk_size: int) -> None:
    """Raise InputError where the model cannot read windows of `chunk_size` tokens."""
    n_positions = max_positions(config)
    if n_positions is not None and chunk_size > n_positions:
        message = f"--chunk_size {chunk_size}: {model_path} reads {n_positions} tokens at most"
        raise InputError(f"{message}; give --chunk_size and --stride of at most that")


def require_known_ids(config: Any, model_path: str, largest_id: int) -> None:
    """Raise InputError where the tokenizer gives ids for which the model has no embedding."""
    n_ids = config.get_text_config().vocab_size
    if largest_id >= n_ids:
        message = f"{model_path}: its tokenizer gives token id {largest_id}, but its model knows only {n_ids} ids"
        raise InputError(f"{message}; put the model's own tokenizer into the folder")


def eos_token_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """The tokens that end a text: those of the generation config, else the tokenizer's."""
    found = getattr(config, "eos_token_id", None)
    if found is None and tokenizer is not None:
        found = tokenizer.eos_token_id
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)


# ---- Weights


def pick_device(name: str) -> torch.device:
    """The device that `auto` or a torch device string names; raises InputError where this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not to be had here ({reason}); use cpu or leave the flag out") from error
    return device


def load_lm(
    model_path: str,
    device: str = "auto",
    dtype: str = "auto",
    cache_dir: Path | None = None,
    device_map: str | None = None,
) -> CausalLM:
    """A causal LM ready for inference; raises InputError where weights are missing, damaged or not a causal LM's.

    dtype: auto is the checkpoint's on CUDA and float32 on CPU. device_map: auto spreads the layers over all GPUs, and
    over the machine's memory where these are too small, which needs the package accelerate; None: all on the device.
    """
    config = load_config(model_path, cache_dir)
    where = pick_device(device)
    if device_map is not None and find_spec("accelerate") is None:
        raise InputError(f"--device_map {device_map}: needs the package accelerate; pip install accelerate")
    weights_dtype = ("float32" if where.type == "cpu" else "auto") if dtype == "auto" else dtype
    try:
        with phase(f"loading {model_path} in {weights_dtype} onto {where}"), _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model_path,
                config=config,
                dtype=weights_dtype,
                cache_dir=cache_dir,
                device_map=device_map,
                output_loading_info=True,
            )
            model, report = loaded
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{model_path}: no weights can be loaded ({_first_line(error)}); copy the model anew"
        ) from error
    except UnpicklingError as error:
        raise InputError(f"{model_path}: its weights are damaged, or more than weights; copy them anew") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{model_path}: its weights are damaged ({_first_line(error)}); copy them anew") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{model_path}: {len(missing)} weights are missing, {missing[0]} the first; copy the model anew"
        )
    lm = CausalLM(model.to(where) if device_map is None else model, model_path)
    _require_causal(lm)
    return lm


@torch.inference_mode()
def _require_causal(lm: CausalLM) -> None:
    """Raise InputError where a later token changes an earlier position's logits, as in BERT."""
    pair = torch.tensor([[1, 2, 3], [1, 2, 4]], device=lm.device)
    with _quiet():  # hints that come once, with the first forward pass
        _, logits = lm.forward(pair)
    if logits.isnan().any():
        raise InputError(f"{lm.name}: gives NaN in {dtype_name(lm)}; use another --dtype")
    logits = logits.nan_to_num()  # some models give -inf to tokens that never occur
    # Only rounding may differ. In float32 even an untrained BERT, whose logits hardly vary, is further off.
    tolerance = max(1e-3, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
    if not float((logits[0, :2] - logits[1, :2]).abs().max()) <= tolerance:
        raise InputError(f"{lm.name}: its first positions read the later ones, so it is not a causal LM")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and hints off stderr: what is wrong with a model, our errors say.

    The bars of downloads are the hub library's and stay.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hook = transformers_logging.set_tqdm_hook(lambda _, args, kwargs: transformers_logging.EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(verbosity)


def _require_model_folder(model_path: str) -> None:
    path = Path(model_path)
    if path.is_file():
        raise InputError(f"{model_path}: is a file; give the folder of a model, or its hub name")
    looks_local = path.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") > 1
    # `models/foo` beside a folder `models` is a mistyped path rather than an organisation on the hub.
    looks_local |= "/" in model_path and path.parent.is_dir()
    if looks_local and not path.is_dir():
        raise InputError(f"{model_path}: does not exist; give the folder of a model, or its hub name")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ---- Copies between host and device
#
# A tensor made on a CUDA device from a list makes the host wait for all that the device still has to do, and so does
# each `.cpu()` and `.tolist()`. `upload` waits for nothing, and `to_host` brings several tensors in one copy.


def upload(numbers: Any, device: torch.device) -> Tensor:
    """A list of numbers, a numpy array or a tensor on the host as a tensor on the device."""
    host = numbers if isinstance(numbers, Tensor) else torch.as_tensor(numbers)
    if device.type != "cuda":
        return host.to(device)
    # The host goes on while a copy runs only where it is from pinned memory.
    return host.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors, all on one device, on the host, by one copy."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    return unpack_tensors(pack_tensors(*tensors).cpu(), *tensors)


def pack_tensors(*tensors: Tensor) -> Tensor:
    """The bytes of the tensors one after the other, (n,) uint8; wide numbers come first, so that all are aligned."""
    return torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in _by_width(tensors)])


def unpack_tensors(data: Tensor, *like: Tensor) -> list[Tensor]:
    """The tensors that `pack_tensors` was called with, which have the shapes and dtypes of `like`."""
    found: dict[int, Tensor] = {}
    start = 0
    for i in _by_width(like):
        n_bytes = prod(like[i].shape) * like[i].element_size()
        found[i] = data[start : start + n_bytes].view(like[i].dtype).view(like[i].shape)
        start += n_bytes
    return [found[i] for i in range(len(like))]


def _by_width(tensors: tuple[Tensor, ...]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
