"""What stage 5 does: check that model, prompts and datastore belong together, generate what is not there yet, report."""

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils import second_reading
from utils.acceptance import Acceptance, read_map
from utils.datastore import Datastore, open_datastore, require_made_with
from utils.decoding import Decoding, Request, decode, n_slots_for
from utils.display import TokenStream, format_example, format_table, use_colour
from utils.draft_costs import DraftCosts
from utils.drafting import DraftSettings, RetrievalDrafter
from utils.files import InputError, file_fingerprint, make_folder, write_json_list
from utils.generation import Generation
from utils.kv_cache import open_rows
from utils.models import (
    CausalLM,
    load_config,
    load_lm,
    load_tokenizer,
    model_fingerprint,
    pick_device,
    tokenizer_fingerprint,
)
from utils.perplexity import negative_log_likelihood
from utils.progress import ProgressBar, phase
from utils.prompts import Prompt, encode_prompts, require_room
from utils.report import ReportRun, write_report
from utils.results import (
    BASELINE,
    pending_runs,
    prompt_path,
    read_baseline,
    read_run,
    run_name,
    save_run,
    typical_prompt,
    write_summary,
)
from utils.retrieval import Retriever
from utils.sampling import Sampler
from utils.text_evaluation import FITTED_MAP, TextReader, evaluate_perplexity, fit_acceptance, format_perplexity
from utils.token_trie import HIDDEN_STATES_MANIFEST
from utils.windows import WindowShape

LOGGER = logging.getLogger(__name__)
WARM_UP_TOKENS = 8
BYTES_PER_GB = 10**9


