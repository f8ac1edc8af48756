"""Fingerprints: whether two models, or two tokenizers, are the same, whatever their names and places."""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from utils.files import InputError, file_fingerprint
from utils.json_io import read_json
from utils.lm.model import ModelSource, fetch_file, find_source
from utils.workers import n_cores

# What a config says that the forward pass does not depend on: where the model is from, which tokens are special, how
# texts are drawn.
NOT_OF_THE_FORWARD_PASS = {
    *("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "task_specific_params", "id2label", "label2id"),
}
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# The hub's cache names a large file's blob by the SHA-256 of its content.
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
# Text for which tokenizers that differ give different ids: spaces, digits, scripts, bytes, control characters.
PROBE_TEXT = "The  Zürich 12345-token\n\n\tprobe: naïve don't 東京 🙂\u200d x=1;\r\n\x00 ǅ %%"


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
    source = find_source(model_path, cache_dir)
    if source.gguf is not None:  # which has the config in it
        return hashlib.sha256(_content_digest(source.gguf).encode()).hexdigest()
    files = [*_weight_files(source.base, cache_dir), *_adapter_files(source, cache_dir)]
    with ThreadPoolExecutor(n_cores()) as threads:
        digests = list(threads.map(_content_digest, files))
    config_path = fetch_file(source.base, CONFIG_NAME, cache_dir)
    config = read_json(config_path) if config_path else None
    if not isinstance(config, dict):
        raise InputError(f"{model_path}: no model config can be loaded; copy the model again")
    decisive = {name: value for name, value in config.items() if name not in NOT_OF_THE_FORWARD_PASS}
    return hashlib.sha256(json.dumps([digests, decisive], sort_keys=True).encode()).hexdigest()


def _content_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    blob = path.resolve()
    if blob != path and blob.parent.name == "blobs" and _BLOB_NAME.fullmatch(blob.name):
        return blob.name
    return file_fingerprint(path)


def _adapter_files(source: ModelSource, cache_dir: Path | None) -> Iterator[Path]:
    """Those of the adapter that is loaded with the weights, where there is one."""
    if source.adapter_config is not None:
        yield source.adapter_config
        for name in ADAPTER_WEIGHTS:
            if found := fetch_file(source.weights, name, cache_dir):
                yield found


def _weight_files(model_path: str, cache_dir: Path | None) -> Iterator[Path]:
    """The weight files in the order of their names, as `from_pretrained` chooses them."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if found := fetch_file(model_path, single, cache_dir):
            yield found
            return
        if found := fetch_file(model_path, index, cache_dir):
            for name in _shard_names(found):
                shard = fetch_file(model_path, name, cache_dir)
                if shard is None:
                    raise InputError(f"{model_path}: {name} is missing, a part of its weights; copy the model again")
                yield shard
            return
    raise InputError(f"{model_path}: no weights found ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}); copy the model again")


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: lists no weight files; copy the model again") from error
