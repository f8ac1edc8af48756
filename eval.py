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
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH keeps out
from utils.cli import (
    COSINE,
    NON_NEGATIVE_INT,
    POSITIVE_INT,
    Parser,
    Range,
    StageParser,
    add_datastore_labels,
    add_excluded_tries,
    add_model,
    add_threads,
    add_verify_checksums,
    run_script,
)
from utils.datastore.trie_files import find_trie_folder, read_token_id_list
from utils.files import exclusive_lock, make_folder, require_file, require_folder
from utils.tables import use_colour
from utils.text.prompts import Prompt, read_prompts, require_template

if TYPE_CHECKING:
    from utils.evaluation.runner import EvaluationSettings

AUTO = "auto"
MAX_COST = 0.2  # of the table in docs/choosing-gamma-theta.md


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = StageParser(__doc__)
    add_model(parser)
    add_threads(parser)
    source = parser.add_argument_group("datastore (not needed with --gen_baseline_only)")
    source.add_argument("--token_trie_dir", type=Path, help="the --output_dir of stage 3, or a trie folder in it")
    add_datastore_labels(parser, "--dataset", required=False)
    add_excluded_tries(parser)
    add_verify_checksums(parser)
    parser.add_argument("--exclude_huge_token_tries", action="store_true", help="leave out tries over --huge_trie_rows")
    parser.add_argument("--huge_trie_rows", type=POSITIVE_INT, default=100_000, help="rows that make a trie huge")
    parser.add_argument("--no_reprocessing", action="store_true", help="take the flattened tries as they are")
    parser.add_argument("--trie_cache_gb", type=Range(float, above=0), default=4.0, help="GB of tries kept in memory")
    parser.add_argument("--move_trie_to_gpu", action="store_true", help="hold all tries on --device from the start")
    parser.add_argument("--prompt_file", type=Path, help="prompts: JSON list or JSON Lines")
    parser.add_argument("--prompt_template", help="text around each prompt, such as 'Q: {prompt}\\nA:' (default: none)")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    parser.add_argument("--save_dir", type=Path, required=True, help="folder for prompt_{i}.json and summary.json")
    parser.add_argument("--overwrite", action="store_true", help="replace runs of other settings in --save_dir")
    parser.add_argument(
        "--similarity_threshold",
        type=cosine_or_auto,
        default=0.5,
        metavar="θ",
        help="cosine similarity in [-1, 1] from which a chunk is accepted; 1 disables retrieval; auto chooses θ and δ so that"
        " most forward passes are saved at --max_cost, and rejects repeats",
    )
    parser.add_argument(
        "--max_cost",
        type=Range(float, above=0),
        default=MAX_COST,
        metavar="NATS",
        help="what auto may lose a token: by how many nats the LM finds the text less likely than its own, estimated on text"
        " that is given",
    )
    parser.add_argument(
        "--threshold_text",
        type=Path,
        metavar="FILE",
        help="passages that auto chooses by, which the datastore does not hold (default: its own, each without its rows)",
    )
    parser.add_argument(
        "--acceptance",
        choices=("threshold", "bernoulli"),
        default="threshold",
        help="threshold accepts iff similarity >= θ; bernoulli with probability (s - η) / (1 - η), η = 2θ - 1",
    )
    parser.add_argument(
        "--min_first_token_prob",
        type=Range(float, least=0, most=1),
        default=0.0,
        help="δ in [0, 1]: only chunks may be proposed to whose first token the LM gives at least this share of what it"
        " gives its likeliest token; 0, the paper's rule, does not ask the LM",
    )
    parser.add_argument(
        "--reject_repeats",
        action="store_true",
        help="accept no chunk that the text holds already after the same token, or with which it would end in the same 2 to"
        " 32 tokens twice in a row",
    )
    parser.add_argument(
        "--min_chunk_length",
        type=POSITIVE_INT,
        metavar="N",
        help="leave out shorter chunks, in tokens; one of 1 saves no forward pass (default: 2 where θ is auto, else 1)",
    )
    parser.add_argument(
        "--neighbors",
        type=POSITIVE_INT,
        default=1,
        metavar="K",
        help="rows that propose: one of the K most similar is drawn, of similarity s with a probability in proportion to"
        " exp(s / T); 1 is the paper's rule. --fit_acceptance fits T and how much of a chunk is proposed",
    )
    parser.add_argument(
        "--neighbor_temperature",
        type=Range(float, above=0),
        default=0.02,
        metavar="T",
        help="of --neighbors, in cosine similarity, where no map is fitted",
    )
    parser.add_argument(
        "--q_max",
        type=Range(float, above=0, below=1),
        default=0.999,
        help="highest acceptance probability of bernoulli",
    )
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
    parser.add_argument("--max_new_tokens", type=POSITIVE_INT, default=50, help="tokens per prompt, at most")
    parser.add_argument(
        "--temperature",
        type=Range(float, least=0),
        help="of the LM's tokens; 0 is greedy (default: the model's generation config where that samples, else 1.0)",
    )
    parser.add_argument(
        "--top_k",
        type=NON_NEGATIVE_INT,
        help="draw from the k likeliest tokens; 0: from all (default: as --temperature, and 50 where that config names"
        " none, as generate does; else 0)",
    )
    parser.add_argument(
        "--top_p",
        type=Range(float, above=0, most=1),
        help="draw from the likeliest tokens of this total mass (default: as --temperature, else 1.0)",
    )
    parser.add_argument("--seed", type=NON_NEGATIVE_INT, default=0, help="same seed, same text, on one machine")
    parser.add_argument("--batch_size", type=POSITIVE_INT, default=1, help="prompts decoded together")
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
    args.model_gen = args.model_gen or args.model_ds
    if not (args.prompt_file or args.perplexity_file or args.fit_acceptance):
        parser.error("needs --prompt_file, --perplexity_file or --fit_acceptance")
    if args.fit_acceptance and (args.gen_baseline_only or args.acceptance_map):
        parser.error("--fit_acceptance needs a datastore, and takes the place of --acceptance_map")
    for name in ("save_as_corpus", "report"):
        if getattr(args, name) and not args.prompt_file:
            parser.error(f"--{name} is of what is generated, so it needs --prompt_file")
    refuse_idle_flags(parser, args)
    if args.gen_baseline_only and args.compare_baseline:
        parser.error("--gen_baseline_only leaves out what --compare_baseline compares with; give one of them")
    if args.stream and args.batch_size > 1:
        parser.error("--stream prints one text at a time; leave --batch_size at 1")
    if not args.gen_baseline_only:
        needed = ("token_trie_dir", "dataset_name", "model_ds", "partition", "tok_prob_threshold")
        missing = [name.removesuffix("_name") for name in needed if getattr(args, name) is None]
        if missing:
            parser.error(f"needs --{', --'.join(missing)}; or --gen_baseline_only, which reads no datastore")
    return args


