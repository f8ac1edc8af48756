"""Look into a datastore: its size and tries, the chunks of one entry token, or what it would propose in a text.

Reads   DIRECTORY   a trie folder of stages 3 and 4, or a folder that holds just one
Run     python -m utils.inspect_datastore output/python-docs --model_path examples/models/large
        python -m utils.inspect_datastore output/python-docs --model_path examples/models/large --token " the"
        python -m utils.inspect_datastore output/python-docs --model_path examples/models/large --text "Return the sum of"

Nothing is written: tries are read as stages 3 and 4 left them, not as stage 5 flattens them. Without --model_path token
ids stand for text, and --token_id for --token.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.cli import NON_NEGATIVE_INT, POSITIVE_INT, Parser, add_model
from utils.datastore.flattened import FOLDER
from utils.datastore.trie_files import (
    HIDDEN_STATES_MANIFEST,
    HIDDEN_STATES_STAGE,
    MANIFEST,
    STAGE,
    datastore_token_ids,
    entry_token_ids,
    is_trie_folder,
    read_trie_positions,
    read_trie_rows,
    trie_path,
)
from utils.files import InputError, require_folder
from utils.manifest import read_finished
from utils.progress import ProgressBar
from utils.tables import align, visible

if TYPE_CHECKING:  # torch and transformers take seconds to import, and wrong flags are answered before
    from transformers import PreTrainedTokenizerBase

    from utils.datastore.store import TokenTrie
    from utils.lm.model import CausalLM

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
N_GROUPS = 5  # of the similarities, equally large
# Token ids as a reader wants to see them.
Shown = Callable[[Sequence[int]], str]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("directory", type=Path, help="trie folder, or the --output_dir of stage 3")
    add_model(parser, default="none: token ids are shown instead of text")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--token", metavar="TEXT", help="show the chunks of this entry token, such as ' the'")
    what.add_argument("--token_id", type=NON_NEGATIVE_INT, metavar="ID", help="the same by the token's id")
    what.add_argument("--text", help="show what would be proposed after each of its tokens")
    parser.add_argument("--largest", type=POSITIVE_INT, default=10, help="tries listed, those with the most chunks")
    parser.add_argument("--branches", type=POSITIVE_INT, default=40, help="lines of --token's tree")
    parser.add_argument("--sample", type=NON_NEGATIVE_INT, default=1000, help="chunks compared with others; 0: none")
    args = parser.parse_args(argv)
    for flag in ("token", "text"):
        if getattr(args, flag) == "":
            parser.error(f"--{flag} is empty")
        if getattr(args, flag) is not None and args.model_path is None:
            instead = "; --token_id needs none" if flag == "token" else ""
            parser.error(f"--{flag} needs --model_path, the model that generates with the datastore{instead}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = find_datastore(args.directory)
    tokenizer = read_tokenizer(args, folder) if args.model_path else None
    shown = ids_as_text if tokenizer is None else quoted_by(tokenizer)
    print(folder)
    if args.text is not None:
        assert tokenizer is not None
        lines = text_lines(args, folder, tokenizer, shown)
    elif args.token is not None or args.token_id is not None:
        token_id = args.token_id if tokenizer is None or args.token is None else token_of(args.token, tokenizer)
        lines = token_lines(args, folder, token_id, shown)
    else:
        lines = overview_lines(args, folder, shown)
    for line in lines:
        print(line)


# ---- Tokens


def read_tokenizer(args: argparse.Namespace, folder: Path) -> "PreTrainedTokenizerBase":
    from utils.datastore.store import require_made_with
    from utils.lm.fingerprint import tokenizer_fingerprint
    from utils.lm.model import load_tokenizer

    tokenizer = load_tokenizer(args.model_path, args.cache_dir)
    require_made_with(folder, args.model_path, tokenizer_fingerprint(tokenizer))
    return tokenizer


def ids_as_text(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


def quoted_by(tokenizer: "PreTrainedTokenizerBase") -> Shown:
    """Shows tokens as text in quotes, line ends and the like as JSON writes them."""
    return lambda token_ids: visible(json.dumps(str(tokenizer.decode(list(token_ids))), ensure_ascii=False))


def token_of(text: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of a text that is one token; raises InputError where it is several."""
    token_ids = list(tokenizer.encode(text, add_special_tokens=False))
    if len(token_ids) != 1:
        shown = quoted_by(tokenizer)
        parts = ", ".join(f"{shown([token_id])} ({token_id})" for token_id in token_ids)
        got = f"is {len(token_ids)} tokens for {tokenizer.name_or_path}: {parts}" if token_ids else "is no token"
        raise InputError(f"--token {text!r}: {got}; give one of them, with its space if it has one, or --token_id")
    return int(token_ids[0])


