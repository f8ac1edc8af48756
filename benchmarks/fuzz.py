"""Spoil the files that the stages read in thousands of ways, and see that each ends in one sentence or a right result.

    python benchmarks/fuzz.py --inputs 12000 --output fuzz.json

Every reader gets its share of mutated files (tests/mutations.py) of a tiny pipeline. A case passes if the reader gives
a result or refuses with an InputError. It fails with any other exception, after SECONDS, where it writes, renames or
deletes anything outside its folder, starts a program or opens a connection, or where the process dies. All happens in
processes whose address space may grow by MEMORY_BYTES and no more, so that what asks for memory as a file's header
says fails too. `--case READER NUMBER` runs one case again, with its traceback.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.common import table, write_json
from benchmarks.faults.crashes import CHANGES, DATASTORE, WRITING, build_stages, run_in_fork
from benchmarks.faults.mutations import mutate
from benchmarks.faults.processes import use_one_thread_in_forks
from utils.datastore.context_vectors import open_hidden_states
from utils.datastore.flattened import FOLDER
from utils.datastore.store import open_datastore, read_flattened
from utils.datastore.trie_files import find_trie_folder, read_context_vectors, read_token_id_list, read_trie_rows
from utils.decoding.acceptance import read_map
from utils.evaluation.results import pending_runs, read_run
from utils.evaluation.summary import typical_prompt, write_summary
from utils.extraction.hidden_states import map_all_hidden_states, read_hidden_states
from utils.extraction.token_probs import find_token_probs, read_extraction, read_token_probs
from utils.files import InputError, file_fingerprint
from utils.json_io import read_json
from utils.manifest import list_path, read_list, require_as_written
from utils.text.corpora import Source, local_files, read_passages
from utils.text.expert_spans import FINGERPRINT, read_expert_spans
from utils.text.prompts import read_prompts

MODEL = ROOT / "examples" / "models" / "small"
SECONDS = 5
MEMORY_BYTES = 1 << 30
BATCH = 100
FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen"}
LABELS = ("texts", "ds", "gen", "train", 0.004)


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read: the files of the folder of which one is spoiled, and what then reads them all."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]


def _example(folder: Path, pattern: str) -> str:
    """One file of many, in its middle by size."""
    found = sorted(folder.glob(pattern), key=lambda path: (path.stat().st_size, path.name))
    return str(found[len(found) // 2].relative_to(folder))


def readers(folder: Path) -> list[Reader]:
    """All of them, for the folder that the whole tiny pipeline was run in."""
    tries, maps = Path(DATASTORE), ("extracted/train_index_to_seqlen.json", "extracted/train_index_to_acc_index.json")
    token = int(Path(_example(folder, f"{tries}/[0-9]*.json")).stem)
    trie = (f"{tries}/{token}.json", f"{tries}/tok_pos_{token}.json")
    hidden_size = read_extraction(folder / "extracted" / "train_manifest.json").results["hidden_size"]
    cpu = torch.device("cpu")

    def read_spans(at: Path) -> Any:
        path = at / "extracted" / "train_expert_spans.json"
        results = read_json(at / "extracted" / "train_manifest.json")["results"]
        spans = read_expert_spans(at / "extracted" / "train", {**results, FINGERPRINT: file_fingerprint(path)})
        return spans.of_tokens(0, np.full(40, 32)), spans.spans_at(np.array([0, 3]), np.array([5, 5]))

    def read_listed(at: Path) -> Any:
        path = at / DATASTORE / "manifest.json"
        manifest = checksums_manifest(path)
        manifest.files["list_sha256"] = hashlib.sha256(list_path(path).read_bytes()).hexdigest()
        listed = read_list(path, manifest)
        require_as_written(path, manifest, [path.parent / name for name in listed], verify=True)

    def checksums_manifest(path: Path) -> Any:
        from utils.manifest import read_manifest

        return read_manifest(path, "save_token_trie_info.py")

    def read_results(at: Path) -> Any:
        name = "verify_generation_t0.9"
        pending_runs(at / "results", ["The quick brown fox"], {name: {0: [1, 2]}}, {name: {}})
        write_summary(at / "results")
        typical_prompt(at / "results", "generation_t0.5")
        return read_run(at / "results", 0, "generation_t0.5")

    def read_vectors(at: Path) -> Any:
        return read_context_vectors(at / DATASTORE, token, read_trie_rows(at / DATASTORE, token))

    def read_maps(at: Path) -> Any:
        extraction = read_extraction(at / "extracted" / "train_manifest.json")
        lengths, first_rows = (at / name for name in maps)
        return open_hidden_states(at / "extracted" / "train.h5", lengths, first_rows, extraction)

    def open_tries(at: Path, reprocess: bool) -> Any:
        folder = find_trie_folder(at / "tries", *LABELS)
        datastore = open_datastore(folder, device=cpu, max_bytes=10**9, reprocess=reprocess)
        return datastore.trie(token)

    def flatten(at: Path) -> Any:
        path = at / DATASTORE / FOLDER / f"{token}.pkl"
        path.unlink(missing_ok=True)
        return open_tries(at, reprocess=True)

    pkl = f"{tries}/{FOLDER}/{token}.pkl"
    manifests = (f"{tries}/manifest.json", f"{tries}/hidden_states_manifest.json", f"{tries}/{FOLDER}/manifest.json")
    return [
        Reader("passages", ("fit.json",), lambda at: list(read_passages(at / "fit.json"))),
        Reader("passages with spans", ("texts/b.json",), lambda at: list(read_passages(at / "texts" / "b.json"))),
        Reader("JSON lines", ("lines.jsonl",), lambda at: list(local_files(Source("local", (at / "lines.jsonl",))))),
        Reader("prompts", ("prompts.json",), lambda at: read_prompts(at / "prompts.json")),
        Reader("prompts, lines", ("lines.jsonl",), lambda at: read_prompts(at / "lines.jsonl")),
        Reader(
            "manifest of stage 2",
            ("extracted/train_manifest.json",),
            lambda at: find_token_probs(at / "extracted", "train"),
        ),
        Reader(
            "token_probs",
            ("extracted/train/token_probs_3.json",),
            lambda at: read_token_probs(at / "extracted" / "train", 3),
        ),
        Reader(
            "hidden_states .npy",
            ("extracted/train/hidden_states_3.npy",),
            lambda at: read_hidden_states(at / "extracted" / "train", 3),
        ),
        Reader(
            "all hidden states .h5",
            ("extracted/train.h5",),
            lambda at: map_all_hidden_states(at / "extracted" / "train.h5").sum(),
        ),
        Reader("index maps", maps, read_maps),
        Reader("expert spans", ("extracted/train_expert_spans.json",), read_spans),
        Reader("tries and positions", trie, lambda at: read_trie_rows(at / DATASTORE, token)),
        Reader("context vectors .h5", (f"{tries}/{token}.h5",), read_vectors),
        Reader("flattened tries", (pkl,), lambda at: read_flattened(at / DATASTORE / FOLDER, token, hidden_size, cpu)),
        Reader("manifests of a datastore", manifests, lambda at: open_tries(at, reprocess=False)),
        Reader("flattening", (*trie, f"{tries}/{token}.h5", *manifests[:2]), flatten),
        Reader("lists of checksums", (f"{tries}/checksums.txt",), read_listed),
        Reader("lists of token ids", ("ids.json",), lambda at: read_token_id_list(at / "ids.json")),
        Reader(
            "acceptance maps",
            ("perplexity/acceptance_map.json",),
            lambda at: read_map(at / "perplexity" / "acceptance_map.json")(0.5),
        ),
        Reader("results", ("results/prompt_0.json",), read_results),
        Reader("results, verified", ("verified/prompt_0.json",), lambda at: write_summary(at / "verified")),
    ]


def build(where: Path, model: Path = MODEL) -> Path:
    """A folder in which every stage was run."""
    stages = {stage.name: stage for stage in build_stages(model, where / "stages")}
    folder = Path(shutil.copytree(stages["5 fit, perplexity"].before, where / "whole"))
    for name in ("5 fit, perplexity", "5 generate, verify"):
        ended = run_in_fork(partial(stages[name].run, folder), folder)
        assert not ended.status, ended.stderr
    (folder / "ids.json").write_text("[5, 17, 300]")
    lines = (
        {"text": "one", "turns": ["a", "b"]},
        {"text": "two 東京", "prompt": "c"},
        {"text": "three", "spans": [[0, 2]]},
    )
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# ---- Cases


def run_case(reader: Reader, whole: Path, work: Path, number: int, seed: int) -> str:
    """ "result", "refused", or what was wrong; in this process."""
    rng = random.Random(f"{seed} {reader.name} {number}")
    name = rng.choice(reader.files)
    spoiled = mutate((whole / name).read_bytes(), name, rng)
    (work / name).write_bytes(spoiled)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(work)
    except InputError as error:
        return "refused" if str(error).count("\n") == 0 else f"many lines: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "result"


class Hangs(BaseException):
    """A case took longer than SECONDS."""


def _hangs(*_: object) -> None:
    raise Hangs


def limit_this_process(work: Path) -> Callable[[], list[str]]:
    """Bound its memory, and note from now on what it may not do; returns what gives and forgets the notes."""
    root, notes = os.path.realpath(work) + os.sep, list[str]()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            notes.append(f"{event} {args!r:.200}")
        elif event in CHANGES or (event == "open" and isinstance(args[0], (str, bytes)) and (args[2] or 0) & WRITING):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not f"{path}{os.sep}".startswith(root) and path != os.devnull and os.path.isabs(os.fsdecode(args[0])):
                notes.append(f"{event} {path}")

    def taken() -> list[str]:
        found = notes.copy()
        notes.clear()
        return found

    sys.addaudithook(hook)
    signal.signal(signal.SIGALRM, _hangs)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = n_pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return taken


def run_cases(reader: Reader, whole: Path, where: Path, numbers: range, seed: int) -> list[tuple[int, str]]:
    """What came of each case; in forks, a new one after each that died."""
    found: list[tuple[int, str]] = []
    while len(found) < len(numbers):
        first = numbers[len(found)]
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read_end)
            _child(reader, whole, where, range(first, min(first + BATCH, numbers.stop)), seed, write_end)
        os.close(write_end)
        said = _read_all(pid, read_end)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found += [(first + i, text) for i, text in enumerate(json.loads(line) for line in said.decode().splitlines())]
        if status:
            found.append((numbers[len(found)], f"the process ended with {status}"))
    return found


def _child(reader: Reader, whole: Path, where: Path, numbers: range, seed: int, pipe: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.stdout = sys.stderr = open(null, "w")  # noqa: SIM115 (ends with the process)
    work = where / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(whole, work)
    taken = limit_this_process(work)
    for number in numbers:
        outcome = run_case(reader, whole, work, number, seed)
        if notes := taken():
            outcome = f"touched what it may not: {notes[:3]}"
        os.write(pipe, (json.dumps(outcome) + "\n").encode())
        _restore(reader, whole, work)
        taken()
    os._exit(0)


def _restore(reader: Reader, whole: Path, work: Path) -> None:
    """Put back what was spoiled, and what reading it may have written."""
    for name in (*reader.files, "results/prompt_0.json", "results/prompt_1.json"):
        shutil.copyfile(whole / name, work / name)
    if reader.name in ("flattening", "manifests of a datastore"):
        shutil.rmtree(work / DATASTORE / FOLDER, ignore_errors=True)
        shutil.copytree(whole / DATASTORE / FOLDER, work / DATASTORE / FOLDER)


def _read_all(pid: int, pipe: int) -> bytes:
    """What a child says until it ends; one that says nothing for three times SECONDS is killed."""
    said = b""
    while True:
        if not select.select([pipe], [], [], 3 * SECONDS + 30)[0]:
            os.kill(pid, signal.SIGKILL)
        if not (block := os.read(pipe, 1 << 16)):
            os.close(pipe)
            return said
        said += block


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=12000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--readers", default="", help="only those whose name begins with this")
    parser.add_argument("--case", nargs=2, metavar=("READER", "NUMBER"), help="run one case here and show what happens")
    parser.add_argument("--output", type=Path, default=Path("fuzz.json"), help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    use_one_thread_in_forks()
    rows, results, started = [], {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        whole = build(where)
        chosen = [reader for reader in readers(whole) if reader.name.startswith(args.readers)]
        if args.case:
            reader = next(reader for reader in chosen if reader.name == args.case[0])
            signal.signal(signal.SIGALRM, _hangs)
            print(run_case(reader, whole, Path(shutil.copytree(whole, where / "work")), int(args.case[1]), args.seed))
            return
        for n, reader in enumerate(chosen):
            reader.read(Path(shutil.copytree(whole, where / "sound")))  # as it is, it must be read
            shutil.rmtree(where / "sound")
            n_cases = args.inputs // len(chosen) + (n < args.inputs % len(chosen))
            found = run_cases(reader, whole, where, range(n_cases), args.seed)
            wrong = [(number, text) for number, text in found if text not in ("result", "refused")]
            counts = Counter(text for _, text in found)
            rows.append((reader.name, len(found), counts["refused"], counts["result"], len(wrong)))
            results[reader.name] = {
                "inputs": len(found),
                "refused": counts["refused"],
                "result": counts["result"],
                "wrong": [{"case": number, "what": text} for number, text in wrong],
            }
            by_kind: dict[str, tuple[int, int, str]] = {}
            for number, text in wrong:
                kind = "\n".join(text.splitlines()[-4:])
                by_kind[kind] = (by_kind.get(kind, (0,))[0] + 1, number, text.splitlines()[0][:200])
            for kind, (times, number, head) in by_kind.items():
                print(f"--- {reader.name}, case {number} and {times - 1} like it: {head}\n{kind}", file=sys.stderr)
    sums = [sum(int(row[i]) for row in rows) for i in range(1, 5)]
    print(table(("reader", "inputs", "refused in a sentence", "read", "wrong"), [*rows, ("all", *sums)]))
    print(f"{time.perf_counter() - started:.0f} s, at most {MEMORY_BYTES >> 20} MiB and {SECONDS} s for each")
    write_json(args.output, torch.device("cpu"), argv, {"readers": results})


if __name__ == "__main__":
    main()
