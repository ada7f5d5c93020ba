# SPDX-License-Identifier: MIT
"""Each comparison rejects a result with one error. One that accepts it would prove nothing."""

import math
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, SHORT, assert_special, make_special_case
from inputs import each_metric
from torch import Tensor

import python_ref
from python_ref import (
    assert_aggregate,
    assert_certified_selection,
    assert_exact_selection,
    assert_forward,
    assert_select,
    assert_values,
)

F32 = torch.float32
N, M, D, C, K = 11, 60, 64, 6, 5


class Selection:
    """A correct selection, into which a test puts an error."""

    def __init__(self, metric: str, integers: bool = False, **options: object) -> None:
        if integers:
            self.query, self.key = (torch.randint(-3, 4, (n, 8)).float() for n in (N, M))
        else:
            self.query, self.key = torch.randn(N, D), torch.randn(M, D)
        self.options = {"k": K, "metric": metric, **options}
        self.s, self.I = python_ref.select(self.query, self.key, **self.options)

    def certify(self) -> None:
        assert_certified_selection(self.query, self.key, self.s, self.I, **self.options)

    def compare(self) -> None:
        assert_exact_selection(self.query, self.key, self.s, self.I, **self.options)


@each_metric
def test_a_correct_selection_is_accepted(metric: str) -> None:
    Selection(metric).certify()
    if metric != "cosine":
        correct = Selection(metric, integers=True)
        correct.certify()
        correct.compare()


@each_metric
def test_a_farther_neighbor(metric: str) -> None:
    """The sixth nearest key in place of the fifth, with its correct similarity."""
    wrong = Selection(metric)
    s, I = python_ref.select(wrong.query, wrong.key, K + 1, metric=metric)
    wrong.s[3, K - 1], wrong.I[3, K - 1] = s[3, K], I[3, K]
    with pytest.raises(AssertionError, match="nearer than a returned neighbor"):
        wrong.certify()


@each_metric
def test_swapped_neighbors(metric: str) -> None:
    wrong = Selection(metric)
    wrong.I[2, :2], wrong.s[2, :2] = wrong.I[2, :2].flip(0), wrong.s[2, :2].flip(0)
    with pytest.raises(AssertionError, match="total order"):
        wrong.certify()


@each_metric
def test_swapped_indices(metric: str) -> None:
    wrong = Selection(metric)
    wrong.I[2, 1:3] = wrong.I[2, 1:3].flip(0)
    with pytest.raises(AssertionError, match="outside its error bound"):
        wrong.certify()


@each_metric
def test_a_duplicate(metric: str) -> None:
    wrong = Selection(metric)
    wrong.I[4, 2], wrong.s[4, 2] = wrong.I[4, 1], wrong.s[4, 1]
    with pytest.raises(AssertionError, match="more than once"):
        wrong.certify()


@each_metric
def test_one_neighbor_k_times(metric: str) -> None:
    wrong = Selection(metric)
    wrong.I[:], wrong.s[:] = wrong.I[:, :1].clone(), wrong.s[:, :1].clone()
    with pytest.raises(AssertionError, match="more than once"):
        wrong.certify()


@each_metric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_similarities_of_rounded_inputs(metric: str, dtype: torch.dtype) -> None:
    """Similarities in half precision, or in TF32, which rounds as float16 does."""
    wrong = Selection(metric)
    query, key = wrong.query.to(dtype).float(), wrong.key.to(dtype).float()
    wrong.s, wrong.I = python_ref.select(query, key, K, metric=metric)
    with pytest.raises(AssertionError, match=r"outside its error bound|nearer than"):
        wrong.certify()


@each_metric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_one_rounded_similarity(metric: str, dtype: torch.dtype) -> None:
    wrong = Selection(metric)
    exact = wrong.s[:, K - 1]
    row = int((exact - exact.to(dtype).float()).abs().argmax())
    wrong.s[row, K - 1] = wrong.s[row, K - 1].to(dtype).float()
    with pytest.raises(AssertionError, match=r"outside its error bound|total order"):
        wrong.certify()


def test_euclidean_by_expansion_at_an_offset() -> None:
    """|q|^2 + |k|^2 - 2 q.k in float32."""
    wrong = Selection("euclidean")
    wrong.query, wrong.key = wrong.query + 1000, wrong.key + 1000
    squares = [X.square().sum(dim=-1) for X in (wrong.query, wrong.key)]
    S = 2 * wrong.query @ wrong.key.mT - squares[0].unsqueeze(-1) - squares[1]
    wrong.s, wrong.I = S.sort(dim=-1, descending=True, stable=True)
    wrong.s, wrong.I = wrong.s[:, :K], wrong.I[:, :K]
    with pytest.raises(AssertionError, match=r"outside its error bound|nearer than"):
        wrong.certify()


