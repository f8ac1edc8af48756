"""Stage 5: check that model, prompts and datastore belong together, generate what is not there yet, report."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from utils.datastore.store import Datastore, open_datastore, reads_bos, require_made_with
from utils.datastore.trie_files import HIDDEN_STATES_MANIFEST
from utils.decoding.acceptance import Acceptance, read_map
from utils.decoding.draft import DraftSettings, RetrievalDrafter
from utils.decoding.draft_policy import DraftPolicy
from utils.decoding.loop import Decoding, decode, n_slots_for
from utils.decoding.retriever import Retriever
from utils.decoding.types import Generation, Request
from utils.evaluation.calibration import (
    CHOSEN_THRESHOLD,
    candidates_for,
    choose,
    read_choice,
)
from utils.evaluation.perplexity import FITTED_MAP, TextReader, evaluate_perplexity, fit_acceptance, format_perplexity
from utils.evaluation.report.page import ReportRun, write_report
from utils.evaluation.report.rescore import rescore
from utils.evaluation.results import (
    BASELINE,
    pending_runs,
    prompt_path,
    read_baseline,
    read_run,
    run_name,
    save_run,
    stored_threads,
)
from utils.evaluation.summary import TokenStream, format_example, format_table, typical_prompt, write_summary
from utils.files import InputError, file_fingerprint, make_folder
from utils.json_io import write_json, write_json_list
from utils.lm.fingerprint import model_fingerprint, tokenizer_fingerprint
from utils.lm.kv_cache import KVCache, make_kv_cache
from utils.lm.model import (
    CausalLM,
    eos_token_ids,
    load_config,
    load_generation_config,
    load_lm,
    load_tokenizer,
    max_positions,
    pick_device,
    require_windows_fit,
    upload,
)
from utils.lm.sampling import Sampler, config_of_processors, not_honoured, processors_of, run_processors
from utils.lm.scoring import negative_log_likelihood
from utils.lm.threads import use_threads
from utils.progress import ProgressBar, phase
from utils.tables import use_colour
from utils.text.corpora import SPLITS, split_path
from utils.text.prompts import Prompt, added_tokens, conversation_of, encode_prompts, encode_turn, require_room
from utils.text.windows import WindowShape

LOGGER = logging.getLogger(__name__)
WARM_UP_TOKENS = 8
LACKS_BOS = "its vectors are not those that generation meets; run stages 2 to 4 again without --no_bos"
# How tokens are drawn where neither a flag nor the model's generation config says.
DRAWING: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


# ---- Settings


@dataclass(frozen=True)
class ModelSettings:
    """The model that generates: a folder or hub name, where it is put, its dtype, and torch's threads."""

    path: str
    cache_dir: Path | None
    device: str
    dtype: str
    n_threads: int | None = None  # None: what is fastest


@dataclass(frozen=True)
class DatastoreSettings:
    """The datastore, and how it is read."""

    trie_folder: Path
    dataset: str  # the labels, to show
    partition: str
    tok_prob_threshold: float
    excluded: frozenset[int]  # entry tokens without proposals
    max_rows: int | None  # of a trie; None: no bound
    min_chunk_length: int  # of the chunks that may be proposed
    max_bytes: int  # of tries in memory
    move_to_device: bool  # all tries, from the start
    reprocess: bool
    verify_checksums: bool


@dataclass(frozen=True)
class GenerationSettings:
    """What to generate from the prompts, and how."""

    prompts: list[Prompt]
    prompt_file: Path | None
    template: str | None
    chat: bool
    runs: Literal["datastore", "baseline", "both"]
    decoding: Literal["chunk", "verify"]
    max_new_tokens: int
    temperature: float | None  # None: the model's generation config says, as of the next two
    top_k: int | None
    top_p: float | None
    seed: int
    batch_size: int
    cuda_graphs: bool
    drafts: DraftSettings
    draft_growth: Literal["paying", "full"]
    stream: bool
    overwrite: bool
    save_as_corpus: Path | None


