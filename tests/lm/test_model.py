"""Any causal LM loads quietly and gives what its head reads; two models are told apart; what cannot be used is named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CONFIGS, tiny_lm
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from utils.files import InputError
from utils.lm.model import CausalLM, load_config, load_lm, load_tokenizer, max_positions, pick_device, require_known_ids, require_windows_fit
from utils.lm.fingerprint import model_fingerprint, tokenizer_fingerprint

FOLDERS = ("gpt2_folder", "llama_folder")


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(gpt2_folder: Path, tmp_path: Path) -> Path:
    """A copy of the GPT-2-style model that a test may damage."""
    return Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))


# ---- One forward pass


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_what_the_head_reads_and_logits_the_models_own(name: str) -> None:
    lm = tiny_lm(name)
    n_ids = lm.model.config.get_text_config().vocab_size
    ids = torch.randint(0, n_ids, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = lm.model(ids, output_hidden_states=True, use_cache=False)
    hidden_states, logits = lm.forward(ids, use_cache=False)
    assert hidden_states.shape == (2, 11, lm.hidden_size)
    torch.testing.assert_close(hidden_states, expected.hidden_states[-1], rtol=0, atol=0)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0)
    last_hidden_states, last_logits = lm.forward(ids, logits_to_keep=3, use_cache=False)
    torch.testing.assert_close(last_hidden_states, hidden_states[:, -3:])
    all_hidden_states, one = lm.forward(ids, logits_to_keep=1, all_hidden=True, use_cache=False)
    torch.testing.assert_close(all_hidden_states, hidden_states)
    torch.testing.assert_close(one, logits[:, -1:])
    # Used without the object, the model is what it was.
    assert lm.model(ids, use_cache=False).logits.shape == logits.shape
    torch.testing.assert_close(last_logits, logits[:, -3:])


@torch.inference_mode()
def test_the_hidden_size_is_the_heads_where_the_model_projects_before_it() -> None:
    sizes = {"vocab_size": 100, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    lm = CausalLM(OPTForCausalLM(OPTConfig(**sizes, hidden_size=32, word_embed_proj_dim=16)), "opt-350m-like")
    hidden_states, _ = lm.forward(torch.tensor([[3, 4, 5]]))
    assert lm.hidden_size == 16
    assert hidden_states.shape == (1, 3, 16)


# ---- Loading


def test_a_loaded_model_is_the_one_that_was_saved(folder: Path) -> None:
    lm = load_lm(str(folder))
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert not lm.model.training
    assert (lm.n_positions, lm.hidden_size) == ((128, 32) if "gpt2" in folder.name else (256, 48))
    for name, weight in saved.state_dict().items():
        torch.testing.assert_close(lm.model.state_dict()[name], weight)


@pytest.mark.parametrize("checkpoint", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("flag", "expected"),
    [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")],
)
def test_dtype_is_float32_on_cpu_unless_asked_for(checkpoint: str, flag: str, expected: str, copy: Path) -> None:
    AutoModelForCausalLM.from_pretrained(copy, dtype=checkpoint).save_pretrained(copy)
    lm = load_lm(str(copy), dtype=flag)
    assert lm.dtype == getattr(torch, expected)
    hidden_states, logits = lm.forward(torch.tensor([[1, 2, 3]]))
    assert hidden_states.dtype == logits.dtype == lm.dtype


def test_loading_and_the_first_forward_pass_print_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_config(str(folder))
    load_tokenizer(str(folder))
    load_lm(str(folder)).forward(torch.tensor([[1, 2, 3]]), use_cache=False)
    assert capfd.readouterr() == ("", "")


# ---- What cannot be used


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def replace(name: str, content: str | bytes, removed: str | None = None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        if removed:
            (folder / removed).unlink()
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def bert(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)).save_pretrained(folder)


def t5(folder: Path) -> None:
    sizes = {"vocab_size": 320, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)


def unknown_to_float16(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.wte.weight.data *= 1e6
    model.save_pretrained(folder)


WEIGHTS = "model.safetensors"
BROKEN_INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(WEIGHTS), "no weights can be loaded"),
        (cut_weights, "its weights are damaged"),
        (replace(WEIGHTS, b""), "its weights are damaged"),
        (replace(WEIGHTS, b"x" * 1000), "its weights are damaged"),
        (replace("pytorch_model.bin", b"x" * 1000, removed=WEIGHTS), "its weights are damaged"),
        (replace("model.safetensors.index.json", BROKEN_INDEX, removed=WEIGHTS), "no weights can be loaded"),
        (replace("model.safetensors.index.json", "{}", removed=WEIGHTS), "no weights can be loaded"),
        (drop_a_weight, "1 weights are missing, transformer.h.1.mlp.c_fc.weight the first"),
        (replace("config.json", '{"model_type": "gpt2", "n_embd": 16, "n_head": 2}'), "no weights can be loaded"),
        (bert, "its first positions read the later ones, so it is not a causal LM"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(damage: Callable[[Path], None], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(InputError, match=f"^{copy}: {message}") as refused:
        load_lm(str(copy))
    assert "\n" not in str(refused.value)


def test_a_model_that_overflows_the_asked_for_dtype_is_refused(copy: Path) -> None:
    unknown_to_float16(copy)
    assert load_lm(str(copy)).dtype == torch.float32
    with pytest.raises(InputError, match="gives NaN in float16; use another --dtype"):
        load_lm(str(copy), dtype="float16")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (t5, "is a t5 model, not a causal LM"),
        (remove("config.json"), "no model config can be loaded"),
        (replace("config.json", ""), "no model config can be loaded"),
        (replace("config.json", "null"), "no model config can be loaded"),
        (replace("config.json", b"\xff"), "no model config can be loaded"),
        (replace("config.json", '{"model_type": "nonsense"}'), "no model config can be loaded"),
        (replace("config.json", '{"model_type": "gpt2", "n_embd": "x"}'), "no model config can be loaded"),
        (shutil.rmtree, "does not exist; give the folder of a model"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text(""))[0], "is a file; give the folder of a model"),
    ],
)
def test_a_folder_that_is_no_causal_lms_is_refused(damage: Callable[[Path], None], message: str, copy: Path) -> None:
    damage(copy)
    for load in (load_config, load_lm):
        with pytest.raises(InputError, match=f"^{copy}: {message}") as refused:
            load(str(copy))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "damage",
    [
        remove("tokenizer.json"),
        remove("tokenizer.json", "tokenizer_config.json"),
        replace("tokenizer.json", ""),
        replace("tokenizer.json", "null"),
        replace("tokenizer.json", "[]"),
        replace("tokenizer.json", '{"version": "1.0"}'),
        replace("tokenizer_config.json", "[]"),
    ],
)
@pytest.mark.parametrize("source", FOLDERS)
def test_a_folder_without_a_sound_tokenizer_is_refused(
    source: str, damage: Callable[[Path], None], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    copy = Path(shutil.copytree(request.getfixturevalue(source), tmp_path / "copy"))
    damage(copy)
    with pytest.raises(InputError, match=f"^{copy}: (no tokenizer can be loaded|its tokenizer has no tokens)"):
        load_tokenizer(str(copy))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "nonsense:0"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=f"--device {device}: not to be had here"):
        pick_device(device)


def test_windows_and_ids_beyond_the_model_are_refused(gpt2_folder: Path) -> None:
    config = load_config(str(gpt2_folder))
    assert max_positions(config) == 128
    require_windows_fit(config, "m", 128)
    require_known_ids(config, "m", 319)
    with pytest.raises(InputError, match="--chunk_size 129: m reads 128 tokens at most"):
        require_windows_fit(config, "m", 129)
    with pytest.raises(InputError, match="m: its tokenizer gives token id 320, but its model knows only 320 ids"):
        require_known_ids(config, "m", 320)


# ---- Fingerprints


def test_a_copy_has_the_same_fingerprints_under_another_name(gpt2_folder: Path, copy: Path) -> None:
    assert model_fingerprint(str(copy)) == model_fingerprint(str(gpt2_folder))
    assert tokenizer_fingerprint(load_tokenizer(str(copy))) == tokenizer_fingerprint(load_tokenizer(str(gpt2_folder)))


def test_other_models_have_other_fingerprints(gpt2_folder: Path, llama_folder: Path, copy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] += 1e-3
    model.save_pretrained(copy)
    found = {model_fingerprint(str(path)) for path in (gpt2_folder, llama_folder, copy)}
    assert len(found) == 3


def test_a_single_weight_anywhere_makes_another_fingerprint(copy: Path) -> None:
    path = copy / WEIGHTS
    content = bytearray(path.read_bytes())
    found = {model_fingerprint(str(copy))}
    for at in np.random.default_rng(0).integers(1000, len(content), 20).tolist():
        content[at] ^= 1
        path.write_bytes(content)
        found.add(model_fingerprint(str(copy)))
        content[at] ^= 1
    assert len(found) == 21


def test_of_the_config_counts_what_the_forward_pass_is_made_of(copy: Path) -> None:
    before, config = model_fingerprint(str(copy)), json.loads((copy / "config.json").read_text())
    for name, value in (("eos_token_id", 7), ("transformers_version", "4.0"), ("_name_or_path", "there")):
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        assert model_fingerprint(str(copy)) == before
    for name, value in (("n_head", 4), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6)):
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        assert model_fingerprint(str(copy)) != before


def test_an_adapter_beside_the_weights_makes_another_fingerprint(copy: Path) -> None:
    before = model_fingerprint(str(copy))
    (copy / "adapter_model.safetensors").write_bytes(b"low ranks")
    assert model_fingerprint(str(copy)) != before


def test_a_copy_in_the_hubs_cache_has_the_same_fingerprint_and_is_not_read(copy: Path, tmp_path: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    before = model_fingerprint(str(copy))
    (copy / WEIGHTS).rename(blob)
    (copy / WEIGHTS).symlink_to(blob)
    assert model_fingerprint(str(copy)) == before
    blob.write_bytes(b"nobody looks")
    assert model_fingerprint(str(copy)) == before


def test_weights_in_parts_have_a_fingerprint_of_every_part(copy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy)
    (copy / WEIGHTS).unlink()
    model.save_pretrained(copy, max_shard_size="50KB")
    parts = sorted(copy.glob("model-*.safetensors"))
    assert len(parts) > 1
    before = model_fingerprint(str(copy))
    content = bytearray(parts[-1].read_bytes())
    content[-1] ^= 1
    parts[-1].write_bytes(content)
    assert model_fingerprint(str(copy)) != before
    parts[-1].unlink()
    with pytest.raises(InputError, match=f"{parts[-1].name} is missing, a part of its weights"):
        model_fingerprint(str(copy))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(WEIGHTS), "no weights found"),
        (replace("model.safetensors.index.json", "{}", removed=WEIGHTS), "lists no weight files"),
    ],
)
def test_a_model_without_weights_has_no_fingerprint(damage: Callable[[Path], None], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(InputError, match=message):
        model_fingerprint(str(copy))


def test_other_tokenizers_have_other_fingerprints(gpt2_folder: Path, llama_folder: Path, copy: Path) -> None:
    fields = json.loads((copy / "tokenizer.json").read_text())
    merges = fields["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    vocabulary = fields["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (copy / "tokenizer.json").write_text(json.dumps(fields))
    found = {tokenizer_fingerprint(load_tokenizer(str(path))) for path in (gpt2_folder, llama_folder, copy)}
    assert len(found) == 3
