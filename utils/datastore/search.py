"""Exact search for the most similar of many unit vectors (paper section 4: the nearest context vector).

Whatever the way, the row returned is the true maximum. Each way gives every row a score that is within a proven error
of the row's cosine, or above it; the rows that this error leaves possible are compared in float64, and ties go to the
lowest row.

    product   one float32 product with all rows: the fewest steps, so the fastest for few rows
    half      the product with a copy of the rows in float16: half the bytes to read; then the best in float64
    bounded   63 dimensions of each row and the length of the rest bound its cosine; only rows whose bound beats the
              best so far are read whole. Reads 256 bytes a row, where the rows concentrate on some directions, as
              hidden states do; where they do not, the search notices, and goes back to the ways above

u below is the rounding of float32 (2^-24), v that of float16 (2^-11), g(D) = D u / (1 - D u): a float32 product of
vectors of length D is off by at most g(D) |x||q|, in whatever order it is added up.
"""

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.files import InputError

Way = Literal["product", "half", "bounded"]

# From how many numbers (rows x dimensions) on a way is faster than the product, with the caches cold as a forward pass
# leaves them (benchmarks/retrieval.py; benchmarks/README.md has the figures). The float16 product is faster from a
# quarter of this on, but torch gives it several threads, which wait for each other where another process has a core.
HALF_FROM_NUMBERS = 2**20
# On CUDA, where it has not been measured: where reading the rows takes longer than launching a few kernels more.
HALF_FROM_NUMBERS_ON_CUDA = 2**24
BOUNDED_FROM_NUMBERS = 3 * 2**16
BOUNDED_FROM_DIMENSIONS = 128  # with fewer, the bounds take as much to read as the rows
# The float16 copy takes as long as some 3 to 15 products, the bounds as long as 15 to 30 from some 10,000 rows on, 35
# to 70 below. Each is made at the search by which it would have paid for itself: a trie that is asked a few times pays
# for nothing it does not use, and one that is asked often at most about twice what it had to.
HALF_AFTER = 8
MANY_ROWS, BOUNDED_AFTER_MANY, BOUNDED_AFTER_FEW = 8192, 32, 128

DIMENSIONS = 63  # of the bounds, which with the length of the rest makes 64 columns
SAMPLE_ROWS = 1024  # that the directions are found from
FEW = 64  # rows compared in float64 without another product in float32 before
FEW_OF_HALVES = 512  # on a device, of the best by float16, which tells fewer apart
MORE_THAN_K = 32  # rows compared in float64 beyond the K that are asked for
MISSES = 8  # searches in a row whose bounds left more than 1 row in MISS_SHARE, after which they are given up
MISS_SHARE = 8  # gathering a row costs some three times as much as passing over it
BLOCK_NUMBERS = 2**20  # gathered at a time
SCORES_AT_ONCE = 2**24  # of a batch, 64 MB

U, V = 2.0**-24, 2.0**-11
LONGEST_ROW = 1 + 1e-4
NOT_FINITE = "a hidden state to look up holds NaN or infinity; use another --dtype, such as float32"


class _Query(NamedTuple):
    """A query on the host as it came, in float32 and float64, and its length; or one made of length 1."""

    vector: Tensor  # (D,) float32
    exact: np.ndarray  # (D,) float64
    norm: float


class Search(NamedTuple):
    """A search that has been started. `pending` (4,) float64 is its result on the rows' device; None: `found` has it.

    The results of many searches can be copied to the host together, and each handed to its `result`.
    """

    of: "VectorIndex"
    found: tuple[int, float] | None
    pending: Tensor | None = None
    scores: Tensor | None = None
    exact: Tensor | None = None
    error: float = 0.0
    n_compared: int = 0

    def result(self, values: list[float] | None = None) -> tuple[int, float]:
        """The row and its similarity, as `VectorIndex.nearest` returns them. values: `pending` on the host."""
        if self.found is not None:
            return self.found
        assert values is not None
        return self.of._settled(self, values)


