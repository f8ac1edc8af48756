"""Corpora: passages from the Hugging Face hub, from the user's files or from Python itself, and the split files.

A passage is one document. `{folder}/{split}.json` is a JSON list of `{"text": …}`, or of
`{"text": …, "spans": [[start, end], …]}` where a person marked the chunks (character offsets), one entry a line.
Everything is streamed: a passage is in memory, a corpus never is.

A new dataset is one function that yields its passages, and one line in `CORPORA`.
"""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from glob import escape
from itertools import count, islice, pairwise
from lzma import LZMAError
from pathlib import Path
from typing import Any

from utils.files import COMPRESSION_SUFFIXES, InputError, file_fingerprint, open_text, require_file
from utils.json_io import iter_json_list, json_list_writer
from utils.manifest import read_manifest, require_as_written
from utils.progress import ProgressBar
from utils.text.expert_spans import cuts_character
from utils.text.python_docs import python_docs

LOGGER = logging.getLogger(__name__)
STAGE = "preprocess_dataset.py"
SPLITS = ("train", "validation", "test")
INPUT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
# The medical instructions come without a validation split: it is cut off the end of train.
N_MEDICAL_VALIDATION = 5000
# Rows of a parquet file that are decoded at once; a row group of the hub's holds up to a million.
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Passage:
    """One document; `spans` are the (start, end) character offsets of its expert chunks, None where none were given."""

    text: str
    spans: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Source:
    """Where the passages come from: the user's files, the hub, or a folder with copies of the hub's repositories."""

    dataset: str
    input_files: tuple[Path, ...] = ()
    text_column: str = "text"
    hub_mirror: Path | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class SplitRule:
    """Which split a passage belongs to, by a hash of the seed and its text: copies of a text are all in one split."""

    validation_fraction: float
    test_fraction: float
    seed: int

    def splits(self) -> set[str]:
        """The splits that passages can belong to, which are those whose fraction is not 0."""
        fractions = {"validation": self.validation_fraction, "test": self.test_fraction}
        return {"train", *(split for split, fraction in fractions.items() if fraction)}

    def split_of(self, text: str) -> str:
        digest = hashlib.sha256(f"{self.seed}\n{text}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
        if point < self.test_fraction:
            return "test"
        return "validation" if point < self.test_fraction + self.validation_fraction else "train"


@dataclass
class SplitSize:
    """How much a split file holds."""

    n_passages: int = 0
    n_characters: int = 0

    def add(self, passage: Passage) -> None:
        self.n_passages += 1
        self.n_characters += len(passage.text)


# ---- Split files


def split_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.json"


def splits_in(folder: Path) -> list[str]:
    """The splits whose files are in the folder."""
    return [split for split in SPLITS if split_path(folder, split).exists()]


def read_passages(path: Path) -> Iterator[Passage]:
    """The passages of a split file, streamed.

    Raises InputError at once where the file is missing, and while it is read where it is not UTF-8, not whole, not a
    list, or where an entry has no sound `text` or `spans`.
    """
    there = [f"{split}.json" for split in splits_in(path.parent)]
    others = f" (in that folder: {', '.join(there)})" if there else ""
    require_file(path, f"preprocess_dataset.py writes{others}")
    _require_as_written(path)
    return _json_entries(path, "text")


def _require_as_written(path: Path) -> None:
    """Raise InputError where stage 1 wrote a split file and it was changed since; takes a second per GB."""
    manifest_path = path.with_name("manifest.json")
    try:
        manifest = read_manifest(manifest_path, STAGE)
    except InputError:
        return  # it is the user's own, or of a run before there were manifests
    if manifest.complete:
        require_as_written(manifest_path, manifest, [path], verify=True)


def write_splits(source: Source, rule: SplitRule, folder: Path, max_passages: int | None) -> dict[str, SplitSize]:
    """Write the split files that are missing, at most `max_passages` each (None: all); returns the sizes of all.

    `rule` counts only for corpora that come without splits. Raises InputError where the source cannot be read or holds
    no passage, and then leaves no file of the splits that it was writing.
    """
    corpus = CORPORA[source.dataset]
    missing = [split for split in SPLITS if split not in splits_in(folder)]
    LOGGER.debug("reading %s from %s for %s", source.dataset, source.input_files or "its corpus", missing or "nothing")
    sizes: dict[str, SplitSize] = {}
    if isinstance(corpus, WithSplits):
        for split in missing:
            passages = _with_text(corpus.read(source, split), f"{source.dataset}, split {split}")
            routed = ((split, passage) for passage in passages)
            sizes |= _write(routed, folder, [split], {split}, max_passages, f"{source.dataset} {split}")
    elif missing:
        passages = _with_text(corpus.read(source), source.dataset)
        routed = ((rule.split_of(passage.text), passage) for passage in passages)
        sizes = _write(routed, folder, missing, rule.splits() & set(missing), max_passages, source.dataset)
    return {split: sizes.get(split) or _size_of(split_path(folder, split)) for split in SPLITS}


def _write(
    routed: Iterable[tuple[str, Passage]],
    folder: Path,
    splits: list[str],
    unfilled: set[str],
    max_passages: int | None,
    desc: str,
) -> dict[str, SplitSize]:
    """Write some split files in one pass over passages that know their split.

    Ends as soon as all of `unfilled`, the splits that take passages, are full; the others stay empty.
    """
    sizes = {split: SplitSize() for split in splits}
    total = max_passages and max_passages * len(unfilled)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(json_list_writer(split_path(folder, split))) for split in splits}
        bar = stack.enter_context(ProgressBar(desc=desc, unit="passages", total=total))
        for split, passage in routed:
            if split in unfilled:
                spans = {} if passage.spans is None else {"spans": passage.spans}
                writers[split]({"text": passage.text, **spans})
                sizes[split].add(passage)
                bar.update()
                if sizes[split].n_passages == max_passages:
                    unfilled = unfilled - {split}
            if not unfilled:
                break
        bar.end()
    return sizes


