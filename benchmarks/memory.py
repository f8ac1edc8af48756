"""The peak memory of a command with all the processes that it starts."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.1


@dataclass(frozen=True)
class Usage:
    """seconds: from start to end; bytes: the largest sum of what its processes held at a time, and of that what no file
    on disk backs (the system takes the rest back where it needs room)."""

    seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int
    output: str


def run_measured(command: Sequence[object], environment: dict[str, str] | None = None) -> Usage:
    """Run a command; a page that several processes share counts once. Raises CalledProcessError where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
        start_new_session=True,  # by which its processes are found
    )
    peaks, ended = [(0, 0)], threading.Event()

    def sample() -> None:
        while not ended.wait(INTERVAL_S):
            peaks.append(_memory_of_session(process.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        output, errors = process.communicate()
        seconds = time.perf_counter() - started
    except BaseException:  # Ctrl-C does not reach another session
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        ended.set()
        sampler.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, output, errors)
    return Usage(seconds, max(peak for peak, _ in peaks), max(peak for _, peak in peaks), output)


def _memory_of_session(session: int) -> tuple[int, int]:
    total = anonymous = 0
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[3]) != session:
                continue
            fields = dict(line.split()[:2] for line in (path / "smaps_rollup").read_text().splitlines()[1:])
        except (OSError, IndexError, ValueError):
            continue  # it has ended
        total += int(fields["Pss:"]) * 1024
        anonymous += int(fields["Pss_Anon:"]) * 1024
    return total, anonymous
