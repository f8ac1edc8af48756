"""When a chunk is accepted."""

import numpy as np

from utils.decoding.acceptance import Acceptance


def test_g_has_its_knots_where_the_paper_puts_them():
    acceptance = Acceptance(0.75, q_max=0.9)
    got = acceptance.map(np.array([-1.0, 0.5, 0.625, 0.75, 0.95, 1.0]))
    assert np.allclose(got, [0, 0, 0.25, 0.5, 0.9, 0.9])


def test_threshold_accepts_from_the_exact_threshold_on_and_one_disables():
    assert Acceptance(0.8).accepts(0.8, 0.99)
    assert not Acceptance(0.8).accepts(np.nextafter(0.8, 0), 0.0)
    assert not Acceptance(1.0).accepts(1.0, 0.0)


def test_bernoulli_accepts_below_g():
    acceptance = Acceptance(0.5, "bernoulli")
    assert acceptance.accepts(0.5, 0.49)
    assert not acceptance.accepts(0.5, 0.5)
