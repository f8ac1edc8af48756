"""Stage 5: generate with chunks from the datastore, without them, or both side by side.

Reads   TOKEN_TRIE_DIR/token_trie_{dataset}_DS{model_ds}_H{model_gen}/{partition}_{γ}/   the tries of stages 3 and 4
        PROMPT_FILE   a JSON list of strings or of objects with "prompt" or "text", or JSON Lines with "turns"
Writes  .../individual_flattened_tries/{id}.pkl   the tries as they are searched, once
        SAVE_DIR/prompt_{i}.json, SAVE_DIR/summary.json, and with --report a page about them
Run     python eval.py --model_path gpt2 --token_trie_dir out --dataset wikitext-103-v1 --partition train \\
            --tok_prob_threshold 0.9 --model_ds gpt2 --model_gen gpt2 --prompt_file prompts.json --save_dir results
"""

import argparse
import sys
from pathlib import Path

from utils.cli import (
    Parser,
    StageParser,
    add_datastore_labels,
    add_excluded_tries,
    add_model,
    add_verify_checksums,
    cosine,
    draft_size,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    probability,
    run_script,
    top_p,
    window_size,
)
from utils.display import use_colour
from utils.files import make_folder, require_file, require_folder, sole_writer
from utils.prompts import read_prompts, repeated, require_template
from utils.token_trie import find_trie_folder, read_token_id_list


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = StageParser(__doc__)
    add_model(parser)
    source = parser.add_argument_group("datastore (not needed with --gen_baseline_only)")
    source.add_argument("--token_trie_dir", type=Path, help="the --output_dir of stage 3, or a trie folder in it")
    add_datastore_labels(parser, "--dataset", required=False)
    add_excluded_tries(parser)
    add_verify_checksums(parser)
    parser.add_argument("--exclude_huge_token_tries", action="store_true", help="leave out tries over --huge_trie_rows")
    parser.add_argument("--huge_trie_rows", type=positive_int, default=100_000, help="rows that make a trie huge")
    parser.add_argument("--no_reprocessing", action="store_true", help="take the flattened tries as they are")
    parser.add_argument("--trie_cache_gb", type=positive_float, default=4.0, help="GB of tries kept in memory")
    parser.add_argument("--move_trie_to_gpu", action="store_true", help="hold all tries on --device from the start")
    parser.add_argument("--prompt_file", type=Path, help="prompts: JSON list or JSON Lines")
    parser.add_argument("--prompt_template", help="text around each prompt, such as 'Q: {prompt}\\nA:' (default: none)")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    parser.add_argument("--save_dir", type=Path, required=True, help="folder for prompt_{i}.json and summary.json")
    parser.add_argument("--overwrite", action="store_true", help="replace runs of other settings in --save_dir")
    parser.add_argument(
        "--similarity_threshold",
        type=cosine,
        default=0.5,
        help="θ in [-1, 1]: cosine similarity from which a chunk is accepted; 1 disables retrieval",
    )
    parser.add_argument(
        "--acceptance",
        choices=("threshold", "bernoulli"),
        default="threshold",
        help="threshold accepts iff similarity >= θ; bernoulli with probability (s - η) / (1 - η), η = 2θ - 1",
    )
    parser.add_argument("--q_max", type=probability, default=0.999, help="highest acceptance probability of bernoulli")
    parser.add_argument(
        "--decoding",
        choices=("chunk", "verify"),
        default="chunk",
        help="chunk emits retrieved chunks; verify lets the LM confirm them, so that the text is the LM's own",
    )
    add_drafts(parser)
    add_texts(parser)
    parser.add_argument(
        "--acceptance_map", type=Path, help="fitted map of similarity to acceptance probability, in the place of θ's"
    )
    parser.add_argument("--max_new_tokens", type=positive_int, default=50, help="tokens per prompt, at most")
    parser.add_argument("--temperature", type=non_negative_float, default=1.0, help="of the LM's tokens; 0 is greedy")
    parser.add_argument(
        "--top_k", type=non_negative_int, default=0, help="draw from the k likeliest tokens; 0: from all"
    )
    parser.add_argument("--top_p", type=top_p, default=1.0, help="draw from the likeliest tokens of this total mass")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="same seed, same text, on one machine")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="prompts decoded together")
    parser.add_argument(
        "--cuda_graphs",
        action="store_true",
        help="pad passes to a few lengths and replay each as a CUDA graph; on a CPU it only pads",
    )
    parser.add_argument("--stream", action="store_true", help="print the text as it comes, chunks marked")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page about the run, such as report.html")
    parser.add_argument("--gen_baseline_only", action="store_true", help="generate without a datastore, and only that")
    parser.add_argument("--compare_baseline", action="store_true", help="generate with and without, prompt by prompt")
    args = parser.parse_args(argv)
    if not (args.prompt_file or args.perplexity_file or args.fit_acceptance):
        parser.error("needs --prompt_file, --perplexity_file or --fit_acceptance")
    if args.fit_acceptance and (args.gen_baseline_only or args.acceptance_map):
        parser.error("--fit_acceptance needs a datastore, and takes the place of --acceptance_map")
    for name in ("save_as_corpus", "report"):
        if getattr(args, name) and not args.prompt_file:
            parser.error(f"--{name} is of what is generated, so it needs --prompt_file")
    if args.gen_baseline_only and args.compare_baseline:
        parser.error("--gen_baseline_only leaves out what --compare_baseline compares with; give one of them")
    if args.stream and args.batch_size > 1:
        parser.error("--stream prints one text at a time; leave --batch_size at 1")
    if not args.gen_baseline_only:
        needed = ("token_trie_dir", "dataset_name", "model_ds", "model_gen", "partition", "tok_prob_threshold")
        missing = [name.removesuffix("_name") for name in needed if getattr(args, name) is None]
        if missing:
            parser.error(f"needs --{', --'.join(missing)}; or --gen_baseline_only, which reads no datastore")
    return args


