"""What the benchmarks share: the clock, the spread, what they ran on, and the file of results."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.json_io import write_json as write_json_file
from utils.manifest import package_versions

# More than the last-level cache of most machines.
FLUSHED_NUMBERS = 2**24


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some measurements, in their order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.values, [0.25, 0.75])
        return float(low), float(high)

    def over(self, other: "Spread") -> "Spread":
        """The ratio to another, repeat by repeat, so that what slowed both of a repeat leaves it as it is."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def as_json(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {"median": self.median, "low_quartile": low, "high_quartile": high, "repeats": len(self.values)}

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """As `median (low to high quartile)`, each multiplied by the scale, of so many significant digits."""
        median, low, high = (f"{scale * value:.{digits}g}" for value in (self.median, *self.quartiles))
        return f"{median} ({low} to {high})"


def measure(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 1,
    before: Callable[[], object] | None = None,
    device: torch.device | None = None,
) -> dict[str, Spread]:
    """Seconds that each of some runs takes. Each repeat does all of them in turn, so that noise meets all alike.

    warm_up: repeats before those that count. before: done before each run, outside its clock. device: waited for at
    both ends of each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        for name, run in runs.items():
            if before is not None:
                before()
            _wait_for(device)
            started = time.perf_counter()
            run()
            _wait_for(device)
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Spread(tuple(values)) for name, values in seconds.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def spread_text(found: Mapping[str, Any]) -> str:
    """A spread that was made JSON, as `Spread.text` writes one."""
    return f"{found['median']:.3g} ({found['low_quartile']:.3g} to {found['high_quartile']:.3g})"


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_flusher(device: torch.device) -> Callable[[], object]:
    """A function that passes over 64 MB, which leaves the caches without what was in them, as a model's weights do."""
    numbers = torch.zeros(FLUSHED_NUMBERS, device=device)
    return lambda: numbers.add_(1)


def copy_bandwidth(device: torch.device, *, n_bytes: int = 2**28, repeats: int = 9) -> Spread:
    """Bytes a second, read and written together, of copying a large array."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, repeats=repeats, device=device)["copy"]
    return Spread(tuple(2 * n_bytes / value for value in seconds.values))


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine in words and numbers, with the threads that torch uses."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_json(path: Path, device: torch.device, argv: Sequence[str] | None, results: Any) -> None:
    """Write results with the command line, the commit, the versions and the hardware they were measured on."""
    about = {
        "argv": [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)],
        "commit": _commit(),
        "versions": package_versions(),
        "hardware": hardware(device),
    }
    write_json_file(path, about | {"results": results}, indent=2)


def _commit() -> str | None:
    """The commit of the code, with a + where files differ from it; None where there is no git to ask."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, the first on the left, the others on the right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)