@each_metric
def test_a_masked_key(metric: str) -> None:
    mask = torch.rand(M) < 0.7
    wrong = Selection(metric, key_mask=mask)
    wrong.options["key_mask"] = mask.clone()
    wrong.options["key_mask"][wrong.I[5, 2]] = False
    with pytest.raises(AssertionError, match="not allowed"):
        wrong.certify()


@each_metric
def test_a_key_that_is_not_a_candidate(metric: str) -> None:
    wrong = Selection(metric)
    others = torch.arange(M)
    wrong.options["candidates"] = others[others != wrong.I[5, 2]]
    with pytest.raises(AssertionError, match="not allowed"):
        wrong.certify()


@each_metric
def test_self_missing_or_not_first(metric: str) -> None:
    self_indices = torch.arange(N)
    wrong = Selection(metric)
    wrong.options["self_indices"] = self_indices
    with pytest.raises(AssertionError, match="self is not"):
        wrong.certify()
    wrong = Selection(metric, self_indices=self_indices)
    wrong.I, wrong.s = wrong.I.roll(1, dims=-1), wrong.s.roll(1, dims=-1)
    with pytest.raises(AssertionError, match="self is not first"):
        wrong.certify()


def test_missing_neighbors() -> None:
    mask = torch.zeros(M, dtype=torch.bool)
    mask[:3] = True
    wrong = Selection("dot", key_mask=mask)
    wrong.certify()
    wrong.I[1, 4] = 7
    with pytest.raises(AssertionError, match="index other than 0"):
        wrong.certify()
    wrong = Selection("dot", key_mask=mask)
    wrong.s[1, 4] = 0.0
    with pytest.raises(AssertionError, match="missing neighbor with a similarity"):
        wrong.certify()
    wrong = Selection("dot", key_mask=mask)
    wrong.s[1, 2], wrong.I[1, 2] = -math.inf, 0
    with pytest.raises(AssertionError):
        wrong.certify()


def test_missing_neighbors_beyond_all_keys() -> None:
    query, key = torch.randn(2, 3), torch.randn(4, 3)
    s, I = python_ref.select(query, key, 6)

    def certify(s: Tensor, I: Tensor) -> None:
        python_ref.assert_certified_selection(query, key, s, I, 6)

    certify(s, I)
    again, nearest = s.clone(), I.clone()
    again[0, 4], nearest[0, 4] = s[0, 0], I[0, 0]
    with pytest.raises(AssertionError, match="missing neighbor with a similarity"):
        certify(again, I)
    with pytest.raises(AssertionError, match="index other than 0"):
        certify(s, I.index_fill(1, torch.tensor([5]), 3))
    with pytest.raises(AssertionError, match="missing neighbor"):
        certify(again, nearest)
    with pytest.raises(AssertionError, match="expected"):
        certify(s[:, :4], I[:, :4])


def test_order_by_index() -> None:
    wrong = Selection("dot", order="index")
    wrong.certify()
    wrong.options["order"] = "similarity"
    with pytest.raises(AssertionError, match="total order"):
        wrong.certify()
    wrong = Selection("dot")
    wrong.options["order"] = "index"
    with pytest.raises(AssertionError, match="do not ascend"):
        wrong.certify()


@pytest.mark.parametrize("index", [-1, M])
def test_an_index_out_of_range(index: int) -> None:
    wrong = Selection("dot")
    wrong.I[0, 0] = index
    with pytest.raises(AssertionError, match="indices: from"):
        wrong.certify()


def test_wrong_tie_order() -> None:
    """All keys tie: the last keys instead of the first, then the first ones in reverse."""
    for metric in ("dot", "euclidean"):
        wrong = Selection(metric, integers=True)
        wrong.key[:] = wrong.key[0].clone()
        wrong.s, wrong.I = python_ref.select(wrong.query, wrong.key, K, metric=metric)
        wrong.compare()
        correct = wrong.I.clone()
        wrong.I = correct + M - K
        with pytest.raises(AssertionError, match="indices"):
            wrong.compare()
        wrong.I = correct.flip(-1)
        with pytest.raises(AssertionError, match="indices"):
            wrong.compare()
        with pytest.raises(AssertionError, match="total order"):
            wrong.certify()