def add_drafts(parser: Parser) -> None:
    drafts = parser.add_argument_group("drafts (with --decoding verify)")
    drafts.add_argument("--draft_shape", choices=("tree", "line"), default="tree", help="a prefix tree, or one branch")
    drafts.add_argument("--max_draft_tokens", type=draft_size, default=16, help="tokens of a draft, at most")
    drafts.add_argument("--draft_neighbors", type=positive_int, default=64, help="rows that vote, the most similar")
    drafts.add_argument("--draft_temperature", type=positive_float, default=0.05, help="of the votes, in similarity")
    drafts.add_argument(
        "--live",
        choices=("off", "sequence", "session"),
        default="sequence",
        help="also draft from the running text (sequence), or from that and the texts before it (session)",
    )
    drafts.add_argument(
        "--draft_growth",
        choices=("paying", "full"),
        default="paying",
        help="paying cuts a draft where, by times measured in this run, a longer pass costs more than it brings",
    )


def add_texts(parser: Parser) -> None:
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--perplexity_file", type=Path, help="passages to give the perplexity of, as stage 1 writes them"
    )
    texts.add_argument(
        "--sweep_similarity_threshold",
        type=cosine,
        nargs="+",
        metavar="θ",
        help="evaluate the perplexity at each of these",
    )
    texts.add_argument(
        "--fit_acceptance", type=Path, help="passages to fit the acceptance map to; it is saved in --save_dir and used"
    )
    texts.add_argument("--perplexity_window", type=window_size, default=512, help="tokens of a window of these texts")
    texts.add_argument("--max_windows", type=positive_int, help="only the first windows (default: all)")
    texts.add_argument("--perplexity_batch_size", type=positive_int, default=8, help="windows the LM reads together")
    texts.add_argument("--num_return_sequences", type=positive_int, default=1, help="texts generated for each prompt")
    texts.add_argument(
        "--save_as_corpus", type=Path, metavar="DIR", help="write prompts and generated texts as a stage 1 corpus"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    prompts = repeated(read_prompts(args.prompt_file), args.num_return_sequences) if args.prompt_file else []
    for path in (args.perplexity_file, args.fit_acceptance):
        if path is not None:
            require_file(path, "stage 1 writes, a JSON list of passages")
    require_template(args.prompt_template, args.chat)
    trie_folder: Path | None = None
    excluded: frozenset[int] = frozenset()
    if not args.gen_baseline_only:
        require_folder(args.token_trie_dir, "save_token_trie_info.py wrote its tries to")
        labels = (args.dataset_name, args.model_ds, args.model_gen, args.partition, args.tok_prob_threshold)
        trie_folder = find_trie_folder(args.token_trie_dir, *labels, any_partition=True)
        if args.excluded_tries_prior:
            excluded = frozenset(read_token_id_list(args.excluded_tries_prior))
    make_folder(args.save_dir)
    if args.report:
        make_folder(args.report.parent)
    # What follows takes seconds to import, which wrong input need not wait for.
    from utils.evaluation import Evaluation

    with sole_writer(args.save_dir, "eval"):
        evaluation = Evaluation(args, prompts, trie_folder, excluded)
        evaluation.run()
    print(evaluation.report(colour=use_colour(sys.stdout)))


if __name__ == "__main__":
    run_script(main)