def _size_of(path: Path) -> SplitSize:
    size = SplitSize()
    for passage in read_passages(path):
        size.add(passage)
    return size


def _with_text(passages: Iterable[Passage], name: str) -> Iterator[Passage]:
    """The passages that have a visible character; raises InputError at the end where none has."""
    is_empty = True
    for passage in passages:
        if passage.text and not passage.text.isspace():
            is_empty = False
            yield passage
    if is_empty:
        raise InputError(f"{name}: holds no passage with text in it; give other input")


# ---- Entries


def _json_entries(path: Path, text_column: str) -> Iterator[Passage]:
    for n, entry in enumerate(iter_json_list(path), 1):
        yield _passage(entry, f"{path}: entry {n}", text_column)


def _json_lines(lines: Iterable[str], name: str, text_column: str) -> Iterator[Passage]:
    for n, line in enumerate(lines, 1):
        where = f"{name}: line {n}"
        if line.isspace() or not line:
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise InputError(f"{where} is not valid JSON ({reason}); expected one JSON object a line") from error
        yield _passage(entry, where, text_column)


def _passage(entry: Any, where: str, text_column: str) -> Passage:
    """The passage of an entry or a row; raises InputError, with its place, where it is not a passage."""
    if not isinstance(entry, dict):
        raise InputError(f'{where}: is {_shown(entry)}; expected an object such as {{"{text_column}": "…"}}')
    if text_column not in entry:
        raise _no_column(where, text_column, list(entry))
    text = entry[text_column]
    if not isinstance(text, str):
        raise InputError(f"{where}: its {text_column!r} is {_shown(text)}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (U+{ord(text[error.start]):04X} at character {error.start})"
        raise InputError(f"{where}: its {text_column!r} holds {half}; expected Unicode text") from error
    return Passage(text, _spans(entry.get("spans"), text, where))


def _no_column(where: str, text_column: str, names: list[str]) -> InputError:
    shown = ", ".join(map(repr, names[:9])) or "nothing"
    return InputError(
        f"{where}: has no {text_column!r}, only {shown}; preprocess_dataset.py --text_column names the text's column"
    )


def _spans(spans: Any, text: str, where: str) -> list[tuple[int, int]] | None:
    """An entry's spans in the order of the text; raises InputError where one is malformed, overlaps or cuts a character."""
    if spans is None:
        return None
    expected = f"expected [start, end] character offsets with 0 <= start < end <= {len(text)}"
    if not isinstance(spans, list):
        raise InputError(f"{where}: its 'spans' are {_shown(spans)}; expected a list of [start, end] pairs")
    for span in spans:
        is_pair = isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)
        if not is_pair or not 0 <= span[0] < span[1] <= len(text):
            raise InputError(f"{where}: among its 'spans' is {_shown(span)}; {expected}")
        if cut := next((offset for offset in span if cuts_character(text, offset)), None):
            character = f"cuts a character in two at {cut} ({_shown(text[cut - 1 : cut + 1])})"
            raise InputError(f"{where}: among its 'spans' is {_shown(span)}, which {character}; move that border")
    ordered = sorted((start, end) for start, end in spans)
    for (first, before), (start, end) in pairwise(ordered):
        if start < before:
            overlap = f"[{first}, {before}] and [{start}, {end}], which overlap"
            raise InputError(f"{where}: among its 'spans' are {overlap}; expected spans that at most touch")
    return ordered