@dataclass(frozen=True)
class TextSettings:
    """The texts whose perplexity is computed, or to which an acceptance map is fitted."""

    perplexity_file: Path | None
    fit_acceptance: Path | None
    thresholds: list[float] | None  # θ of the table; None: that of the acceptance
    window: int
    with_bos: bool
    max_windows: int | None
    batch_size: int


@dataclass(frozen=True)
class AutoThreshold:
    """How θ and δ are chosen. text: a file of passages; None: the datastore's own text."""

    max_cost: float  # nats a token
    text: Path | None


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of one stage 5 command, as its flags give them. datastore: None where only the baseline runs."""

    model: ModelSettings
    datastore: DatastoreSettings | None
    acceptance: Acceptance  # by θ
    acceptance_map: Path | None  # a fitted map that takes the place of θ's
    auto_threshold: AutoThreshold | None  # chooses θ and δ in the place of the acceptance's
    generation: GenerationSettings
    texts: TextSettings
    save_dir: Path
    report: Path | None


# ---- The runs of one command


class Evaluation:
    """The runs of one command: `run` generates and saves them, `summary` describes the results as text."""

    def __init__(self, settings: EvaluationSettings) -> None:
        """Raises InputError where a prompt does not fit the model, or the datastore is not this model's."""
        self._settings, self._generation = settings, settings.generation
        model = settings.model
        config = load_config(model.path, model.cache_dir)
        self._tokenizer = load_tokenizer(model.path, model.cache_dir)
        prompts = self._generation.prompts
        self._encoded = encode_prompts(prompts, self._tokenizer, self._generation.template, self._generation.chat)
        n_positions, n_new = max_positions(config), self._generation.max_new_tokens
        require_room(prompts, self._encoded, self._tokenizer, n_positions, n_new)
        self._config = load_generation_config(model.path, model.cache_dir)
        if prompts and (left_out := not_honoured(self._config)):
            LOGGER.warning("%s: its generation config sets %s, not honoured here", model.path, ", ".join(left_out))
        prefix_ids = added_tokens(self._tokenizer)[0]
        if settings.texts.perplexity_file or settings.texts.fit_acceptance:
            n_prefix = len(prefix_ids) if settings.texts.with_bos else 0
            require_windows_fit(config, model.path, settings.texts.window, n_prefix, ("--perplexity_window",))
        self._model_fingerprint = model_fingerprint(model.path, model.cache_dir)
        if settings.datastore is not None:
            tokenizer = tokenizer_fingerprint(self._tokenizer)
            folder = settings.datastore.trie_folder
            require_made_with(folder, model.path, tokenizer, self._model_fingerprint)
            if prefix_ids and (prompts or settings.texts.with_bos) and not reads_bos(folder):
                LOGGER.warning("%s: was made without the BOS that is read here, so that %s", folder, LACKS_BOS)
        self._acceptance, map_path = settings.acceptance, settings.acceptance_map
        if map_path is not None:
            try:
                self._acceptance = replace(self._acceptance, fitted=read_map(map_path))
            except ValueError as error:
                raise InputError(f"{map_path}: {error}; leave out --reject_repeats") from error
        self._similarities: list[float] = []  # of this command's proposals
        self._parts: list[str] = []  # of the summary

    def run(self) -> None:
        """Choose θ, fit, evaluate and generate, as the settings ask."""
        texts = self._settings.texts
        if self._settings.auto_threshold is not None:
            self._choose_threshold(self._settings.auto_threshold)
        if texts.fit_acceptance:
            self._fit(texts.fit_acceptance)
        if texts.perplexity_file:
            thresholds = texts.thresholds or [self._acceptance.similarity_threshold]
            thresholds = [] if self._settings.datastore is None else thresholds
            found = evaluate_perplexity(
                self._text_reader(), texts.perplexity_file, self._settings.save_dir, thresholds, self._acceptance
            )
            self._parts.append(format_perplexity(found))
        if self._generation.prompts:
            self._generate()
        if self._generation.save_as_corpus:
            self._save_as_corpus(self._generation.save_as_corpus)
        if self._settings.report:
            self._write_report(self._settings.report)

    @cached_property
    def _lm(self) -> CausalLM:
        model = self._settings.model
        lm = load_lm(model.path, model.device, model.dtype, model.cache_dir)
        use_threads(lm, model.n_threads, stored_threads(self._settings.save_dir), n_tokens=1)
        return lm

    @cached_property
    def _datastore(self) -> Datastore:
        settings, lm = self._settings.datastore, self._lm
        assert settings is not None
        # Verified drafts compare a few rows and count votes on the host; chunk mode searches whole tries on the device.
        on_device = self._generation.decoding == "chunk" or settings.move_to_device
        datastore = open_datastore(
            settings.trie_folder,
            device=lm.device if on_device else torch.device("cpu"),
            max_bytes=settings.max_bytes,
            excluded=settings.excluded,
            max_rows=settings.max_rows,
            min_chunk_length=settings.min_chunk_length,
            reprocess=settings.reprocess,
            verify=settings.verify_checksums,
        )
        if datastore.hidden_size != lm.hidden_size:
            got = f"hidden size {datastore.hidden_size} but {self._settings.model.path} has {lm.hidden_size}"
            raise InputError(f"{settings.trie_folder}: {got}; rebuild the datastore with this model")
        if settings.move_to_device:
            datastore.load_all()
        return datastore

    @property
    def _run_name(self) -> str:
        return run_name(self._generation.decoding, self._acceptance.similarity_threshold)

    def _decode_text(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    # ---- Texts

    def _choose_threshold(self, auto: AutoThreshold) -> None:
        """Choose θ and δ, or take those that an earlier command chose in the same way."""
        datastore, path = self._settings.datastore, self._settings.save_dir / CHOSEN_THRESHOLD
        assert datastore is not None
        inputs = {
            "model": self._model_fingerprint,
            "datastore": file_fingerprint(datastore.trie_folder / HIDDEN_STATES_MANIFEST),
            "excluded": sorted(datastore.excluded),
            "max_rows": datastore.max_rows,
            "min_chunk_length": datastore.min_chunk_length,
            "text": None if auto.text is None else file_fingerprint(auto.text),
            "max_cost": auto.max_cost,
            "temperature": self._drawing["temperature"],
            "dtype": self._settings.model.dtype,
        }
        choice = read_choice(path, inputs)
        if choice is None:
            temperature, folder = self._drawing["temperature"], datastore.trie_folder
            text, save_dir = auto.text, self._settings.save_dir
            found = candidates_for(self._lm, self._tokenizer, self._datastore, folder, temperature, text, save_dir)
            choice = choose(found, auto.max_cost)
            write_json(path, {"inputs": inputs, "choice": asdict(choice)}, indent=2)
        theta, least = choice.similarity_threshold, choice.min_first_token_prob
        self._acceptance = choice.applied_to(self._acceptance)
        where = f"{datastore.trie_folder}, each window without its passage's rows" if auto.text is None else auto.text
        expected = f"{choice.saved:.1%} of the forward passes saved at {choice.cost:.3f} nats a token"
        if choice.saved == 0:
            expected = f"nothing is saved at {auto.max_cost:g} nats a token; give a higher --max_cost"
        self._parts.append(f"θ {theta:g} and δ {least:g}, chosen by the text of {where}; expected there: {expected}")

    def _fit(self, path: Path) -> None:
        save_dir = self._settings.save_dir
        fitted = fit_acceptance(self._text_reader(), path, save_dir, self._acceptance)
        self._acceptance = replace(self._acceptance, fitted=fitted)
        origin, n_tokens = fitted.origin, fitted.origin["tokens"]
        shown = ", ".join(
            f"{name} {np.exp(-origin[f'log_likelihood_{name}'] / n_tokens):.3f}"
            for name in ("base", "constant", "fitted")
        )
        self._parts.append(
            f"Acceptance map fitted to {path} in {origin['steps']} steps; perplexity there: {shown} "
            f"(best constant q {origin['constant']:.4f}): {save_dir / FITTED_MAP}"
        )

    def _text_reader(self) -> TextReader:
        texts = self._settings.texts
        shape = WindowShape(texts.window, texts.window, min_length=2, with_bos=texts.with_bos)
        datastore = None if self._settings.datastore is None else self._datastore
        return TextReader(
            self._lm,
            self._tokenizer,
            datastore,
            shape,
            texts.max_windows,
            texts.batch_size,
            self._settings.save_dir,
            self._acceptance,
        )

    # ---- Generation

    @cached_property
    def _run_settings(self) -> dict[str, dict[str, Any]]:
        """By the name of each run: all that decides its tokens. The baseline's are among those of every other run."""
        generation, datastore = self._generation, self._settings.datastore
        names = ("seed", "batch_size", "cuda_graphs")
        baseline: dict[str, Any] = {
            "model": self._model_fingerprint,
            "device": pick_device(self._settings.model.device).type,
        }
        baseline |= {"max_new_tokens": generation.max_new_tokens} | self._drawing
        baseline |= {name: getattr(generation, name) for name in names} | {"dtype": self._settings.model.dtype}
        if processors := config_of_processors(self._config):
            baseline |= {"processors": processors}
        if generation.runs == "baseline":
            return {BASELINE: baseline}
        assert datastore is not None
        with_datastore = baseline | {
            "datastore": file_fingerprint(datastore.trie_folder / HIDDEN_STATES_MANIFEST),
            "excluded": sorted(datastore.excluded),
            "max_rows": datastore.max_rows,
        }
        if datastore.min_chunk_length > 1:
            with_datastore |= {"min_chunk_length": datastore.min_chunk_length}
        if generation.decoding == "verify":
            drafts = generation.drafts
            with_datastore |= {
                "draft_shape": drafts.shape,
                "max_draft_tokens": drafts.max_tokens,
                "draft_neighbors": drafts.neighbors,
                "draft_temperature": drafts.temperature,
                "live": drafts.live,
                "draft_growth": generation.draft_growth,
            }
        else:
            acceptance = self._acceptance
            fitted = acceptance.fitted
            with_datastore |= {
                "acceptance": acceptance.policy,
                "q_max": acceptance.q_max if acceptance.policy == "bernoulli" else None,
                "acceptance_map": None if fitted is None else [fitted.similarities, fitted.probabilities],
            }
            if acceptance.asks_lm:
                with_datastore |= {"min_first_token_prob": acceptance.min_first_token_prob}
            if acceptance.reject_repeats:
                with_datastore |= {"reject_repeats": True}
            if acceptance.mixture is not None:
                with_datastore |= asdict(acceptance.mixture)
        return ({BASELINE: baseline} if generation.runs == "both" else {}) | {self._run_name: with_datastore}

    def _generate(self) -> None:
        """Generate every run that a prompt lacks, and save it as it ends; the turns of conversations one after the other."""
        for turn in range(1 + max(prompt.turn for prompt in self._generation.prompts)):
            if lacking := self._lacking_runs(turn):
                self._generate_turn(lacking)

    def _lacking_runs(self, turn: int) -> dict[str, list[Request]]:
        """What is left to generate of the prompts that are of this turn, by the name of the run."""
        indices = [prompt.index for prompt in self._generation.prompts if prompt.turn == turn]
        prompt_ids = {name: {index: self._prompt_ids(name, index) for index in indices} for name in self._run_settings}
        texts = [prompt.text for prompt in self._generation.prompts]
        pending = pending_runs(
            self._settings.save_dir, texts, prompt_ids, self._run_settings, self._generation.overwrite
        )
        n_new, seed = self._generation.max_new_tokens, self._generation.seed
        return {
            name: [Request(index, prompt_ids[name][index], n_new, seed) for index in lacking]
            for name, lacking in pending.items()
            if lacking
        }

    def _prompt_ids(self, name: str, index: int) -> list[int]:
        """The token ids of a prompt; before a later turn of a conversation come the run's own answers."""
        turns = conversation_of(self._generation.prompts, index)
        if len(turns) == 1:
            return self._encoded[index]
        earlier = (read_run(self._settings.save_dir, turn.index, name) for turn in turns[:-1])
        answers = [str(self._tokenizer.decode(each.new_token_ids, skip_special_tokens=True)) for each in earlier]
        return encode_turn(turns, answers, self._tokenizer)

    def _generate_turn(self, lacking: dict[str, list[Request]]) -> None:
        lm, stream = self._lm, None
        caches = self._make_caches(lm, lacking)
        with phase("warming up"):
            self._warm_up(lm, caches)
        if self._generation.stream:
            stream = TokenStream(sys.stdout, self._decode_text, use_colour(sys.stdout))
        on_tokens = None if stream is None else stream.write
        generations = {
            name: decode(
                lm, requests, replace(self._decoding(name, lm, requests), cache=caches[name], on_tokens=on_tokens)
            )
            for name, requests in lacking.items()
        }
        total = sum(map(len, lacking.values()))
        with ProgressBar(total=total, desc="generating", unit="run", disable=stream is not None) as bar:
            for name in _turns(list(generations), {name: len(requests) for name, requests in lacking.items()}):
                if stream is not None:
                    stream.begin(name, {request.index: request.prompt_ids for request in lacking[name]})
                generation = next(generations[name])
                self._save(lm, name, generation)
                if generation.trace is not None:
                    self._similarities += [proposal.similarity for proposal in generation.trace.proposals]
                bar.update()
                LOGGER.debug("prompt %s, %s: %s", generation.index, name, _costs(generation))

    def _make_caches(self, lm: CausalLM, lacking: dict[str, list[Request]]) -> dict[str, KVCache]:
        """A cache for each run. With one row all share one: it is empty whenever another run takes its turn."""
        n_rows = min(self._generation.batch_size, max(map(len, lacking.values())))
        n_slots = {name: n_slots_for(requests, self._verifies(name)) for name, requests in lacking.items()}
        make = partial(make_kv_cache, lm, n_rows, graphs=self._generation.cuda_graphs)
        with torch.inference_mode():
            if n_rows == 1:
                return dict.fromkeys(lacking, make(n_slots=max(n_slots.values())))
            return {name: make(n_slots=n) for name, n in n_slots.items()}

    def _warm_up(self, lm: CausalLM, caches: dict[str, KVCache]) -> None:
        """Run each kind of decoding once, with all rows, since first calls are slow. Nothing of it is kept."""
        n_tokens = min(WARM_UP_TOKENS, self._generation.max_new_tokens)
        for name, cache in caches.items():
            requests = [Request(n, self._encoded[0], n_tokens) for n in range(cache.n_rows)]
            for _ in decode(lm, requests, replace(self._decoding(name, lm, requests), cache=cache)):
                pass

    def _verifies(self, name: str) -> bool:
        return name != BASELINE and self._generation.decoding == "verify"

    @cached_property
    def _drawing(self) -> dict[str, Any]:
        """temperature, top_k and top_p: those that were given, else the generation config's where that samples."""
        # Where a config samples and says nothing else, `generate` draws from the 50 likeliest.
        config = {"top_k": 50} | self._config.to_diff_dict() if self._config.do_sample else {}
        given = {name: getattr(self._generation, name) for name in DRAWING}
        return {
            name: config.get(name, default) if given[name] is None else given[name] for name, default in DRAWING.items()
        }

    def _sampler(self, lm: CausalLM, requests: list[Request]) -> Sampler:
        """With the processors that the model's generation config asks for."""
        try:
            sampler = Sampler.from_settings(**self._drawing)
            if not config_of_processors(self._config):
                return sampler
            # Some depend on how long the prompt is, such as the one of min_new_tokens.
            of_requests = {
                request.index: processors_of(lm.model, request.prompt_ids, request.max_new_tokens, sampler.greedy)
                for request in requests
            }
        except (ValueError, TypeError) as error:  # the flags were checked
            message = f"{self._settings.model.path}: its generation config cannot be used ({str(error).rstrip('.')})"
            raise InputError(f"{message}; correct its generation_config.json") from error

        def process(index: int, token_ids: list[int], logits: Tensor) -> Tensor:
            return run_processors(of_requests[index], upload([token_ids], logits.device), logits)

        return replace(sampler, process=process)

    def _decoding(self, name: str, lm: CausalLM, requests: list[Request]) -> Decoding:
        """How a run decodes these requests, with a drafter of its own."""
        generation = self._generation
        decoding = Decoding(
            sampler=self._sampler(lm, requests),
            eos_token_ids=eos_token_ids(lm.model.generation_config, self._tokenizer),
        )
        if name == BASELINE:
            return decoding
        if not self._verifies(name):
            return replace(decoding, retriever=Retriever(self._datastore, self._acceptance))
        policy = DraftPolicy() if generation.draft_growth == "paying" else None
        return replace(decoding, drafter=RetrievalDrafter(self._datastore, generation.drafts), draft_policy=policy)

    def _save(self, lm: CausalLM, name: str, generation: Generation) -> None:
        nll = negative_log_likelihood(lm, generation.prompt_ids, generation.new_token_ids)
        prompt, settings = self._generation.prompts[generation.index], self._run_settings[name]
        save_dir = self._settings.save_dir
        n_threads = torch.get_num_threads()
        save_run(save_dir, name, generation, prompt.text, settings, self._decode_text, nll, n_threads, turn=prompt.turn)

    def _save_as_corpus(self, folder: Path) -> None:
        """Write the generated texts as stage 1 writes a corpus, all in train; each with its prompt, as the model read it."""
        make_folder(folder)
        name, prompts = next(iter(self._run_settings)), self._generation.prompts
        # The last turn of a conversation has the others before it.
        last = [i for i in range(len(prompts)) if i + 1 == len(prompts) or not prompts[i + 1].turn]
        texts = [self._corpus_text(read_run(self._settings.save_dir, i, name).token_ids) for i in last]
        for split in SPLITS:
            write_json_list(split_path(folder, split), [{"text": text} for text in texts] if split == "train" else [])
        self._parts.append(f"{len(texts)} texts as a corpus: {split_path(folder, 'train')}")

    def _corpus_text(self, token_ids: list[int]) -> str:
        """Without the tokens that the tokenizer adds before a text, as it does in stage 2 again, and without EOS."""
        prefix_ids, _ = added_tokens(self._tokenizer)
        first = len(prefix_ids) if token_ids[: len(prefix_ids)] == prefix_ids else 0
        has_ended = token_ids[-1] in eos_token_ids(self._lm.model.generation_config, self._tokenizer)
        return self._decode_text(token_ids[first:-1] if has_ended else token_ids[first:])

    # ---- What came out

    def summary(self, colour: bool) -> str:
        """The table of all runs in --save_dir, one generation with its chunks marked, and where the files are."""
        save_dir = self._settings.save_dir
        if not self._generation.prompts:
            return "\n\n".join(self._parts)
        summary = write_summary(save_dir)
        parts = [*self._parts, format_table(summary)]
        if self._run_name in self._run_settings and self._generation.decoding == "verify":
            shares = summary["runs"][self._run_name].get("acceptance_by_position", [])
            shown = ", ".join(f"{ahead} {share:.0%}" for ahead, share in enumerate(shares, start=1))
            parts.append(f"Drafted tokens accepted, by how far ahead: {shown or 'nothing was drafted'}")
        elif self._run_name in self._run_settings:
            index = typical_prompt(save_dir, self._run_name)
            generation = read_run(save_dir, index, self._run_name)
            parts.append(format_example(generation, self._run_name, self._decode_text, colour))
        if self._similarities:
            parts.append(_describe(np.array(self._similarities), self._acceptance))
        parts.append(f"Every generation: {prompt_path(save_dir, 0)} and on; totals: {save_dir / 'summary.json'}")
        return "\n\n".join(parts)

    def _write_report(self, path: Path) -> None:
        """Write the page about this command's run, from what is in --save_dir, whenever it was generated."""
        settings, generation = self._settings, self._generation
        name = BASELINE if generation.runs == "baseline" else self._run_name
        summary, acceptance = write_summary(settings.save_dir), self._acceptance
        proposes = name != BASELINE and generation.decoding == "chunk" and not acceptance.never
        with_what = {"chunk": "with chunks", "verify": "with drafts"}[generation.decoding]
        datastore = settings.datastore
        ending = "alone" if datastore is None else f"{with_what} of {datastore.dataset}"
        run = ReportRun(
            name=name,
            title=f"{Path(settings.model.path).name} {ending}",
            facts=self._facts(summary["runs"][name]["settings"]),
            similarity_threshold=acceptance.similarity_threshold,
            min_first_token_prob=acceptance.min_first_token_prob,
            reject_repeats=acceptance.reject_repeats,
            policy=acceptance.policy,
            acceptance_map=acceptance.acceptance_map if proposes else None,
            is_fitted=acceptance.fitted is not None,
            corpus="" if datastore is None else f"{datastore.dataset}, {datastore.partition}",
            trie_folder=None if datastore is None else datastore.trie_folder,
        )
        indices = ProgressBar(range(len(generation.prompts)), desc="writing the report", unit="text")
        texts = ((read_run(settings.save_dir, i, name), read_baseline(settings.save_dir, i, name)) for i in indices)
        how = partial(rescore, self._lm, self._datastore) if proposes else None
        write_report(path, run, summary, texts, self._decode_text, how)
        self._parts.append(f"To look at in a browser: {path}")

    def _facts(self, run_settings: dict[str, Any]) -> list[tuple[str, str]]:
        """What the page says of how the run was made."""
        model, datastore = self._settings.model, self._settings.datastore
        facts: dict[str, Any] = {
            "model": model.path,
            "model fingerprint": run_settings["model"],
            "prompts": self._generation.prompt_file,
        }
        if datastore is not None:
            theta = self._acceptance.similarity_threshold
            facts |= {"datastore": datastore.trie_folder, "γ": datastore.tok_prob_threshold, "θ": theta}
        facts |= {name: value for name, value in run_settings.items() if name not in ("model", "datastore")}
        return [(name.replace("_", " "), str(value)) for name, value in facts.items() if value not in (None, [])]


def _turns(names: list[str], counts: dict[str, int]) -> Iterator[str]:
    """The run that generates next, again and again.

    Runs alternate, so that noise affects all alike, and the order reverses each round, so that no run always goes first.
    """
    left = dict(counts)
    while names := [name for name in names if left[name]]:
        for name in names:
            yield name
            left[name] -= 1
        names.reverse()


def _costs(generation: Generation) -> str:
    stats, n_tokens = generation.stats, len(generation.new_token_ids)
    passes = f"{n_tokens} tokens in {stats.forward_passes} forward passes, {stats.seconds:.2f} s"
    return f"{passes} ({stats.lm_seconds:.2f} in the LM, {stats.retrieval_seconds:.2f} in retrieval)"


def _describe(similarities: np.ndarray, acceptance: Acceptance) -> str:
    """The distribution of the best similarities. These differ between models, so without it θ means little."""
    quantiles = np.percentile(similarities, [5, 25, 50, 75, 95])
    shown = ", ".join(f"{share}% {value:.3f}" for share, value in zip((5, 25, 50, 75, 95), quantiles, strict=True))
    described = f"Best similarity of {len(similarities)} proposals, quantiles: {shown}"
    if acceptance.fitted is not None:
        return described
    above = (similarities >= acceptance.similarity_threshold).mean()
    return f"{described}; {above:.1%} are at or above θ = {acceptance.similarity_threshold}"
