"""Cut prompts from held-out documents: the opening of each, up to a word's end.

Reads   the test split of `python-docs`, or --data_file  [{"text": str}, ...]
Writes  OUTPUT_FILE                                      [str, ...]
Run     python examples/make_prompts.py --output_file examples/prompts.json
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import POSITIVE_INT, Parser, run_script
from utils.files import InputError
from utils.json_io import iter_json_list, write_json_list
from utils.text.python_docs import python_docs

# A document must go on for as long as its prompt several times over, so that there is something to continue.
TIMES_LONGER = 3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output_file", type=Path, required=True, help="prompt file to write")
    parser.add_argument(
        "--data_file", type=Path, help="split to cut from, of preprocess_dataset.py (default: python-docs' test split)"
    )
    parser.add_argument("--n_prompts", type=POSITIVE_INT, default=16, help="prompts, evenly over the documents")
    parser.add_argument("--n_characters", type=POSITIVE_INT, default=260, help="most characters of a prompt")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    texts = python_docs("test") if args.data_file is None else passages(args.data_file)
    prompts = cut_prompts(texts, args.n_prompts, args.n_characters)
    if not prompts:
        source, needed = args.data_file or "python-docs", TIMES_LONGER * args.n_characters
        raise InputError(f"{source}: no document of {needed} characters to cut a prompt from; lower --n_characters")
    write_json_list(args.output_file, prompts)
    print(f"{args.output_file}: {len(prompts)} prompts")


def passages(path: Path) -> Iterable[str]:
    for entry in iter_json_list(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise InputError(f"{path}: an entry has no text; give a split that preprocess_dataset.py wrote")
        yield entry["text"]


def cut_prompts(texts: Iterable[str], n_prompts: int, n_characters: int) -> list[str]:
    """The openings of documents spread evenly over those that are long enough, each at most n_characters long."""
    openings = [text[: n_characters + 1] for text in texts if len(text) >= TIMES_LONGER * n_characters]
    n_prompts = min(n_prompts, len(openings))
    chosen = [openings[i * len(openings) // n_prompts] for i in range(n_prompts)]
    return [cut_at_word_end(opening, n_characters) for opening in chosen]


def cut_at_word_end(opening: str, n_characters: int) -> str:
    """The opening without the word that n_characters cut in two; scripts without spaces are cut where it falls."""
    whole_words = re.match(r"(?s)(.*\S)\s", opening)
    return whole_words[1] if whole_words else opening[:n_characters]


if __name__ == "__main__":
    run_script(main)