def test_wrong_nan_order() -> None:
    wrong = Selection("dot")
    wrong.key[[20, 30, 40]] = math.nan
    wrong.s, wrong.I = python_ref.select(wrong.query, wrong.key, 2, metric="dot")
    wrong.options["k"] = 2
    wrong.certify()
    correct = wrong.I.clone()
    wrong.I = correct + 10
    with pytest.raises(AssertionError, match="tie of NaN"):
        wrong.certify()
    wrong.I = correct.flip(-1)
    with pytest.raises(AssertionError, match="total order"):
        wrong.certify()
    # NaN ranks below the numbers.
    wrong = Selection("dot")
    wrong.key[20] = math.nan
    wrong.s, wrong.I = python_ref.select(
        wrong.query, wrong.key, K, key_mask=torch.arange(M) != 20, metric="dot"
    )
    with pytest.raises(AssertionError, match="nearer than a returned neighbor"):
        wrong.certify()


def test_a_number_for_nan() -> None:
    wrong = Selection("dot")
    wrong.key[20] = math.nan
    wrong.s, wrong.I = python_ref.select(wrong.query, wrong.key, K, metric="dot")
    wrong.s[0, 0] = 1e30
    with pytest.raises(AssertionError, match="outside its error bound"):
        wrong.certify()


@pytest.mark.parametrize(("other", "is_certain"), [(-1e30, False), (-1.0, True)])
def test_nan_for_a_sum_that_overflows(other: float, is_certain: bool) -> None:
    """Of 9e74 and -1e40, a sum in float32 is NaN or infinite; of 9e74 and -1e10, infinite."""
    query, key = torch.tensor([[3e37, 1e10]]), torch.tensor([[3e37, other]])
    call = (torch.zeros(1, 1, dtype=torch.int64), 1)
    assert_certified_selection(query, key, torch.tensor([[math.inf]]), *call, metric="dot")
    outcome = pytest.raises(AssertionError, match="error bound") if is_certain else nullcontext()
    with outcome:
        assert_certified_selection(query, key, torch.tensor([[math.nan]]), *call, metric="dot")


