"""Small random models with tokenizers, as folders that the scripts load; and a way to run a script as from a shell."""

import gc
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    "preprocess_dataset.py",
    "extract_token_probs_and_memmap.py",
    "save_token_trie_info.py",
    "make_token_trie.py",
    "eval.py",
)
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# More would only wait for each other on models this small.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.faults.processes import use_one_thread_in_forks  # noqa: E402
from utils import workers  # noqa: E402
from utils.files import InputError  # noqa: E402

use_one_thread_in_forks()
gc.freeze()  # so that no collection looks at what was imported, which is most of what there is
# The same examples in every run, and no verdict by how long one takes.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
workers.START_S = 1e-9  # so that tests with two processes have two, little as their work is

# Emoji with joiners, CJK, control characters, tabs, a byte order mark, combining marks, and plain prose.
TEXTS = [
    "The quick brown fox jumps over the lazy dog. The quick brown fox sleeps. " * 6,
    "def add(a, b):\n    return a + b\n\n\nclass Adder:\n\tdef __call__(self, a, b):\n\t\treturn add(a, b)\n" * 5,
    "東京は日本の首都です。東京タワー。 👩‍👩‍👧‍👦 family 🙂🙂 naïve Zürich e\u0301 \u0000\u0001\u001b[0m \ufeff end. "
    * 8,
    "the cat sat on the mat, the dog sat on the log, the cat and the dog sat. " * 7,
]


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-style model (2 layers, D 32, 128 positions) with a byte-level BPE tokenizer that adds nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=128
    )
    config = GPT2Config(
        vocab_size=320,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return save(tmp_path_factory.mktemp("gpt2"), GPT2LMHeadModel, config, wrapped)


@pytest.fixture
def gpt2_copy(gpt2_folder: Path, tmp_path: Path) -> Path:
    """A copy of the GPT-2-style model that a test may damage."""
    return Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-style model (2 layers, D 48, grouped keys) with a Metaspace BPE tokenizer with byte fallback and BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return save(tmp_path_factory.mktemp("llama"), LlamaForCausalLM, config, wrapped)


def save(folder: Path, kind: type[PreTrainedModel], config: object, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    kind(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_stage() -> Callable[..., None]:
    """Run a script's main in this process: run_stage("eval.py", "--flag", value, …); flags may be any type."""

    def run(script: str, *flags: object) -> None:
        importlib.import_module(script.removesuffix(".py")).main([str(flag) for flag in flags])

    return run


@pytest.fixture
def refusal(run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence with which a script refuses its input: refusal("eval.py", "--flag", value, …)."""

    def run(script: str, *flags: object) -> str:
        try:
            run_stage(script, *flags)
        except InputError as error:
            message = str(error)
        except SystemExit as stop:
            assert stop.code == 2  # noqa: PT017 (either kind of refusal will do)
            message = capsys.readouterr().err.strip()
        else:
            raise AssertionError(f"{script} {' '.join(map(str, flags))} was not refused")
        assert "\n" not in message, message
        return message

    return run