# ---- The whole datastore


def overview_lines(args: argparse.Namespace, folder: Path, shown: Shown) -> Iterator[str]:
    overview = survey(folder)
    yield from size_lines(overview)
    if not len(overview.rows):
        yield "It is empty: stage 3 found no token above γ, and no span."
        return
    yield from table_lines(overview, args.largest, shown)
    yield ""
    if not has_context_vectors(folder):
        yield "No context vectors yet, so nothing is similar to anything: run make_token_trie.py."
        return
    if not args.sample:
        return
    found = sample_neighbors(folder, overview, args.sample)
    n_alone = found.n_drawn - len(found.similarities)
    yield f"The most similar other chunk of the same entry token, for {found.n_drawn:,} chunks drawn at random"
    if len(found.similarities):
        rows = [("similarity", "chunks", "begins with the same token (%)", "the same, or one begins the other (%)")]
        for lowest, highest, n, alike, fits in found.groups():
            rows.append((f"{lowest:.3f} to {highest:.3f}", f"{n:,}", f"{alike:.1%}"[:-1], f"{fits:.1%}"[:-1]))
        yield from align(rows)
    if n_alone:
        yield f"{n_alone:,} of them are alone in their trie."


def size_lines(overview: "Overview") -> Iterator[str]:
    names, counts = overview.arguments, overview.counts
    source = {"expert": "marked spans", "both": f"γ {names['tok_prob_threshold']} and marked spans"}.get(
        names.get("chunk_source", ""), f"γ {names['tok_prob_threshold']}"
    )
    yield f"  chunks   {names['model_ds']} at {source}, of {names['dataset_name']} {names['partition']}"
    if overview.hidden is not None:
        size, dtype = overview.hidden["hidden_size"], overview.hidden["dtype"]
        yield f"  context  hidden states of {names['model_gen']}, {size} numbers in {dtype}"
    plateaus = f"of {counts['plateaus']:,} plateaus in {counts['tokens']:,} tokens"
    yield f"  size     {counts['rows']:,} chunks {plateaus}, {counts['entry_tokens']:,} token tries"
    shares = ", ".join(f"{kind} {n / 1e6:,.1f}" for kind, n in overview.n_bytes.items() if n)
    yield f"  on disk  {sum(overview.n_bytes.values()) / 1e6:,.1f} MB: {shares}"
    yield ""


def table_lines(overview: "Overview", n_largest: int, shown: Shown) -> Iterator[str]:
    one_each = np.ones_like(overview.rows)
    lengths, n_each = overview.chunk_lengths, overview.chunks_of_length
    of_rows = [*weighted_quantiles(np.sort(overview.rows), one_each), overview.rows.mean()]
    of_lengths = [*weighted_quantiles(lengths, n_each), (lengths * n_each).sum() / n_each.sum()]
    names = {0.0: "least", 0.5: "median", 1.0: "most"}
    header = ["", *(names.get(q, f"{q:.0%}") for q in QUANTILES), "mean"]
    rows = (("chunks of a token trie", of_rows), ("tokens of a chunk", of_lengths))
    table = [[name, *(f"{n:,}" for n in found[:-1]), f"{found[-1]:,.2f}"] for name, found in rows]
    yield from align([header, *table])
    yield ""
    chosen = overview.largest[:n_largest]
    table = [["largest tries", "token id", "chunks", "% of all"]]
    for i in chosen.tolist():
        token_id, n = int(overview.entry_token_ids[i]), int(overview.rows[i])
        table.append([shown([token_id]), str(token_id), f"{n:,}", f"{100 * n / overview.rows.sum():.1f}"])
    yield from align(table)


