# SPDX-License-Identifier: MIT
"""`finish_kernel` and `exact_topk_kernel` in Triton's interpreter, with hits found by PyTorch.

They need a process of their own, started with ``TRITON_INTERPRET=1``, as those of test_triton.py.
"""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from convnn_kernels.triton import backend, configs
from python_ref import assert_forward, assert_select

pytestmark = in_interpreter

F32, F16 = torch.float32, torch.float16
LIST = 32  # of a row with k <= 9


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclasses.dataclass
class Finish:
    """`select` and `forward` by a sweep in PyTorch and the kernel."""

    # The fewest hits of a row: columns that tie with the last of them are hits, too.
    hits: int = 0
    splits: int = 1
    block_m: int = 64
    queues: int = 4
    pair: int = 2
    # Rows whose queues were too short, by their number in [0, B * N).
    listed: tuple[int, ...] = ()
    # How many hits each row had.
    found: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))

    def select(self, query: Tensor, key: Tensor, k: int, *options: Any) -> tuple[Tensor, Tensor]:
        return self._run(query, key, k, *options)[1:]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k: int,
        weight: Tensor | None,
        bias: Tensor | None,
        candidates: Tensor | None,
        self_indices: Tensor | None,
        key_mask: Tensor | None,
        metric: str,
        rho: str,
        scale: float,
        order: str,
        key_range: Tensor | None = None,
        exclude_self: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = (candidates, self_indices, key_mask, metric, order, key_range, exclude_self)
        return self._run(query, key, k, *options, aggregate=(value, weight, bias, rho, scale))

    def _run(
        self, query: Tensor, key: Tensor, k: int, *options: Any, aggregate: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from convnn_kernels.triton import aggregation as aggregations
        from convnn_kernels.triton.exact_topk import prepare_exact_topk
        from convnn_kernels.triton.finish import prepare_finish
        from convnn_kernels.triton.launch import Plan, Pointers
        from convnn_kernels.triton.search import prepare

        search, tensors = prepare(query, key, k, *options)
        shape = (*query.shape[:-1], k)
        s, I = torch.full(shape, math.nan), torch.full(shape, -7)
        output = torch.zeros(0)
        pointers = Pointers(query.device, **tensors, p_similarities=s, p_indices=I)
        norms = search.norms()
        Plan(norms.launches, **norms.buffers)(pointers)
        queue, count = self._sweep(search, pointers, options)
        pointers.add(p_queue=queue, p_count=count)
        if self.listed:
            self._list(search, pointers)
            count[list(self.listed), -1] = queue.shape[-1] + 1
            Plan([prepare_exact_topk(search, norms.names, 0)])(pointers)
            written = (I != -7).all(-1).flatten().nonzero().flatten().tolist()
            assert written == sorted(self.listed)
        aggregation = None
        if aggregate is not None:
            value, weight, bias, rho, scale = aggregate
            aggregation, more = aggregations.prepare(value, s, I, weight, rho, scale)
            output = value.new_empty((*shape[:-1], value.shape[-1]))
            pointers.add(
                p_value=more["p_value"],
                p_weight_rows=None if weight is None else weight[:, 0].T.contiguous(),
                p_bias=bias,
                p_output=output,
                p_terms=torch.zeros(shape, dtype=torch.int64),
            )
        numbers = search.numbers() | {"first_b": 0, "count_b": search.Q.B, "first_n": 0}
        numbers |= {"rows_n": search.Q.N, "splits": self.splits, "CAP": queue.shape[-1]}
        numbers |= {
            "ADVANCE": self.block_m,
            "sample_step": 2,
            "BLOCK_M": self.block_m,
            "QUEUES": self.queues,
            "PAIR": self.pair,
        }
        rescore = configs.needs_bounds(search.bits, search.Q.D, search.metric, False)
        Plan([prepare_finish(search, rescore, numbers, norms.names, aggregation)])(pointers)
        return output, s, I

    def _list(self, search: Any, pointers: Any) -> None:
        """Lists rows for `exact_topk_kernel`."""
        B, N = search.Q.B, search.Q.N
        rows = torch.full((B, N), 2**30, dtype=torch.int32)
        count = torch.zeros(B, dtype=torch.int32)
        for b in range(B):
            mine = [row % N for row in self.listed if row // N == b]
            rows[b, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            count[b] = len(mine)
        pointers.add(p_listed=count, p_rows=rows)

    def _sweep(self, search: Any, pointers: Any, options: Any) -> tuple[Tensor, Tensor]:
        """The queues of all rows and how long they are: entries as the sweep writes them."""
        B, N, M = search.Q.B, search.Q.N, search.K.N
        names = search.norms().names
        candidates, _, mask, metric, _, key_range, _ = (*options, None, False)[:7]

        def rows(name: str, layout: Any) -> Tensor:
            X = pointers.tensor(names.get(name, name))
            layout = layout.contiguous() if search.scales_rows else layout
            return X.as_strided(layout[:4], (*layout[4:], 1)).double().flatten(0, 1)

        def norm(name: str) -> Tensor:
            return pointers.tensor(names[name]).double().view(B, -1)

        q, key = rows("p_query", search.Q), rows("p_key", search.K)
        product = score = q @ key.mT
        if metric == "euclidean":
            score = -(q[:, :, None] - key[:, None]).square().sum(-1)
        elif metric == "cosine":
            norms = norm("p_query_norm")[:, :, None] * norm("p_key_norm")[:, None]
            score = torch.where(norms == 0, 0.0, product / norms)
        columns = torch.arange(M) if candidates is None else candidates
        allowed = torch.ones(B, N, len(columns), dtype=torch.bool)
        if mask is not None:
            allowed &= mask.reshape(-1, 1, M)[..., columns]
        if key_range is not None:
            begin, end = key_range.unsqueeze(-2).unbind(-1)
            allowed &= (begin <= columns) & (columns < end)
        product, score = product[..., columns].float(), score[..., columns].float()
        # NaN above every number, and below what is not allowed.
        score = score.nan_to_num(math.inf, math.inf, torch.finfo(F32).min).masked_fill(
            ~allowed, -math.inf
        )
        wanted = min(max(self.hits, search.ranks), len(columns))
        lowest = score.sort(-1, descending=True).values[..., wanted - 1 : wanted]
        hit = (score >= lowest) & allowed
        self.found = hit.sum(-1)

        leaves, turn = self.block_m // self.queues, self.queues * self.pair
        o = torch.arange(len(columns))
        tile = o // self.block_m
        # The last tile ends with the last column.
        within = o - (tile * self.block_m).clamp(max=len(columns) - self.block_m)
        place = tile * leaves + within // turn * self.pair + within % self.pair
        tiles_each = -(-(int(tile[-1]) + 1) // self.splits)
        of = (tile // tiles_each) * self.queues + within // self.pair % self.queues
        kinds = self.splits * self.queues
        lists: list[list[list[int]]] = [[[] for _ in range(kinds)] for _ in range(B * N)]
        bits = product.view(torch.int32).long() << 32 | place
        for b, n, c in hit.nonzero().tolist():
            lists[b * N + n][of[c]].append(int(bits[b, n, c]))
        longest = max((len(each) for row in lists for each in row), default=0)
        queue = torch.full((B * N, kinds, max(1, longest)), -1, dtype=torch.int64)
        count = torch.zeros(B * N, kinds, dtype=torch.int32)
        for r, row in enumerate(lists):
            for i, each in enumerate(row):
                count[r, i] = len(each)
                queue[r, i, : len(each)] = torch.tensor(each, dtype=torch.int64)
        return queue, count


@pytest.fixture(autouse=True)
def _fresh_plans() -> None:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()
    return


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("D", [5, 37])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_hits(metric: str, D: int, dtype: torch.dtype) -> None:
    """Similarities from products, and of few terms or differences from rows."""
    query, key = normal(2, 18, D, dtype=dtype), normal(2, 200, D, seed=1, dtype=dtype)
    for finish in (Finish(), Finish(hits=20, splits=3)):
        assert_select(finish.select, query, key, 9, metric=metric, backward=False)


OPTIONS = {
    "mask": {"key_mask": torch.arange(150) % 7 > 3},
    "few_left": {"key_mask": (torch.arange(150) == 3) | (torch.arange(150) == 149)},
    "none_left": {"key_mask": torch.zeros(150, dtype=torch.bool)},
    "candidates": {"candidates": (torch.arange(140) * 37) % 149},
    "candidates_and_mask": {
        "candidates": (torch.arange(140) * 37) % 149,
        "key_mask": torch.arange(150) % 3 == 0,
    },
    "self": {"self_indices": torch.tensor([0, 75, 149, 7, 8])},
    "self_and_mask": {
        "self_indices": torch.tensor([0, 75, 149, 7, 8]),
        "key_mask": torch.arange(150) % 2 == 0,
    },
    "self_outside_candidates": {
        "self_indices": torch.tensor([149, 75, 148, 6, 8]),
        "candidates": torch.arange(147, 0, -2),
    },
    "self_and_ranges": {
        "self_indices": torch.tensor([0, 75, 149, 7, 8]),
        "key_range": torch.tensor([[0, 1], [76, 150], [100, 150], [8, 8], [0, 9]]),
    },
    "self_excluded": {"self_indices": torch.tensor([0, 75, 149, 7, 8]), "exclude_self": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize(
    ("k", "metric", "dtype"), [(4, "dot", F16), (20, "euclidean", F32)], ids=str
)
def test_options(option: str, order: str, k: int, metric: str, dtype: torch.dtype) -> None:
    query, key = integers(5, 18, dtype=dtype), integers(150, 18, seed=1, dtype=dtype)
    options = {**OPTIONS[option], "metric": metric, "order": order}
    for finish in (Finish(), Finish(hits=40, splits=3)):
        assert_select(finish.select, query, key, k, **options, exact=True, backward=False)


@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize(
    "hits",
    [
        LIST,
        LIST + 1,
        *(pytest.param(hits, marks=pytest.mark.slow) for hits in (LIST - 1, 2 * LIST, 3 * LIST)),
    ],
)
def test_more_hits_than_a_list_has(hits: int, with_self: bool) -> None:
    """The nearest keys are the last entries of the last queue; or all tie, and the first are."""
    M = 130
    query = torch.ones(3, 16)
    key = torch.arange(M)[:, None].expand(M, 16).float() - M
    options: dict[str, Any] = {"metric": "dot"}
    if with_self:
        options["self_indices"] = torch.tensor([3, 129, 64])
    for splits, q in ((1, query), (3, query), (3, query * 0)):
        finish = Finish(hits=hits, splits=splits)
        assert_select(finish.select, q, key, 9, **options, exact=True, backward=False)
        assert int(finish.found.max()) == (hits if q.any() else M)


def test_each_batch_element_has_tokens_of_its_own() -> None:
    query, key = integers(3, 4, 18, dtype=F16), integers(3, 130, 18, seed=1, dtype=F16)
    own = torch.randperm(130)[:12].view(3, 4)
    named: dict[str, Any] = {"self_indices": own, "metric": "dot", "exact": True}
    assert_select(Finish(hits=40).select, query, key, 9, **named, backward=False)


@pytest.mark.parametrize("k", [1, 9, 12, 13, 16, 17, 32, 64])
def test_lists_of_all_lengths(k: int) -> None:
    """Similarities with many ties, and k + 1 to some hundred hits."""
    query, key = integers(6, 18, dtype=F16), integers(400, 18, seed=1, dtype=F16)
    # Tokens that are near themselves.
    own = torch.tensor([0, 7, 399, 64, 65, 200])
    for hits, q, options in ((k + 1, key[own] * 10, {"self_indices": own}), (5 * k, query, {})):
        finish = Finish(hits=hits)
        named: dict[str, Any] = {**options, "metric": "dot", "exact": True}
        assert_select(finish.select, q, key, k, **named, backward=False)


@pytest.mark.parametrize(("queues", "pair", "block_m"), [(8, 2, 128), (2, 32, 64), (4, 2, 128)])
def test_columns_of_queues(queues: int, pair: int, block_m: int) -> None:
    """One hit, in any column, the last one of the last tile among them."""
    M = 2 * block_m
    query, key = torch.eye(M)[[0, 1, block_m - 1, block_m, 37, 2 * block_m - 1]], torch.eye(M)
    finish = Finish(queues=queues, pair=pair, block_m=block_m)
    s, I = finish.select(query, key, 1, None, None, None, "dot", "similarity")
    assert torch.equal(I[:, 0], query.argmax(1))
    assert torch.equal(s[:, 0], torch.ones(6))


# Scores of 40 columns, by how some of them are equal.
EQUAL = {
    "none": torch.arange(40.0),
    "within": torch.arange(40.0).clamp(max=38),
    "first_and_last": torch.arange(40.0).clamp(max=36),
    "last_place": torch.arange(40.0) // 2,
    "all": torch.ones(40),
}


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("equal", EQUAL)
def test_a_row_with_equal_similarities(equal: str, k: int, order: str) -> None:
    """Beside others without, of a program that ranks its rows together; the columns in ascending
    order and in another one."""
    query, weight = 10 * torch.eye(4, 16), normal(16, 1, k, seed=3)
    value = normal(40, 16, seed=2)
    value[37] = math.nan
    for columns in (torch.arange(40), torch.arange(40) * 7 % 40):
        key = EQUAL["none"][:, None].repeat(1, 16)
        key[:, 1] = EQUAL[equal][columns]
        options: dict[str, Any] = {"metric": "dot", "scale": 0.01, "order": order}
        assert_forward(Finish().forward, query, key, value, k, weight, **options, backward=False)


def test_pairs_of_bfloat16_are_widened() -> None:
    """By the PTX of the kernel, which the interpreter does not reach: the first is the low half."""
    import inspect

    from convnn_kernels.triton import finish, ptx_interpreter

    found = re.search(r'"(shl\..*?)"', inspect.getsource(finish.as_float32.fn))
    assert found is not None
    x = torch.cat([normal(62), torch.tensor([math.inf, -0.0])]).bfloat16()
    pairs = x.view(torch.int32).numpy().view("uint32")
    registers = ptx_interpreter.run(found[1], {"$2": pairs}, len(pairs))
    for i in (0, 1):
        wide = torch.from_numpy(registers[f"${i}"].view("float32").copy())
        assert torch.equal(wide, x[i::2].float())


def test_rows_are_ranked_each_by_itself() -> None:
    """What a row has too few of, with all its hits equal, others have too many of, with ties."""
    query, key = torch.eye(4, 32), torch.zeros(64, 32)
    key[:, 0] = -5
    key[:8, 0] = 5
    for row in (1, 2, 3):
        key[:, row] = -torch.arange(64.0)
        key[10 * row, row] = key[10 * row + 5, row] = 9
        key[1, row], key[2, row] = 8, 7
    finish = Finish(hits=6)
    options: dict[str, Any] = {"metric": "dot", "exact": True, "backward": False}
    assert_select(finish.select, query, key, 3, **options)
    value, weight = normal(64, 16, seed=2), normal(16, 1, 3, seed=3)
    options["scale"] = 0.1
    assert_forward(Finish(hits=6).forward, query, key, value, 3, weight, **options)


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(
    "case", ["plain", "candidates", "self", "mask", "by index", "distinct", "constant"]
)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_both_paths_are_bit_equal_where_sums_are_exact(
    case: str, metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of many columns and that of few, over rows whose norms are powers of two."""
    from convnn_kernels.triton import select

    signs = [integers(n, 16, seed=n, dtype=dtype).sign() for n in (5, 300)]
    query, key = (torch.where(X == 0, 1, X) * 2 for X in signs)
    if case == "distinct":
        key = key[torch.arange(len(key)) % 40]
    if case == "constant":
        key[:] = key[0]
    everything = torch.arange(len(key))
    options = (
        everything.flip(0)[::2] if case == "candidates" else None,
        everything[: len(query)] * 50 + 5 if case == "self" else None,
        everything % 3 > 0 if case == "mask" else None,
        metric,
        "index" if case == "by index" else "similarity",
    )
    run = backend.operators()["convnn::select"]
    taken = []
    by_sweep = select.select_large
    monkeypatch.setattr(select, "select_large", lambda *a: (taken.append(1), by_sweep(*a)))
    s, I = run(query, key, 9, *options)
    assert taken == [1]
    monkeypatch.setattr(select, "is_large", lambda *_: False)
    other_s, other_I = run(query, key, 9, *options)
    assert taken == [1]
    assert torch.equal(I, other_I)
    assert torch.equal(s.view(torch.int32), other_s.view(torch.int32))


@pytest.mark.parametrize("kernel", ["finish", "exact_topk"])
def test_an_index_of_self_beyond_32_bits_is_no_row(kernel: str) -> None:
    query, key = integers(3, 18), integers(60, 18, seed=1)
    own = torch.tensor([5, 7, 9]) + 2**32
    options = (None, own, None, "dot", "similarity")
    # Few columns go through exact_topk.
    run = Finish().select if kernel == "finish" else backend.operators()["convnn::select"]
    s, I = run(query, key, 60, *options)
    assert (I.sort(1).values == torch.arange(60)).all()
    assert s.isfinite().all()


def test_a_neighbor_infinitely_far_has_no_part() -> None:
    """Though none of k is missing, and no two are equally near."""
    query, key, value = 10 * torch.eye(4, 16), normal(40, 16), normal(40, 6, seed=2)
    key[3, 1], value[3] = -3e38, math.nan
    options: dict[str, Any] = {"metric": "dot", "key_mask": torch.arange(40) < 4}
    Y, s, _ = assert_forward(Finish().forward, query, key, value, 4, **options, backward=False)
    assert s[1, 3] == -math.inf
    assert bool(Y[1].isfinite().all())


def test_more_neighbors_than_hits() -> None:
    query, key = integers(5, 18), integers(20, 18, seed=1)
    for k, order in ((21, "similarity"), (40, "index"), (9, "similarity")):
        key = key[: 5 if k == 9 else 20]
        options: dict[str, Any] = {"metric": "dot", "order": order, "exact": True}
        assert_select(Finish().select, query, key, k, **options, backward=False)


SPECIAL = {
    "nan_rows": lambda X: X.index_fill_(-2, torch.tensor([5, 131]), math.nan),
    "negative_nan": lambda X: X.index_fill_(-2, torch.tensor([131]), -math.nan),
    "infinite_rows": lambda X: X.index_fill_(-2, torch.tensor([7, 120]), math.inf),
    "zero_rows": lambda X: X.index_fill_(-2, torch.arange(0, 140, 2), 0.0),
    "negative_zero": lambda X: X.index_fill_(-2, torch.arange(40, 140), -0.0),
    "constant": lambda X: X.fill_(0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(("dtype", "D"), [(F32, 37), (F16, 21)], ids=str)
def test_special_values(special: str, metric: str, dtype: torch.dtype, D: int) -> None:
    query, key = normal(5, D), normal(140, D, seed=1)
    SPECIAL[special](key)
    query[1], query[2, 3], query[3] = 0.0, math.nan, -0.0
    query[4, 0] = math.inf
    query, key = query.to(dtype), key.to(dtype)
    assert_select(Finish().select, query, key, 6, metric=metric, backward=False)


@pytest.mark.parametrize("N", [1, 2, 3, 5, 17, 19])
def test_any_number_of_rows(N: int) -> None:
    """The last rows of a batch element may be computed twice; of few rows, several neighbors are
    read at a time."""
    query, key = integers(3, N, 18), integers(3, 70, 18, seed=1)
    value, weight = normal(3, 70, 6, seed=2), normal(6, 1, 5, seed=3)
    assert_forward(Finish().forward, query, key, value, 5, weight, backward=False)


@pytest.mark.parametrize("with_self", [False, True])
def test_listed_rows_are_left_as_they_are(with_self: bool) -> None:
    """Their similarities and indices are there already, and the convolution takes them."""
    query, key, value = integers(2, 7, 18), integers(2, 90, 18, seed=1), normal(2, 90, 6, seed=2)
    finish = Finish(listed=(0, 6, 7, 11, 13), splits=2)
    own = torch.tensor([3, 1, 4, 5, 9, 2, 6]) if with_self else None
    options: dict[str, Any] = {"self_indices": own, "metric": "dot", "scale": 0.1}
    assert_forward(finish.forward, query, key, value, 5, **options, exact=True, backward=False)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["self_and_mask", "candidates", "self_outside_candidates"])
@pytest.mark.parametrize(
    ("k", "M"), [(4, 150), (4, 30), pytest.param(40, 150, marks=pytest.mark.slow)]
)
def test_listed_rows(option: str, k: int, M: int) -> None:
    """More of them than the programs of a batch element take at once; of all columns."""
    options = {
        name: X[X < M][:M]
        if name == "candidates"
        else X[:M].expand(2, M)
        if name == "key_mask"
        else X % M
        for name, X in OPTIONS[option].items()
    }
    N = 19
    if "self_indices" in options:
        options["self_indices"] = torch.arange(N) * 7 % M
    query, key = integers(2, N, 18, dtype=F16), integers(2, M, 18, seed=1, dtype=F16)
    query[0] = 0  # all columns tie
    for metric, order in (("dot", "similarity"), ("euclidean", "index")):
        finish = Finish(listed=(*range(N - 1), 2 * N - 1))
        named: dict[str, Any] = {**options, "metric": metric, "order": order, "exact": True}
        assert_select(finish.select, query, key, k, **named, backward=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("D", [5, 150])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_similarities_of_listed_rows(metric: str, D: int, dtype: torch.dtype) -> None:
    query, key = normal(11, D, dtype=dtype), normal(200, D, seed=1, dtype=dtype)
    finish = Finish(listed=(3, 10))
    assert_select(finish.select, query, key, 9, metric=metric, backward=False)


@pytest.mark.slow
@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize(
    ("k", "C", "order", "dtype"),
    [
        (9, 5, "similarity", F16),
        (4, 140, "index", F32),
        pytest.param(33, 16, "similarity", F32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_convolution(
    rho: str, weight: bool, k: int, C: int, order: str, dtype: torch.dtype
) -> None:
    """Missing neighbors, whose value is NaN, a value of another dtype, one block of channels and
    several."""
    N, M, D = 10, 60, 20
    mask = torch.arange(2 * M).view(2, M) % 3 > 0
    mask[1, 3:] = False
    mask[0, -1] = False
    value = normal(2, M, C, seed=2, dtype=dtype)
    # Nor does it matter what lies before the first row.
    value[:, 0] = value[0, -1] = math.nan
    assert_forward(
        Finish().forward,
        normal(2, N, D),
        normal(2, M, D, seed=1),
        value,
        k,
        normal(C, 1, k, seed=3, dtype=dtype) if weight else None,
        normal(C, seed=4, dtype=dtype) if weight else None,
        key_mask=mask,
        rho=rho,
        scale=-0.7 if rho == "softmax" else 1.0,
        order=order,
        backward=False,
    )


def test_queries_of_shared_keys() -> None:
    """They are one batch element of the search; their values are not."""
    query, key = normal(2, 3, 5, 20), normal(2, 1, 40, 20, seed=1).expand(2, 3, 40, 20)
    value = normal(2, 3, 40, 6, seed=2)
    assert_forward(Finish().forward, query, key, value, 4, backward=False)
    key = normal(40, 20, seed=1).expand(2, 3, 40, 20)
    assert_forward(Finish().forward, query, key, value, 4, backward=False)


def test_an_infinite_similarity_is_nan_as_in_eager_softmax() -> None:
    query, key, value = normal(3, 20), normal(40, 20, seed=1), normal(40, 6, seed=2)
    query[1] = math.nan
    key[7, 2] = math.inf
    Y, _, _ = assert_forward(Finish().forward, query, key, value, 4, metric="dot", backward=False)
    assert bool(Y[1].isnan().all())
