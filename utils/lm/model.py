"""One causal LM: load any from Hugging Face, run forward passes that give hidden states and logits.

The context vector of a position is what the LM head reads there: the last layer's hidden state after the final norm
(paper section 4). It is taken at the head's input, which is the right place in every architecture.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from tempfile import TemporaryDirectory
from threading import get_ident
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, StrictDataclassError
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
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from utils.files import InputError
from utils.json_io import read_json
from utils.progress import phase

# Others lack what decoding needs: mps has no float64, meta computes nothing.
DEVICE_TYPES = ("cpu", "cuda")
GGUF_NEEDS = ("gguf", "accelerate")
ADAPTER_CONFIG = "adapter_config.json"


class CausalLM:
    """A causal LM on its device, and what its config says. It leaves nothing on the model between two calls."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name
        self.n_positions = max_positions(model.config)
        parameters = inspect.signature(model.forward).parameters
        self._slices_logits = "logits_to_keep" in parameters
        # transformers 5.24 renames the keyword, and warns about the old name.
        self._cache_keyword = "cache" if "cache" in parameters else "past_key_values"

    @cached_property
    def hidden_size(self) -> int:
        """D of the LM head's input. Not always the config's: some models (OPT 350M) project down before the head."""
        in_features = getattr(self.model.get_output_embeddings(), "in_features", None)
        if isinstance(in_features, int):
            return in_features
        with torch.inference_mode():
            hidden_states, _ = self.forward(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        return hidden_states.shape[-1]

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
        with _head_input(self.model, logits_to_keep if all_hidden else 0) as head_inputs:
            logits = self.model(input_ids=input_ids, use_cache=cache is not None, **kwargs).logits
        hidden_states = head_inputs[-1].view(len(input_ids), -1, head_inputs[-1].shape[-1])
        if logits_to_keep and not all_hidden:
            hidden_states = hidden_states[:, -logits_to_keep:]
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return hidden_states, logits


@contextmanager
def _head_input(model: PreTrainedModel, n_logits: int) -> Iterator[list[Tensor]]:
    """The inputs of the LM head while the block runs, in this thread alone; other threads may use the model meanwhile.

    n_logits: give the head only so many last positions to compute; 0: all.
    """
    found: list[Tensor] = []
    thread = get_ident()

    def before_head(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if get_ident() != thread:
            return None
        found.append(inputs[0])
        if not n_logits or inputs[0].ndim < 3:
            return None
        return inputs[0][:, -n_logits:], *inputs[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(before_head)
    try:
        yield found
    finally:
        hook.remove()


def dtype_name(lm: CausalLM) -> str:
    return str(lm.dtype).removeprefix("torch.")


# ---- Where a model is


@dataclass(frozen=True)
class ModelSource:
    """What `from_pretrained` is called with for the parts of a model, which are in one place but for adapters."""

    base: str  # config and weights; an adapter's are those of the model that it was trained on
    weights: str  # the adapter's where there is one, else the same
    tokenizer: str
    keywords: dict[str, str]  # gguf_file
    adapter_config: Path | None = None  # of a peft adapter

    @property
    def gguf(self) -> Path | None:
        """The GGUF file that has config, weights and tokenizer."""
        return Path(self.base, self.keywords["gguf_file"]) if self.keywords else None


def find_source(model_path: str, cache_dir: Path | None = None) -> ModelSource:
    """Where the parts of a model are: a folder, a hub name, a GGUF file, or an adapter of `peft` with or without its base.

    Raises InputError where the path is no such thing, or needs a package that is not installed.
    """
    path = Path(model_path)
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / CONFIG_NAME).exists() else []
    if path.is_file() and path.suffix == ".gguf":
        files = [path]
    if len(files) > 1:
        raise InputError(f"{model_path}: holds {len(files)} GGUF files; give one of them, such as {files[0]}")
    if files:
        _require_packages(f"{files[0]}: a GGUF file", GGUF_NEEDS)
        folder = str(files[0].parent)
        return ModelSource(folder, folder, folder, {"gguf_file": files[0].name})
    _require_model_folder(model_path)
    adapter_config = fetch_file(model_path, ADAPTER_CONFIG, cache_dir)
    if adapter_config is None:
        return ModelSource(model_path, model_path, model_path, {})
    _require_packages(f"{model_path}: an adapter", ("peft",))
    base = model_path
    if fetch_file(model_path, CONFIG_NAME, cache_dir) is None:
        settings = read_json(adapter_config)
        named = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        if not isinstance(named, str) or not named:
            raise InputError(f"{adapter_config}: names no base_model_name_or_path; add it, or merge the adapter")
        _require_model_folder(named, f"{adapter_config}: base_model_name_or_path {named}")
        base = named
    has_tokenizer = fetch_file(model_path, "tokenizer_config.json", cache_dir) is not None
    return ModelSource(base, model_path, model_path if has_tokenizer else base, {}, adapter_config)


def fetch_file(model_path: str, name: str, cache_dir: Path | None) -> Path | None:
    """A file of a model, from the hub where it is not here yet; None where the model has none of the name."""
    folder = Path(model_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    return _fetch_from_hub(model_path, name, cache_dir)


@cache  # a hub that does not answer costs many seconds each time
def _fetch_from_hub(model_path: str, name: str, cache_dir: Path | None) -> Path | None:
    try:
        return Path(hf_hub_download(model_path, name, cache_dir=cache_dir))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        # Where the repository cannot be reached at all, loading the model says so.
        return None


def _require_packages(what: str, packages: tuple[str, ...]) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise InputError(f"{what}, which needs {' and '.join(missing)}; pip install {' '.join(missing)}")


def _package_missing(model_path: str, error: ImportError) -> InputError:
    reason = _first_line(error)
    # Of this one transformers does not say what pip calls it.
    remedy = "pip install flash-attn" if "FlashAttention" in reason else "install it"
    return InputError(f"{model_path}: needs a package that is not installed ({reason}); {remedy}")


# ---- Tokenizer and config


def load_tokenizer(model_path: str, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises InputError where the folder or the hub has none."""
    _require_docstrings()
    source = find_source(model_path, cache_dir)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, cache_dir=cache_dir, **source.keywords)
    except ImportError as error:
        raise _package_missing(model_path, error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StructError) as error:
        raise InputError(f"{model_path}: no tokenizer can be loaded ({_first_line(error)}); add its files") from error
    except Exception as error:
        # The Rust tokenizers raise a bare Exception for a damaged tokenizer.json.
        if type(error) is not Exception:
            raise
        raise InputError(f"{model_path}: its tokenizer is damaged ({_first_line(error)}); copy it again") from error
    # Some kinds of tokenizer load without any files, and then have nothing but their special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{model_path}: its tokenizer has no tokens; add tokenizer.json or the vocabulary files")
    return tokenizer


def _require_docstrings() -> None:
    if sys.flags.optimize > 1:
        raise InputError("python -OO: removes the docstrings, which transformers reads; use -O, or leave it out")


def load_config(model_path: str, cache_dir: Path | None = None) -> Any:
    """The model's config, without its weights; raises InputError where there is none or it is not a causal LM's."""
    _require_docstrings()
    source = find_source(model_path, cache_dir)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source.base, cache_dir=cache_dir, **source.keywords)
    except ImportError as error:
        raise _package_missing(model_path, error) from error
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError, StructError) as error:
        raise InputError(f"{model_path}: no model config can be loaded ({_first_line(error)})") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise InputError(f"{model_path}: is a {config.model_type} model, not a causal LM; give a decoder-only LM")
    return config


def load_generation_config(model_path: str, cache_dir: Path | None = None) -> GenerationConfig:
    """What the model's `generation_config.json` says; that of its config where there is none."""
    source = find_source(model_path, cache_dir)
    try:
        with _quiet():
            return GenerationConfig.from_pretrained(source.base, cache_dir=cache_dir)
    except (OSError, ValueError, TypeError):
        return GenerationConfig.from_model_config(load_config(model_path, cache_dir))


def max_positions(config: Any) -> int | None:
    """The longest sequence that the model reads; None where positions are relative and have no bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def require_windows_fit(
    config: Any, model_path: str, n_tokens: int, n_prefix: int, flags: tuple[str, ...] = ("--chunk_size", "--stride")
) -> None:
    """Raise InputError where the model cannot read windows of `n_tokens` tokens, and `n_prefix` before them."""
    n_positions = max_positions(config)
    if n_positions is not None and n_tokens + n_prefix > n_positions:
        less = f", {n_prefix} for BOS" if n_prefix else ""
        message = f"{flags[0]} {n_tokens}: {model_path} reads {n_positions} tokens at most{less}"
        raise InputError(f"{message}; give {' and '.join(flags)} of at most {n_positions - n_prefix}")


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
        raise InputError(f"--device {name}: not available here ({reason}); use cpu or leave the flag out") from error
    if device.type not in DEVICE_TYPES:
        raise InputError(f"--device {name}: is not supported; use {' or '.join(DEVICE_TYPES)}")
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
    source = find_source(model_path, cache_dir)
    weights_dtype = ("float32" if where.type == "cpu" else "auto") if dtype == "auto" else dtype
    try:
        with phase(f"loading {model_path} in {weights_dtype} onto {where}"), _quiet():
            model, missing = _load_weights(source, config, weights_dtype, cache_dir, device_map)
    except torch.OutOfMemoryError as error:
        raise InputError(f"{model_path}: does not fit into the memory of {where}; give another --device") from error
    except ImportError as error:
        raise _package_missing(model_path, error) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{model_path}: no weights can be loaded ({_first_line(error)}); copy the model again"
        ) from error
    except UnpicklingError as error:
        raise InputError(f"{model_path}: its weights are damaged, or more than weights; copy them again") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{model_path}: its weights are damaged ({_first_line(error)}); copy them again") from error
    if missing:
        raise InputError(
            f"{model_path}: {len(missing)} weights are missing, {min(missing)} the first; copy the model again"
        )
    lm = CausalLM((model.to(where) if device_map is None else model).eval(), model_path)
    _require_causal(lm)
    return lm


def _load_weights(
    source: ModelSource, config: Any, dtype: str, cache_dir: Path | None, device_map: str | None
) -> tuple[Any, set[str]]:
    """The model, and the names of its weights that are in none of its files."""
    with _base_alone(source) as base:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            **source.keywords,
            config=config,
            dtype=dtype,
            cache_dir=cache_dir,
            device_map=device_map,
            output_loading_info=True,
        )
    model, report = loaded
    missing = set(report["missing_keys"])
    if source.adapter_config and base != source.weights:
        missing |= model.load_adapter(source.weights, adapter_kwargs={"cache_dir": cache_dir}).missing_keys
    return model, missing


@contextmanager
def _base_alone(source: ModelSource) -> Iterator[str]:
    """The model without an adapter that lies beside it, by links to its files; one on the hub is left with it.

    Transformers loads such an adapter with the model, and then does not report what the model itself lacks.
    """
    folder = Path(source.base)
    if source.adapter_config is None or not (folder / ADAPTER_CONFIG).is_file():
        yield source.base
        return
    with TemporaryDirectory() as links:
        for path in folder.iterdir():
            if path.name != ADAPTER_CONFIG:
                Path(links, path.name).symlink_to(path.absolute())
        yield links


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


def _require_model_folder(model_path: str, where: str | None = None) -> None:
    """where: what the message begins with, None: the path."""
    path, where = Path(model_path), where or model_path
    if path.is_file():
        raise InputError(f"{where}: is a file; give the folder of a model, or its hub name")
    looks_local = path.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") > 1
    # `models/foo` beside a folder `models` is a mistyped path rather than an organisation on the hub.
    looks_local |= "/" in model_path and path.parent.is_dir()
    if looks_local and not path.is_dir():
        raise InputError(f"{where}: does not exist; give the folder of a model, or its hub name")


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