# ---- One entry token


def token_lines(args: argparse.Namespace, folder: Path, token_id: int, shown: Shown) -> Iterator[str]:
    name = f"{shown([token_id])} ({token_id})" if args.model_path else f"token id {token_id}"
    chunks = read_chunks(folder, token_id, name)
    tree = prefix_tree(chunks)
    n_different = len(set(map(tuple, chunks)))
    yield f"  {name}: {len(chunks):,} chunks, {n_different:,} of them different"
    yield ""
    yield from branch_lines(tree, heaviest(tree, args.branches), shown, len(f"{len(chunks):,}"), 0)


def branch_lines(branches: list["Branch"], kept: set[int], shown: Shown, width: int, depth: int) -> Iterator[str]:
    """How many chunks begin with the tokens down to here, those tokens, and what becomes of the chunks."""
    left_out = [branch for branch in branches if id(branch) not in kept]
    for branch in branches:
        if id(branch) in kept:
            yield f"{branch.n_rows:{width},}  {'    ' * depth}{shown(branch.token_ids)}{_fate(branch, kept)}"
            yield from branch_lines(branch.branches, kept, shown, width, depth + 1)
    if left_out and not depth:
        yield f"{sum(branch.n_rows for branch in left_out):{width},}  in {_ways(len(left_out), 'other ')}"


def _fate(branch: "Branch", kept: set[int]) -> str:
    hidden = [other for other in branch.branches if id(other) not in kept]
    notes = [f"{branch.n_ending:,} end here"] if branch.n_ending and branch.branches else []
    if hidden:
        others = "others" if len(hidden) < len(branch.branches) else "go on"
        notes.append(f"{sum(other.n_rows for other in hidden):,} {others} in {_ways(len(hidden))}")
    return f"   ({', '.join(notes)})" if notes else ""


def _ways(n: int, kind: str = "") -> str:
    return f"{n:,} {kind}{'way' if n == 1 else 'ways'}"


# ---- A text


def text_lines(
    args: argparse.Namespace, folder: Path, tokenizer: "PreTrainedTokenizerBase", shown: Shown
) -> Iterator[str]:
    from utils.datastore.store import require_made_with
    from utils.lm.fingerprint import model_fingerprint, tokenizer_fingerprint
    from utils.lm.model import load_lm

    fingerprint = model_fingerprint(args.model_path, args.cache_dir)
    require_made_with(folder, args.model_path, tokenizer_fingerprint(tokenizer), fingerprint)
    lm = load_lm(args.model_path, args.device, args.dtype, args.cache_dir)
    token_ids = list(tokenizer(args.text, verbose=False)["input_ids"])
    proposals = proposals_in(folder, lm, token_ids)
    rows = [("", "token", "proposed chunk", "as in the text", "similarity", "first token")]
    for proposal in proposals:
        agrees, similarity, prob = "", "", ""
        if proposal.chunk_ids:
            similarity, prob = f"{proposal.similarity:.3f}", f"{proposal.first_token_prob:.3f}"
            agrees = f"{proposal.n_right} of {proposal.n_known}" if proposal.n_known else "at its end"
        chunk = shown(proposal.chunk_ids) if proposal.chunk_ids else "-"
        rows.append((str(proposal.position), shown([proposal.entry_token_id]), chunk, agrees, similarity, prob))
    yield from align(rows, n_left=4)
    yield ""
    known = [proposal for proposal in proposals if proposal.n_known]
    n_right = sum(proposal.n_right == proposal.n_known for proposal in known)
    n_proposed = sum(not math.isnan(proposal.similarity) for proposal in proposals)
    yield f"{n_proposed:,} of {len(proposals):,} tokens have a proposal; {n_right:,} of {len(known):,} are what follows"
    if n_proposed:
        yield "first token: the probability that the LM gives to the chunk's first token, relative to its likeliest token"


