"""Fingerprints: the same for the same model or tokenizer under any name, another where one weight or id differs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from utils.files import InputError
from utils.lm.fingerprint import model_fingerprint, tokenizer_fingerprint
from utils.lm.model import load_tokenizer

WEIGHTS = "model.safetensors"


def test_a_copy_has_the_same_fingerprints_under_another_name(gpt2_folder: Path, gpt2_copy: Path) -> None:
    assert model_fingerprint(str(gpt2_copy)) == model_fingerprint(str(gpt2_folder))
    assert tokenizer_fingerprint(load_tokenizer(str(gpt2_copy))) == tokenizer_fingerprint(
        load_tokenizer(str(gpt2_folder))
    )


def test_other_models_have_other_fingerprints(gpt2_folder: Path, llama_folder: Path, gpt2_copy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_copy)
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] += 1e-3
    model.save_pretrained(gpt2_copy)
    found = {model_fingerprint(str(path)) for path in (gpt2_folder, llama_folder, gpt2_copy)}
    assert len(found) == 3


def test_a_single_weight_anywhere_makes_another_fingerprint(gpt2_copy: Path) -> None:
    path = gpt2_copy / WEIGHTS
    content = bytearray(path.read_bytes())
    found = {model_fingerprint(str(gpt2_copy))}
    for at in np.random.default_rng(0).integers(1000, len(content), 20).tolist():
        content[at] ^= 1
        path.write_bytes(content)
        found.add(model_fingerprint(str(gpt2_copy)))
        content[at] ^= 1
    assert len(found) == 21


def test_of_the_config_counts_what_the_forward_pass_is_made_of(gpt2_copy: Path) -> None:
    before, config = model_fingerprint(str(gpt2_copy)), json.loads((gpt2_copy / "config.json").read_text())
    for name, value in (("eos_token_id", 7), ("transformers_version", "4.0"), ("_name_or_path", "there")):
        (gpt2_copy / "config.json").write_text(json.dumps(config | {name: value}))
        assert model_fingerprint(str(gpt2_copy)) == before
    for name, value in (("n_head", 4), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6)):
        (gpt2_copy / "config.json").write_text(json.dumps(config | {name: value}))
        assert model_fingerprint(str(gpt2_copy)) != before


def test_an_adapter_makes_another_fingerprint_beside_the_weights_and_alone(
    gpt2_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/peft.py").touch()  # looked for, but not used for a fingerprint
    monkeypatch.syspath_prepend(tmp_path / "packages")
    base = model_fingerprint(str(gpt2_copy))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(gpt2_copy), "lora_alpha": 8}
    found = {base}
    for weights, alpha in ((b"low ranks", 8), (b"others", 8), (b"others", 16)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        found.add(model_fingerprint(str(adapter)))
    assert len(found) == 4
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (gpt2_copy / name).write_bytes((adapter / name).read_bytes())
    assert model_fingerprint(str(gpt2_copy)) == model_fingerprint(str(adapter))
    (gpt2_copy / "adapter_config.json").unlink()  # without which no adapter is loaded
    assert model_fingerprint(str(gpt2_copy)) == base


def test_the_bytes_of_a_gguf_file_are_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gguf", "accelerate"):
        (tmp_path / f"{name}.py").touch()  # looked for, but not used for a fingerprint
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF 1")
    before = model_fingerprint(str(path))
    assert model_fingerprint(str(tmp_path)) == before
    path.write_bytes(b"GGUF 2")
    assert model_fingerprint(str(path)) != before


def test_a_copy_in_the_hubs_cache_is_the_same_and_is_not_read(gpt2_copy: Path, tmp_path: Path) -> None:
    content = (gpt2_copy / WEIGHTS).read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    before = model_fingerprint(str(gpt2_copy))
    (gpt2_copy / WEIGHTS).rename(blob)
    (gpt2_copy / WEIGHTS).symlink_to(blob)
    assert model_fingerprint(str(gpt2_copy)) == before
    blob.write_bytes(b"nobody looks")
    assert model_fingerprint(str(gpt2_copy)) == before


def test_weights_in_parts_have_a_fingerprint_of_every_part(gpt2_copy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_copy)
    (gpt2_copy / WEIGHTS).unlink()
    model.save_pretrained(gpt2_copy, max_shard_size="50KB")
    parts = sorted(gpt2_copy.glob("model-*.safetensors"))
    assert len(parts) > 1
    before = model_fingerprint(str(gpt2_copy))
    content = bytearray(parts[-1].read_bytes())
    content[-1] ^= 1
    parts[-1].write_bytes(content)
    assert model_fingerprint(str(gpt2_copy)) != before
    parts[-1].unlink()
    with pytest.raises(InputError, match=f"{parts[-1].name} is missing, a part of its weights"):
        model_fingerprint(str(gpt2_copy))


def test_a_model_without_weights_has_no_fingerprint(gpt2_copy: Path) -> None:
    (gpt2_copy / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no weights found"):
        model_fingerprint(str(gpt2_copy))
    (gpt2_copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="lists no weight files"):
        model_fingerprint(str(gpt2_copy))


def test_other_tokenizers_have_other_fingerprints(gpt2_folder: Path, llama_folder: Path, gpt2_copy: Path) -> None:
    fields = json.loads((gpt2_copy / "tokenizer.json").read_text())
    merges = fields["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    vocabulary = fields["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (gpt2_copy / "tokenizer.json").write_text(json.dumps(fields))
    found = {tokenizer_fingerprint(load_tokenizer(str(path))) for path in (gpt2_folder, llama_folder, gpt2_copy)}
    assert len(found) == 3
