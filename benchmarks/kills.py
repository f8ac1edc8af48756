"""Kill every stage hundreds of times, start it again, and compare the bytes with those of an undisturbed run.

    python benchmarks/kills.py --kills 240 --output kills.json

Of the kills, half come just before a file or folder is changed, spread evenly over all changes of a run; the others
after a random time, in the middle of a write, or several in a row. Worker processes are killed too. Then disks that
fill up (a limit on the length of files; a small tmpfs where this user may mount one), Ctrl-C and SIGTERM, which must
leave one sentence, the right exit status and a run that can go on.

Everything is tiny, so that a run takes half a second: what is tested is the order of what happens, not its amount.
"""

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common import table, write_json
from benchmarks.faults.crashes import (
    Crash,
    Ended,
    Stage,
    build_stages,
    content,
    count_operations,
    difference,
    run_in_fork,
)
from benchmarks.faults.processes import use_one_thread_in_forks

MODEL = ROOT / "examples" / "models" / "small"
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=240, help="in all (default: %(default)s)")
    parser.add_argument("--others", type=int, default=6, help="full disks, and signals, of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--stages", default="", help="only those whose name begins with this")
    parser.add_argument("--output", type=Path, default=Path("kills.json"), help="(default: %(default)s)")
    return parser.parse_args(argv)


class Trials:
    """All trials of one stage, and what came of them."""

    def __init__(self, stage: Stage, where: Path, rng: random.Random) -> None:
        self.stage, self.where, self.rng = stage, where, rng
        self.wanted = stage.undisturbed(where)
        started = time.perf_counter()
        assert not difference(stage.crashed_and_run_again(where, [])[0], self.wanted)
        self.seconds = time.perf_counter() - started
        with stage.copy(where) as folder:
            self.n_operations = count_operations(lambda: stage.run(folder), folder)
        self.longest = max(len(data) for data in self.wanted.values() if isinstance(data, bytes))
        self.kills = self.identical = self.others = self.others_right = 0
        self.failures: list[str] = []

    def kill(self, n_kills: int) -> None:
        """At least so many kills that met a run that was going on."""
        at = self._operations()
        while self.kills < n_kills:
            kind = self.kills % 4
            if self.stage.n_workers > 1:
                kind = (1, 4)[self.kills % 2]
            if kind % 2 == 0 and kind < 4:
                crashes = [Crash(at_operation=next(at))]
            elif kind == 1:
                crashes = [
                    Crash(after_seconds=self.rng.uniform(0, self.seconds)) for _ in range(self.rng.choice((1, 1, 3)))
                ]
            elif kind == 3:
                crashes = [Crash(within_bytes=self.rng.randrange(self.longest))]
            else:
                crashes = [Crash(at_operation=self.rng.choice((0, 0, 1, 3, 7, 12)), of_workers=True)]
            self._try(crashes)

    def _operations(self) -> Iterator[int]:
        # By the golden ratio: evenly spread, however many are taken, and none twice before all were.
        step = max(round(self.n_operations * 0.618), 1)
        while any(self.n_operations % d == 0 and step % d == 0 for d in range(2, step + 1)):
            step += 1
        n = 0
        while True:
            yield n % self.n_operations
            n += step

    def _try(self, crashes: list[Crash]) -> None:
        try:
            found, ends = self.stage.crashed_and_run_again(self.where, crashes)
        except AssertionError as error:
            self.failures.append(f"{', '.join(map(str, crashes))}: {error}"[:2000])
            self.kills += len(crashes)
            return
        # A worker that is killed leaves the stage to say so; a moment after the end killed nobody.
        died = [end for end in ends if end.status < 0 or (end.status == 2 and "worker process was ended" in end.stderr)]
        wrong = [end for end in ends if end.status not in (0, 2, -signal.SIGKILL, -signal.SIGXFSZ)]
        differs = difference(found, self.wanted) or "".join(end.stderr for end in wrong)
        self.kills += len(died)
        self.identical += 0 if differs else len(died)
        if differs:
            places = "; ".join(end.last_line for end in ends)
            self.failures.append(f"{', '.join(map(str, crashes))} ({places}): {differs}"[:2000])

    def fill_disk(self, n: int) -> None:
        for _ in range(n):
            crash = Crash(within_bytes=self.rng.randrange(self.longest), disk_full=True)
            self._judge(crash, lambda end: end.status == 2 and _is_one_sentence(end), "cannot be written")

    def interrupt(self, n: int) -> None:
        for i in range(n):
            by = (signal.SIGINT, signal.SIGTERM)[i % 2]
            crash = Crash(after_seconds=self.rng.uniform(0.01, 0.9) * self.seconds, by=by)
            self._judge(
                crash, lambda end, by=by: end.status == EXIT_STATUS[by] and _is_one_sentence(end), "run the same"
            )

    def _judge(self, crash: Crash, is_right: Any, words: str) -> None:
        try:
            found, (end,) = self.stage.crashed_and_run_again(self.where, [crash])
        except AssertionError as error:
            self.others += 1
            self.failures.append(f"{crash}: {error}"[:2000])
            return
        if end.status == 0:
            return  # the file never got that long, or the run was over
        self.others += 1
        differs = difference(found, self.wanted)
        if not differs and is_right(end) and words in end.last_line:
            self.others_right += 1
        else:
            self.failures.append(f"{crash}: {differs or end.status}, {end.stderr}"[-2000:])

    def fill_tmpfs(self, n: int) -> None:
        """The same on a disk that is really full, and then is not any more."""
        n_bytes = sum(len(data) for data in self.wanted.values() if isinstance(data, bytes))
        for _ in range(n):
            with _tmpfs(self.where / "tmpfs", 1 << 30) as disk, self.stage.copy(disk) as folder:
                used = shutil.disk_usage(disk).used
                size = used + max(int(self.rng.uniform(0.02, 0.95) * max(n_bytes - used, 4096)), 4096)
                subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
                end = run_in_fork(partial(self.stage.run, folder), folder)
                subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                if end.status == 0:
                    continue
                again = run_in_fork(partial(self.stage.run, folder), folder)
                differs = difference(content(folder), self.wanted) if not again.status else again.stderr
            self.others += 1
            # A table of generated texts names the folder that it is in.
            if not differs and end.status == 2 and _is_one_sentence(end):
                self.others_right += 1
            else:
                self.failures.append(f"full tmpfs of {size} bytes: {differs or end.status}, {end.stderr}"[-2000:])