# ---- Which datastore


def find_datastore(directory: Path) -> Path:
    """The trie folder that `directory` is or holds; raises InputError where there is none, or more than one."""
    require_folder(directory, f"{STAGE} wrote its tries to")
    if is_trie_folder(directory):
        return directory
    folders = sorted(path.parent for path in directory.glob(f"**/{MANIFEST}") if is_trie_folder(path.parent))
    if not folders:
        raise InputError(f"{directory}: holds no datastore; give the --output_dir of {STAGE}, or a trie folder in it")
    if len(folders) > 1:
        raise InputError(f"{directory}: holds {len(folders)} datastores, {', '.join(map(str, folders))}; give one")
    return folders[0]


# ---- Sizes


@dataclass(frozen=True)
class Overview:
    """What all tries of a datastore come to. hidden: what stage 4 said; None where it has not ended."""

    arguments: dict[str, Any]
    counts: dict[str, Any]
    hidden: dict[str, Any] | None
    n_bytes: dict[str, int]  # by kind of file
    rows: np.ndarray  # (E,) of each entry token
    entry_token_ids: np.ndarray  # (E,) ascending
    chunk_lengths: np.ndarray  # (L,) ascending, the lengths that there are
    chunks_of_length: np.ndarray  # (L,) rows of each

    @property
    def largest(self) -> np.ndarray:
        """Indices (E,) of the tries, those with the most rows first."""
        return np.lexsort((self.entry_token_ids, -self.rows))


def survey(folder: Path) -> Overview:
    """Read where every row stands; raises InputError where stage 3 did not end or a file is damaged."""
    manifest = read_finished(folder / MANIFEST, STAGE)
    hidden = None
    if has_context_vectors(folder):
        hidden = read_finished(folder / HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE).inputs
    token_ids = entry_token_ids(folder)
    rows = np.zeros(len(token_ids), dtype=np.int64)
    by_depth: dict[int, int] = {}
    for i, token_id in enumerate(ProgressBar(token_ids, desc="reading token tries", unit="trie", leave=False)):
        depths = read_trie_positions(folder, token_id)[2]
        rows[i] = sum(depths.values())
        for depth, n_rows in depths.items():
            by_depth[depth] = by_depth.get(depth, 0) + n_rows
    lengths = np.array(sorted(by_depth), dtype=np.int64)
    return Overview(
        arguments=manifest.arguments,
        counts=manifest.results,
        hidden=hidden,
        n_bytes=_bytes_by_kind(folder),
        rows=rows,
        entry_token_ids=np.array(token_ids, dtype=np.int64),
        chunk_lengths=lengths - 1,
        chunks_of_length=np.array([by_depth[depth] for depth in lengths.tolist()], dtype=np.int64),
    )


def has_context_vectors(folder: Path) -> bool:
    """Whether stage 4 has begun here."""
    return (folder / HIDDEN_STATES_MANIFEST).is_file()


def _bytes_by_kind(folder: Path) -> dict[str, int]:
    n_bytes = dict.fromkeys(("chunks", "positions", "context vectors", "flattened for stage 5", "other"), 0)
    for entry in os.scandir(folder):
        if entry.is_file():
            n_bytes[_kind(entry.name)] += entry.stat().st_size
    if (folder / FOLDER).is_dir():
        n_bytes["flattened for stage 5"] = sum(entry.stat().st_size for entry in os.scandir(folder / FOLDER))
    return n_bytes


def _kind(name: str) -> str:
    if name.endswith(".h5"):
        return "context vectors"
    if name.startswith("tok_pos_"):
        return "positions"
    return "chunks" if name.endswith(".json") and not name.endswith(MANIFEST) else "other"


