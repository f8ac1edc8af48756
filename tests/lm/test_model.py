"""Any causal LM loads quietly and gives what its head reads; what cannot be used is named; copies keep every bit."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import CONFIGS, tiny_lm
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from utils.files import InputError
from utils.lm import model as lm_model
from utils.lm.model import (
    CausalLM,
    eos_token_ids,
    find_source,
    load_config,
    load_generation_config,
    load_lm,
    load_tokenizer,
    max_positions,
    pack_tensors,
    pick_device,
    require_known_ids,
    require_windows_fit,
    to_host,
    unpack_tensors,
    upload,
)

FOLDERS = ("gpt2_folder", "llama_folder")


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# ---- One forward pass


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_what_the_head_reads_and_logits_the_models_own(name: str) -> None:
    lm = tiny_lm(name)
    n_ids = lm.model.config.get_text_config().vocab_size
    ids = torch.randint(0, n_ids, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = lm.model(ids, output_hidden_states=True, use_cache=False)
    hidden_states, logits = lm.forward(ids)
    assert hidden_states.shape == (2, 11, lm.hidden_size)
    torch.testing.assert_close(hidden_states, expected.hidden_states[-1], rtol=0, atol=0)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0)
    last_hidden_states, last_logits = lm.forward(ids, logits_to_keep=3)
    torch.testing.assert_close(last_hidden_states, hidden_states[:, -3:])
    all_hidden_states, one = lm.forward(ids, logits_to_keep=1, all_hidden=True)
    torch.testing.assert_close(all_hidden_states, hidden_states)
    torch.testing.assert_close(one, logits[:, -1:])
    # Used without the object, the model is what it was.
    assert lm.model(ids, use_cache=False).logits.shape == logits.shape
    torch.testing.assert_close(last_logits, logits[:, -3:])


class WithoutSlices(GPT2LMHeadModel):
    """A model that computes all logits, whatever it is asked for, as some do."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        assert "logits_to_keep" not in kwargs
        return super().forward(input_ids, **kwargs)


@torch.inference_mode()
def test_of_a_model_that_computes_all_logits_the_last_are_kept() -> None:
    kind, sizes = CONFIGS["gpt2"]
    lm, ids = CausalLM(WithoutSlices(kind(**sizes)).eval(), "m"), torch.tensor([[3, 1, 4, 1, 5]])
    hidden_states, logits = lm.forward(ids)
    for n in (1, 3):
        last_hidden_states, last_logits = lm.forward(ids, logits_to_keep=n)
        torch.testing.assert_close(last_hidden_states, hidden_states[:, -n:])
        torch.testing.assert_close(last_logits, logits[:, -n:])
        all_hidden_states, last_logits = lm.forward(ids, logits_to_keep=n, all_hidden=True)
        torch.testing.assert_close(all_hidden_states, hidden_states)
        torch.testing.assert_close(last_logits, logits[:, -n:])


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
def test_dtype_is_float32_on_cpu_unless_asked_for(checkpoint: str, flag: str, expected: str, gpt2_copy: Path) -> None:
    AutoModelForCausalLM.from_pretrained(gpt2_copy, dtype=checkpoint).save_pretrained(gpt2_copy)
    lm = load_lm(str(gpt2_copy), dtype=flag)
    assert lm.dtype == getattr(torch, expected)
    hidden_states, logits = lm.forward(torch.tensor([[1, 2, 3]]))
    assert hidden_states.dtype == logits.dtype == lm.dtype


def test_loading_and_the_first_forward_pass_print_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_config(str(folder))
    load_tokenizer(str(folder))
    load_lm(str(folder)).forward(torch.tensor([[1, 2, 3]]))
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
def test_weights_that_cannot_be_used_are_refused(damage: Callable[[Path], None], message: str, gpt2_copy: Path) -> None:
    damage(gpt2_copy)
    with pytest.raises(InputError, match=f"^{gpt2_copy}: {message}") as refused:
        load_lm(str(gpt2_copy))
    assert "\n" not in str(refused.value)


def test_a_model_that_overflows_the_asked_for_dtype_is_refused(gpt2_copy: Path) -> None:
    unknown_to_float16(gpt2_copy)
    assert load_lm(str(gpt2_copy)).dtype == torch.float32
    with pytest.raises(InputError, match="gives NaN in float16; use another --dtype"):
        load_lm(str(gpt2_copy), dtype="float16")


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
def test_a_folder_that_is_no_causal_lms_is_refused(
    damage: Callable[[Path], None], message: str, gpt2_copy: Path
) -> None:
    damage(gpt2_copy)
    for load in (load_config, load_lm):
        with pytest.raises(InputError, match=f"^{gpt2_copy}: {message}") as refused:
            load(str(gpt2_copy))
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
    with pytest.raises(InputError, match=f"--device {device}: not available here"):
        pick_device(device)


