"""The row found is the true maximum, as float64 over all rows finds it, whichever way is taken and whatever the rows."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import utils.datastore.search
from utils.datastore.search import VectorIndex, Way
from utils.files import InputError

WAYS: list[Way] = ["product", "half", "bounded"]
# Without these instructions a float16 copy is slower than the rows, and none is made.
CONVERTS_HALVES_FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
# Sums of the same products in another order.
SUM_ROUNDING = 1e-14


def brute_force(query: Tensor, rows: Tensor) -> np.ndarray:
    """(N,) float64 cosine similarities, the sums rounded once."""
    exact = query.double().numpy()
    length = math.sqrt(math.fsum(exact * exact)) or 1.0
    return np.array([math.fsum(row * exact) / length for row in rows.double().numpy()])


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1).float()


def noise(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def clustered(n: int, d: int, seed: int) -> Tensor:
    return noise(5, d, seed)[torch.arange(n) % 5] + 0.02 * noise(n, d, seed + 1)


def near_duplicate(n: int, d: int, seed: int) -> Tensor:
    return unit(noise(1, d, seed)) + 1e-6 * unit(noise(n, d, seed + 1))


def narrow_cone(n: int, d: int, seed: int) -> Tensor:
    """Cosine 0.9 and more between any two, with a decaying spectrum: as hidden states are."""
    spectrum = 1 / torch.arange(1, d + 1)
    return 3 * unit(noise(1, d, seed)) + unit(noise(n, d, seed + 1) * spectrum)


def opposite(n: int, d: int, seed: int) -> Tensor:
    row = noise(1, d, seed)
    return torch.where(torch.arange(n)[:, None] % 3 == 2, row, -row)


def with_zeros(n: int, d: int, seed: int) -> Tensor:
    return noise(n, d, seed) * (torch.arange(n)[:, None] % 2)


def coarse(n: int, d: int, seed: int) -> Tensor:
    """Rows of few different values: many ties and near ties that float16 cannot tell apart."""
    return noise(n, d, seed).round() + 1e-4 * noise(n, d, seed + 1).round()


KINDS: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": noise,
    "clustered": clustered,
    "near-duplicate": near_duplicate,
    "narrow cone": narrow_cone,
    "opposite": opposite,
    "with zeros": with_zeros,
    "coarse": coarse,
}


def queries_for(rows: Tensor, seed: int) -> Tensor:
    """A row itself, close to rows, between two, opposite to one, far from all, and zero; of all lengths."""
    n, d = rows.shape
    chosen = rows[torch.randint(n, (6,), generator=torch.Generator().manual_seed(seed))]
    near = chosen + noise(6, d, seed) * torch.tensor([[0.0], [1e-7], [1e-4], [1e-2], [0.1], [1.0]])
    others = torch.stack([chosen[0] + chosen[1], -chosen[0], noise(1, d, seed + 1)[0], torch.zeros(d)])
    return torch.cat([near, others]) * torch.tensor([1, 1, 7, 1e-3, 1e5, 40, 1e-12, 1e12, 1, 1])[:, None]


def nearest_on_device(index: VectorIndex, query: Tensor) -> tuple[int, float]:
    """What runs on an accelerator, run on the host."""
    search = index._search_on_device(query)
    assert search.pending is not None
    return search.result(search.pending.tolist())


def require_nearest(found: tuple[int, float], exact: np.ndarray, rows: Tensor) -> None:
    row, similarity = found
    assert exact[row] >= exact.max() - SUM_ROUNDING
    assert similarity == pytest.approx(min(max(exact.max(), -1), 1), abs=SUM_ROUNDING)
    if exact.max() - exact.min() > 0:  # so the query is not zero
        assert not (rows[:row] == rows[row]).all(dim=1).any(), "of equal rows the lowest wins"
    else:
        assert row == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(1, 33), (63, 200), (65, 5), (530, 130)])
def test_nearest_is_the_true_maximum(way: Way, kind: str, n: int, d: int) -> None:
    rows = unit(KINDS[kind](n, d, n + d))
    queries = queries_for(rows, n)
    index = VectorIndex(rows, way)
    batch_rows, batch_similarities = index.nearest_batch(queries)
    for i, query in enumerate(queries):
        exact = brute_force(query, rows)
        require_nearest(index.nearest(query), exact, rows)
        require_nearest((int(batch_rows[i]), float(batch_similarities[i])), exact, rows)
        require_nearest(nearest_on_device(index, query), exact, rows)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 200),
    d=st.integers(1, 90),
    kind=st.sampled_from(list(KINDS)),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**20),
)
def test_nearest_is_the_true_maximum_for_any_shape(n: int, d: int, kind: str, way: Way, seed: int) -> None:
    rows = unit(KINDS[kind](n, d, seed))
    index = VectorIndex(rows, way)
    for query in queries_for(rows, seed)[:5]:
        require_nearest(index.nearest(query), brute_force(query, rows), rows)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_nearest_is_the_true_maximum_of_vectors_of_small_whole_numbers(data: st.DataObject) -> None:
    d = data.draw(st.integers(1, 6))
    numbers = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
    rows = unit(torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=30)), dtype=torch.float64))
    query = torch.tensor(data.draw(numbers), dtype=torch.float32)
    way = data.draw(st.sampled_from(WAYS))
    require_nearest(VectorIndex(rows, way).nearest(query), brute_force(query, rows), rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_equal", [1, 2, 63, 64, 65, 400])
def test_equal_rows_tie_and_the_lowest_wins(way: Way, n_equal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.datastore.search, "BLOCK_NUMBERS", 700)  # so that they are compared in several blocks
    row = unit(noise(1, 70, 1))
    index = VectorIndex(torch.cat([-row] * 7 + [row] * n_equal + [-row]), way)
    query = row[0] * 5
    found = [index.nearest(query), nearest_on_device(index, query)]
    rows, similarities = index.nearest_batch(query[None])
    for best, similarity in [*found, (int(rows[0]), float(similarities[0]))]:
        assert best == 7
        assert similarity == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_float32_cannot_tell_apart_are_told_apart(way: Way) -> None:
    # The first coordinates decide nothing, the last one does: by 2^-30, far below the rounding of the sum.
    rows = torch.zeros(300, 128)
    rows[:, 0] = 1.0
    rows[:, -1] = 2.0**-30 * torch.arange(300)
    query = torch.zeros(128)
    query[0] = query[-1] = 1.0
    row, similarity = VectorIndex(rows, way).nearest(query)
    assert (row, similarity) == (299, pytest.approx((1 + 299 * 2.0**-30) / math.sqrt(2), abs=1e-15))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_a_query_of_any_dtype_and_length_is_compared_by_direction(way: Way, dtype: torch.dtype) -> None:
    index = VectorIndex(torch.eye(4), way)
    assert index.nearest(torch.tensor([0, 0, 7, 1], dtype=dtype)) == (2, pytest.approx(7 / 50**0.5, abs=1e-15))
    # The least and the largest of some dtypes, whose squares are 0 or infinite.
    for extreme in (torch.finfo(dtype).tiny, torch.finfo(dtype).max / 2):
        query = torch.tensor([0, extreme, 0, -extreme], dtype=dtype)
        assert index.nearest(query) == (1, pytest.approx(0.5**0.5, abs=1e-15))
        rows, similarities = index.nearest_batch(query[None])
        assert (rows.tolist(), similarities.tolist()) == ([1], pytest.approx([0.5**0.5], abs=1e-15))


@pytest.mark.parametrize("way", WAYS)
def test_a_query_of_zeros_is_as_similar_to_every_row(way: Way) -> None:
    index = VectorIndex(unit(noise(200, 64, 3)), way)
    assert index.nearest(torch.zeros(64)) == nearest_on_device(index, torch.zeros(64)) == (0, 0.0)
    rows, similarities = index.nearest_batch(torch.stack([torch.zeros(64), noise(1, 64, 4)[0]]))
    assert (rows[0], similarities[0]) == (0, 0)


def test_similarity_never_leaves_the_range_of_a_cosine() -> None:
    # Rounded to float32 the rows are a little longer than 1.
    row = torch.tensor([0.6, 0.8000001])
    assert float(row.double().square().sum()) > 1
    index = VectorIndex(torch.stack([row, -row]))
    assert index.nearest(torch.nn.functional.normalize(row.double(), dim=0)) == (0, 1.0)
    assert index.nearest_batch(row[None])[1].tolist() == [1.0]
    assert VectorIndex(-row[None]).nearest(row) == (0, -1.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_errors_and_never_a_row(way: Way, bad: float) -> None:
    rows = unit(noise(100, 40, 5))
    index = VectorIndex(rows, way)
    query = noise(1, 40, 6)[0]
    query[17] = bad
    for search in (
        index.nearest,
        lambda q: nearest_on_device(index, q),
        lambda q: index.nearest_batch(torch.stack([rows[0], q])),
    ):
        with pytest.raises(InputError, match="NaN or infinity"):
            search(query)
    rows = rows.clone()
    rows[99, 39] = bad
    with pytest.raises(ValueError, match="not of length 1, or hold NaN"):
        VectorIndex(rows, way)


def test_rows_that_became_nan_since_are_an_error() -> None:
    rows = unit(noise(100, 40, 5))
    index = VectorIndex(rows)
    rows[3] = math.nan
    for search in (index.nearest, lambda query: index.nearest_batch(query[None])):
        with pytest.raises(ValueError, match="NaN"):
            search(rows[0].clone())


def test_rows_and_queries_of_another_shape_are_refused() -> None:
    for rows in (torch.eye(3).double(), torch.empty(0, 3), torch.ones(3), 2 * torch.eye(3)):
        with pytest.raises(ValueError, match="the rows are"):
            VectorIndex(rows)
    with pytest.raises(ValueError, match="shape"):
        VectorIndex(torch.eye(3)).nearest(torch.ones(4))
    with pytest.raises(ValueError, match="shape"):
        VectorIndex(torch.eye(3)).nearest_batch(torch.ones(3))


def test_a_batch_of_none_finds_none() -> None:
    rows, similarities = VectorIndex(torch.eye(3)).nearest_batch(torch.empty(0, 3))
    assert (rows.shape, rows.dtype, similarities.shape, similarities.dtype) == ((0,), torch.int64, (0,), torch.float64)


@pytest.mark.parametrize("way", WAYS)
def test_batches_are_cut_into_blocks_of_bounded_size(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = unit(narrow_cone(300, 70, 1)), narrow_cone(23, 70, 2)
    whole = VectorIndex(rows, way).nearest_batch(queries)
    monkeypatch.setattr(utils.datastore.search, "SCORES_AT_ONCE", 1500)
    monkeypatch.setattr(utils.datastore.search, "BLOCK_NUMBERS", 700)
    cut = VectorIndex(rows, way).nearest_batch(queries)
    assert whole[0].tolist() == cut[0].tolist()
    assert whole[1].tolist() == pytest.approx(cut[1].tolist(), abs=SUM_ROUNDING)


# ---- Which way, and when


def state(index: VectorIndex, n: int, d: int) -> Way:
    """The way that its next search takes, as the copies tell that it holds beside its rows (n, d)."""
    n_bytes_of: dict[int, Way] = {0: "product", n * d * 2: "half", n * 64 * 4 + 63 * d * 8: "bounded"}
    return n_bytes_of[index.n_bytes]


@pytest.mark.parametrize(
    ("n", "d", "after_few", "after_many"),
    [
        (1535, 128, "product", "product"),  # 128 numbers short of the threshold
        (1536, 128, "product", "bounded"),
        (1600, 127, "product", "product"),  # too few dimensions for bounds
        (8191, 128, "product", "bounded"),
        (8192, 128, "half", "bounded"),
        (16400, 64, "half", "half"),
    ],
)
def test_copies_are_made_once_they_pay_and_the_row_stays_the_true_one(
    n: int, d: int, after_few: Way, after_many: Way
) -> None:
    rows = unit(narrow_cone(n, d, 1))
    index = VectorIndex(rows)
    bounded_after = 32 if n >= 8192 else 128
    if not CONVERTS_HALVES_FAST:
        after_few, after_many = "product", "product" if after_many == "half" else after_many
    seen = []
    for i in range(bounded_after + 1):
        query = rows[i * 7 % n] + 0.01 * unit(noise(1, d, i))[0]
        row = index.nearest(query)[0]
        exact = rows.double() @ query.double()
        assert float(exact[row]) >= float(exact.max()) - SUM_ROUNDING
        seen.append(state(index, n, d))
    assert seen == ["product"] * 7 + [after_few] * (bounded_after - 8) + [after_many] * 2


def test_a_batch_counts_as_many_searches() -> None:
    index = VectorIndex(unit(narrow_cone(8192, 128, 1)))
    index.nearest_batch(narrow_cone(32, 128, 2))
    assert state(index, 8192, 128) == "bounded"


def test_bounds_that_leave_too_many_rows_are_given_up() -> None:
    rows = unit(noise(8192, 128, 1))
    index = VectorIndex(rows)
    for i in range(50):
        query = noise(1, 128, 100 + i)[0]
        assert index.nearest(query)[0] == int((rows.double() @ query.double()).argmax())
    assert state(index, 8192, 128) == ("half" if CONVERTS_HALVES_FAST else "product")


def test_the_error_of_a_half_product_is_near_its_bound_and_never_above() -> None:
    # All numbers lie just below the middle between two of float16, so that all are rounded the same way, and most.
    row = torch.full((1, 255), (1 + 0.999 * 2.0**-11) / 16)
    index = VectorIndex(row, "half")
    assert index._half is not None
    error = float((row[0].double() ** 2).sum()) - float(torch.mv(index._half, row[0].half())[0])
    assert 0.6 * index._half_error < error <= index._half_error


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_never_below_what_they_bound(kind: str) -> None:
    for n, d in ((1, 9), (50, 64), (200, 100)):
        rows = unit(KINDS[kind](n, d, 4))
        index = VectorIndex(rows, "bounded")
        assert index._columns is not None
        directions = index._directions
        assert torch.allclose(directions @ directions.T, torch.eye(len(directions)).double(), rtol=0, atol=1e-13)
        # Most of them inside what the directions span, where the length of the rest is all rounding.
        queries = torch.nn.functional.normalize(torch.cat([rows, noise(20, d, 5)]).double(), dim=1)
        bounds = index._along_directions(queries) @ index._columns.T
        assert bool((bounds.double() + index._bounds_error >= queries @ rows.double().T).all())


def test_a_half_product_that_is_rounded_on_the_way_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded_on_the_way(rows: Tensor, query: Tensor) -> Tensor:
        total = torch.zeros(len(rows), dtype=rows.dtype)
        for column, factor in zip(rows.T, query, strict=True):
            total = total + column * factor
        return total

    # How torch adds up is tried once for each number of dimensions: no other test has these.
    assert state(VectorIndex(unit(noise(9, 301, 1)), "half"), 9, 301) == "half"
    monkeypatch.setattr(torch, "mv", rounded_on_the_way)
    assert state(VectorIndex(unit(noise(9, 302, 1)), "half"), 9, 302) == "product"


def masks_for(n: int, seed: int) -> list[Tensor]:
    """All rows, half of them, few, one and none."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    return [order < wanted for wanted in (n, n // 2, min(n, 3), 1, 0)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(1, 33), (63, 200), (530, 130)])
