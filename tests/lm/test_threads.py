"""How many threads compute: what the user says, what an earlier run had, or what is faster here and now."""

import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import tiny_lm

from utils.lm.model import CausalLM
from utils.lm.threads import N_ROUNDS, use_threads

N_DEFAULT, N_TOKENS = 3, 7


@pytest.fixture(autouse=True)
def default_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's own number, as on a machine that sets none."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(N_DEFAULT)
    yield
    torch.set_num_threads(before)


class Timed(CausalLM):
    """A model that one number of threads takes 20 ms longer for; it notes how many threads and tokens it is read with."""

    def __init__(self, slow: int) -> None:
        super().__init__(tiny_lm("five tokens").model, "m")
        self.slow = slow
        self.passes: list[tuple[int, tuple[int, ...]]] = []

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        n_threads = torch.get_num_threads()
        self.passes.append((n_threads, tuple(input_ids.shape)))
        time.sleep(0.02 * (n_threads == self.slow))
        return super().forward(input_ids, **kwargs)


def test_one_thread_is_taken_where_it_is_faster_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    lm = Timed(slow=N_DEFAULT)
    assert use_threads(lm, None, None, N_TOKENS) == torch.get_num_threads() == 1
    (said,) = caplog.messages
    assert re.fullmatch(
        r"a forward pass takes [\d.]+ ms with 3 threads and [\d.]+ ms with one, so one computes; "
        r"--threads 3 decides otherwise",
        said,
    )
    # In turns, so that what else the machine does meets both alike.
    assert lm.passes == [(3, (1, N_TOKENS)), (1, (1, N_TOKENS))] * (N_ROUNDS + 1)


def test_torchs_own_number_stays_where_it_is_faster(caplog: pytest.LogCaptureFixture) -> None:
    assert use_threads(Timed(slow=1), None, None, N_TOKENS) == torch.get_num_threads() == N_DEFAULT
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("wanted", "earlier", "expected"),
    [(2, None, 2), (5, None, 5), (2, 1, 2), (None, 1, 1), (None, 2, 2), (None, 64, N_DEFAULT)],
)
def test_the_users_number_or_else_an_earlier_runs_is_used_untimed(
    wanted: int | None, earlier: int | None, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An earlier run's, since bytes may depend on it; never more than torch would use here."""
    lm = Timed(slow=N_DEFAULT)
    assert use_threads(lm, wanted, earlier, N_TOKENS) == torch.get_num_threads() == expected
    assert (lm.passes, caplog.messages) == ([], [])


def test_nothing_is_timed_where_the_number_is_set_or_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = Timed(slow=N_DEFAULT)
    torch.set_num_threads(1)
    assert use_threads(lm, None, None, N_TOKENS) == 1
    torch.set_num_threads(N_DEFAULT)
    with monkeypatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", str(N_DEFAULT))  # as torchrun sets it
        assert use_threads(lm, None, None, N_TOKENS) == N_DEFAULT
    monkeypatch.setattr(Timed, "device", SimpleNamespace(type="cuda"))
    assert use_threads(lm, None, None, N_TOKENS) == N_DEFAULT
    assert lm.passes == []