def _changed(call: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    s, I = python_ref.select(**call)
    return change(s), I


def _nan_last(s: Tensor, I: Tensor) -> tuple[Tensor, Tensor]:
    order = s.nan_to_num(-math.inf, math.inf).argsort(dim=-1, descending=True, stable=True)
    return s.gather(-1, order), I.gather(-1, order)


def _select_flushed(query: Tensor, key: Tensor, *options: Any, **more: Any) -> Any:
    query, key = (X.masked_fill(X.abs() < torch.finfo(X.dtype).tiny, 0.0) for X in (query, key))
    return python_ref.select(query, key, *options, **more)


def _select_by_norms_that_overflow(query: Tensor, key: Tensor, metric: str, **options: Any) -> Any:
    if metric == "cosine":
        query, key = (X.float() / X.float().square().sum(-1, True).sqrt() for X in (query, key))
    return python_ref.select(query, key, metric=metric, **options)


@pytest.mark.parametrize(
    ("content", "dtype", "wrong"),
    [
        ("not_finite", F32, lambda **call: _nan_last(*python_ref.select(**call))),
        ("not_finite", F32, lambda **call: _changed(call, lambda s: s.nan_to_num(0.0, math.inf))),
        ("not_finite", F32, lambda **call: _changed(call, lambda s: s.nan_to_num(math.nan))),
        ("tiny", torch.float16, _select_flushed),
        ("huge", F32, _select_by_norms_that_overflow),
    ],
    ids=["nan_last", "nan_is_zero", "infinity_is_large", "flushed", "norms_overflow"],
)
def test_special_values(content: str, dtype: torch.dtype, wrong: Callable[..., Any]) -> None:
    """Of the cases, some tell the wrong result from a right one."""
    cases = [case for case in map(make_special_case, range(80)) if case.content == content]
    rejected = 0
    for case in cases:
        case = replace(case, query_dtype=dtype, order="similarity")
        try:
            assert_special(case, python_ref.forward, wrong, backward=False)
        except AssertionError:
            rejected += 1
    assert rejected >= 3, f"{rejected} of {len(cases)}"


def test_values() -> None:
    exact = torch.randn(40, 30, dtype=torch.float64)
    eager = exact.float()
    assert_values("correct", exact.float(), exact, eager)
    for corrupt in (
        lambda X: X.index_put_((torch.tensor(3), torch.tensor(4)), X.max() * 1e-6 + X[3, 4]),
        lambda X: X.copy_(X.bfloat16().float()),
        lambda X: X.mul_(1 + 5e-7),
        lambda X: X[0, 0].fill_(math.nan),
        lambda X: X[0, 0].fill_(math.inf),
        lambda X: X[3].copy_(X[4].clone()),
    ):
        wrong = exact.float()
        corrupt(wrong)
        with pytest.raises(AssertionError):
            assert_values("wrong", wrong, exact, eager)
    with pytest.raises(AssertionError, match="shape"):
        assert_values("wrong", exact.float()[1:], exact, eager)
    with pytest.raises(AssertionError, match="expected"):
        assert_values("wrong", exact, exact, eager)
    missing = exact.clone()
    missing[0, 0] = math.nan
    with pytest.raises(AssertionError, match="NaN"):
        assert_values("wrong", exact.float(), missing, missing.float())


class Corrupt(torch.autograd.Function):
    """The identity with functions applied to its value and to its gradient."""

    @staticmethod
    def forward(ctx: object, X: Tensor, forward: Callable, backward: Callable) -> Tensor:
        ctx.backward_ = backward
        return forward(X.clone())

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple:
        return ctx.backward_(grad.clone()), None, None


def one_element(X: Tensor) -> Tensor:
    """X with its largest element 0.1% too large."""
    X = X.contiguous()
    flat = X.view(-1)
    flat[flat.abs().argmax()] *= 1.001
    return X


def unchanged(X: Tensor) -> Tensor:
    return X


NAMES = ("query", "key", "value", "weight", "bias")


@pytest.mark.parametrize("name", [None, *NAMES, "output", "similarities"])
def test_one_wrong_element(name: str | None) -> None:
    """In the output, the similarities or a gradient of `forward`; with None there is none."""
    inputs = {
        "query": torch.randn(N, D),
        "key": torch.randn(M, D),
        "value": torch.randn(M, C),
        "weight": torch.randn(4, C, K),
        "bias": torch.randn(4),
    }

    def forward(*arguments: object) -> tuple[Tensor, ...]:
        query, key, value, k, weight, bias, *rest = arguments
        leaves = dict(zip(NAMES, (query, key, value, weight, bias), strict=True))
        if name in NAMES:
            leaves[name] = Corrupt.apply(leaves[name], unchanged, one_element)
        query, key, value, weight, bias = leaves.values()
        Y, s, I = python_ref.forward(query, key, value, k, weight, bias, *rest)
        if name == "output":
            Y = Corrupt.apply(Y, one_element, unchanged)
        if name == "similarities":
            s = Corrupt.apply(s, one_element, unchanged)
        return Y, s, I

    for metric in ("cosine", "dot", "euclidean"):
        if name is None:
            assert_forward(forward, **inputs, k=K, metric=metric)
            continue
        with pytest.raises(AssertionError, match=rf"{name}|error bound"):
            assert_forward(forward, **inputs, k=K, metric=metric)


def test_a_different_neighbor_does_not_excuse_a_wrong_output() -> None:
    """The output must be that of the returned neighbors, even if others are correct."""

    def forward(*arguments: object) -> tuple[Tensor, ...]:
        Y, s, I = python_ref.forward(*arguments)
        I = I.clone()
        I[0, K - 1] = (I[0, K - 1] + 1) % M
        return Y, s, I

    with pytest.raises(AssertionError):
        assert_forward(forward, torch.randn(N, D), torch.randn(M, D), torch.randn(M, C), K)


def test_a_lost_gradient() -> None:
    """The gradient of one query is zero, or all of them are."""

    def lost(grad: Tensor) -> Tensor:
        grad[0] = 0
        return grad

    def select(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return python_ref.select(Corrupt.apply(query, unchanged, lost), *rest)

    def detached(query: Tensor, key: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return python_ref.select(query.detach(), key, *rest)

    for operator in (select, detached):
        with pytest.raises(AssertionError, match="gradient of query"):
            assert_select(operator, torch.randn(N, D), torch.randn(M, D), K)


def test_a_missing_neighbor_that_is_used() -> None:
    """-inf is treated as any other similarity, with rho = ones."""

    def aggregate(value: Tensor, s: Tensor, *rest: object) -> Tensor:
        return python_ref.aggregate(value, s.nan_to_num(neginf=0.0), *rest)

    s = torch.randn(N, K)
    s[3, 4] = -math.inf
    I = torch.randint(M, (N, K))
    with pytest.raises(AssertionError, match="output"):
        assert_aggregate(aggregate, torch.randn(M, C), s, I, rho="ones")


@pytest.mark.parametrize("size", [0.7002, 0.3, 1.9])
def test_equal_elements(size: float) -> None:
    """A sum in another order than eager PyTorch's is right, also where that order has no error."""

    def in_order(query: Tensor, key: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        I = python_ref.select(query, key, *rest)[1]
        q, k = query.float()[:, None], key.float()[I]
        dot = torch.zeros(I.shape)
        for d in range(q.shape[-1]):
            dot = dot + q[..., d] * k[..., d]
        return dot / (q.norm(dim=-1) * k.norm(dim=-1)), I

    def wrong(*arguments: object) -> tuple[Tensor, Tensor]:
        s, I = in_order(*arguments)
        return s - 1e-5, I

    query, key = (torch.full((n, 128), size, dtype=torch.float16) for n in (3, M))
    assert_select(in_order, query, key, K, backward=False)
    with pytest.raises(AssertionError, match="similarities"):
        assert_select(wrong, query, key, K, backward=False)


@pytest.mark.parametrize("size", [0.7, 1.9, 0.0923])
def test_equal_neighbors_summed_in_order(size: float) -> None:
    """Partial sums, as those of eager PyTorch, add equal numbers far more accurately."""

    def in_order(value: Tensor, s: Tensor, I: Tensor, *rest: object) -> Tensor:
        weights = s.exp()
        total = sum(weights.unbind(-1), torch.zeros(len(s)))
        Y = torch.zeros(len(s), value.shape[1])
        for j, weight in enumerate(weights.unbind(-1)):
            Y = Y + (weight / total)[:, None] * value[I[:, j]]
        return Y

    def wrong(*arguments: object) -> Tensor:
        return in_order(*arguments) + 1e-4

    given = torch.full((M, C), size), torch.zeros(3, 266), torch.randint(M, (3, 266))
    assert_aggregate(in_order, *given, backward=False)
    with pytest.raises(AssertionError, match="output"):
        assert_aggregate(wrong, *given, backward=False)


@pytest.mark.parametrize("seed", [1, 53, 55])
def test_distances_of_few_columns(seed: int) -> None:
    """Three numbers have few sums, and all may be luckier than one that is rounded once."""
    torch.manual_seed(seed)
    given = torch.randn(1, 3) * 1000, torch.randn(3, 3) * 1e-3, torch.randn(3, 3), 3
    options = {"metric": "euclidean", "scale": 3.0, "backward": False}

    def forward(query: Tensor, key: Tensor, value: Tensor, k: int, *rest: object) -> Any:
        s, I = python_ref.select(query.double(), key.double(), k, metric="euclidean")
        return python_ref.aggregate(value, s.float(), I, scale=3.0), s.float(), I

    def wrong(*arguments: Any) -> Any:
        Y, s, I = forward(*arguments)
        return Y.roll(1, -1), s, I

    assert_forward(forward, *given, **options)
    with pytest.raises(AssertionError, match="output"):
        assert_forward(wrong, *given, **options)


@pytest.mark.parametrize("seed", [5, 15, 25])
def test_a_scale_that_is_rounded(seed: int) -> None:
    """Three products with it may all be luckier than those of the same numbers in two steps."""
    torch.manual_seed(seed)
    s = torch.randn(1, 3) + 60
    given = torch.randn(5, 1), s, torch.randint(5, (1, 3))

    def in_two_steps(value: Tensor, s: Tensor, I: Tensor, *rest: object) -> Tensor:
        weights = (s * 0.7 * (3.0 / 0.7)).softmax(-1)
        return (weights[..., None] * value[I]).sum(-2)

    def wrong(*arguments: object) -> Tensor:
        return in_two_steps(*arguments) * (1 + 1e-3)

    assert_aggregate(in_two_steps, *given, scale=3.0)
    with pytest.raises(AssertionError, match="output"):
        assert_aggregate(wrong, *given, scale=3.0)


class ByOutput(torch.autograd.Function):
    """Softmax and sum. The gradient of s takes the mean of t, that of rho, from the output."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, s: Tensor, I: Tensor, error: float) -> Tensor:
        Y = python_ref.aggregate(value, s, I)
        ctx.save_for_backward(value, s, I, Y)
        ctx.error = error
        return Y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        value, s, I, Y = ctx.saved_tensors
        rho = s.softmax(-1)
        t = (grad[:, None] * value[I]).sum(-1)
        mean = sum((grad * Y).unbind(-1)) + ctx.error
        pairs = (rho[..., None] * grad[:, None]).flatten(0, 1)
        grad_value = torch.zeros_like(value).index_add(0, I.flatten(), pairs)
        return grad_value, rho * (t - mean[:, None]), None, None


def test_a_gradient_of_which_one_row_cancels() -> None:
    """The large terms of that row do not excuse errors of others."""

    def lost(value: Tensor, s: Tensor, *rest: object) -> Tensor:
        return python_ref.aggregate(value, s.detach() + 0 * s, *rest)

    value = torch.tensor([[1e6], [0.0], [0.01], [0.02]])
    s, I = torch.tensor([[200.0, 0.0], [0.0, 0.3]]), torch.tensor([[0, 1], [2, 3]])
    assert_aggregate(python_ref.aggregate, value, s, I, grad_output=torch.ones(2, 1))
    with pytest.raises(AssertionError, match="gradient of similarities"):
        assert_aggregate(lost, value, s, I, grad_output=torch.ones(2, 1))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_distances_far_from_zero(dtype: torch.dtype, error: float) -> None:
    """Differences of close numbers are exact, whatever their size."""
    query, key = (1000 + 1e-2 * torch.randn(n, 8, dtype=dtype) for n in (N, M))

    def wrong(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        query = Corrupt.apply(query, unchanged, lambda grad: grad * (1 + error))
        return python_ref.select(query, *rest)

    assert_select(python_ref.select, query, key, K, metric="euclidean")
    with pytest.raises(AssertionError, match="gradient of query"):
        assert_select(wrong, query, key, K, metric="euclidean")


def test_a_scale_that_changes_no_bit() -> None:
    """With a scale of 1, logits are differences of similarities, exactly."""

    def wrong(value: Tensor, s: Tensor, I: Tensor, *rest: object) -> Tensor:
        return python_ref.aggregate(value, s - (s - s[:, :1]) * 1e-4, I, *rest)

    given = torch.randn(M, C), torch.tensor([[1000.0, 1001.0, 1002.0]]), torch.tensor([[0, 1, 2]])
    assert_aggregate(python_ref.aggregate, *given, backward=False)
    with pytest.raises(AssertionError, match="output"):
        assert_aggregate(wrong, *given, backward=False)


def test_a_gradient_that_cancels() -> None:
    """One neighbor outweighs the others: eager PyTorch subtracts t from itself."""
    value, I = torch.randn(M, 48) * 10, torch.randint(M, (N, 2))
    s = torch.tensor([[60.0, 0.0]]).expand(N, 2).contiguous()

    def aggregate(value: Tensor, s: Tensor, I: Tensor, *rest: object) -> Tensor:
        return ByOutput.apply(value, s, I, 0.0)

    def wrong(value: Tensor, s: Tensor, I: Tensor, *rest: object) -> Tensor:
        return ByOutput.apply(value, s, I, 1e-3)

    assert_aggregate(aggregate, value, s, I)
    with pytest.raises(AssertionError, match="gradient of similarities"):
        assert_aggregate(wrong, value, s, I)


def test_half_precision_sums() -> None:
    """Sums in bfloat16 instead of float32 that is rounded once at the end."""

    def aggregate(value: Tensor, s: Tensor, indices: Tensor, *rest: object) -> Tensor:
        total = torch.zeros(N, C, dtype=torch.bfloat16)
        for j in range(indices.shape[1]):
            total = total + value[indices[:, j]]
        return total

    value, s, I = torch.randn(M, C).bfloat16(), torch.randn(N, 400), torch.randint(M, (N, 400))
    with pytest.raises(AssertionError, match="output"):
        assert_aggregate(aggregate, value, s, I, rho="ones", backward=False)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs mallopt of glibc")
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("size", [1, 300, 100_000])
def test_new_memory_is_nan(size: int, dtype: torch.dtype) -> None:
    """An element that an operator does not write is NaN, even where memory is reused."""
    for _ in range(3):
        X = torch.empty(size, dtype=dtype)
        assert X.isnan().all()
        X.fill_(1.0)
        del X
