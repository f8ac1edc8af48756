"""Stage 2 in several processes, as torchrun's ranks or as shards, writes what one process writes, whatever is cut off."""

import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from conftest import ROOT, TEXTS
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.faults.processes import die_before_rename, in_child
from utils.cli import run_script
from utils.extraction import distributed
from utils.extraction.distributed import AnotherRankFailed, Ranks, joined_ranks
from utils.extraction.run import N_PLACES, place_batches
from utils.extraction.token_probs import STAGE, token_probs_path, windows_with_token_probs
from utils.files import InputError, exclusive_lock
from utils.text.windows import WindowPlan, plan_batches, plan_windows

FLAGS = ("--partition", "train", "--chunk_size", "24", "--stride", "18", "--min_length", "10", "--batch_size", "3")


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


def variables(rank: int, n_ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    numbers = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "localhost"} | {name: str(number) for name, number in numbers.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


# ---- Ranks, as forks of this process, which has imported torch already


Fork = Callable[..., list[int]]


@pytest.fixture
def fork_ranks() -> Iterator[Fork]:
    """fork_ranks(n, run, harm): start n ranks, as scripts; returns their process ids. harm: done first in a rank."""
    started = []

    def start_ranks(
        n_ranks: int, run: Callable[[], None], harm: dict[int, Callable[[], None]] | None = None
    ) -> list[int]:
        port, pids = free_port(), []
        for rank in range(n_ranks):
            if not (pid := os.fork()):
                os.environ |= variables(rank, n_ranks, port)
                run_rank(f"rank{rank}", run, (harm or {}).get(rank, lambda: None))
            pids.append(pid)
        started.extend(pids)
        return pids

    yield start_ranks
    for pid in started:  # that a test which failed has left
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def run_rank(prog: str, run: Callable[[], None], harm: Callable[[], None]) -> NoReturn:
    sys.argv[0], distributed.NOTICE_S = prog, 600
    status = 1
    try:
        harm()
        run_script(run)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(status)


def statuses(pids: list[int], *, end_others: bool = False) -> list[int]:
    """What each ends with, a signal as a negative number. end_others: once one was killed, as torchrun does."""
    found: dict[int, int] = {}
    asked_to_end = set[int]()
    while left := set(pids).difference(found):
        for pid in left:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                found[pid] = os.waitstatus_to_exitcode(status)
            elif end_others and min(found.values(), default=0) < 0 and pid not in asked_to_end:
                asked_to_end.add(pid)
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
    return [found[pid] for pid in pids]


def require_ended(said: str, prog: str, rank: int) -> None:
    """Fails unless this is how a rank says that another one has ended, without gloo's sources and advice."""
    assert said.startswith(f"{prog}: error: rank {rank}: another rank has ended (")
    assert said.endswith("); see what it printed and run again, it goes on from here")
    assert ".cc:" not in said
    assert "typically" not in said


def test_ranks_write_what_one_process_writes(
    fork_ranks: Fork, run: Callable[..., None], outputs: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "one", *outputs)
    assert statuses(fork_ranks(3, lambda: run(tmp_path / "three", *outputs))) == [0, 0, 0]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    # Once more, with another number of ranks, which find all there.
    assert statuses(fork_ranks(2, lambda: run(tmp_path / "three", *outputs))) == [0, 0]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.parametrize("killed", [0, 1])
def test_after_a_rank_was_killed_the_rest_is_shared_out(
    killed: int, fork_ranks: Fork, run: Callable[..., None], outputs: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "one", *outputs)
    again = tmp_path / "again"
    for n_renames in (5, 12):
        pids = fork_ranks(2, lambda: run(again, *outputs), {killed: lambda n=n_renames: die_before_rename(n)})
        assert statuses(pids, end_others=True)[killed] == -signal.SIGKILL
    n_windows = len(windows_with_token_probs(tmp_path / "one" / "train"))
    assert 0 < len(windows_with_token_probs(again / "train")) < n_windows
    assert statuses(fork_ranks(2, lambda: run(again, *outputs))) == [0, 0]
    assert contents(again) == contents(tmp_path / "one")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_says_why_and_the_other_that_it_has_ended(
    failing: int, fork_ranks: Fork, run: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    more = ("--quiet", "--save_hidden_states", "--chunk_size", "100", "--stride", "90")
    assert statuses(fork_ranks(2, lambda: run(tmp_path, *more), {failing: limit_file_size})) == [2, 2]
    said = {line.partition(":")[0]: line for line in capfd.readouterr().err.splitlines()}
    assert said.keys() == {"rank0", "rank1"}
    assert "File too large" in said[f"rank{failing}"]
    other = 1 - failing
    require_ended(said[f"rank{other}"], f"rank{other}", other)
    assert statuses(fork_ranks(2, lambda: run(tmp_path, *more))) == [0, 0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--stride 99", "--stride 99: expected 1 to the --chunk_size of 24"),
        ("--batch_size 0", "--batch_size: got '0'"),
        ("--shard 0 --num_shards 2", "--shard: torchrun shares the windows out itself"),
        ("--merge_only", "--merge_only: torchrun shares the windows out itself"),
        ("--data_dir /nowhere", "/nowhere/train.json: does not exist"),
        ("--min_length 5000", "the text has no passage of the 5000 tokens"),
        ("--model_path /nowhere", "/nowhere: does not exist"),
        ("--output_dir /proc/nowhere", "/proc/nowhere"),
    ],
)
def test_what_all_ranks_find_wrong_is_said_once(
    more: str,
    message: str,
    fork_ranks: Fork,
    run: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert statuses(fork_ranks(3, lambda: run(tmp_path / "out", "--quiet", *more.split()))) == [2, 2, 2]
    (said,) = capfd.readouterr().err.splitlines()
    assert message in said
    assert said.startswith("rank0: error: ")


def test_a_rank_that_waits_for_the_others_ends_at_once_by_sigterm(
    fork_ranks: Fork, run: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told, tell = os.pipe()
    goes_on, go_on = os.pipe()
    gather = Ranks.gather

    def tell_of_gather() -> None:
        Ranks.gather = lambda self, found: (os.write(tell, b"0"), gather(self, found))[1]  # type: ignore[method-assign]

    def hold_before_gather() -> None:
        Ranks.gather = lambda self, found: (os.write(tell, b"1"), os.read(goes_on, 1), gather(self, found))[2]  # type: ignore[method-assign]

    pids = fork_ranks(2, lambda: run(tmp_path, "--quiet"), {0: tell_of_gather, 1: hold_before_gather})
    assert {os.read(told, 1), os.read(told, 1)} == {b"0", b"1"}
    os.kill(pids[0], signal.SIGTERM)
    assert statuses(pids[:1]) == [143]  # while the other one is still held
    assert capfd.readouterr().err.splitlines() == [
        "rank0: terminated; run the same command again and it goes on from here"
    ]
    os.write(go_on, b"!")
    assert statuses(pids[1:]) == [2]
    (said,) = capfd.readouterr().err.splitlines()
    require_ended(said, "rank1", 1)
    for end in (told, tell, goes_on, go_on):
        os.close(end)


# ---- Ranks, as processes of their own


# A machine that is busy takes longer than usual to start all ranks.
PATIENT = "from utils.extraction import distributed; distributed.NOTICE_S = 600"
Started = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(flags: list[str], tmp_path: Path) -> Iterator[Started]:
    """start(rank, port, before): one of two ranks, as a script that writes to tmp_path/two; before: code to run first."""
    started = []

    def start_rank(rank: int, port: int, before: str = PATIENT) -> subprocess.Popen[str]:
        program = f"{before}\nfrom utils.cli import run_script\nimport {STAGE.removesuffix('.py')} as stage\n"
        command = [sys.executable, "-c", program + "run_script(stage.main)", *flags]
        process = subprocess.Popen(
            [*command, "--output_dir", str(tmp_path / "two"), "--quiet"],
            cwd=ROOT,
            env=os.environ | variables(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_rank
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_says_for_whom_it_waits_and_ends_at_once_by_sigterm(rank: int, start: Started) -> None:
    assert distributed.NOTICE_S <= 10
    port = free_port()
    process = start(rank, port, "from utils.extraction import distributed; distributed.NOTICE_S = 0.1")
    assert process.stderr is not None
    assert process.stderr.readline() == f"rank {rank}: waiting at localhost:{port} for all 2 ranks to start\n"
    process.send_signal(signal.SIGTERM)
    # It would wait for a day.
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert err == "-c: terminated; run the same command again and it goes on from here\n"


@pytest.mark.parametrize("killed", [0, 1])
def test_where_no_launcher_ends_the_others_they_end_by_themselves(
    killed: int, start: Started, run: Callable[..., None], tmp_path: Path
) -> None:
    port, die = free_port(), "from benchmarks.faults.processes import die_before_rename; die_before_rename(8)"
    ranks = [start(rank, port, f"{PATIENT}; {die}" if rank == killed else PATIENT) for rank in range(2)]
    stderrs = [process.communicate(timeout=120)[1] for process in ranks]
    other = 1 - killed
    assert (ranks[killed].returncode, ranks[other].returncode) == (-signal.SIGKILL, 2)
    assert stderrs[killed] == ""
    (said,) = stderrs[other].splitlines()
    require_ended(said, "-c", other)
    assert 0 < len(windows_with_token_probs(tmp_path / "two" / "train")) < 72
    run(tmp_path / "one")
    run(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_unusable_input_is_one_sentence_of_all_ranks_together(start: Started, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "two").write_text("in the way")
    port = free_port()
    ranks = [start(rank, port) for rank in range(2)]
    said = [line for process in ranks for line in process.communicate(timeout=120)[1].splitlines()]
    assert said == [
        f"-c: error: {tmp_path / 'two' / 'train'}: cannot be made a folder (Not a directory); choose another folder"
    ]
    assert [process.returncode for process in ranks] == [2, 2]


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


# ---- What a rank is told


def test_a_process_by_itself_asks_nobody() -> None:
    ranks = Ranks()
    assert ranks.is_first
    assert ranks.broadcast(lambda: 3) == 3
    assert ranks.gather(4) == [4]
    ranks.refuse_flags({"--shard": True})
    assert ranks.device("auto") == "auto"


@pytest.mark.parametrize("missing", distributed.VARIABLES)
def test_without_a_launchers_variables_a_process_is_by_itself(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with joined_ranks() as ranks:
        assert ranks == Ranks()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "x", "RANK, WORLD_SIZE: expected whole numbers .*; start with torchrun"),
        ("WORLD_SIZE", "2.5", "RANK, WORLD_SIZE: expected whole numbers .*; start with torchrun"),
        ("MASTER_PORT", "x", "localhost:x: rank 1 cannot meet the others there .*; check --nnodes"),
    ],
)
def test_variables_that_cannot_be_used_are_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, right in variables(1, 2, 1).items():
        monkeypatch.setenv(known, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{message}"), joined_ranks():
        pass


def test_a_port_that_another_program_listens_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        for name, value in variables(0, 2, port).items():
            monkeypatch.setenv(name, value)
        message = rf"^localhost:{port}: rank 0 cannot meet the others there \(.*EADDRINUSE.*\); check --nnodes"
        with pytest.raises(InputError, match=message) as refused, joined_ranks():
            pass
    assert "\n" not in str(refused.value)


def test_only_rank_0_prints_what_all_find_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        print("wrong", file=sys.stderr)
        raise InputError("wrong")

    with pytest.raises(InputError), Ranks(0, 2).quiet_but_first():
        refuse()
    assert capsys.readouterr().err == "wrong\n"
    with pytest.raises(AnotherRankFailed), Ranks(1, 2).quiet_but_first():
        refuse()
    assert capsys.readouterr().err == ""


def test_each_rank_of_a_machine_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Ranks(6 + local, 8, local).device("auto") for local in range(2)] == ["cuda:0", "cuda:1"]
    assert Ranks(7, 8, 1).device("cuda") == "cuda:1"
    assert Ranks(7, 8, 1).device("cpu") == "cpu"
    assert Ranks(7, 8, 1).device("cuda:0") == "cuda:0"
    with pytest.raises(InputError, match="--nproc_per_node: rank 2 of this machine has no GPU of its own, there are 2"):
        Ranks(8, 9, 2).device("auto")


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
    tmp_path.joinpath("train").mkdir()
    with exclusive_lock(tmp_path, "train_extraction", items=places_of(1, 2)):
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


def test_an_array_of_shards_tokenises_the_text_once(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []

    def counted(*args: Any) -> WindowPlan:
        planned.append(args)
        return plan_windows(*args)

    monkeypatch.setattr("utils.extraction.run.plan_windows", counted)
    for shard in range(3):
        run(tmp_path, "--shard", shard, "--num_shards", 3)
        assert (tmp_path / "train_plan.npy").exists()
    run(tmp_path, "--merge_only")
    assert len(planned) == 1
    assert not (tmp_path / "train_plan.npy").exists()


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


# ---- Shares of the work


def places_of(share: int, n_shares: int) -> range:
    """The places of the batches that a rank or shard computes."""
    return range(share * N_PLACES // n_shares, (share + 1) * N_PLACES // n_shares)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.integers(1, 5))
def test_a_batch_is_where_its_middle_token_is(lengths: list[int], batch_size: int) -> None:
    batches = plan_batches(np.array(lengths), batch_size)
    owners = [i for i, batch in enumerate(batches) for window in batch for _ in range(lengths[window])]
    for i, place in enumerate(place_batches(np.array(lengths), batches).tolist()):
        tokens = [token for token, owner in enumerate(owners) if owner == i]
        middle = tokens[(len(tokens) - 1) // 2]
        assert place == middle * N_PLACES // len(owners)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 9))
def test_shares_have_every_batch_once_and_as_many_tokens_but_for_a_batch(
    lengths: list[int], batch_size: int, n_shares: int
) -> None:
    found = plan_batches(np.array(lengths), batch_size)
    places = place_batches(np.array(lengths), found).tolist()
    shares = [[i for i, place in enumerate(places) if place in places_of(k, n_shares)] for k in range(n_shares)]
    assert [i for share in shares for i in share] == list(range(len(found)))  # each once, and neighbours together
    sizes = [sum(lengths[window] for window in batch) for batch in found]
    for share in shares:
        assert abs(sum(sizes[i] for i in share) - sum(lengths) / n_shares) <= max(sizes)
