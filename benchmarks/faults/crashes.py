"""Ways to end a stage from outside at a chosen point, and small runs of every stage to do it to.

A stage runs in a fork of this process, which has imported what is slow to import, so that hundreds of kills take
minutes. `Crash` says when it dies; whatever is left is what kill -9 leaves: no handler, no `finally` runs.
"""

import json
import os
import resource
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils import workers
from utils.cli import run_script
from utils.datastore import chunk_lists, external_sort, flattened

ROOT = Path(__file__).resolve().parent.parent.parent
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
# Tells worker processes, whatever starts them, when to die too.
IN_WORKERS = "CRASH_OF_WORKERS"
# What a run's result files say of time; all else is the same however often it was killed.
TIMES = {"time", "session", "seconds", "tts", "tts_same_run", "seconds_per_token", "rest_seconds"}


@dataclass(frozen=True)
class Crash:
    """When a run dies, at the first that comes; nothing set: it runs to its end."""

    at_operation: int | None = None  # just before it changes a file or folder for the n-th time, from 0
    at_event: str | None = None  # at the first audit event of this name
    after_seconds: float | None = None
    within_bytes: int | None = None  # in the write that would make any file longer than this
    disk_full: bool = False  # within_bytes fails the write instead
    by: int = signal.SIGKILL  # the signal that ends it
    of_workers: bool = (
        False  # at_operation counts in each worker: these die, or one of them sends the run another signal
    )

    def __str__(self) -> str:
        if self.at_operation is not None:
            who = "a worker " if self.of_workers else ""
            return f"{signal.Signals(self.by).name} {who}before file operation {self.at_operation}"
        if self.at_event is not None:
            return f"{signal.Signals(self.by).name} at {self.at_event}"
        if self.after_seconds is not None:
            return f"{signal.Signals(self.by).name} after {self.after_seconds:.3f} s"
        how = "disk full" if self.disk_full else "within a write"
        return "undisturbed" if self.within_bytes is None else f"{how} at byte {self.within_bytes} of a file"


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, or less the signal that killed it; what it wrote to stderr."""

    status: int
    stderr: str

    @property
    def last_line(self) -> str:
        """Of stderr, without what progress bars left before it."""
        return (self.stderr.replace("\r", "\n").rstrip().rpartition("\n")[2]).strip()

    def __str__(self) -> str:
        return f"{self.status}: {self.last_line}"


def run_in_fork(run: Callable[[], None], folder: Path, crash: Crash = Crash(), seconds: float = 60) -> Ended:
    """Run as a script in a fork that dies as `crash` says; operations count below `folder`.

    Returns when the fork and all that it started have ended; a run over `seconds` hangs, which is an error.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read_end)
        _in_child(run, folder, crash, write_end)
    os.close(write_end)
    told = crash.after_seconds is None
    said, deadline = b"", time.monotonic() + (seconds if told else crash.after_seconds or 0)
    while True:
        if not select.select([read_end], [], [], max(deadline - time.monotonic(), 0))[0]:
            if not told:
                os.kill(pid, crash.by)
            else:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"hangs ({seconds} s): {said.decode(errors='replace')}")
            told, deadline = True, time.monotonic() + seconds
        elif block := os.read(read_end, 1 << 16):
            said += block
        else:
            break
    os.close(read_end)
    status = os.waitpid(pid, 0)[1]
    _struck(folder).unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace"))


