"""The text and the datastores that the tables need, made by the stages as from the command line.

A work folder is laid out as run_pipeline.sh lays out its --output_dir, which may be given as one: `data` (stage 1),
`extracted/{model}` (stage 2), `tries` (stages 3 and 4). Each stage says itself whether there is anything left to do.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import POSITIVE_INT, Parser, add_cache_dir, file_name
from utils.datastore.trie_files import trie_folder_path
from utils.files import InputError
from utils.text.corpora import split_path

EXAMPLE_DATASET = "python-docs"
LARGE, SMALL = (str(ROOT / "examples" / "models" / name) for name in ("large", "small"))
MAX_CHUNK_LENGTH = 64  # stage 3's own
PREPROCESS, EXTRACT = "preprocess_dataset.py", "extract_token_probs_and_memmap.py"
SAVE_TRIES, MAKE_TRIES = "save_token_trie_info.py", "make_token_trie.py"


@cache
def run_script(script: str, *flags: object) -> None:
    """Run a script of the repository, once in a process; what it prints is not the benchmark's.

    Raises InputError where it fails.
    """
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise InputError(f"{script} failed, see above; the command was {' '.join(command)}")


def model_label(model: str) -> str:
    """What folders are named after: the last part of a path or hub name."""
    return Path(model).name


@dataclass(frozen=True)
class Work:
    """A work folder and what its text and models are; each method runs what is not there yet and says where it is.

    The flags are those of the stages, as text. data_folder: a stage 1 folder that was made otherwise, in the place of
    stage 1's flags.
    """

    folder: Path
    model_ds: str = LARGE
    model_gen: str = LARGE
    dataset: str = EXAMPLE_DATASET
    partition: str = "train"
    data_flags: tuple[str, ...] = ()
    window_flags: tuple[str, ...] = ()
    model_flags: tuple[str, ...] = ()  # device and dtype
    cache_flags: tuple[str, ...] = ()
    data_folder: Path | None = None

    def data(self) -> Path:
        """Stage 1's output folder, with train.json, validation.json and test.json."""
        if self.data_folder is not None:
            return self.data_folder
        folder = self.folder / "data"
        run_script(PREPROCESS, "--dataset", self.dataset, "--output_dir", folder, *self.data_flags, *self.cache_flags)
        return folder

    def split(self, name: str) -> Path:
        """The passages of a split."""
        return split_path(self.data(), name)

    def extracted(self, model: str, hidden_states: bool = True) -> Path:
        """Stage 2's output folder with a model's probabilities of the partition, and its hidden states as an .h5."""
        folder = self.folder / "extracted" / model_label(model)
        flags: list[object] = ["--model_path", model, "--data_dir", self.data(), "--output_dir", folder]
        flags += ["--partition", self.partition, *self.window_flags, *self.model_flags, *self.cache_flags]
        if hidden_states:
            flags += ["--save_hidden_states", "--construct_memmap", "--discard_intermediates"]
        run_script(EXTRACT, *flags)
        return folder

    def tries(
        self, tok_prob_threshold: float, max_chunk_length: int = MAX_CHUNK_LENGTH, skip_first_tokens: int | None = None
    ) -> Path:
        """The trie folder at a γ, its hidden states in place. skip_first_tokens None: stage 3's own."""
        by_ds, by_gen = model_label(self.model_ds), model_label(self.model_gen)
        if by_ds == by_gen and self.model_ds != self.model_gen:
            names = f"{self.model_ds} and {self.model_gen}"
            raise InputError(f"{names} have one name, which folders are named after; rename one of them")
        extracted = self.extracted(self.model_gen) / self.partition
        token_probs = (
            extracted if by_ds == by_gen else self.extracted(self.model_ds, hidden_states=False) / self.partition
        )
        folder, chunk_flags = self._tries_folder(max_chunk_length, skip_first_tokens)
        labels = (self.dataset, by_ds, by_gen, self.partition, tok_prob_threshold)
        label_names = ("--dataset_name", "--model_ds", "--model_gen", "--partition", "--tok_prob_threshold")
        label_flags = [each for pair in zip(label_names, labels, strict=True) for each in pair]
        flags: list[object] = ["--token_prob_dir", token_probs, "--output_dir", folder, "--model_name", self.model_ds]
        run_script(SAVE_TRIES, *flags, *label_flags, *chunk_flags, *self.cache_flags)
        flags = ["--save_dir", folder, "--all_hidden_states_path", f"{extracted}.h5"]
        flags += ["--idx_to_seqlen_path", f"{extracted}_index_to_seqlen.json"]
        flags += ["--index_to_acc_index_path", f"{extracted}_index_to_acc_index.json"]
        run_script(MAKE_TRIES, *flags, *label_flags)
        return trie_folder_path(folder, *labels)

    def _tries_folder(self, max_chunk_length: int, skip_first_tokens: int | None) -> tuple[Path, list[object]]:
        """Stage 3's output folder, which is named after what is not its default, and the flags that say so."""
        name, flags = "tries", list[object]()
        if max_chunk_length != MAX_CHUNK_LENGTH:
            name, flags = f"{name}_max{max_chunk_length}", [*flags, "--max_chunk_length", max_chunk_length]
        if skip_first_tokens is not None:
            name, flags = f"{name}_skip{skip_first_tokens}", [*flags, "--skip_first_tokens", skip_first_tokens]
        return self.folder / name, flags

    def of_models(self, model_ds: str, model_gen: str) -> "Work":
        """The same text with other models."""
        return replace(self, model_ds=model_ds, model_gen=model_gen)

    def of_text(self, data_folder: Path, name: str) -> "Work":
        """The same models on the text of another stage 1 folder, in a folder of that name within this one."""
        return replace(self, folder=self.folder / name, data_folder=data_folder)