def test_windows_and_ids_beyond_the_model_are_refused(gpt2_folder: Path) -> None:
    config = load_config(str(gpt2_folder))
    assert max_positions(config) == 128
    require_windows_fit(config, "m", 128, n_prefix=0)
    require_known_ids(config, "m", 319)
    with pytest.raises(InputError, match="--chunk_size 129: m reads 128 tokens at most"):
        require_windows_fit(config, "m", 129, n_prefix=0)
    with pytest.raises(InputError, match=r"m reads 128 tokens at most, 1 for BOS; .* of at most 127"):
        require_windows_fit(config, "m", 128, n_prefix=1)
    with pytest.raises(InputError, match="m: its tokenizer gives token id 320, but its model knows only 320 ids"):
        require_known_ids(config, "m", 320)


def test_a_text_ends_where_the_config_or_else_the_tokenizer_says(gpt2_folder: Path) -> None:
    tokenizer = load_tokenizer(str(gpt2_folder))
    assert eos_token_ids(GenerationConfig(eos_token_id=7), tokenizer) == {7}
    assert eos_token_ids(GenerationConfig(eos_token_id=[7, 8]), tokenizer) == {7, 8}
    assert eos_token_ids(GenerationConfig(), tokenizer) == eos_token_ids(None, tokenizer) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert eos_token_ids(GenerationConfig(), tokenizer) == eos_token_ids(None) == frozenset()


# ---- What needs another package


def set_in_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "package"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, "optimum"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}, "gptqmodel"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8"}}, "accelerate"),
        ({"_attn_implementation": "flash_attention_2"}, "flash-attn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_need_a_package_are_refused_with_its_name(
    fields: dict[str, Any], package: str, gpt2_copy: Path
) -> None:
    if find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed here")
    set_in_json(gpt2_copy / "config.json", **fields)
    with pytest.raises(InputError, match=f"^{gpt2_copy}: needs a package that is not installed .*{package}") as refused:
        load_lm(str(gpt2_copy))
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_needs_a_package_is_refused_with_its_name(gpt2_copy: Path) -> None:
    if find_spec("sacremoses"):
        pytest.skip("sacremoses is installed here")
    (gpt2_copy / "tokenizer.json").unlink()
    (gpt2_copy / "vocab.json").write_text('{"a": 0}')
    (gpt2_copy / "merges.txt").touch()
    set_in_json(gpt2_copy / "tokenizer_config.json", tokenizer_class="BioGptTokenizer")
    with pytest.raises(InputError, match=f"^{gpt2_copy}: needs a package that is not installed .*sacremoses.*install"):
        load_tokenizer(str(gpt2_copy))


def test_python_without_docstrings_is_refused_where_transformers_needs_them(
    gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_model, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    for load in (load_tokenizer, load_config, load_lm):
        with pytest.raises(InputError, match=r"^python -OO: removes the docstrings, which transformers reads; use -O"):
            load(str(gpt2_folder))


@pytest.fixture
def adapter(gpt2_folder: Path, tmp_path: Path) -> Path:
    """A folder that holds an adapter's config and names its base."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(gpt2_folder)}))
    return folder


LOADERS = (load_tokenizer, load_config, load_generation_config, load_lm)


def test_an_adapter_without_peft_is_refused_beside_the_weights_and_alone(
    adapter: Path, gpt2_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not read without it: the weights beside an adapter are another model."""
    monkeypatch.setitem(sys.modules, "peft", None)
    shutil.copy(adapter / "adapter_config.json", gpt2_copy)
    for folder in (gpt2_copy, adapter):
        for load in LOADERS:
            with pytest.raises(InputError) as refused:
                load(str(folder))
            assert str(refused.value) == f"{folder}: an adapter, which needs peft; pip install peft"


def test_an_adapter_alone_has_config_and_tokenizer_of_its_base(
    adapter: Path, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, adapter.with_name("packages"), "peft")
    assert load_config(str(adapter)).n_embd == 32
    assert load_generation_config(str(adapter)).eos_token_id == 0
    assert find_source(str(adapter)).tokenizer == str(gpt2_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2_folder / name, adapter)
    assert find_source(str(adapter)).tokenizer == str(adapter)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, folder: Path, *packages: str) -> None:
    """Let packages be found that are only looked for."""
    folder.mkdir()
    for name in packages:
        (folder / f"{name}.py").touch()
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "names no base_model_name_or_path; add it, or merge the adapter"),
        ("/none", "base_model_name_or_path /none: does not exist; give the folder of a model, or its hub name"),
    ],
)
def test_an_adapter_whose_base_is_not_there_is_refused(
    base: str | None, message: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, adapter.with_name("packages"), "peft")
    set_in_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    for load in LOADERS:
        with pytest.raises(InputError, match=f"^{adapter}/adapter_config.json: {message}$"):
            load(str(adapter))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # for what peft calls
