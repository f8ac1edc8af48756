"""Scoring: log p of each token is the log-softmax of its logits, in slices and in batches that fit the device."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import Scripted, tiny_lm

from utils.files import InputError
from utils.lm import scoring
from utils.lm.model import CausalLM, load_lm
from utils.lm.scoring import (
    find_batch_size,
    largest_that_fits,
    log_probs_of,
    negative_log_likelihood,
    require_finite,
    score_windows,
    start_scoring,
)

IDS = np.arange(20).reshape(2, 10)


@pytest.fixture
def gpt2(gpt2_folder: Path) -> CausalLM:
    return load_lm(str(gpt2_folder))


# ---- Log-probabilities


def log_probs_by_hand(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """In float64, one position at a time."""
    expected = np.zeros(targets.shape)
    for place in np.ndindex(*targets.shape):
        values = [float(value) for value in logits[place]]
        largest = max(values)
        total = math.fsum(math.exp(value - largest) for value in values)
        expected[place] = values[targets[place]] - largest - math.log(total)
    return expected


@pytest.mark.parametrize("slice_values", [1, 7 * 3, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_are_those_of_a_float64_softmax(
    dtype: torch.dtype, slice_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SLICE_VALUES", {"cpu": slice_values})
    generator = torch.Generator().manual_seed(0)
    for scale, n_rows, n_positions, n_ids in ((1, 1, 1, 2), (3, 2, 5, 7), (30, 3, 11, 50), (3000, 2, 4, 9)):
        logits = (torch.randn(n_rows, n_positions, n_ids, generator=generator) * scale).to(dtype)
        targets = torch.randint(0, n_ids, (n_rows, n_positions), generator=generator)
        found = log_probs_of(logits, targets)
        assert found.dtype == torch.float32
        assert bool((found <= 0).all())
        np.testing.assert_allclose(found.numpy(), log_probs_by_hand(logits, targets), rtol=1e-5, atol=2e-6 * scale)


def test_the_log_prob_of_an_impossible_token_is_minus_infinity() -> None:
    logits = torch.tensor([[[0.0, -math.inf, 0.0], [1e4, 0.0, -math.inf]]])
    assert log_probs_of(logits, torch.tensor([[1, 0]])).tolist() == [[-math.inf, 0]]
    assert log_probs_of(logits, torch.tensor([[0, 1]])).tolist() == [[pytest.approx(math.log(0.5)), -1e4]]


def test_rounding_lifts_no_log_prob_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    logsumexp = torch.Tensor.logsumexp  # which may round down on a GPU
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: logsumexp(x, dim) * (1 - 2**-23))
    assert log_probs_of(torch.tensor([[[90.0, 0.0]]]), torch.tensor([[0]])).tolist() == [[0]]


@pytest.mark.parametrize("slice_values", [1, 2 * 320 * 3, 1 << 24])
def test_windows_score_as_the_log_softmax_of_the_models_logits(
    slice_values: int, gpt2: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SLICE_VALUES", {"cpu": slice_values})
    log_probs = score_windows(gpt2, IDS).log_probs
    with torch.no_grad():
        expected = gpt2.model(torch.as_tensor(IDS)).logits.log_softmax(-1).numpy()
    assert (log_probs[:, 0] == 0).all()
    for row, position in np.ndindex(2, 9):
        assert log_probs[row, position + 1] == pytest.approx(expected[row, position, IDS[row, position + 1]], abs=1e-5)


def test_no_float32_copy_of_all_logits_is_made(gpt2: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    logsumexp = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: (sizes.append(x.numel()), logsumexp(x, dim))[1])
    monkeypatch.setattr(scoring, "SLICE_VALUES", {"cpu": 2 * 320 * 4})
    score_windows(gpt2, IDS)
    assert sizes == [2 * 320 * 4, 2 * 320 * 4, 2 * 320]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_nll_is_the_sum_over_the_new_tokens_alone(name: str) -> None:
    lm = tiny_lm(name)
    text = [5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        logits = lm.model(torch.tensor([text])).logits
    log_probs = log_probs_by_hand(logits[:, :-1], torch.tensor([text[1:]]))[0]
    for n_prompt in range(1, len(text)):
        found = negative_log_likelihood(lm, text[:n_prompt], text[n_prompt:])
        assert found == pytest.approx(-log_probs[n_prompt - 1 :].sum(), rel=1e-5)


# ---- Windows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_hidden_states_come_in_the_dtype_that_is_asked_for(dtype: str, gpt2: CausalLM) -> None:
    scores = score_windows(gpt2, IDS, np.dtype(dtype))
    with torch.no_grad():
        expected = gpt2.model(torch.as_tensor(IDS), output_hidden_states=True).hidden_states[-1].numpy()
    assert scores.hidden_states is not None
    assert scores.hidden_states.dtype == dtype
    np.testing.assert_allclose(scores.hidden_states, expected, rtol=1e-5 if dtype == "float32" else 1e-3, atol=1e-3)
    assert scores.is_finite.all()
    assert score_windows(gpt2, IDS).hidden_states is None


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("logits", math.nan, "window 7: the model computed NaN or infinity; use another --dtype, such as float32"),
        ("hidden", math.nan, "window 7: the model computed NaN or infinity; use another --dtype, such as float32"),
        ("hidden", math.inf, "window 7: the model computed NaN or infinity; use another --dtype, such as float32"),
        (
            "hidden",
            7e4,
            "window 7: a hidden state exceeds the 65504 that float16 holds; use --hidden_dtype float32",
        ),
    ],
)
def test_a_number_that_is_none_is_refused_with_its_window(
    where: str, value: float, message: str, gpt2: CausalLM
) -> None:
    def change(hidden_states: torch.Tensor, logits: torch.Tensor) -> None:
        (logits if where == "logits" else hidden_states)[1, 4, 3] = value

    scores = score_windows(Scripted(gpt2, change), IDS, np.dtype("float16"))
    require_finite(4, 0, scores)
    with pytest.raises(InputError) as refused:
        require_finite(7, 1, scores)
    assert str(refused.value) == message


# ---- The size of a batch


class SmallMemory(CausalLM):
    """A model on a device that holds so many windows at a time."""

    def __init__(self, lm: CausalLM, n_windows: int, device: str = "cpu") -> None:
        super().__init__(lm.model, lm.name)
        self.n_windows, self.named = n_windows, torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.named

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        if len(input_ids) > self.n_windows:
            raise torch.OutOfMemoryError
        return super().forward(input_ids, **kwargs)  # type: ignore[arg-type]


def test_batches_are_halved_until_they_fit_and_that_is_said(gpt2: CausalLM, caplog: pytest.LogCaptureFixture) -> None:
    assert largest_that_fits(SmallMemory(gpt2, 64), 64, 10) == 64
    assert not caplog.messages
    assert largest_that_fits(SmallMemory(gpt2, 20), 64, 10) == 16
    assert caplog.messages == [
        "64 windows of 10 tokens do not fit into cpu; reading 32 at a time",
        "32 windows of 10 tokens do not fit into cpu; reading 16 at a time",
    ]
    with pytest.raises(InputError, match="1 windows of 10 tokens do not fit into the memory of cpu"):
        largest_that_fits(SmallMemory(gpt2, 0), 4, 10)


def test_a_cpu_reads_2048_tokens_at_a_time(gpt2: CausalLM) -> None:
    assert [find_batch_size(gpt2, n) for n in (1, 24, 2048, 5000)] == [2048, 85, 1, 1]


def test_a_gpu_reads_32768_tokens_at_a_time_where_they_fit(gpt2: CausalLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    # `meta` stands for any device but the CPU: the model itself runs on that.
    assert find_batch_size(SmallMemory(gpt2, 10**6, "meta"), 128) == 256
    assert find_batch_size(SmallMemory(gpt2, 100, "meta"), 128) == 64
    assert find_batch_size(SmallMemory(gpt2, 1, "meta"), 128) == 1


def test_a_batch_too_large_for_the_memory_is_refused(gpt2: CausalLM) -> None:
    small = SmallMemory(gpt2, 1)
    message = "2 windows of 10 tokens do not fit into the memory of cpu; give a smaller --batch_size"
    for score in (score_windows, start_scoring):
        with pytest.raises(InputError, match=message):
            score(small, IDS)