def add_work(parser: Parser, model_ds: str = LARGE, model_gen: str = LARGE) -> None:
    """The flags of a work folder; the models are the example's where none are given."""
    work = parser.add_argument_group("text, models and datastore")
    add_work_folder(work)
    work.add_argument("--dataset", help="of preprocess_dataset.py (default: python-docs; local with --input_files)")
    work.add_argument("--input_files", type=Path, nargs="+", metavar="PATH", help="your text: files or folders of them")
    work.add_argument("--text_column", metavar="NAME", help="column that holds the text (default: text)")
    work.add_argument("--max_passages", type=POSITIVE_INT, metavar="N", help="of each split (default: all)")
    work.add_argument("--partition", type=file_name, default="train", help="split that the chunks come from")
    shown = {LARGE: "the example's large", SMALL: "the example's small"}
    work.add_argument("--model_ds", default=model_ds, help=f"chooses the chunks (default: {shown[model_ds]})")
    work.add_argument("--model_gen", default=model_gen, help=f"indexes them, generates (default: {shown[model_gen]})")
    work.add_argument("--chunk_size", type=POSITIVE_INT, help="tokens of a window (default: stage 2's)")
    work.add_argument("--stride", type=POSITIVE_INT, help="tokens from window to window (default: stage 2's)")
    work.add_argument("--min_length", type=POSITIVE_INT, help="of a passage, in tokens (default: stage 2's)")
    work.add_argument("--device", default="auto", help="torch device; auto: CUDA if there is one")
    work.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="weights'")
    add_cache_dir(parser)


def add_work_folder(parser: "argparse._ActionsContainer") -> None:
    here = "output/benchmarks"
    parser.add_argument(
        "--work", type=Path, default=ROOT / here, help=f"folder of data and datastores, kept (default: {here})"
    )


def work_of(args: argparse.Namespace) -> Work:
    """The work folder that the flags of add_work say."""
    return Work(
        args.work,
        args.model_ds,
        args.model_gen,
        args.dataset or ("local" if args.input_files else EXAMPLE_DATASET),
        args.partition,
        _flags(args, ("input_files", "text_column", "max_passages")),
        _flags(args, ("chunk_size", "stride", "min_length")),
        _flags(args, ("device", "dtype")),
        _flags(args, ("cache_dir",)),
    )


def _flags(args: argparse.Namespace, names: Sequence[str]) -> tuple[str, ...]:
    """As on the command line, those that were given."""
    given = ((name, getattr(args, name)) for name in names)
    return tuple(
        str(part)
        for name, value in given
        if value is not None
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    )
