"""The nearest row is the true one, found as a loop over all rows finds it."""

import numpy as np
import pytest
import torch

from utils.acceptance import Acceptance
from utils.retrieval import nearest_row


def brute_force(query: torch.Tensor, rows: torch.Tensor) -> tuple[int, float]:
    similarities = [float(row.double() @ query.double() / query.double().norm()) for row in rows]
    return int(np.argmax(similarities)), max(similarities)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1).float()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["random", "clustered", "near-duplicate"])
def test_nearest_row_equals_brute_force(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(777, 48, generator=generator)
    if kind == "clustered":
        rows = rows[torch.randint(5, (777,), generator=generator)] + 0.01 * rows
    if kind == "near-duplicate":
        rows = rows[:1] + 1e-6 * rows
    rows = unit(rows)
    for _ in range(20):
        query = 10 * rows[int(torch.randint(777, (1,), generator=generator))] + torch.randn(48, generator=generator)
        row, similarity = nearest_row(query, rows)
        wanted_row, wanted = brute_force(query, rows)
        assert (row, similarity) == (wanted_row, pytest.approx(wanted, abs=1e-9)) or similarity >= wanted - 1e-15


def test_equal_rows_tie_and_the_lowest_wins():
    row = unit(torch.randn(1, 33, generator=torch.Generator().manual_seed(1)))
    rows = torch.cat([-row] * 7 + [row] * 90)
    found, similarity = nearest_row(row[0] * 5, rows)
    assert found == 7
    assert similarity == pytest.approx(1.0, abs=1e-6)


def test_a_query_of_any_dtype_or_length_is_compared_by_direction():
    rows = unit(torch.eye(4))
    assert nearest_row(torch.tensor([0, 0, 7, 1], dtype=torch.bfloat16), rows)[0] == 2
    assert nearest_row(torch.zeros(4), rows) == (0, 0.0)


def test_g_has_its_knots_where_the_paper_puts_them():
    acceptance = Acceptance(0.75, q_max=0.9)
    got = acceptance.probability(np.array([-1.0, 0.5, 0.625, 0.75, 0.95, 1.0]))
    assert np.allclose(got, [0, 0, 0.25, 0.5, 0.9, 0.9])


def test_threshold_accepts_from_the_exact_threshold_on_and_one_disables():
    assert Acceptance(0.8).accepts(0.8, 0.99)
    assert not Acceptance(0.8).accepts(np.nextafter(0.8, 0), 0.0)
    assert not Acceptance(1.0).accepts(1.0, 0.0)


def test_bernoulli_accepts_below_g():
    acceptance = Acceptance(0.5, "bernoulli")
    assert acceptance.accepts(0.5, 0.49)
    assert not acceptance.accepts(0.5, 0.5)