class VectorIndex:
    """Answers which of N unit vectors is most similar to a query. The rows must not change while it lives."""

    def __init__(self, rows: Tensor, way: Way | None = None) -> None:
        """rows (N, D) float32 of length 1 or 0, N >= 1, on any device; they are not copied.

        way: use this one from the first search on; None: the fastest for this many rows, once there have been so many
        searches that its copies pay. Raises ValueError for other rows, NaN among them.
        """
        if rows.ndim != 2 or rows.dtype != torch.float32 or not rows.numel():
            raise ValueError(f"the rows are {rows.dtype} of shape {tuple(rows.shape)}; expected float32 (N >= 1, D)")
        if not float(torch.linalg.vector_norm(rows, dim=1).max()) <= LONGEST_ROW:
            raise ValueError("the rows are not of length 1, or hold NaN")
        self._rows, self._way, self._n_searches, self._n_misses = rows.detach(), way, 0, 0
        self._array = self._rows.numpy() if rows.device.type == "cpu" else None
        self._half: Tensor | None = None  # (N, D) float16
        self._half_error = 0.0
        self._columns: Tensor | None = None  # (N, up to 64) float32: the row along the directions, the rest's length
        self._directions = rows.new_empty(0)  # (up to 63, D) float64, orthonormal
        # Of a float32 product, the query's own rounding and that of the comparison, relative to the query's length.
        n_dimensions = rows.shape[1]
        self._error = LONGEST_ROW * 1.01 * (n_dimensions + 4) * U / (1 - n_dimensions * U)
        self._block = max(1, BLOCK_NUMBERS // n_dimensions)
        if way is not None:
            self._build(way)

    @property
    def n_bytes(self) -> int:
        """What the index holds beside the rows themselves, so far."""
        return sum(copy.nbytes for copy in (self._half, self._columns, self._directions) if copy is not None)

    def nearest(self, query: Tensor) -> tuple[int, float]:
        """The row most similar to the query and its cosine similarity in [-1, 1]; ties go to the lowest row.

        query (D,) of any float dtype and length; one of length 0 is as similar, 0, to every row. Raises ValueError for
        another shape, and InputError for NaN or infinity in it: the model computed them.
        """
        search = self.search(query)
        return search.result(None if search.pending is None else search.pending.tolist())

    def search(self, query: Tensor, allowed: Tensor | None = None) -> Search:
        """Start to search for the row most similar to the query, without waiting for a device.

        allowed (N,) bool on the rows' device: which rows may be found; the result is row -1 of similarity NaN where none
        is. None: all.
        """
        if query.shape != self._rows.shape[1:]:
            raise ValueError(
                f"the query has shape {tuple(query.shape)}, the rows have {self._rows.shape[1]} dimensions"
            )
        if self._array is not None and allowed is not None:  # for which no copy is of use
            return Search(self, self._nearest_of_allowed(_prepare(query.detach()), allowed))
        self._count(1)
        if self._array is None:
            return self._search_on_device(query, allowed)
        prepared = _prepare(query.detach())
        return Search(self, (0, 0.0) if prepared is None else self._nearest_on_host(prepared, None))

    def nearest_batch(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As `nearest` for queries (M, D): rows (M,) int64 and similarities (M,) float64, on the rows' device."""
        self._require_queries(queries)
        self._count(len(queries))
        step = min(max(SCORES_AT_ONCE // len(self._rows), 1), 256)
        found = [self._nearest_of_block(block) for block in queries.detach().split(step) if len(block)]
        if not found:
            return self._rows.new_empty(0, dtype=torch.int64), self._rows.new_empty(0, dtype=torch.float64)
        return torch.cat([rows for rows, _ in found]), torch.cat([similarities for _, similarities in found])

    def nearest_k(self, queries: Tensor, n_neighbors: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rows most similar to each query, most similar first, ties in ascending order, by products with all rows.

        queries (M, D) as of `nearest`; allowed (M, N) bool on the rows' device: which rows each may find, None for all.
        Returns rows (M, K) int64 and similarities (M, K) float64 in [-1, 1], K being the lesser of n_neighbors >= 1 and N,
        on the rows' device; similarity NaN where fewer rows are allowed.
        """
        self._require_queries(queries)
        k = min(n_neighbors, len(self._rows))
        n_compared = min(k + MORE_THAN_K, len(self._rows))
        # The rows that are compared are gathered in float64.
        step = max(SCORES_AT_ONCE // max(len(self._rows), 2 * n_compared * self._rows.shape[1]), 1)
        masks = [None] * len(queries) if allowed is None else allowed.split(step)
        blocks = zip(queries.detach().split(step), masks, strict=False)
        found = [self._nearest_k_of_block(block, k, n_compared, mask) for block, mask in blocks if len(block)]
        if not found:
            return self._rows.new_empty((0, k), dtype=torch.int64), self._rows.new_empty((0, k), dtype=torch.float64)
        return torch.cat([rows for rows, _ in found]), torch.cat([similarities for _, similarities in found])

    def _require_queries(self, queries: Tensor) -> None:
        if queries.ndim != 2 or queries.shape[1] != self._rows.shape[1]:
            raise ValueError(
                f"the queries have shape {tuple(queries.shape)}, the rows have {self._rows.shape[1]} dimensions"
            )

    # ---- One query on the host: numpy on what torch multiplied, since numpy's own threads would get in torch's way

    def _nearest_on_host(self, query: _Query, bounds: np.ndarray | None) -> tuple[int, float]:
        if self._columns is not None:
            if bounds is None:
                bounds = torch.mv(self._columns, self._query_columns(query)).numpy()
            candidates = self._within_bounds(bounds, query)
            if candidates is not None:
                return self._best_of(candidates, query)
        if self._half is not None:
            scores = torch.mv(self._half, (query.vector / query.norm).half()).float().numpy()
            return self._best_of((scores >= scores.max() - 2 * self._half_error).nonzero()[0], query)
        scores = torch.mv(self._rows, query.vector).numpy()
        best = int(scores.argmax())
        close = scores >= scores[best] - 2 * self._error * query.norm
        if np.count_nonzero(close) == 1:
            return best, self._similarity(best, query)
        return self._best_of(close.nonzero()[0], query)

    def _nearest_of_allowed(self, query: _Query | None, allowed: Tensor) -> tuple[int, float]:
        rows = allowed.nonzero()[:, 0].numpy()
        if not len(rows):
            return -1, math.nan
        if query is None:
            return int(rows[0]), 0.0
        if len(rows) * MISS_SHARE > len(self._rows):  # gathering so many costs more than passing over all
            scores = torch.mv(self._rows, query.vector).numpy()[rows]
            rows = rows[scores >= scores.max() - 2 * self._error * query.norm]
        return self._best_of(rows, query)

    def _within_bounds(self, bounds: np.ndarray, query: _Query) -> np.ndarray | None:
        """The rows that may be the best, best bounds tried first; None where the bounds leave too many."""
        best = self._similarity(int(bounds.argmax()), query, clip=False)
        candidates = (bounds >= (best - self._bounds_error) * query.norm).nonzero()[0]
        if len(candidates) > FEW:
            by_bound = np.argpartition(bounds[candidates], -FEW)[-FEW:]
            scores = torch.mv(self._rows[torch.from_numpy(candidates[by_bound])], query.vector)
            best = max(best, float(scores.max()) / query.norm - self._error)
            candidates = candidates[bounds[candidates] >= (best - self._bounds_error) * query.norm]
        return None if self._is_miss(len(candidates)) else candidates

    def _is_miss(self, n_candidates: int) -> bool:
        """Whether the bounds left too many rows; where they do again and again they are given up."""
        if n_candidates * MISS_SHARE <= max(len(self._rows), FEW * MISS_SHARE):
            self._n_misses = 0
            return False
        self._n_misses += 1
        if self._n_misses == MISSES and self._way is None:
            self._columns, self._directions = None, self._directions.new_empty(0)
            self._build("half")
        return True

    def _best_of(self, candidates: np.ndarray, query: _Query) -> tuple[int, float]:
        if len(candidates) == 1:
            return int(candidates[0]), self._similarity(int(candidates[0]), query)
        exact = torch.from_numpy(query.exact)
        return self._compared(torch.from_numpy(candidates), query.vector, exact, query.norm)

    def _similarity(self, row: int, query: _Query, clip: bool = True) -> float:
        assert self._array is not None
        similarity = float(self._array[row].astype(np.float64).dot(query.exact)) / query.norm
        return min(max(similarity, -1.0), 1.0) if clip else similarity

    # ---- On any device

    def _compared(self, candidates: Tensor, vector: Tensor, exact: Tensor, norm: float) -> tuple[int, float]:
        """The best of some rows, ascending, in float64; where they are many, by a product in float32 first.

        vector (D,) float32 and exact (D,) float64 are the query, norm its length.
        """
        if len(candidates) > FEW:
            blocks = candidates.split(self._block)
            scores = torch.cat([(self._rows[block] * vector).sum(dim=1) for block in blocks])
            candidates = candidates[scores >= scores.max() - 2 * self._error * norm]
        best_row, best = -1, -math.inf
        for block in candidates.split(self._block) if len(candidates) else ():
            products = (self._rows[block].double() * exact).sum(dim=1)
            i = int(products.argmax())
            if float(products[i]) > best:
                best_row, best = int(block[i]), float(products[i])
        if best_row < 0:
            raise ValueError("no row compares with the query; the rows have changed and hold NaN")
        return best_row, min(max(best / norm, -1.0), 1.0)

    def _search_on_device(self, query: Tensor, allowed: Tensor | None = None) -> Search:
        """The best by a score that is at most `error` below the cosine are compared in float64, all on the device."""
        exact = _unit_rows(query.detach().to(self._rows.device)[None])[0]
        n_compared = FEW
        if self._columns is not None:
            scores, error = torch.mv(self._columns, self._along_directions(exact[None])[0]), self._bounds_error
        elif self._half is not None:
            scores, error = _half_product(self._half, exact.half()).float(), self._half_error
            n_compared = FEW_OF_HALVES
        else:
            scores, error = torch.mv(self._rows, exact.float()), 2 * self._product_error()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        top = torch.topk(scores, min(n_compared, len(scores)))
        similarities = (self._rows[top.indices].double() * exact).sum(dim=1)
        similarities = similarities.masked_fill(top.values == -math.inf, -math.inf)
        best = similarities.max()
        row = torch.where(similarities == best, top.indices, len(scores)).min()
        # The best, the first score that was not compared at most, and NaN where the query holds one.
        values = torch.stack([row.double(), best, top.values[-1].double(), exact.sum()])
        return Search(self, None, values, scores, exact, error, n_compared)

    def _settled(self, search: Search, values: list[float]) -> tuple[int, float]:
        """The result of a search on the device; where more rows than were compared may be the best, it compares these too."""
        scores, exact = search.scores, search.exact
        assert scores is not None
        assert exact is not None
        row, best, last, query_sum = values
        if not math.isfinite(query_sum) or math.isnan(best):
            raise InputError(NOT_FINITE)
        if best == -math.inf:
            return -1, math.nan
        if len(scores) <= search.n_compared or last + search.error < best:
            return int(row), min(max(best, -1.0), 1.0)
        candidates = (scores >= best - search.error).nonzero()[:, 0]
        if self._columns is not None:
            self._is_miss(len(candidates))
        return self._compared(candidates, exact.float(), exact, 1.0)

    def _nearest_of_block(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        exact = _unit_rows(queries.to(self._rows.device))
        if not bool(exact.isfinite().all()):
            raise InputError(NOT_FINITE)
        vectors = exact.float()
        if self._columns is not None and self._array is not None:
            bounds = torch.mm(self._along_directions(exact), self._columns.T).numpy()
            prepared = [_Query(vectors[i], exact[i].numpy(), 1.0) for i in range(len(vectors))]
            found = [self._nearest_on_host(query, bounds[i]) for i, query in enumerate(prepared)]
            return torch.tensor([row for row, _ in found]), torch.tensor([s for _, s in found], dtype=torch.float64)
        scores = torch.mm(vectors, self._rows.T)
        best, rows = scores.max(dim=1)
        close = scores >= best[:, None] - 2 * self._product_error()
        is_zero = ~exact.any(dim=1)
        rows[is_zero] = 0
        similarities = (self._rows[rows].double() * exact).sum(dim=1).clamp(-1, 1)
        for i in ((close.sum(dim=1) != 1) & ~is_zero).nonzero()[:, 0].tolist():
            rows[i], similarities[i] = self._compared(close[i].nonzero()[:, 0], vectors[i], exact[i], 1.0)
        return rows, similarities

    def _nearest_k_of_block(
        self, queries: Tensor, k: int, n_compared: int, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The best by a float32 product are compared in float64; where others may be among the K, all these are."""
        exact = _unit_rows(queries.to(self._rows.device))
        if not bool(exact.isfinite().all()):
            raise InputError(NOT_FINITE)
        scores = torch.mm(exact.float(), self._rows.T)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        top = torch.topk(scores, n_compared)
        candidates = top.indices.sort(dim=1).values
        similarities = torch.bmm(self._rows[candidates].double(), exact[:, :, None])[:, :, 0]
        similarities = similarities.masked_fill(scores.gather(1, candidates) == -math.inf, -math.inf)
        best, order = (each[:, :k] for each in similarities.sort(dim=1, descending=True, stable=True))
        rows = candidates.gather(1, order)
        if n_compared < len(self._rows):
            last = top.values[:, -1].double()
            missed = (last + 2 * self._product_error() >= best[:, -1]) & (last > -math.inf)
            for i in missed.nonzero()[:, 0].tolist():
                possible = (scores[i] >= best[i, -1] - 2 * self._product_error()).nonzero()[:, 0]
                blocks = possible.split(self._block)
                of_query = torch.cat([(self._rows[block].double() * exact[i]).sum(dim=1) for block in blocks])
                best[i], order_i = (each[:k] for each in of_query.sort(descending=True, stable=True))
                rows[i] = possible[order_i]
        return rows, best.clamp(-1, 1).masked_fill(best == -math.inf, math.nan)

    def _product_error(self) -> float:
        # Where torch may multiply float32 matrices as tf32 or bf16, each factor is rounded to as few as 8 bits.
        return self._error + (0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-6)

    # ---- The copies

    def _count(self, n_searches: int) -> None:
        """Make what pays by now: the float16 copy, then the bounds in its place."""
        before, self._n_searches = self._n_searches, self._n_searches + n_searches
        if self._way is not None:
            return
        bounded_after = BOUNDED_AFTER_MANY if len(self._rows) >= MANY_ROWS else BOUNDED_AFTER_FEW
        is_wide = self._rows.shape[1] >= BOUNDED_FROM_DIMENSIONS
        if before < bounded_after <= self._n_searches and is_wide and self._rows.numel() >= BOUNDED_FROM_NUMBERS:
            self._build("bounded")
        elif before < HALF_AFTER <= self._n_searches:
            self._build("half")

    def _build(self, way: Way) -> None:
        if way == "bounded":
            self._half = None
            self._build_bounds()
            return
        kind = self._rows.device.type
        pays = self._rows.numel() >= (HALF_FROM_NUMBERS if kind == "cpu" else HALF_FROM_NUMBERS_ON_CUDA)
        pays &= _converts_halves_fast() or kind != "cpu"  # on other processors the copy is slower
        if way == "half" and (pays or self._way) and _adds_halves_in_float32(self._rows.shape[1], kind):
            self._build_half()

    def _build_half(self) -> None:
        """The rows in float16, and by how much a product with them may be off for a query of length 1.

        With x', q' the rounded row and query: |x'.q' - x.q| <= |x - x'||q| + |x'||q - q'|, where the first distance is
        measured and |q - q'| <= v |q| + sqrt(D) 2^-25 (v relative, or half of the smallest float16). The product adds
        up in float32, g(D) |x'||q'|, and is rounded to float16 once, v |x'.q'| + 2^-25.
        """
        n_dimensions = self._rows.shape[1]
        self._half = self._rows.half()
        distance = max(
            float(torch.linalg.vector_norm(rows - half.float(), dim=1).max())
            for rows, half in zip(self._rows.split(self._block), self._half.split(self._block), strict=True)
        )
        self._half_error = 1.01 * (distance + 2 * V + math.sqrt(n_dimensions) * 2.0**-25) + self._error + 2.0**-24

    def _build_bounds(self) -> None:
        """The rows along some orthonormal directions P, and how long what is left of each is.

        x = P a + x2 and q = P b + q2 with x2, q2 orthogonal to all of P, so x.q = a.b + x2.q2 <= a.b + |x2||q2|: one
        product with the columns [a, |x2|]. Any P will do; the more of the rows' length it takes, the fewer are left.
        |x2|^2 = |x|^2 - |a|^2. All is made in float64; `_bounds_error` is that of columns and product in float32.
        """
        self._directions = _main_directions(self._rows)
        n_columns = len(self._directions) + 1
        self._columns = self._rows.new_empty(len(self._rows), n_columns)
        for block, columns in zip(self._rows.split(self._block), self._columns.split(self._block), strict=True):
            columns[:] = self._along_directions(block.double())

    def _along_directions(self, vectors: Tensor) -> Tensor:
        """(M, up to 64) float32 for vectors (M, D) float64: along the directions, and the length of the rest."""
        along = torch.mm(vectors, self._directions.T)
        squares = (vectors * vectors).sum(dim=1)
        rest = (squares - (along * along).sum(dim=1)).clamp_min(0).add(self._slack * squares).sqrt()
        return torch.cat([along, rest[:, None]], dim=1).float()

    def _query_columns(self, query: _Query) -> Tensor:
        """The same for one query on the host, in fewer steps."""
        along = torch.mv(self._directions, torch.from_numpy(query.exact)).numpy()
        square = query.norm * query.norm
        columns = np.empty(len(along) + 1, dtype=np.float32)
        columns[:-1] = along
        columns[-1] = math.sqrt(max(square - float(along.dot(along)), 0.0) + self._slack * square)
        return torch.from_numpy(columns)

    @property
    def _slack(self) -> float:
        # Of |x2|^2, above its rounding in float64 and that of P; the root of what is nearly 0 would enlarge it.
        return (self._rows.shape[1] + 64) * 2.0**-48

    @property
    def _bounds_error(self) -> float:
        return 1.01 * (DIMENSIONS + 8) * U


def _prepare(query: Tensor) -> _Query | None:
    """The query, made of length 1 where its length is extreme or its dtype another; None where it is 0."""
    if query.dtype == torch.float32 and query.device.type == "cpu":
        exact = query.numpy().astype(np.float64)
        norm = math.sqrt(exact.dot(exact))
        # Products far from the smallest and largest float32 round as the bounds say.
        if 1e-6 < norm < 1e6:
            return _Query(query, exact, norm)
    unit = _unit_rows(query.cpu()[None])[0]
    if not bool(unit.isfinite().all()):
        raise InputError(NOT_FINITE)
    return _Query(unit.float(), unit.numpy(), 1.0) if bool(unit.any()) else None


def _unit_rows(vectors: Tensor) -> Tensor:
    """(M, D) float64 of length 1; zeros stay, NaN and infinity become NaN."""
    exact = vectors.double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    # By the largest first, so that no square is 0 or infinite.
    exact = exact / torch.where(largest == 0, 1.0, largest)
    return exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True).clamp_min(1.0)


def _main_directions(rows: Tensor) -> Tensor:
    """(up to 63, D) float64 orthonormal directions that take much of the rows' length: subspace iteration on some."""
    step = max(1, len(rows) // SAMPLE_ROWS)
    sample = rows[::step][:SAMPLE_ROWS]
    found = _orthonormal(sample[:: max(1, len(sample) // DIMENSIONS)][:DIMENSIONS].T.double())
    for _ in range(2):
        found = _orthonormal((sample.T @ (sample @ found.float())).double())
    return found.T.contiguous()


def _orthonormal(vectors: Tensor) -> Tensor:
    """(D, up to K) orthonormal columns that span those given (D, K) float64, but for what is hardly there.

    By the products of the columns alone: torch's QR took up to 0.4 s for 256 x 63 where another process had a core.
    """
    for _ in range(2):  # the first time to within 0.01, the second to within 1e-14
        squares, turned = torch.linalg.eigh(vectors.T @ vectors)
        is_there = squares > 1e-12 * squares.amax(dim=0) if len(squares) else squares > 0
        vectors = vectors @ (turned[:, is_there] / squares[is_there].sqrt())
    return vectors


def _converts_halves_fast() -> bool:
    """Whether the processor turns float16 into float32 by itself, without which the copy is slower, not faster."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _half_product(rows: Tensor, query: Tensor) -> Tensor:
    """(N,) float16 products of float16 rows and query. On CUDA parts of a sum may else be added up in float16."""
    if not rows.is_cuda:
        return torch.mv(rows, query)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction, False
    try:
        return torch.mv(rows, query)
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


@cache
def _adds_halves_in_float32(n_dimensions: int, device: str = "cpu") -> bool:
    """Whether a float16 product on this machine is rounded once, at its end: tried, since torch does not promise it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(256, n_dimensions, generator=generator).div(n_dimensions**0.5).half()
    query = torch.rand(n_dimensions, generator=generator).div(n_dimensions**0.5).half()
    exact = rows.double() @ query.double()
    bound = 1.01 * (V + n_dimensions * U) * exact + 2.0**-25
    found = _half_product(rows.to(device), query.to(device)).cpu()
    return bool(((found.double() - exact).abs() <= bound).all())