def test_of_the_allowed_rows_the_nearest_is_found(way: Way, kind: str, n: int, d: int) -> None:
    rows = unit(KINDS[kind](n, d, n + d))
    index = VectorIndex(rows, way)
    for query in queries_for(rows, n):
        exact = brute_force(query, rows)
        for allowed in masks_for(n, d):
            search = index.search(query, allowed)
            device_search = index._search_on_device(query, allowed)
            assert device_search.pending is not None
            for row, similarity in (search.result(), device_search.result(device_search.pending.tolist())):
                if not allowed.any():
                    assert row == -1
                    assert math.isnan(similarity)
                    continue
                assert allowed[row]
                of_allowed = exact[allowed.numpy()]
                assert exact[row] >= of_allowed.max() - SUM_ROUNDING
                assert similarity == pytest.approx(min(max(of_allowed.max(), -1), 1), abs=SUM_ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_allowed_rows_the_k_nearest_are_found(kind: str) -> None:
    rows = unit(KINDS[kind](200, 40, 5))
    queries = queries_for(rows, 5)
    masks = torch.stack([masks_for(200, i)[i % 5] for i in range(len(queries))])
    found, similarities = VectorIndex(rows).nearest_k(queries, 20, masks)
    for i, query in enumerate(queries):
        exact, allowed = brute_force(query, rows), masks[i].numpy()
        n_found = min(20, int(allowed.sum()))
        wanted = np.sort(exact[allowed])[::-1][:n_found].clip(-1, 1)
        assert similarities[i, :n_found].numpy() == pytest.approx(wanted, abs=SUM_ROUNDING)
        assert similarities[i, n_found:].isnan().all()
        chosen = found[i, :n_found].tolist()
        assert allowed[chosen].all()
        assert len(set(chosen)) == n_found


def require_k_nearest(rows: Tensor, queries: Tensor, k: int, device: str = "cpu") -> None:
    found, similarities = (each.cpu() for each in VectorIndex(rows.to(device)).nearest_k(queries.to(device), k))
    assert found.shape == similarities.shape == (len(queries), min(k, len(rows)))
    for i, query in enumerate(queries):
        exact = brute_force(query, rows)
        wanted = np.sort(exact)[::-1][: min(k, len(rows))].clip(-1, 1)
        assert similarities[i].numpy() == pytest.approx(wanted, abs=SUM_ROUNDING)
        chosen = found[i].tolist()
        assert len(set(chosen)) == len(chosen)
        assert exact[chosen].clip(-1, 1) == pytest.approx(wanted, abs=SUM_ROUNDING)
        for row, after in itertools.pairwise(chosen):
            assert row < after or not (rows[row] == rows[after]).all(), "equal rows are in ascending order"
        equal_to_last = (rows == rows[chosen[-1]]).all(dim=1).nonzero()[:, 0].tolist()
        left_out = set(equal_to_last) - set(chosen)
        assert min(left_out, default=len(rows)) > chosen[-1], "of equal rows the lowest are there"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 33, 4), (63, 20, 63), (65, 5, 1), (530, 130, 64), (300, 40, 7)])