def _shown(value: Any) -> str:
    """A value as JSON, short enough for a message."""
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else shown[:57] + "…"


# ---- The hub


def _repository(source: Source, name: str) -> str:
    """A dataset repository as `load_dataset` names it: by its hub name, or by the folder in the mirror."""
    return name if source.hub_mirror is None else str(source.hub_mirror / name)


def _repository_files(source: Source, name: str, pattern: str) -> str:
    """Files of a dataset repository as the builders of `load_dataset` name them."""
    if source.hub_mirror is None:
        return f"hf://datasets/{name}/{pattern}"
    return f"{escape(str(source.hub_mirror / name))}/{pattern}"


def _hub_rows(source: Source, name: str, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The rows of a streamed `load_dataset` of the hub repository `name`; its failures become InputError."""
    # Imported late: it takes a second, and wrong flags are answered before.
    import datasets
    from pyarrow import ArrowException

    if source.hub_mirror is None:
        remedy = "check the network, or give a folder that holds copies of the hub's datasets with --hub_mirror"
    else:
        remedy = f"expected a whole copy of the hub's repository in {source.hub_mirror / name}"
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error is in the message
    datasets.disable_progress_bars()
    _require_cache(source.cache_dir or Path(datasets.config.HF_DATASETS_CACHE))
    try:
        yield from datasets.load_dataset(*args, streaming=True, cache_dir=source.cache_dir, **kwargs)
    except Exception as error:
        # The hub's client lets errors of its HTTP library through, whose name differs from version to version.
        is_httpx = any(kind.__module__.startswith("httpx") for kind in type(error).__mro__)
        if not is_httpx and not isinstance(error, OSError | ValueError | EOFError | LZMAError | ArrowException):
            raise
        raise InputError(f"{source.dataset}: {name} cannot be read ({_first_line(error)}); {remedy}") from error


def _require_cache(folder: Path) -> None:
    """Raise InputError where `datasets` cannot keep what it reads, as with a HOME that is read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        raise InputError(f"{folder}: the cache of Hugging Face datasets is not writable; choose one with --cache_dir")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def wikitext_103(source: Source, split: str) -> Iterator[Passage]:
    """WikiText-103's articles, each from its ` = Title = ` to the next, joined from the hub's lines."""
    name = "Salesforce/wikitext"
    rows = _hub_rows(source, name, _repository(source, name), "wikitext-103-v1", split=split, batch_size=ROWS_AT_ONCE)
    lines: list[str] = []
    for row in rows:
        line = row["text"] or " \n"  # the hub leaves nothing of WikiText's blank lines
        if _is_title(line) and lines:
            yield Passage(_article(lines))
            lines = []
        lines.append(line)
    if lines:
        yield Passage(_article(lines))


def _is_title(line: str) -> bool:
    """Whether a line is an article's title, ` = Title = `; a section's is ` = = Section = = `."""
    is_heading = line.startswith(" = ") and line.endswith(" = \n") and len(line) > len(" = = \n")
    return is_heading and not line.startswith(" = = ")


def _article(lines: list[str]) -> str:
    """The text of an article, without the blank lines between it and the next."""
    return "".join(lines).rstrip() + "\n"


def medical_instructions(source: Source, split: str) -> Iterator[Passage]:
    """Medical conversations; the last 5,000 of the hub's train split are the validation split."""
    name = "Mohammed-Altaf/medical-instruction-100k"
    hub_split = "test" if split == "test" else "train"
    rows = _hub_rows(source, name, _repository(source, name), split=hub_split, batch_size=ROWS_AT_ONCE)
    passages = (_passage(row, f"{name}: row {n}", "Conversation") for n, row in enumerate(rows, 1))
    if split == "test":
        yield from passages
        return
    held_back: deque[Passage] = deque(islice(passages, N_MEDICAL_VALIDATION))
    for passage in passages:
        held_back.append(passage)
        oldest = held_back.popleft()
        if split == "train":
            yield oldest
    if split == "validation":
        yield from held_back


def federal_register(source: Source) -> Iterator[Passage]:
    """The documents of the United States' Federal Register, from the Pile of Law."""
    name = "pile-of-law/pile-of-law"
    files = _repository_files(source, name, "data/train.federal_register*.jsonl.xz")
    # Read as lines: `datasets` guesses the types of JSON columns from the first rows and stops at rows that differ.
    rows = _hub_rows(source, name, "text", data_files=files, split="train")
    yield from _json_lines((row["text"] for row in rows), name, "text")


def dockerfiles(source: Source) -> Iterator[Passage]:
    """The Dockerfiles among the code files of GitHub."""
    name = "codeparrot/github-code"
    files = _repository_files(source, name, "data/train-*.parquet")
    filters = [("language", "==", "Dockerfile")]
    columns: dict[str, Any] = {"columns": ["code"], "filters": filters, "batch_size": ROWS_AT_ONCE}
    rows = _hub_rows(source, name, "parquet", data_files=files, split="train", **columns)
    for n, row in enumerate(rows, 1):
        yield _passage(row, f"{name}: Dockerfile {n}", "code")


# ---- The user's files


def find_input_files(paths: list[Path]) -> list[Path]:
    """The files that the user's paths name, each once; of a folder all files in sorted order but the hidden ones.

    Links to folders are followed. Raises InputError where a path is missing, a link leads nowhere, a file is of no kind
    we read, or a folder holds none we read.
    """
    kinds = f"{', '.join(INPUT_SUFFIXES)}, or one of these and {', '.join(COMPRESSION_SUFFIXES)}"
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in _files_below(path) if _kind(file) in INPUT_SUFFIXES)
            if not inside:
                raise InputError(f"{path}: holds no file that ends in {kinds}; give another folder")
            found += inside
        else:
            require_file(path, f"holds the text, or a folder of files ({kinds})")
            if _kind(path) not in INPUT_SUFFIXES:
                raise InputError(f"{path}: ends in {path.suffix or 'nothing'!r}; expected {kinds}")
            found.append(path)
    return [require_file(file, "holds text") for file in dict.fromkeys(found)]