def _in_child(run: Callable[[], None], folder: Path, crash: Crash, pipe: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(pipe, 2)
    os.close(pipe)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 (end with the process)
    os.setsid()
    # What forks would share: tqdm's lock, which one that is killed may hold; the servers that this process has started.
    tqdm.set_lock(threading.RLock())
    forkserver._forkserver.__init__()  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if crash.of_workers:
        os.environ[IN_WORKERS] = f"{crash.at_operation} {crash.by} {folder}"
        os.environ["PYTHONPATH"] = str(ROOT)
        preload = BaseContext.set_forkserver_preload
        # First of what their server loads, whatever the stage has it load.
        BaseContext.set_forkserver_preload = lambda self, module_names: preload(self, [__name__, *module_names])  # type: ignore[method-assign]
    elif crash.at_operation is not None:
        strike_at_operation(crash.at_operation, folder, lambda: os.kill(os.getpid(), crash.by))
    if crash.at_event is not None:
        strike_at_event(crash.at_event, crash.by)
    if crash.within_bytes is not None:
        # The default action, which Python has switched off, ends the process in the middle of its write.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN if crash.disk_full else signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (crash.within_bytes, crash.within_bytes))
    status = 1
    try:
        run_script(run)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Without Python's own end, which would wait for what the parent process had started.
        os._exit(status)


def operations(folder: Path) -> Callable[[str, tuple[Any, ...]], str | None]:
    """A function that tells, of an audit event, the place below the folder that it changes, or None."""
    root = os.path.realpath(folder) + os.sep

    def changed(event: str, args: tuple[Any, ...]) -> str | None:
        if event == "open":
            if not isinstance(args[0], (str, bytes, os.PathLike)) or not (args[2] or 0) & WRITING:
                return None
        elif event not in CHANGES:
            return None
        path = os.fsdecode(args[0])
        # shutil.rmtree names what is in an open folder without it.
        is_inside = f"{path}{os.sep}".startswith(root) or not os.path.isabs(path)
        return f"{event} {path.removeprefix(root)}" if is_inside else None

    return changed


def strike_at_operation(n: int, folder: Path, strike: Callable[[], object]) -> None:
    """Call `strike` when this process is about to change something below the folder for the n-th time, from 0."""
    changed = operations(folder)
    counts: dict[int, int] = {}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES and event != "open":
            return
        place = changed(event, args)
        if place is None:
            return
        # A fork of this process counts for itself.
        done = counts.get(os.getpid(), 0)
        counts[os.getpid()] = done + 1
        if done == n:
            os.write(2, f"\nstruck before {place}\n".encode())
            strike()

    sys.addaudithook(hook)


def strike_at_event(name: str, by: int) -> None:
    """Send this process a signal at its first audit event of this name."""
    is_done = False

    def hook(event: str, _: tuple[Any, ...]) -> None:
        nonlocal is_done
        if event == name and not is_done:
            is_done = True
            os.kill(os.getpid(), by)

    sys.addaudithook(hook)


def _strike_from_worker(by: int, folder: Path) -> None:
    """Kill this worker process, or send another signal to the run that it works for, which one worker does."""
    if by == signal.SIGKILL:
        os.kill(os.getpid(), by)
    parent = parent_process()
    assert parent is not None
    assert parent.pid is not None
    with suppress(FileExistsError):
        os.close(os.open(_struck(folder), os.O_CREAT | os.O_EXCL))
        os.kill(parent.pid, by)


def _struck(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.struck")


def count_operations(run: Callable[[], object], folder: Path) -> int:
    """How often an undisturbed run changes something below the folder."""
    path = folder.parent / f"{folder.name}.operations"

    def run_and_count() -> None:
        changed, n = operations(folder), 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal n
            if (event in CHANGES or event == "open") and changed(event, args) is not None:
                n += 1

        sys.addaudithook(hook)
        run()
        path.write_text(str(n))

    ended = run_in_fork(run_and_count, folder)
    assert not ended.status, ended.stderr
    n = int(path.read_text())
    path.unlink()
    return n


if IN_WORKERS in os.environ:  # this is a worker process, or the server that forks them
    _n, _by, _folder = os.environ[IN_WORKERS].split(" ", 2)
    strike_at_operation(int(_n), Path(_folder), partial(_strike_from_worker, int(_by), Path(_folder)))


# ---- What is compared


def content(folder: Path) -> dict[str, object]:
    """Every file below a folder but the locks, by relative name; result files of stage 5 without their times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            data = path.read_bytes()
            is_result = path.name.startswith("prompt_") or path.name == "summary.json"
            found[str(path.relative_to(folder))] = _without_times(json.loads(data)) if is_result else data
    return found


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {
            k: _without_times(v) for k, v in value.items() if k not in TIMES and not k.endswith(("_seconds", "_us"))
        }
    return value


def difference(found: dict[str, object], wanted: dict[str, object]) -> str:
    """The first file in which two folders differ, in words; "" where they are the same."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            return f"{name} is there, and should not be"
        if name not in found:
            return f"{name} is missing"
        if found[name] != wanted[name]:
            return f"{name} differs"
    return ""


# ---- The stages


TEXTS = (
    "the cat sat on the mat, the dog sat on the log, the cat and the dog sat. " * 5,
    "def add(a, b):\n    return a + b\n\n\nclass Adder:\n\tdef __call__(self, a, b):\n\t\treturn add(a, b)\n" * 3,
    "The quick brown fox jumps over the lazy dog. The quick brown fox sleeps. " * 4,
    "naïve Zürich, 東京は日本の首都です。 " * 9,
)
GAMMA = "0.004"
LABELS = ("--model_ds", "ds", "--model_gen", "gen", "--partition", "train", "--tok_prob_threshold", GAMMA)
DATASTORE = f"tries/token_trie_texts_DSds_Hgen/train_{GAMMA}"


@dataclass
class Stage:
    """A command to be killed, or several in turn: what must be there before, in a folder that is not touched; flags."""

    name: str
    script: str
    before: Path
    flags: Callable[[Path], list[object]] = field(repr=False)
    n_workers: int = 1
    then: tuple[Callable[[Path], list[object]], ...] = ()  # flags of the same script again
    _wanted: dict[str, object] | None = field(default=None, repr=False)

    def run(self, folder: Path) -> None:
        """In this process; `folder` holds a copy of what must be there before."""
        import importlib

        os.sched_getaffinity = lambda _: set(range(self.n_workers))
        if self.n_workers > 1:  # share out what would else be one task
            chunk_lists.BATCH_TOKENS, external_sort.LEAST_UNIT_BYTES, workers.START_S = 200, 500, 1e-9
            flattened.LEAST_TASK_BYTES = 500
        main = importlib.import_module(self.script.removesuffix(".py")).main
        for flags in (self.flags, *self.then):
            main([str(flag) for flag in flags(folder)])

    @contextmanager
    def copy(self, where: Path) -> Iterator[Path]:
        """A copy of what must be there before, deleted afterwards; always under the same name, which results may hold."""
        folder = Path(shutil.copytree(self.before, where / "work"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def undisturbed(self, where: Path) -> dict[str, object]:
        """What one run to the end leaves; made once."""
        if self._wanted is None:
            with self.copy(where) as folder:
                ended = run_in_fork(lambda: self.run(folder), folder)
                assert not ended.status, (self.name, ended.stderr)
                self._wanted = content(folder)
        return self._wanted

    def crashed_and_run_again(self, where: Path, crashes: list[Crash]) -> tuple[dict[str, object], list[Ended]]:
        """What is there after the crashes, one run each, and one run to the end; how each of the first ended."""
        with self.copy(where) as folder:
            ends = [run_in_fork(lambda: self.run(folder), folder, crash) for crash in crashes]
            last = run_in_fork(lambda: self.run(folder), folder)
            assert not last.status, (self.name, list(map(str, crashes)), last.stderr)
            return content(folder), ends


def import_what_is_slow(model: Path) -> None:
    """Once, so that the forks need not: what the stages import, and what transformers does with its first model."""
    import utils.evaluation.runner
    import utils.extraction.run  # noqa: F401
    from utils.lm.model import load_lm, load_tokenizer

    load_lm(str(model), "cpu")
    load_tokenizer(str(model))


def build_stages(model: Path, root: Path) -> list[Stage]:
    """All stages of a tiny pipeline, each with the undisturbed output of those before it in a folder below `root`."""
    import_what_is_slow(model)
    first = root / "stage_1"
    (first / "texts").mkdir(parents=True)
    (first / "texts" / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    rows = [{"text": text, "spans": [[4, 7], [12, 15]]} for text in TEXTS[1:]]
    (first / "texts" / "b.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (first / "prompts.json").write_text(json.dumps(["The quick brown fox", "the cat sat on"]))
    extract = ["--model_path", model, "--partition", "train", "--chunk_size", 32, "--stride", 24, "--min_length", 20]
    extract += ["--device", "cpu", "--construct_memmap"]

    def eval_flags(folder: Path, save_dir: str, *flags: object) -> list[object]:
        found = ["--model_path", model, "--token_trie_dir", folder / "tries", "--dataset", "texts", *LABELS]
        return [*found, "--save_dir", folder / save_dir, "--device", "cpu", *flags]

    def tries_flags(folder: Path) -> list[object]:
        found = ["--token_prob_dir", folder / "extracted", "--output_dir", folder / "tries", "--model_name", model]
        return [*found, "--dataset_name", "texts", *LABELS, "--chunk_source", "both", "--max_chunk_length", 5]

    def vector_flags(folder: Path) -> list[object]:
        found = ["--save_dir", folder / "tries", "--dataset_name", "texts", *LABELS]
        found += ["--idx_to_seqlen_path", folder / "extracted" / "train_index_to_seqlen.json"]
        found += ["--index_to_acc_index_path", folder / "extracted" / "train_index_to_acc_index.json"]
        return [*found, "--all_hidden_states_path", folder / "extracted" / "train.h5"]

    local = ["--dataset", "local", "--validation_fraction", 0.2, "--test_fraction", 0.2]

    def texts_of(folder: Path) -> list[object]:
        return [*local, "--input_files", folder / "texts", "--output_dir", folder / "data"]

    def to_extract(folder: Path) -> list[object]:
        return [*extract, "--data_dir", folder / "data", "--output_dir", folder / "extracted"]

    for name, text in (("fit", TEXTS[0]), ("test", TEXTS[2])):
        (first / f"{name}.json").write_text(json.dumps([{"text": text}]))
    texts = {"--fit_acceptance": "fit.json", "--perplexity_file": "test.json"}

    def text_flags(folder: Path) -> list[object]:
        paths = [item for flag, name in texts.items() for item in (flag, folder / name)]
        return eval_flags(folder, "perplexity", *paths, "--max_windows", 3, "--perplexity_window", 32)

    def prompted(save_dir: str, *flags: object) -> Callable[[Path], list[object]]:
        def of_folder(folder: Path) -> list[object]:
            prompts = ("--prompt_file", folder / "prompts.json", "--max_new_tokens", 5)
            return eval_flags(folder, save_dir, *prompts, *flags)

        return of_folder

    recipes: list[tuple[str, str, Callable[[Path], list[object]], int]] = [
        ("1 preprocess", "preprocess_dataset.py", texts_of, 1),
        ("2 extract", "extract_token_probs_and_memmap.py", to_extract, 1),
        ("3 tries", "save_token_trie_info.py", tries_flags, 1),
        ("4 vectors", "make_token_trie.py", lambda f: [*vector_flags(f), "--max_workers", 1], 1),
        ("5 flatten, generate", "eval.py", prompted("results", "--compare_baseline"), 1),
    ]
    stages, before = [], first
    for n, (name, script, flags, n_workers) in enumerate(recipes, start=2):
        stage = Stage(name, script, before, flags, n_workers)
        stages.append(stage)
        after = Path(shutil.copytree(before, root / f"stage_{n}"))
        ended = run_in_fork(partial(stage.run, after), after)
        assert not ended.status, (name, ended.stderr)
        before = after
    by_name = {stage.name[0]: stage for stage in stages}

    def extracted_with(*flags: object) -> Callable[[Path], list[object]]:
        return lambda folder: [*to_extract(folder), *flags]

    shards = [extracted_with("--num_shards", 2, *which) for which in (["--shard", 0], ["--shard", 1], ["--merge_only"])]
    script, texts_there = by_name["2"].script, by_name["2"].before
    stages[2:2] = [
        Stage("2 extract, discard", script, texts_there, extracted_with("--discard_intermediates")),
        Stage("2 extract, 2 shards, merge", script, texts_there, shards[0], then=tuple(shards[1:])),
    ]
    # By measured times, drafts of another length would be taken.
    verified = ("--decoding", "verify", "--draft_growth", "full", "--temperature", 0)
    stages += [
        Stage("3 tries, 2 workers", "save_token_trie_info.py", by_name["3"].before, tries_flags, 2),
        Stage("4 vectors, 2 workers", "make_token_trie.py", by_name["4"].before, vector_flags, 2),
        Stage("5 flatten, 2 workers", "eval.py", by_name["5"].before, by_name["5"].flags, 2),
        Stage("5 generate, verify", "eval.py", before, prompted("verified", *verified)),
        Stage("5 fit, perplexity", "eval.py", before, text_flags),
    ]
    return stages