def test_a_loaded_adapter_is_its_base_merged_with_it(gpt2_copy: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft, which requirements.txt leaves out")
    folder, ids = tmp_path / "adapter", torch.tensor([[3, 1, 4, 1, 5]])
    with_adapter = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpt2_copy),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]),
    )
    for name, weight in with_adapter.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.3)
    with_adapter.save_pretrained(folder)
    merged = with_adapter.merge_and_unload()(ids).logits
    assert not torch.allclose(load_lm(str(gpt2_copy)).forward(ids)[1], merged, atol=0.1)
    torch.testing.assert_close(load_lm(str(folder)).forward(ids)[1], merged)
    for file in folder.glob("adapter_*"):
        shutil.copy(file, gpt2_copy)
    torch.testing.assert_close(load_lm(str(gpt2_copy)).forward(ids)[1], merged)
    # What the base lacks is not made up where the adapter is whole.
    drop_a_weight(gpt2_copy)
    for path in (folder, gpt2_copy):
        with pytest.raises(InputError, match=r"1 weights are missing, transformer\.h\.1\.mlp\.c_fc\.weight the first"):
            load_lm(str(path))


def test_a_gguf_file_is_refused_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    path = tmp_path / "m.gguf"
    path.touch()
    for given in (path, tmp_path):  # a folder with one is that one
        for load in LOADERS:
            with pytest.raises(InputError) as refused:
                load(str(given))
            message = "a GGUF file, which needs gguf and accelerate; pip install gguf accelerate"
            assert str(refused.value) == f"{path}: {message}"


def test_a_gguf_file_is_all_that_a_model_needs(
    gpt2_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, tmp_path / "packages", "gguf", "accelerate")
    folder = tmp_path / "gguf"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    source = find_source(str(folder / "b.gguf"))
    assert (source.base, source.keywords) == (str(folder), {"gguf_file": "b.gguf"})
    assert source.weights == source.tokenizer == source.base
    with pytest.raises(InputError, match=f"^{folder}: holds 2 GGUF files; give one of them, such as {folder}/a.gguf$"):
        find_source(str(folder))
    (folder / "a.gguf").unlink()
    assert find_source(str(folder)) == source
    # Beside other weights it counts only where it is given itself.
    shutil.copy(folder / "b.gguf", gpt2_copy)
    assert load_lm(str(gpt2_copy)).hidden_size == 32
    assert find_source(str(gpt2_copy / "b.gguf")).gguf == gpt2_copy / "b.gguf"


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF files need gguf, which requirements.txt leaves out")
    pytest.importorskip("accelerate", reason="GGUF files need accelerate, which requirements.txt leaves out")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {i}" for i in range(100)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    whole = path.read_bytes()
    for content in (whole[:-50], whole[:20], b"x" * 100, b""):
        path.write_bytes(content)
        for load in LOADERS:
            with pytest.raises(InputError, match=f"^{path}: "):
                load(str(path))


# ---- Copies between host and device


TENSORS = [
    torch.arange(3, dtype=torch.int32),
    torch.tensor([[1.5, -2.0], [3.0, 4.0]], dtype=torch.bfloat16).T,
    torch.tensor([True]),
    torch.tensor([0.1], dtype=torch.float64),
    torch.empty(0, 4),
    torch.tensor([[2**53 + 1]]),
]


def test_tensors_of_any_dtype_and_shape_come_back_from_their_bytes() -> None:
    for got, wanted in zip(unpack_tensors(pack_tensors(*TENSORS), *TENSORS), TENSORS, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got, wanted)


def test_what_is_on_the_host_stays_as_it_is() -> None:
    assert [got is wanted for got, wanted in zip(to_host(*TENSORS), TENSORS, strict=True)] == [True] * len(TENSORS)
    assert torch.equal(upload([1, 2], torch.device("cpu")), torch.tensor([1, 2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_goes_up_and_comes_down_is_the_same() -> None:
    device = torch.device("cuda")
    for got, wanted in zip(to_host(*(upload(tensor, device) for tensor in TENSORS)), TENSORS, strict=True):
        assert torch.equal(got, wanted)
