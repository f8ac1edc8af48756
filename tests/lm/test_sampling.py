"""Tokens are drawn from the distribution that temperature, top-k and top-p leave."""

import numpy as np
import torch

from utils.lm.sampling import Sampler, uniforms

LOGITS = torch.log(torch.tensor([[0.5, 0.1, 0.0, 0.3, 0.1]]))


def draws(sampler: Sampler, n: int) -> np.ndarray:
    points = ((np.arange(n) + 0.5) / n).tolist()
    return np.bincount(sampler.tokens(LOGITS.expand(n, -1), points, lambda _: []), minlength=5) / n


def test_draws_follow_the_distribution_and_leave_out_probability_zero():
    assert np.allclose(draws(Sampler.from_settings(1.0, None, None), 1000), [0.5, 0.1, 0.0, 0.3, 0.1], atol=2e-3)


def test_the_ends_of_the_unit_interval_draw_tokens_of_positive_probability():
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.5, 0.0]]))
    sampler = Sampler.from_settings(1.0, None, None)
    assert sampler.tokens(logits, [0.0], lambda _: []).tolist() == [1]
    assert sampler.tokens(logits, [np.nextafter(1.0, 0)], lambda _: []).tolist() == [2]


def test_temperature_top_k_and_top_p_cut_as_the_field_defines_them():
    squared = np.array([0.25, 0.01, 0.0, 0.09, 0.01]) / 0.36
    assert np.allclose(draws(Sampler.from_settings(0.5, None, None), 1000), squared, atol=2e-3)
    assert np.allclose(draws(Sampler.from_settings(1.0, 2, None), 1000), [0.625, 0, 0, 0.375, 0], atol=2e-3)
    assert np.allclose(draws(Sampler.from_settings(1.0, None, 0.7), 1000), [0.625, 0, 0, 0.375, 0], atol=2e-3)


def test_temperature_zero_is_greedy_and_ties_go_to_the_lowest_id():
    sampler = Sampler.from_settings(0.0, 5, 0.5)
    assert sampler.tokens(torch.tensor([[1.0, 3.0, 3.0]]), [0.99], lambda _: []).tolist() == [1]


def test_streams_are_independent_and_a_longer_one_begins_as_the_shorter():
    assert np.array_equal(uniforms(3, 7, 0, 5), uniforms(3, 7, 0, 9)[:5])
    streams = [uniforms(seed, sequence, stream, 4) for seed in (0, 1) for sequence in (0, 1) for stream in (0, 1)]
    assert len({tuple(stream) for stream in streams}) == 8
