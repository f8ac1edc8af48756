"""Stage 2 in several processes, as torchrun's ranks or as shards, writes what one process writes, whatever is cut off."""

import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXTS
from processes import die_before_rename, in_child

from utils.extraction import distributed as ranks
from utils.lm.scoring import largest_that_fits
from utils.files import InputError, sole_writer_of_part
from utils.lm.model import CausalLM, load_lm
from utils.extraction.distributed import AnotherFailed, Ranks
from utils.extraction.token_probs import STAGE, token_probs_path, windows_with_token_probs
from utils.text.windows import share_of

FLAGS = ("--partition", "train", "--chunk_size", "24", "--stride", "18", "--min_length", "10", "--batch_size", "3")
N_PLACES = 1 << 40


@pytest.fixture(scope="module")
def flags(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line but for the output folder."""
    data = tmp_path_factory.mktemp("data")
    (data / "train.json").write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    return ["--model_path", str(gpt2_folder), "--data_dir", str(data), *FLAGS]


@pytest.fixture
def run(run_stage: Callable[..., None], flags: list[str]) -> Callable[..., None]:
    """run(folder, flag, …): the stage in this process."""
    return lambda folder, *more: run_stage(STAGE, *flags, "--output_dir", folder, *more)


@pytest.fixture(params=["", "--discard_intermediates"])
def outputs(request: pytest.FixtureRequest) -> list[str]:
    return ["--construct_memmap", *str(request.param).split()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the locks, which are empty."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- Ranks


def start_ranks(n_ranks: int, run: Callable[[], None], harm: dict[int, Callable[[], None]] | None = None) -> list[int]:
    """Fork that many ranks, as torchrun would start them; returns their process ids. harm: done first in a rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(n_ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        try:
            (harm or {}).get(rank, lambda: None)()
            run()
            code = 0
        except InputError as error:
            print(f"refused by {rank}: {error}", file=sys.stderr)
            code = 2
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            print(f"rank {rank}: {error!r}", file=sys.stderr)
            code = 1
        sys.stderr.flush()
        os._exit(code)
    return pids


def exit_codes(pids: list[int], *, end_others: bool = True) -> list[int]:
    """What each ended with, a signal as a negative number; where one was killed the others are, as torchrun does it."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] < 0 and end_others:
            for other in set(pids).difference(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


def test_ranks_write_what_one_process_writes(run: Callable[..., None], outputs: list[str], tmp_path: Path) -> None:
    run(tmp_path / "one", *outputs)
    assert exit_codes(start_ranks(3, lambda: run(tmp_path / "three", *outputs))) == [0, 0, 0]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    # Both of them once more, which find all there.
    assert exit_codes(start_ranks(2, lambda: run(tmp_path / "three", *outputs))) == [0, 0]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.parametrize("killed", [0, 1])
def test_after_a_rank_was_killed_the_rest_is_shared_out(
    killed: int, run: Callable[..., None], outputs: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "one", *outputs)
    again = tmp_path / "again"
    for n_renames in (4, 11):
        codes = exit_codes(
            start_ranks(2, lambda: run(again, *outputs), {killed: lambda n=n_renames: die_before_rename(n)})
        )
        assert codes[killed] == -signal.SIGKILL
    assert (
        0 < len(windows_with_token_probs(again / "train")) < len(windows_with_token_probs(tmp_path / "one" / "train"))
    )
    assert exit_codes(start_ranks(2, lambda: run(again, *outputs))) == [0, 0]
    assert contents(again) == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("killed", "message"),
    [
        (0, "refused by 1: rank 1: rank 0 cannot be reached any more"),
        (1, "refused by 0: rank 1: has not been heard of"),
    ],
)
def test_where_no_launcher_ends_the_others_they_end_by_themselves(
    killed: int,
    message: str,
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ranks, "BEAT_S", 0.05)
    monkeypatch.setattr(ranks, "SILENCE_S", 2)
    pids = start_ranks(2, lambda: run(tmp_path), {killed: lambda: die_before_rename(8)})
    codes = exit_codes(pids, end_others=False)
    assert (codes[killed], codes[1 - killed]) == (-signal.SIGKILL, 2)
    said = capfd.readouterr().err
    assert f"{message}" in said
    assert "Traceback" not in said
    assert exit_codes(start_ranks(2, lambda: run(tmp_path))) == [0, 0]


def test_a_rank_that_fails_ends_all_with_one_error(
    run: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    more = ("--save_hidden_states", "--chunk_size", "100", "--stride", "90")
    assert exit_codes(start_ranks(2, lambda: run(tmp_path / "out", *more), {1: limit_file_size})) == [2, 2]
    errors = [line for line in capfd.readouterr().err.splitlines() if "refused" in line or "rank" in line]
    assert len(errors) == 1
    assert errors[0].startswith("refused by 1: ")
    assert "File too large" in errors[0]
    assert exit_codes(start_ranks(2, lambda: run(tmp_path / "out", *more))) == [0, 0]


def test_what_all_ranks_find_wrong_is_said_once(
    run: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (("--stride", "99"), "--stride 99: expected"),
        (("--batch_size", "0"), "--batch_size: got '0'"),
    ):
        assert exit_codes(start_ranks(3, lambda more=more: run(tmp_path / "out", *more))) == [2, 2, 2]
        assert capfd.readouterr().err.count(message) == 1


@pytest.mark.parametrize("flag", ["--shard 0 --num_shards 2", "--merge_only"])
def test_shards_are_not_shared_out_again(
    flag: str, run: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_codes(start_ranks(2, lambda: run(tmp_path / "out", *flag.split()))) == [2, 2]
    assert "torchrun shares the windows out itself" in capfd.readouterr().err


def test_torchrun_starts_ranks_that_end_with_one_summary(
    run: Callable[..., None], flags: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "one", "--construct_memmap")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / STAGE), *flags, "--output_dir", str(tmp_path / "two"), "--construct_memmap"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert done.stdout.count("tokens/s (float32 on cpu, 2 processes)") == 1
    assert len(done.stdout.splitlines()) == 2


def test_a_wait_ends_where_another_rank_has_failed(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    waiting, failing = Ranks(0, 2, 0, store), Ranks(1, 2, 1, store)
    assert waiting.share("value", lambda: [1, 2]) == failing.share("value", lambda: None) == [1, 2]
    assert (waiting.add("tokens", 3), failing.add("tokens", 4)) == (3, 7)
    assert failing.gather("found", "mine") == []
    store.set("left/0", "")  # as if the other had noticed already
    with pytest.raises(InputError, match="too bad"), failing.failing_together():
        raise InputError("too bad")
    with pytest.raises(AnotherFailed):
        waiting.gather("others", "mine")
    with pytest.raises(AnotherFailed):
        waiting.add("tokens", 1)
    with pytest.raises(SystemExit) as stop, waiting.failing_together():
        waiting.check()
    assert stop.value.code == 2


# ---- Shards


def test_shards_and_a_merge_write_what_one_process_writes(
    run: Callable[..., None], outputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "one", *outputs)
    merged = tmp_path / "merged"
    for shard in (2, 0, 3, 1):
        run(merged, *outputs, "--shard", shard, "--num_shards", 4)
        found = windows_with_token_probs(merged / "train")
    assert found == windows_with_token_probs(tmp_path / "one" / "train")
    assert not (merged / "train.h5").exists()
    capsys.readouterr()
    run(merged, *outputs, "--shard", 3, "--num_shards", 4)
    assert "shard 3 of 4: 0 windows computed; after all shards run --merge_only" in capsys.readouterr().out
    run(merged, *outputs, "--merge_only")
    assert contents(merged) == contents(tmp_path / "one")
    for more in (("--shard", 3, "--num_shards", 4), ("--merge_only",)):
        capsys.readouterr()
        run(merged, *outputs, *more)
        assert "all that is asked for is there already" in capsys.readouterr().out


def test_shards_that_are_missing_are_named(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"72 of 72 windows are not there yet; run the shards first, with the same"):
        run(tmp_path, "--merge_only")
    for shard in (1, 4):
        run(tmp_path, "--shard", shard, "--num_shards", 5)
    with pytest.raises(InputError, match=r"of 72 windows .*; run --shard 0, 2, 3 of --num_shards 5 first"):
        run(tmp_path, "--merge_only")
    token_probs_path(tmp_path / "train", windows_with_token_probs(tmp_path / "train")[-1]).unlink()
    for shard in (0, 2, 3):
        run(tmp_path, "--shard", shard, "--num_shards", 5)
    with pytest.raises(InputError, match=r": 1 of 72 windows .*; run --shard 4 of --num_shards 5 first"):
        run(tmp_path, "--merge_only")
    run(tmp_path, "--shard", 4, "--num_shards", 5)
    with pytest.raises(InputError, match=r": 72 of 72 windows .*; run --shard 0, 1 of --num_shards 2 first"):
        run(tmp_path, "--merge_only", "--num_shards", 2, "--save_hidden_states")  # that the shards were not asked for
    run(tmp_path, "--merge_only")


def test_a_shard_of_another_command_is_refused(run: Callable[..., None], tmp_path: Path) -> None:
    run(tmp_path, "--shard", 0, "--num_shards", 2)
    for more, name in ((("--stride", 20), "stride 18"), (("--batch_size", 4), "batch_size 3")):
        with pytest.raises(InputError, match=f"was made with --{name}, this run has"):
            run(tmp_path, "--shard", 1, "--num_shards", 2, *more)


def test_shards_may_run_at_a_time_but_not_those_with_windows_in_common(
    run: Callable[..., None], tmp_path: Path
) -> None:
    places = share_of(1, 2, N_PLACES)
    tmp_path.joinpath("train").mkdir()
    with sole_writer_of_part(tmp_path, "train_extraction", places.start, len(places)):
        assert in_child(lambda: run(tmp_path, "--shard", 0, "--num_shards", 2)) == (0, "")
        for more in (("--shard", 1, "--num_shards", 2), ("--shard", 2, "--num_shards", 4), ("--merge_only",), ()):
            assert "another run is writing here" in in_child(lambda more=more: run(tmp_path, *more))[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--shard 2 --num_shards 2", "--shard 2: the last of 2 is 1"),
        ("--shard 0", "--shard: needs --num_shards"),
        ("--num_shards 2", "--num_shards: says nothing without --shard or --merge_only"),
        ("--shard 0 --num_shards 2 --merge_only", "--merge_only: puts the shards together"),
        ("--shard -1 --num_shards 2", "--shard: got '-1'"),
        ("--device_map auto --device cpu", "--device_map: takes all GPUs, so it goes without --device"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    more: str, message: str, refusal: Callable[..., str], flags: list[str], tmp_path: Path
) -> None:
    assert message in refusal(STAGE, *flags, "--output_dir", tmp_path, *more.split())


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is not None, reason="accelerate is installed")
def test_a_device_map_without_accelerate_is_refused(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--device_map auto: needs the package accelerate; pip install accelerate"):
        run(tmp_path, "--device_map", "auto")
    assert not list(tmp_path.rglob("*.json"))


# ---- The size of a batch


class SmallMemory(CausalLM):
    """A model on a device that holds so many windows."""

    def __init__(self, lm: CausalLM, n_windows: int) -> None:
        super().__init__(lm.model, lm.name)
        self._n_windows = n_windows

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        if len(input_ids) > self._n_windows:
            raise torch.OutOfMemoryError
        return super().forward(input_ids, **kwargs)


def test_batches_are_halved_until_they_fit_and_that_is_said(
    gpt2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = load_lm(str(gpt2_folder))
    assert largest_that_fits(SmallMemory(lm, 64), 64, 10) == 64
    assert not caplog.messages
    assert largest_that_fits(SmallMemory(lm, 20), 64, 10) == 16
    assert caplog.messages == [
        "64 windows of 10 tokens do not fit into cpu; reading 32 at a time",
        "32 windows of 10 tokens do not fit into cpu; reading 16 at a time",
    ]
    with pytest.raises(InputError, match="1 windows of 10 tokens do not fit into the memory of cpu"):
        largest_that_fits(SmallMemory(lm, 0), 4, 10)


def test_without_a_batch_size_later_runs_take_that_of_the_first(
    run_stage: Callable[..., None], run: Callable[..., None], flags: list[str], tmp_path: Path
) -> None:
    without = flags[: flags.index("--batch_size")]
    run_stage(STAGE, *without, "--output_dir", tmp_path)
    manifest = json.loads((tmp_path / "train_manifest.json").read_text())
    assert manifest["arguments"]["batch_size"] == 2048 // 24
    run_stage(STAGE, *without, "--output_dir", tmp_path, "--batch_size", 85)
    with pytest.raises(InputError, match="was made with --batch_size 85, this run has 3"):
        run(tmp_path)
    run(tmp_path / "three")
    run_stage(STAGE, *without, "--output_dir", tmp_path / "three", "--save_hidden_states")
    assert json.loads((tmp_path / "three" / "train_manifest.json").read_text())["arguments"]["batch_size"] == 3


def test_shares_cover_all_places() -> None:
    ends = np.concatenate([[share_of(k, 7, N_PLACES).start, share_of(k, 7, N_PLACES).stop] for k in range(7)])
    assert ends[0] == 0
    assert ends[-1] == N_PLACES
    assert (ends[1:-1:2] == ends[2::2]).all()