def _is_one_sentence(end: Ended) -> bool:
    """Whether stderr holds one line beside progress bars, and no traceback."""
    lines = [
        line
        for line in re.split(r"[\r\n]+", end.stderr)
        if line.strip() and not re.search(r"\d+%\||\d+(it|\?| ).*/s|\[.*\d:\d\d", line)
    ]
    return len(lines) == 1 and "Traceback" not in end.stderr


@contextmanager
def _tmpfs(where: Path, n_bytes: int) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "none", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def may_mount(where: Path) -> bool:
    try:
        with _tmpfs(where, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    use_one_thread_in_forks()
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        mounts = may_mount(where / "tmpfs")
        stages = [stage for stage in build_stages(MODEL, where / "stages") if stage.name.startswith(args.stages)]
        for n, stage in enumerate(stages):
            trials = Trials(stage, where, random.Random(f"{args.seed} {stage.name}"))
            n_kills = args.kills // len(stages) + (n < args.kills % len(stages))
            trials.kill(n_kills)
            trials.fill_disk(args.others)
            trials.interrupt(args.others)
            if mounts:
                trials.fill_tmpfs(args.others // 2)
            rows.append(
                (stage.name, trials.n_operations, trials.kills, trials.identical, trials.others, trials.others_right)
            )
            results[stage.name] = {
                "operations": trials.n_operations,
                "kills": trials.kills,
                "identical": trials.identical,
                "full_disks_and_signals": trials.others,
                "of_them_right": trials.others_right,
                "failures": trials.failures,
            }
            for failure in trials.failures:
                print(f"{stage.name}: {failure}", file=sys.stderr)
            # After each: the whole takes a quarter of an hour.
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
            write_json(args.output, torch.device("cpu"), argv, {"mounts": mounts, "stages": results})
    sums = [sum(int(row[i]) for row in rows) for i in range(1, 6)]
    header = ("stage", "changes of files", "kills", "identical", "full disks, signals", "right")
    print(table(header, [*rows, ("all", *sums)]))
    if not mounts:
        print("No tmpfs could be mounted here: disks were filled by a limit on the length of files only.")


if __name__ == "__main__":
    main()