class Evaluation:
    """The runs of one command: `run` generates and saves them, `report` says what came out."""

    def __init__(
        self, args: argparse.Namespace, prompts: list[Prompt], trie_folder: Path | None, excluded: frozenset[int]
    ) -> None:
        """Raises InputError where a prompt has no room, or the datastore is not this model's."""
        self._args, self._prompts, self._trie_folder, self._excluded = args, prompts, trie_folder, excluded
        config = load_config(args.model_path, args.cache_dir)
        self._tokenizer = load_tokenizer(args.model_path, args.cache_dir)
        self._encoded = encode_prompts(prompts, self._tokenizer, args.prompt_template, args.chat)
        n_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        require_room(prompts, self._encoded, n_positions, args.max_new_tokens)
        self._model_fingerprint = model_fingerprint(args.model_path, args.cache_dir)
        if trie_folder is not None:
            tokenizer = tokenizer_fingerprint(self._tokenizer)
            require_made_with(trie_folder, args.model_path, tokenizer, self._model_fingerprint)
        self._retrieval_run = run_name(args.decoding, args.similarity_threshold)
        self._retriever: Retriever | None = None
        self._fitted = read_map(args.acceptance_map) if args.acceptance_map else None
        self._parts: list[str] = []  # of the report

    def run(self) -> None:
        """Fit, evaluate and generate, whatever the command asks for."""
        if self._args.fit_acceptance:
            self._fit()
        if self._args.perplexity_file:
            thresholds = self._args.sweep_similarity_threshold or [self._args.similarity_threshold]
            thresholds = [] if self._trie_folder is None else thresholds
            report = evaluate_perplexity(
                self._text_reader(), self._args.perplexity_file, self._args.save_dir, thresholds, self._acceptance()
            )
            self._parts.append(format_perplexity(report))
        if self._prompts:
            self._generate()
        if self._args.save_as_corpus:
            self._save_as_corpus()
        if self._args.report:
            self._write_report()

    def _fit(self) -> None:
        args = self._args
        self._fitted = fit_acceptance(self._text_reader(), args.fit_acceptance, args.save_dir, args.q_max)
        origin, n_tokens = self._fitted.origin, self._fitted.origin["tokens"]
        shown = ", ".join(
            f"{name} {np.exp(-origin[f'log_likelihood_{name}'] / n_tokens):.3f}"
            for name in ("base", "constant", "fitted")
        )
        self._parts.append(
            f"Acceptance map fitted to {args.fit_acceptance} in {origin['steps']} steps; perplexity there: {shown} "
            f"(best constant q {origin['constant']:.4f}): {args.save_dir / FITTED_MAP}"
        )

    def _text_reader(self) -> TextReader:
        args = self._args
        shape = WindowShape(args.perplexity_window, args.perplexity_window, min_length=2)
        datastore = None if self._trie_folder is None else self._datastore
        return TextReader(
            self._lm, self._tokenizer, datastore, shape, args.max_windows, args.perplexity_batch_size, args.save_dir
        )

    def _acceptance(self) -> Acceptance:
        args = self._args
        return Acceptance(args.similarity_threshold, args.acceptance, args.q_max, self._fitted)

    def _save_as_corpus(self) -> None:
        """The generated texts as stage 1 writes a corpus, all in train; each with its prompt, as the model read it."""
        folder = make_folder(self._args.save_as_corpus)
        name = next(iter(self._settings()))
        texts = [self._corpus_text(read_run(self._args.save_dir, i, name).token_ids) for i in range(len(self._prompts))]
        for split in ("train", "validation", "test"):
            write_json_list(folder / f"{split}.json", [{"text": text} for text in texts] if split == "train" else [])
        self._parts.append(f"{len(texts)} texts as a corpus: {folder / 'train.json'}")

    def _corpus_text(self, token_ids: list[int]) -> str:
        """Without the marks of begin and end, which stage 2's windows do not have either."""
        marks = {self._tokenizer.bos_token_id, *eos_token_ids(self._lm, self._tokenizer)}
        first = 1 if token_ids[0] in marks else 0
        last = len(token_ids) - (1 if token_ids[-1] in marks else 0)
        return self._decode(token_ids[first:last])

    @cached_property
    def _lm(self) -> CausalLM:
        return load_lm(self._args.model_path, self._args.device, self._args.dtype, self._args.cache_dir)

    def _generate(self) -> None:
        """Generate every run that a prompt still lacks and save it as it ends."""
        pending = pending_runs(self._args.save_dir, self._prompt_pairs(), self._settings(), self._args.overwrite)
        if not any(pending):
            return
        lm = self._lm
        decodings = {name: self._decoding(name, lm) for name in self._settings()}
        if self._args.cuda_graphs:
            decodings = self._with_graphs(lm, decodings)
        with phase("warming up"):
            self._warm_up(lm, decodings)
        if self._args.stream:
            stream = TokenStream(sys.stdout, self._decode, use_colour(sys.stdout))
            decodings = {name: replace(each, on_tokens=stream.write) for name, each in decodings.items()}
        with ProgressBar(total=sum(map(len, pending)), desc="generating", unit="run", disable=self._args.stream) as bar:
            for n_turn, indices in enumerate(self._batches(pending)):
                names = list(decodings)
                # Each goes first half of the time, so that neither always finds the caches warm.
                for name in names if n_turn % 2 == 0 else reversed(names):
                    requests = [self._request(index) for index in indices if name in pending[index]]
                    if self._args.stream:
                        stream.begin(name, {request.index: request.prompt_ids for request in requests})
                    for generation in decode(lm, requests, decodings[name]):
                        self._save(lm, name, generation)
                        bar.update()
                        LOGGER.debug("prompt %s, %s: %s", generation.index, name, _cost_of(generation))

    def report(self, colour: bool) -> str:
        """The table of all runs, one generation with its chunks marked, and where the files are, for this stream."""
        save_dir = self._args.save_dir
        if not self._prompts:
            return "\n\n".join(self._parts)
        summary = write_summary(save_dir)
        parts = [*self._parts, format_table(summary)]
        if self._retrieval_run in self._settings() and self._args.decoding == "verify":
            shares = summary["runs"][self._retrieval_run].get("acceptance_by_position", [])
            shown = ", ".join(f"{ahead} {share:.0%}" for ahead, share in enumerate(shares, start=1))
            parts.append(f"Drafted tokens accepted, by how far ahead: {shown or 'nothing was drafted'}")
        elif self._retrieval_run in self._settings():
            index = typical_prompt(save_dir, self._retrieval_run)
            generation = read_run(save_dir, index, self._retrieval_run)
            parts.append(format_example(generation, self._retrieval_run, self._decode, colour))
        if self._retriever is not None and self._retriever.similarities:
            parts.append(_describe(np.array(self._retriever.similarities), self._retriever.acceptance))
        parts.append(f"Every generation: {prompt_path(save_dir, 0)} and on; totals: {save_dir / 'summary.json'}")
        return "\n\n".join(parts)

    def _write_report(self) -> None:
        """The page about this command's run, from what lies in --save_dir, whenever it was generated."""
        args = self._args
        name = BASELINE if args.gen_baseline_only else self._retrieval_run
        summary, acceptance = write_summary(args.save_dir), self._acceptance()
        proposes = name != BASELINE and args.decoding == "chunk" and not acceptance.never
        with_what = {"chunk": "with chunks", "verify": "with drafts"}[args.decoding]
        ending = "alone" if name == BASELINE else f"{with_what} of {args.dataset_name}"
        run = ReportRun(
            name=name,
            title=f"{Path(args.model_path).name} {ending}",
            facts=self._facts(summary["runs"][name]["settings"]),
            similarity_threshold=args.similarity_threshold,
            policy=args.acceptance,
            acceptance_map=acceptance.in_force if proposes else None,
            is_fitted=self._fitted is not None,
            corpus=f"{args.dataset_name}, {args.partition}",
            trie_folder=self._trie_folder,
        )
        indices = ProgressBar(range(len(self._prompts)), desc="writing the report", unit="text")
        texts = ((read_run(args.save_dir, i, name), read_baseline(args.save_dir, i, name)) for i in indices)
        read_again = partial(second_reading.read_again, self._lm, self._datastore) if proposes else None
        write_report(args.report, run, summary, texts, self._decode, read_again)
        self._parts.append(f"To look at in a browser: {args.report}")

    def _facts(self, settings: dict[str, Any]) -> list[tuple[str, str]]:
        """What a reader of a page wants to know of how it was made."""
        args = self._args
        facts = {"model": args.model_path, "model fingerprint": settings["model"], "prompts": args.prompt_file}
        if self._trie_folder is not None:
            facts |= {"datastore": self._trie_folder, "γ": args.tok_prob_threshold, "θ": args.similarity_threshold}
        facts |= {name: value for name, value in settings.items() if name not in ("model", "datastore")}
        return [(name.replace("_", " "), str(value)) for name, value in facts.items() if value not in (None, [])]

    def _prompt_pairs(self) -> list[tuple[str, list[int]]]:
        return [(prompt.text, ids) for prompt, ids in zip(self._prompts, self._encoded, strict=True)]

    def _settings(self) -> dict[str, dict[str, Any]]:
        """By the name of each run: all that decides its tokens. The baseline's are among the others'."""
        args = self._args
        shared = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "dtype", "cuda_graphs")
        baseline = {"model": self._model_fingerprint, "device": pick_device(args.device).type}
        baseline |= {name: getattr(args, name) for name in shared}
        if args.gen_baseline_only:
            return {BASELINE: baseline}
        assert self._trie_folder is not None
        with_datastore = baseline | {
            "datastore": file_fingerprint(self._trie_folder / HIDDEN_STATES_MANIFEST),
            "excluded": sorted(self._excluded),
            "max_rows": args.huge_trie_rows if args.exclude_huge_token_tries else None,
        }
        if args.decoding == "verify":
            drafts = ("draft_shape", "max_draft_tokens", "draft_neighbors", "draft_temperature", "live", "draft_growth")
            with_datastore |= {name: getattr(args, name) for name in drafts}
        else:
            q_max = args.q_max if args.acceptance == "bernoulli" else None
            fitted = None if self._fitted is None else [self._fitted.similarities, self._fitted.probabilities]
            with_datastore |= {"acceptance": args.acceptance, "q_max": q_max, "acceptance_map": fitted}
        return ({BASELINE: baseline} if args.compare_baseline else {}) | {self._retrieval_run: with_datastore}

    def _decoding(self, name: str, lm: CausalLM) -> Decoding:
        args = self._args
        decoding = Decoding(
            sampler=Sampler.from_settings(args.temperature, args.top_k, args.top_p),
            eos_token_ids=eos_token_ids(lm, self._tokenizer),
            batch_size=args.batch_size,
        )
        if name == BASELINE:
            return decoding
        datastore = self._datastore
        if args.decoding == "verify":
            settings = DraftSettings(
                shape=args.draft_shape,
                max_tokens=args.max_draft_tokens,
                neighbors=args.draft_neighbors,
                temperature=args.draft_temperature,
                live=args.live,
            )
            costs = DraftCosts() if args.draft_growth == "paying" else None
            return replace(decoding, drafter=RetrievalDrafter(datastore, settings), draft_costs=costs)
        self._retriever = Retriever(datastore, self._acceptance())
        return replace(decoding, retriever=self._retriever)

    @cached_property
    def _datastore(self) -> Datastore:
        args, lm = self._args, self._lm
        assert self._trie_folder is not None
        # Drafts need a few rows and their votes are counted on the host; a search of whole tries is the device's.
        searches = args.decoding == "chunk" or args.move_trie_to_gpu
        datastore = open_datastore(
            self._trie_folder,
            device=lm.device if searches else torch.device("cpu"),
            max_bytes=int(args.trie_cache_gb * BYTES_PER_GB),
            excluded=self._excluded,
            max_rows=args.huge_trie_rows if args.exclude_huge_token_tries else None,
            reprocess=not args.no_reprocessing,
            verify=args.verify_checksums,
        )
        if datastore.hidden_size != lm.hidden_size:
            got = f"hidden size {datastore.hidden_size} but {args.model_path} has {lm.hidden_size}"
            raise InputError(f"{self._trie_folder}: {got}; rebuild the datastore with this model")
        if args.move_trie_to_gpu:
            datastore.load_all()
        return datastore

    def _with_graphs(self, lm: CausalLM, decodings: dict[str, Decoding]) -> dict[str, Decoding]:
        """One cache for all runs, so that each pass is captured once."""
        requests = [self._request(index) for index in range(len(self._encoded))]
        n_slots = max(n_slots_for(requests, decoding) for decoding in decodings.values())
        with torch.inference_mode():
            rows = open_rows(lm, self._args.batch_size, n_slots, graphs=True)
        return {name: replace(decoding, rows=rows) for name, decoding in decodings.items()}

    def _warm_up(self, lm: CausalLM, decodings: dict[str, Decoding]) -> None:
        """First calls pay for what later ones do not; none of it is kept."""
        n_tokens = min(WARM_UP_TOKENS, self._args.max_new_tokens)
        for decoding in decodings.values():
            for _ in decode(lm, [Request(0, self._encoded[0], n_tokens)], decoding):
                pass
        if self._retriever is not None:
            self._retriever.similarities.clear()

    def _batches(self, pending: list[list[str]]) -> Iterator[list[int]]:
        """The prompts that lack a run, as many at a time as are decoded together."""
        lacking = [index for index, names in enumerate(pending) if names]
        for start in range(0, len(lacking), self._args.batch_size):
            yield lacking[start : start + self._args.batch_size]

    def _request(self, index: int) -> Request:
        return Request(index, self._encoded[index], self._args.max_new_tokens, self._args.seed)

    def _save(self, lm: CausalLM, name: str, generation: Generation) -> None:
        nll = negative_log_likelihood(lm, generation.prompt_ids, generation.new_token_ids)
        prefix = self._prompts[generation.index].text
        save_run(self._args.save_dir, name, generation, prefix, self._settings()[name], self._decode, nll)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def eos_token_ids(lm: CausalLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text: those of the generation config, else the tokenizer's."""
    found = lm.model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)


def _cost_of(generation: Generation) -> str:
    stats, n_tokens = generation.stats, len(generation.new_token_ids)
    passes = f"{n_tokens} tokens in {stats.forward_passes} forward passes, {stats.seconds:.2f} s"
    return f"{passes} ({stats.lm_seconds:.2f} in the LM, {stats.retrieval_seconds:.2f} in retrieval)"


def _describe(similarities: np.ndarray, acceptance: Acceptance) -> str:
    """The distribution of the best similarities, without which θ says little: it differs from model to model."""
    quantiles = np.percentile(similarities, [5, 25, 50, 75, 95])
    shown = ", ".join(f"{share}% {value:.3f}" for share, value in zip((5, 25, 50, 75, 95), quantiles, strict=True))
    above = (similarities >= acceptance.similarity_threshold).mean()
    return (
        f"Best similarity of {len(similarities)} proposals, quantiles: {shown}; "
        f"{above:.1%} are at or above θ = {acceptance.similarity_threshold}"
    )