def weighted_quantiles(values: np.ndarray, counts: np.ndarray) -> list[int]:
    """`QUANTILES` of values (n,) ascending that are there counts (n,) times; n >= 1."""
    ends = np.cumsum(counts)
    places = np.ceil(np.array(QUANTILES) * ends[-1]).clip(1)
    return values[np.searchsorted(ends, places)].tolist()


# ---- Similarities within tries


@dataclass(frozen=True)
class Neighbors:
    """For some rows drawn at random: the most similar other row of the same entry token. Arrays are of length n."""

    n_drawn: int
    similarities: np.ndarray  # of those that are not alone in their trie
    begins_alike: np.ndarray  # bool: its chunk begins with the same token
    fits: np.ndarray  # bool: its chunk is the same, or one begins with the other

    def groups(self) -> Iterator[tuple[float, float, int, float, float]]:
        """From the least similar: lowest and highest similarity, how many, shares that begin alike and that fit."""
        order = np.argsort(self.similarities, kind="stable")
        for part in np.array_split(order, N_GROUPS):
            if len(part):
                found = self.similarities[part]
                alike, fits = (float(which[part].mean()) for which in (self.begins_alike, self.fits))
                yield float(found.min()), float(found.max()), len(part), alike, fits


def sample_neighbors(folder: Path, overview: Overview, n_sampled: int, seed: int = 0) -> Neighbors:
    """Draw at most n_sampled rows of tries with context vectors, without replacement."""
    kept = np.isin(overview.entry_token_ids, datastore_token_ids(folder))
    token_ids, ends = overview.entry_token_ids[kept], np.cumsum(overview.rows[kept])
    n_rows = int(ends[-1]) if len(ends) else 0
    drawn = np.sort(np.random.default_rng(seed).choice(n_rows, min(n_sampled, n_rows), replace=False))
    tries = np.searchsorted(ends, drawn, side="right")
    starts = ends - overview.rows[kept]
    found: list[tuple[float, bool, bool]] = []
    from utils.datastore.store import flattened_trie

    bar = ProgressBar(np.unique(tries).tolist(), desc="comparing chunks", unit="trie", leave=False)
    for i in bar:
        if overview.rows[kept][i] > 1:
            trie = flattened_trie(folder, int(token_ids[i]))
            found += [_neighbor(trie, row) for row in (drawn[tries == i] - starts[i]).tolist()]
    similarities, alike, fits = zip(*found, strict=True) if found else ((), (), ())
    return Neighbors(len(drawn), np.array(similarities), np.array(alike, dtype=bool), np.array(fits, dtype=bool))


def _neighbor(trie: "TokenTrie", row: int) -> tuple[float, bool, bool]:
    import torch

    cosines = torch.mv(trie.context_vectors, trie.context_vectors[row])
    cosines[row] = -torch.inf
    nearest = int(cosines.argmax())
    chunk, other = trie.chunk(row), trie.chunk(nearest)
    n_common = min(len(chunk), len(other))
    return float(cosines[nearest]), chunk[0] == other[0], chunk[:n_common] == other[:n_common]


# ---- The chunks of one entry token


@dataclass
class Branch:
    """Tokens that chunks have in common after those above; n_rows pass here, n_ending end with its last token."""

    token_ids: list[int]
    n_rows: int
    n_ending: int
    branches: list["Branch"]


def read_chunks(folder: Path, entry_token_id: int, name: str) -> list[list[int]]:
    """The chunks of an entry token, prefix-sorted; raises InputError, which calls it `name`, where it has none."""
    if not trie_path(folder, entry_token_id).is_file():
        raise InputError(f"{folder}: no chunk follows {name}; give another token")
    rows = read_trie_rows(folder, entry_token_id)
    chunks = [ids.tolist() for ids in np.split(rows.chunk_ids, rows.chunk_offsets[1:-1])]
    return sorted(chunks)