def test_the_k_nearest_are_those_of_brute_force(kind: str, n: int, d: int, k: int) -> None:
    rows = unit(KINDS[kind](n, d, n + k))
    require_k_nearest(rows, queries_for(rows, n), k)


def test_more_rows_than_are_compared_at_first_may_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit(noise(4, 50, 3)).repeat(60, 1)
    monkeypatch.setattr(utils.datastore.search, "SCORES_AT_ONCE", 3000)  # some queries at a time
    require_k_nearest(rows, queries_for(rows, 2), 10)


def test_k_nearest_of_no_query_and_of_bad_ones() -> None:
    index = VectorIndex(unit(noise(9, 6, 1)))
    assert [each.shape for each in index.nearest_k(torch.empty(0, 6), 4)] == [(0, 4), (0, 4)]
    with pytest.raises(ValueError, match="have 6 dimensions"):
        index.nearest_k(torch.ones(2, 5), 4)
    with pytest.raises(InputError, match="NaN or infinity"):
        index.nearest_k(torch.full((2, 6), math.nan), 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_nearest_on_cuda_are_those_of_brute_force(kind: str) -> None:
    rows = unit(KINDS[kind](777, 130, 9))
    require_k_nearest(rows, queries_for(rows, 9), 64, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_nearest_on_cuda_is_the_true_maximum(kind: str, way: Way) -> None:
    rows = unit(KINDS[kind](777, 130, 9))
    queries = queries_for(rows, 9)
    index = VectorIndex(rows.cuda(), way)
    batch_rows, batch_similarities = index.nearest_batch(queries.cuda())
    for i, query in enumerate(queries):
        exact = brute_force(query, rows)
        require_nearest(index.nearest(query.cuda()), exact, rows)
        require_nearest((int(batch_rows[i]), float(batch_similarities[i])), exact, rows)