def cosine_or_auto(text: str) -> float | str:
    return text if text == AUTO else COSINE(text)


def refuse_idle_flags(parser: StageParser, args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing."""
    names: tuple[str, ...]
    if not (args.perplexity_file or args.fit_acceptance):
        names = ("sweep_similarity_threshold", "perplexity_window", "max_windows", "perplexity_batch_size", "no_bos")
        parser.refuse_flags(args, names, "is about texts, so it needs --perplexity_file or --fit_acceptance")
    if args.gen_baseline_only:
        parser.refuse_flags(args, ("min_chunk_length",), "is about a datastore, which is not read here")
        parser.refuse_flags(args, ("decoding",), "says nothing with --gen_baseline_only, which proposes nothing")
    if args.decoding == "chunk" or args.gen_baseline_only:
        names = ("draft_shape", "max_draft_tokens", "draft_neighbors", "draft_temperature", "live", "draft_growth")
        parser.refuse_flags(args, names, "is about drafts, so it needs --decoding verify")
    if args.gen_baseline_only or (args.decoding == "verify" and not (args.perplexity_file or args.fit_acceptance)):
        names = (
            "min_first_token_prob",
            "reject_repeats",
            "neighbors",
            "neighbor_temperature",
            "acceptance",
            "q_max",
            "acceptance_map",
            "sweep_similarity_threshold",
        )
        parser.refuse_flags(args, names, "is about the acceptance of chunks, of which there is none here")
    if args.similarity_threshold == AUTO:
        refuse_flags_of_auto(parser, args)
    else:
        parser.refuse_flags(args, ("max_cost", "threshold_text"), "needs --similarity_threshold auto")
    if args.acceptance_map:
        parser.refuse_flags(args, ("neighbors",), "is in the --acceptance_map")
    if args.acceptance_map or args.fit_acceptance or args.neighbors == 1:
        message = "says nothing where one row proposes, and where a map is fitted that has its own"
        parser.refuse_flags(args, ("neighbor_temperature",), message)
    if args.neighbors > 1:
        parser.refuse_flags(args, ("reject_repeats",), "is about one proposal, so it needs --neighbors 1")
    if args.temperature == 0:
        parser.refuse_flags(args, ("top_k", "top_p"), "says nothing at --temperature 0, which draws nothing")
        accepts_at_random = args.decoding == "chunk" and (args.acceptance == "bernoulli" or args.neighbors > 1)
        if args.num_return_sequences > 1 and not accepts_at_random:
            parser.error("--num_return_sequences: at --temperature 0 all texts of a prompt are the same")
    if not args.exclude_huge_token_tries:
        parser.refuse_flags(args, ("huge_trie_rows",), "says nothing without --exclude_huge_token_tries")
    if not args.prompt_file:
        names = ("prompt_template", "chat", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size")
        names += ("decoding", "cuda_graphs", "stream", "compare_baseline", "num_return_sequences", "overwrite")
        parser.refuse_flags(args, names, "is about generation, so it needs --prompt_file")


def refuse_flags_of_auto(parser: StageParser, args: argparse.Namespace) -> None:
    """Refuse what --similarity_threshold auto chooses itself, or does not choose for."""
    if not args.prompt_file or args.gen_baseline_only or args.decoding == "verify":
        parser.error(
            "--similarity_threshold: auto is for chunks that are generated; give --prompt_file and a datastore"
        )
    names = ("min_first_token_prob", "reject_repeats", "neighbors", "acceptance", "acceptance_map", "fit_acceptance")
    parser.refuse_flags(args, names, "is not for --similarity_threshold auto, which chooses how chunks are accepted")


def add_drafts(parser: Parser) -> None:
    drafts = parser.add_argument_group("drafts (with --decoding verify)")
    drafts.add_argument("--draft_shape", choices=("tree", "line"), default="tree", help="a prefix tree, or one branch")
    drafts.add_argument(
        "--max_draft_tokens", type=Range(int, least=1, most=256), default=16, help="tokens of a draft, at most"
    )
    drafts.add_argument("--draft_neighbors", type=POSITIVE_INT, default=64, help="rows that vote, the most similar")
    drafts.add_argument(
        "--draft_temperature", type=Range(float, above=0), default=0.05, help="of the votes, in similarity"
    )
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
        type=COSINE,
        nargs="+",
        metavar="θ",
        help="evaluate the perplexity at each of these",
    )
    texts.add_argument(
        "--fit_acceptance", type=Path, help="passages to fit the acceptance map to; it is saved in --save_dir and used"
    )
    texts.add_argument(
        "--perplexity_window", type=Range(int, least=2), default=512, help="tokens of a window of these texts"
    )
    texts.add_argument(
        "--no_bos", action="store_true", help="read these texts without BOS where the tokenizer puts it before prompts"
    )
    texts.add_argument("--max_windows", type=POSITIVE_INT, help="only the first windows (default: all)")
    texts.add_argument("--perplexity_batch_size", type=POSITIVE_INT, default=8, help="windows the LM reads together")
    texts.add_argument("--num_return_sequences", type=POSITIVE_INT, default=1, help="texts generated for each prompt")
    texts.add_argument(
        "--save_as_corpus", type=Path, metavar="DIR", help="write prompts and generated texts as a stage 1 corpus"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    prompts = read_prompts(args.prompt_file, args.chat, args.num_return_sequences) if args.prompt_file else []
    for path in (args.perplexity_file, args.fit_acceptance, args.threshold_text):
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
    # Imported late: torch takes seconds, and wrong input is answered before.
    from utils.evaluation.runner import Evaluation

    with exclusive_lock(args.save_dir, "eval"):
        evaluation = Evaluation(settings_of(args, prompts, trie_folder, excluded))
        evaluation.run()
    print(evaluation.summary(colour=use_colour(sys.stdout)))


def settings_of(
    args: argparse.Namespace, prompts: list[Prompt], trie_folder: Path | None, excluded: frozenset[int]
) -> "EvaluationSettings":
    """The flags by what they are about."""
    from utils.decoding.acceptance import Acceptance, NeighborMixture
    from utils.decoding.draft import DraftSettings
    from utils.evaluation import runner

    datastore = None
    if trie_folder is not None:
        datastore = runner.DatastoreSettings(
            trie_folder=trie_folder,
            dataset=args.dataset_name,
            partition=args.partition,
            tok_prob_threshold=args.tok_prob_threshold,
            excluded=excluded,
            max_rows=args.huge_trie_rows if args.exclude_huge_token_tries else None,
            min_chunk_length=args.min_chunk_length or (2 if args.similarity_threshold == AUTO else 1),
            max_bytes=int(args.trie_cache_gb * 1e9),
            move_to_device=args.move_trie_to_gpu,
            reprocess=not args.no_reprocessing,
            verify_checksums=args.verify_checksums,
        )
    drafts = DraftSettings(
        shape=args.draft_shape,
        max_tokens=args.max_draft_tokens,
        neighbors=args.draft_neighbors,
        temperature=args.draft_temperature,
        live=args.live,
    )
    generation = runner.GenerationSettings(
        prompts=prompts,
        prompt_file=args.prompt_file,
        template=args.prompt_template,
        chat=args.chat,
        runs="baseline" if args.gen_baseline_only else "both" if args.compare_baseline else "datastore",
        decoding=args.decoding,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        batch_size=args.batch_size,
        cuda_graphs=args.cuda_graphs,
        drafts=drafts,
        draft_growth=args.draft_growth,
        stream=args.stream,
        overwrite=args.overwrite,
        save_as_corpus=args.save_as_corpus,
    )
    texts = runner.TextSettings(
        perplexity_file=args.perplexity_file,
        fit_acceptance=args.fit_acceptance,
        thresholds=args.sweep_similarity_threshold,
        window=args.perplexity_window,
        with_bos=not args.no_bos,
        max_windows=args.max_windows,
        batch_size=args.perplexity_batch_size,
    )
    chosen = None
    if args.similarity_threshold == AUTO:
        chosen = runner.AutoThreshold(args.max_cost, args.threshold_text)
    theta = 1.0 if chosen else args.similarity_threshold
    return runner.EvaluationSettings(
        model=runner.ModelSettings(args.model_path, args.cache_dir, args.device, args.dtype, args.threads),
        datastore=datastore,
        acceptance=Acceptance(
            theta,
            args.acceptance,
            args.q_max,
            min_first_token_prob=args.min_first_token_prob,
            reject_repeats=args.reject_repeats,
            neighbors=NeighborMixture(args.neighbors, args.neighbor_temperature) if args.neighbors > 1 else None,
        ),
        acceptance_map=args.acceptance_map,
        auto_threshold=chosen,
        generation=generation,
        texts=texts,
        save_dir=args.save_dir,
        report=args.report,
    )


if __name__ == "__main__":
    run_script(main)