def _files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below it, hidden ones apart; a folder that several links lead to is read once."""
    seen = {folder.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders.copy():
            target = Path(place, name).resolve()
            if target in seen:  # a link to a folder above it has no end
                folders.remove(name)
            seen.add(target)
        for name in names:
            file = Path(place, name)
            if name.startswith("."):
                continue
            if file.is_symlink() and not file.exists():
                raise InputError(
                    f"{file}: is a link to {os.readlink(file)}, which does not exist; correct or remove it"
                )
            if file.is_file():
                yield file


def _kind(file: Path) -> str:
    """What a file holds, as its suffix says: `.jsonl` for `part.jsonl` and `part.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] != ".parquet" else ""  # Parquet compresses what it holds
    return suffixes[-1] if suffixes else ""


def files_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the kinds and contents of files in their order, whatever their names and places."""
    bar = ProgressBar(files, desc="looking at the input", unit="file", leave=False)
    kinds_and_contents = [(_kind(file), file_fingerprint(file)) for file in bar]
    return hashlib.sha256(repr(kinds_and_contents).encode()).hexdigest()


def local_files(source: Source) -> Iterator[Passage]:
    """The passages of the user's files: a txt is one, a jsonl's lines, a json list's entries, a parquet's rows."""
    for path in source.input_files:
        kind = _kind(path)
        if kind == ".parquet":
            yield from _parquet_rows(path, source.text_column)
        elif kind == ".txt":
            with open_text(path) as file:
                yield Passage(file.read())
        elif kind == ".jsonl" or _is_json_lines(path):
            with open_text(path) as file:
                yield from _json_lines(file, str(path), source.text_column)
        else:
            yield from _json_entries(path, source.text_column)


def _is_json_lines(path: Path) -> bool:
    """Whether a `.json` file begins with an object: then it is JSON Lines, as some tools name them."""
    with open_text(path) as file:
        return file.read(4096).lstrip().startswith("{")


def _parquet_rows(path: Path, text_column: str) -> Iterator[Passage]:
    """The passages of a parquet file; one of its row groups is read at a time."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    numbers = count(1)
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise _no_column(str(path), text_column, names)
            columns = [name for name in (text_column, "spans") if name in names]
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        yield _passage(row, f"{path}: row {next(numbers)}", text_column)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = _first_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); expected a whole parquet file") from error


def embedded_documents(_: Source, split: str) -> Iterator[Passage]:
    """Python's own documentation, which every machine has."""
    yield from map(Passage, python_docs(split))


# ---- The registry


@dataclass(frozen=True)
class WithSplits:
    """A corpus that has splits: `read(source, split)` yields the passages of one."""

    read: Callable[[Source, str], Iterator[Passage]]


@dataclass(frozen=True)
class WithoutSplits:
    """A corpus that is one stream, `read(source)`; a `SplitRule` assigns its passages to splits."""

    read: Callable[[Source], Iterator[Passage]]


CORPORA: dict[str, WithSplits | WithoutSplits] = {
    "wikitext-103-v1": WithSplits(wikitext_103),
    "med_instruction": WithSplits(medical_instructions),
    "pile-of-law-federal_register": WithoutSplits(federal_register),
    "Dockerfile": WithoutSplits(dockerfiles),
    "python-docs": WithSplits(embedded_documents),
    "local": WithoutSplits(local_files),
}
