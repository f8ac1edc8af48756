"""Look into a datastore: its size and tries, the chunks of one entry token, or what it would propose in a text.

Reads   DIRECTORY   a trie folder of stages 3 and 4, or a folder that holds just one
Run     python -m utils.inspect_datastore output/python-docs --model_path examples/models/large
        python -m utils.inspect_datastore output/python-docs --model_path examples/models/large --token " the"
        python -m utils.inspect_datastore output/python-docs --model_path examples/models/large --text "Return the sum of"

Nothing is written. Without --model_path token ids stand for text, and --token_id for --token.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import Parser, add_model, non_negative_int, positive_int, run_script
from utils.display import align, visible
from utils.files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.inspection import Branch, Overview

# Token ids as a reader wants to see them.
Shown = Callable[[Sequence[int]], str]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("directory", type=Path, help="trie folder, or the --output_dir of stage 3")
    add_model(parser, default="none, and ids stand for text")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--token", metavar="TEXT", help="show the chunks of this entry token, such as ' the'")
    what.add_argument("--token_id", type=non_negative_int, metavar="ID", help="the same by the token's id")
    what.add_argument("--text", help="show what would be proposed after each of its tokens")
    parser.add_argument("--largest", type=positive_int, default=10, help="tries listed, those with the most chunks")
    parser.add_argument("--branches", type=positive_int, default=40, help="lines of --token's tree")
    parser.add_argument("--sample", type=non_negative_int, default=1000, help="chunks compared with others; 0: none")
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
    # What follows takes seconds to import, which wrong flags need not wait for.
    from utils.inspection import find_datastore

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
    from utils.datastore import require_made_with
    from utils.models import load_tokenizer, tokenizer_fingerprint

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
    from utils.inspection import has_context_vectors, sample_neighbors, survey

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
    import numpy as np

    from utils.inspection import QUANTILES, weighted_quantiles

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
    from utils.inspection import heaviest, prefix_tree, read_chunks

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
    from utils.datastore import require_made_with
    from utils.inspection import proposals_in
    from utils.models import load_lm, model_fingerprint, tokenizer_fingerprint

    fingerprint = model_fingerprint(args.model_path, args.cache_dir)
    require_made_with(folder, args.model_path, tokenizer_fingerprint(tokenizer), fingerprint)
    lm = load_lm(args.model_path, args.device, args.dtype, args.cache_dir)
    token_ids = list(tokenizer(args.text, verbose=False)["input_ids"])
    proposals = proposals_in(folder, lm, token_ids)
    rows = [("", "token", "proposed chunk", "as in the text", "similarity")]
    for proposal in proposals:
        agrees, similarity = "", ""
        if proposal.chunk_ids:
            similarity = f"{proposal.similarity:.3f}"
            agrees = f"{proposal.n_right} of {proposal.n_known}" if proposal.n_known else "at its end"
        chunk = shown(proposal.chunk_ids) if proposal.chunk_ids else "-"
        rows.append((str(proposal.position), shown([proposal.entry_token_id]), chunk, agrees, similarity))
    yield from align(rows, n_left=4)
    yield ""
    known = [proposal for proposal in proposals if proposal.n_known]
    n_right = sum(proposal.n_right == proposal.n_known for proposal in known)
    n_proposed = sum(not math.isnan(proposal.similarity) for proposal in proposals)
    yield f"{n_proposed:,} of {len(proposals):,} tokens have a proposal; {n_right:,} of {len(known):,} are what follows"


if __name__ == "__main__":
    run_script(main)
