"""Language models: load any Hugging Face causal LM, run one forward pass that gives hidden states and logits, tell
models and tokenizers apart.

The context vector of a position is what the LM head reads there: the last layer's hidden state after the final norm
(paper section 4). It is taken at the head's input, which is the right place in every architecture.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from utils.files import InputError, file_fingerprint, n_cores, read_json
from utils.progress import phase

# What a config says beside what the forward pass computes: where it is from, what text ends with, how texts are drawn.
NOT_OF_THE_FORWARD_PASS = {
    *("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "task_specific_params", "id2label", "label2id"),
}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# The hub's cache names a large file's blob by the SHA-256 of its content.
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
# Text on which two tokenizers that are not the same give other ids: spaces, digits, scripts, bytes, control characters.
PROBE_TEXT = "The  Zürich 12345-token\n\n\tprobe: naïve don't 東京 🙂\u200d x=1;\r\n\x00 ǅ %%"


class CausalLM:
    """A causal LM in evaluation mode on its device, and what its config says."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model.eval(), name
        self.n_positions = max_positions(model.config)
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._head_inputs: list[Tensor] = []
        self._is_reading = False  # the model may be used without this object, which then has nothing to keep
        self._n_logits = 0  # of how many last positions the head is asked for logits; 0: of all it is given
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
        self, input_ids: Tensor, *, logits_to_keep: int = 0, all_hidden: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """One forward pass: hidden states (B, K, D) at the LM head's input and logits (B, K, V), in the model's dtype.

        input_ids (B, T) int64. K = T, or the last `logits_to_keep` positions where it is not 0; with `all_hidden` the
        hidden states are those of all T all the same. Further keywords go to the model: past_key_values,
        attention_mask, position_ids, use_cache.
        """
        if self._slices_logits:
            kwargs["logits_to_keep"] = 0 if all_hidden else logits_to_keep
        self._is_reading, self._n_logits = True, logits_to_keep if all_hidden else 0
        self._head_inputs.clear()
        try:
            logits = self.model(input_ids=input_ids, **kwargs).logits
        finally:
            self._is_reading, self._n_logits = False, 0
        hidden_states = self._head_inputs.pop().view(len(input_ids), -1, self.hidden_size)
        if logits_to_keep and not all_hidden:
            hidden_states = hidden_states[:, -logits_to_keep:]
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return hidden_states, logits


def pick_device(name: str) -> torch.device:
    """The device that `auto` or a torch device string names; raises InputError where this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not to be had here ({reason}); use cpu or leave the flag out") from error
    return device


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
    # Where there are no files some kinds of tokenizer come with their special tokens alone.
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
    if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
        raise InputError(f"{model_path}: is a {config.model_type} model, not a causal LM; give a decoder-only LM")
    return config


def max_positions(config: Any) -> int | None:
    """The longest sequence that the model reads; None: no bound, positions are relative."""
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


def load_lm(
    model_path: str,
    device: str = "auto",
    dtype: str = "auto",
    cache_dir: Path | None = None,
    device_map: str | None = None,
) -> CausalLM:
    """A causal LM ready for inference; raises InputError where weights are missing, damaged or not a causal LM's.

    dtype: auto is the checkpoint's on CUDA and float32 on CPU. device_map: auto spreads the layers over all GPUs, and
    over the memory of the machine where these do not do; None: all on the device. It needs the package accelerate.
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
        _, logits = lm.forward(pair, use_cache=False)
    if logits.isnan().any():
        raise InputError(f"{lm.name}: gives NaN in {_dtype_name(lm)}; use another --dtype")
    logits = logits.nan_to_num()  # some models give tokens that never come -inf
    # Only rounding may differ. Even an untrained BERT, whose logits hardly vary, is further off in float32.
    tolerance = max(1e-3, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
    if not float((logits[0, :2] - logits[1, :2]).abs().max()) <= tolerance:
        raise InputError(f"{lm.name}: its first positions read the later ones, so it is not a causal LM")


def _dtype_name(lm: CausalLM) -> str:
    return str(lm.dtype).removeprefix("torch.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and hints off stderr meanwhile: what is wrong with a model is said by our errors.

    The bars of downloads are the hub library's own and stay.
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
    # `models/foo` beside a folder `models` is a path that is mistyped rather than an organisation on the hub.
    looks_local |= "/" in model_path and path.parent.is_dir()
    if looks_local and not path.is_dir():
        raise InputError(f"{model_path}: does not exist; give the folder of a model, or its hub name")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ---- Fingerprints


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for tokenizers that give the same ids, whatever their files or names: vocabulary and a probe text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    probe = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    return hashlib.sha256(repr((vocabulary, probe)).encode("utf-8", "surrogatepass")).hexdigest()


def model_fingerprint(model_path: str, cache_dir: Path | None = None) -> str:
    """The same for the same weights and the same forward pass, under any name, in a folder or in the hub's cache.

    Every byte of the weights counts, since merged adapters and edited facts change a few matrices only: about a second
    for each GB and core where the cache of the hub does not know the digests already. Of the config counts what the
    forward pass is made of; another end-of-text token, say, leaves hidden states as they are.
    """
    files = [*_weight_files(model_path, cache_dir), *_adapter_files(model_path)]
    with ThreadPoolExecutor(n_cores()) as threads:
        digests = list(threads.map(_content_digest, files))
    config_path = _fetch(model_path, CONFIG_NAME, cache_dir)
    config = read_json(config_path) if config_path else None
    if not isinstance(config, dict):
        raise InputError(f"{model_path}: no model config can be loaded; copy the model anew")
    decisive = {name: value for name, value in config.items() if name not in NOT_OF_THE_FORWARD_PASS}
    return hashlib.sha256(json.dumps([digests, decisive], sort_keys=True).encode()).hexdigest()


def _content_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    blob = path.resolve()
    if blob != path and blob.parent.name == "blobs" and _BLOB_NAME.fullmatch(blob.name):
        return blob.name
    return file_fingerprint(path)


def _adapter_files(model_path: str) -> list[Path]:
    """Of an adapter that lies beside the weights and is loaded with them."""
    return [path for name in ADAPTER_FILES if (path := Path(model_path, name)).is_file()]


def _weight_files(model_path: str, cache_dir: Path | None) -> Iterator[Path]:
    """The weight files in the order of their names, as `from_pretrained` chooses them."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if found := _fetch(model_path, single, cache_dir):
            yield found
            return
        if found := _fetch(model_path, index, cache_dir):
            for name in _shard_names(found):
                shard = _fetch(model_path, name, cache_dir)
                if shard is None:
                    raise InputError(f"{model_path}: {name} is missing, a part of its weights; copy the model anew")
                yield shard
            return
    raise InputError(f"{model_path}: no weights found ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}); copy the model anew")


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: lists no weight files; copy the model anew") from error


def _fetch(model_path: str, name: str, cache_dir: Path | None) -> Path | None:
    """A file of a model, from the hub where it is not here yet; None where the model has none of the name."""
    found = cached_file(model_path, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