def prefix_tree(chunks: list[list[int]]) -> list[Branch]:
    """Prefix-sorted chunks as a tree: a branch ends where a chunk does or where they part; the most frequent first."""
    return _branches(chunks, 0)


def _branches(chunks: list[list[int]], depth: int) -> list[Branch]:
    """Of prefix-sorted chunks that agree in their first `depth` tokens and are longer."""
    found = []
    first = 0
    while first < len(chunks):
        end = first
        while end < len(chunks) and chunks[end][depth] == chunks[first][depth]:
            end += 1
        group = chunks[first:end]
        # Prefix-sorted: what the first and the last have in common, all between have, and the first is no longer.
        n_common = depth
        while n_common < len(group[0]) and group[0][n_common] == group[-1][n_common]:
            n_common += 1
        longer = [chunk for chunk in group if len(chunk) > n_common]
        found.append(
            Branch(group[0][depth:n_common], len(group), len(group) - len(longer), _branches(longer, n_common))
        )
        first = end
    return sorted(found, key=lambda branch: -branch.n_rows)


def heaviest(branches: list[Branch], n_branches: int) -> set[int]:
    """The ids (Python's) of the branches with the most rows; a branch comes with those that it grows from."""
    everything = [(branch.n_rows, depth, branch) for depth, branch in _walk(branches)]
    everything.sort(key=lambda entry: (-entry[0], entry[1]))
    return {id(branch) for _, _, branch in everything[:n_branches]}


def _walk(branches: list[Branch], depth: int = 0) -> Iterator[tuple[int, Branch]]:
    for branch in branches:
        yield depth, branch
        yield from _walk(branch.branches, depth + 1)


# ---- What would be proposed in a text


@dataclass(frozen=True)
class Proposal:
    """What the datastore has after one token of a text. chunk_ids is empty, similarity NaN, where it has nothing.

    first_token_prob: what the LM gives to the chunk's first token, relative to its likeliest; n_right: tokens of the
    chunk from its first on that the text goes on with; n_known: tokens of the chunk that the text is long enough for.
    """

    position: int
    entry_token_id: int
    similarity: float
    first_token_prob: float
    chunk_ids: list[int]
    n_right: int
    n_known: int


def proposals_in(folder: Path, lm: "CausalLM", token_ids: list[int]) -> list[Proposal]:
    """One proposal for each token of the text, which the LM reads in one pass; raises InputError where it is too long."""
    import torch

    from utils.datastore.store import flattened_trie
    from utils.lm.scoring import relative_probs

    if lm.n_positions is not None and len(token_ids) > lm.n_positions:
        raise InputError(f"--text: is {len(token_ids)} tokens, {lm.name} reads {lm.n_positions} at most; shorten it")
    with torch.inference_mode():
        hidden_states, logits = lm.forward(torch.tensor([token_ids], device=lm.device))
        queries, logits = hidden_states[0].float().cpu(), logits[0].float().cpu()
    nearest: dict[int, tuple[float, float, list[int]]] = {}
    for token_id in sorted(set(token_ids) & set(datastore_token_ids(folder))):
        trie = flattened_trie(folder, token_id)
        for position in (n for n, other in enumerate(token_ids) if other == token_id):
            row, similarity = trie.index.nearest(queries[position])
            prob = float(relative_probs(logits[position : position + 1], trie.first_ids[None, row : row + 1]))
            nearest[position] = similarity, prob, trie.chunk(row)
    return [
        _proposal(token_ids, position, *nearest.get(position, (math.nan, math.nan, [])))
        for position in range(len(token_ids))
    ]


def _proposal(token_ids: list[int], position: int, similarity: float, prob: float, chunk: list[int]) -> Proposal:
    following = token_ids[position + 1 : position + 1 + len(chunk)]
    differing = (i for i, (a, b) in enumerate(zip(chunk, following, strict=False)) if a != b)
    n_right = next(differing, len(following))
    return Proposal(position, token_ids[position], similarity, prob, chunk, n_right, len(following))
