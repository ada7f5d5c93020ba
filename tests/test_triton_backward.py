# SPDX-License-Identifier: MIT
"""The backward of `forward` with a depthwise weight or none, in Triton's interpreter.

It needs a process of its own, started with ``TRITON_INTERPRET=1``: `make test` has one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convnn_kernels
from convnn_kernels.triton import backend, configs
from python_ref import assert_aggregate, assert_forward, assert_select

pytestmark = in_interpreter

ops = torch.ops.convnn
F32, F16 = torch.float32, torch.float16
TENSORS = ("grad_output", "grad_similarities", "query", "key", "value", "similarities", "indices")
NEEDS = ("query", "key", "value", "weight", "bias")


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from convnn_kernels.triton.launch import forget_plans

    forget_plans()
    # The kernels for few tokens have tests of their own.
    monkeypatch.setattr(configs, "allows_backward_small", lambda *_: False)
    with convnn_kernels.backend("triton"):
        yield
    monkeypatch.undo()
    forget_plans()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_call(
    M: int = 45,
    k: int = 3,
    metric: str = "cosine",
    rho: str = "softmax",
    weight: bool = True,
    dtype: torch.dtype = F32,
    N: int = 70,
    B: int = 2,
    D: int = 10,
    C: int = 7,
) -> dict[str, Any]:
    """The arguments of forward_backward, but for the needed gradients: several tiles of queries and
    blocks of keys, the last ones not full; missing neighbors of both kinds, a hub, and keys that
    nobody chose."""
    query, key, value = (
        normal(B, n, size, seed=seed, dtype=dtype)
        for seed, (n, size) in enumerate([(N, D), (M, D), (M, C)])
    )
    # Distinct, as `forward` has them.
    few = max(M // 2, k - 1)
    I = torch.rand(B, N, few, generator=torch.Generator().manual_seed(3)).argsort(-1)
    I = torch.cat([torch.full((B, N, 1), M - 1), I[:, :, : k - 1]], -1)
    similar = torch.nn.functional.cosine_similarity if metric == "cosine" else None
    rows = key.float().gather(1, I.view(B, -1, 1).expand(-1, -1, D)).view(B, N, k, D)
    q = query.float().unsqueeze(2)
    if similar is not None:
        s = similar(q, rows, dim=-1)
    else:
        s = (q * rows).sum(-1) if metric == "dot" else -(q - rows).square().sum(-1)
    s[0, 5:9], s[-1, 3, k - 1] = -math.inf, -math.inf
    I[-1, N // 2, 0] = M
    return {
        "grad_output": normal(B, N, C, seed=4, dtype=dtype),
        "grad_similarities": normal(B, N, k, seed=5),
        **{"query": query, "key": key, "value": value},
        "weight": normal(C, 1, k, seed=6, dtype=dtype) if weight else None,
        **{"similarities": s, "indices": I, "has_bias": True},
        **{"metric": metric, "rho": rho, "scale": 0.7 if rho == "softmax" else 1.0},
    }


def run(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> dict[str, Tensor]:
    backward = backend.operators()["convnn::forward_backward"]
    results = backward(*call.values(), *(name in needed for name in NEEDS))
    return dict(zip(NEEDS, results, strict=True))


def expected(call: dict[str, Any]) -> dict[str, Tensor]:
    """In float64, pair by pair."""
    x = {name: X.double() if isinstance(X, Tensor) else X for name, X in call.items()}
    I, M = call["indices"], call["key"].shape[1]
    present = (x["similarities"] != -math.inf) & (I >= 0) & (I < M)
    leaves = {n: x[n].clone().requires_grad_() for n in ("query", "key", "value")}
    W = torch.ones(x["value"].shape[-1], 1, I.shape[-1], dtype=torch.float64)
    W = (W if x["weight"] is None else x["weight"]).clone().requires_grad_()
    b = torch.zeros(len(W), dtype=torch.float64, requires_grad=True)
    safe = torch.where(present, I, 0)
    batch = torch.arange(len(I)).view(-1, 1, 1)
    rows, q = leaves["key"][batch, safe], leaves["query"].unsqueeze(2)
    if call["metric"] == "cosine":
        s = torch.nn.functional.cosine_similarity(q, rows, dim=-1, eps=1e-12)
    elif call["metric"] == "dot":
        s = (q * rows).sum(-1)
    else:
        s = -(q - rows).square().sum(-1)
    s = s.masked_fill(~present, -math.inf)
    if call["rho"] == "softmax":
        rho = (call["scale"] * s).softmax(-1).nan_to_num(0.0)
    else:
        rho = torch.ones_like(s) if call["rho"] == "ones" else s
    rho = torch.where(present, rho, 0.0)
    X = torch.where(present[..., None], leaves["value"][batch, safe], 0.0)
    Y = torch.einsum("bnk,bnkc,ck->bnc", rho, X, W[:, 0]) + b
    outputs, grads = [Y], [x["grad_output"]]
    if x["grad_similarities"] is not None:
        outputs.append(torch.where(present, s, 0.0))
        grads.append(x["grad_similarities"])
    wanted = [*leaves.values(), W, b]
    results = torch.autograd.grad(outputs, wanted, grads, materialize_grads=True, allow_unused=True)
    return {name: grad.nan_to_num(0.0) for name, grad in zip(NEEDS, results, strict=True)}


def assert_close(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> None:
    results, references = run(call, needed), expected(call)
    for name in NEEDS:
        if name not in needed or (name == "weight" and call["weight"] is None):
            assert results[name].shape == (0,), name
            continue
        assert results[name].dtype == call.get(name, call["value"]).dtype
        epsilon = torch.finfo(results[name].dtype).eps
        error = (results[name].double() - references[name]).abs().amax()
        assert error <= 16 * epsilon * references[name].abs().amax(), (name, float(error))


@pytest.mark.parametrize(
    ("metric", "rho", "k", "weight", "dtype"),
    [
        ("cosine", "softmax", 1, True, F32),
        ("cosine", "softmax", 9, True, F32),
        pytest.param("cosine", "softmax", 40, False, F32, marks=pytest.mark.slow),
        ("cosine", "similarity", 3, True, F16),
        ("cosine", "ones", 3, False, F32),
        ("dot", "softmax", 3, False, F16),
        ("dot", "similarity", 9, True, F32),
        ("dot", "ones", 1, True, F32),
        ("euclidean", "softmax", 9, True, F16),
        ("euclidean", "similarity", 1, False, F32),
        ("euclidean", "ones", 3, True, F32),
    ],
    ids=str,
)
def test_gradients(metric: str, rho: str, k: int, weight: bool, dtype: torch.dtype) -> None:
    call = make_call(k=k, metric=metric, rho=rho, weight=weight, dtype=dtype)
    assert_close(call)
    if k == 3:
        assert_close({**call, "grad_similarities": None})


@pytest.mark.quick_one_in(4)
@pytest.mark.parametrize("needed", [*((name,) for name in NEEDS), NEEDS[:2], NEEDS[2:]], ids=str)
@pytest.mark.parametrize("direct", [True, False])
def test_only_what_is_needed(needed: tuple[str, ...], direct: bool) -> None:
    """The bits are those of a call that needs everything."""
    call = make_call()
    if not direct:
        call["grad_similarities"] = None
    everything, some = run(call), run(call, needed)
    for name in NEEDS:
        assert torch.equal(some[name], everything[name] if name in needed else torch.empty(0))


def test_runs_are_equal() -> None:
    for first, second in zip(run(make_call()).values(), run(make_call()).values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("row", [0, 15, 40, 63])
def test_hubs(row: int) -> None:
    """A list longer than several chunks, in each place of a block, and keys that nobody chose."""
    call = make_call(M=64, N=130, metric="dot")
    hub = torch.rand(call["indices"].shape, generator=torch.Generator().manual_seed(7)) < 0.7
    call["indices"] = torch.where(hub, row, call["indices"])
    pairs = int((call["indices"] // 16 == row // 16).sum())
    assert pairs > 6 * configs.key_side(0, 32, 7, 10, 130, 64, 3)["CHUNK"]
    q, rows = (
        call["query"].unsqueeze(2),
        call["key"][torch.arange(2).view(2, 1, 1), call["indices"] % 64],
    )
    call["similarities"] = (q * rows).sum(-1)
    assert_close(call)


def test_what_is_not_finite_stays_with_its_keys() -> None:
    """The other keys of a block have the bits that they have without it."""
    call = make_call()
    clean = run(call)
    call["grad_output"][0, 20], call["query"][1, 30, 2] = math.nan, math.inf
    dirty = run(call)
    hit = torch.zeros(2, 46, dtype=torch.bool)
    hit[0, call["indices"][0, 20]] = True
    dv = dirty["value"].isnan().all(-1)
    assert torch.equal(dv[0], hit[0, :45])
    assert not dv[1].any()
    hit[1, call["indices"][1, 30]] = True
    dk = dirty["key"].isnan().any(-1)
    assert torch.equal(dk, hit[:, :45])
    far = ~hit[:, :45]
    assert torch.allclose(dirty["value"][far], clean["value"][far], atol=1e-5)
    assert torch.allclose(dirty["key"][far], clean["key"][far], atol=1e-5)


def assert_padding_has_no_gradient(
    run: Callable[..., dict[str, Tensor]], call: dict[str, Any]
) -> None:
    """Queries without a neighbor, and keys and values that nobody chose, may be infinite or NaN;
    others have the gradients that they have without these."""
    I, M = call["indices"], call["key"].shape[1]
    present = (call["similarities"] != -math.inf) & (I < M)
    chosen = [torch.isin(torch.arange(M), I[b][present[b]]) for b in range(len(I))]
    padding = {"query": ~present.any(-1), "key": ~torch.stack(chosen)}
    padding["value"] = padding["key"]
    clean = run(call)
    for number in (math.inf, math.nan):
        padded = {name: call[name].clone() for name in padding}
        for name, rows in padding.items():
            assert rows.any()
            padded[name][rows] = number
        dirty = run({**call, **padded})
        for name, rows in padding.items():
            assert not dirty[name][rows].any(), name
            alone = run({**call, name: padded[name]}, (name,))
            assert not alone[name][rows].any(), name
        for name in NEEDS[:4]:
            epsilon = torch.finfo(clean[name].dtype).eps
            bound = 8 * epsilon * float(clean[name].abs().amax())
            torch.testing.assert_close(dirty[name], clean[name], atol=bound, rtol=0.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": F16}, {"D": 70}, {"metric": "dot"}, {"metric": "euclidean"}],
    ids=str,
)
def test_padding_has_no_gradient(options: dict[str, Any]) -> None:
    """D = 70 is several blocks of channels."""
    assert_padding_has_no_gradient(run, make_call(**options))


def test_padding_has_no_gradient_where_queries_are_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(configs, "allowed_backward", lambda *_: 0)
    assert_padding_has_no_gradient(run, make_call())


def test_queries_without_neighbors_add_nothing() -> None:
    """Not even where the gradient of their output is not finite."""
    call = make_call()
    clean = run(call)
    call["grad_output"][0, 5:9] = math.nan
    dirty = run(call)
    for name in NEEDS[:4]:
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("rho", ["softmax", "ones"])
def test_a_missing_neighbor_adds_nothing_to_the_weight(rho: str) -> None:
    """Not even where the gradient of the output is infinite."""
    query, key, value = normal(4, 6), normal(3, 6, seed=1), normal(3, 6, seed=2)
    W = normal(6, 1, 4, seed=3).requires_grad_()
    Y, _, _ = ops.forward(query, key, value, 4, W, rho=rho)
    grad = normal(4, 6, seed=4)
    grad[2, 1] = math.inf
    (dW,) = torch.autograd.grad(Y, W, grad)
    assert not dW[:, :, 3].any()


def test_products_as_the_switch_has_them_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from convnn_kernels.triton import backward as module
    from convnn_kernels.triton import hardware

    plans = []
    plan = module.plan_backward
    monkeypatch.setattr(module, "elements_at_a_time", lambda call: call.batch)
    monkeypatch.setattr(module, "plan_backward", lambda call: plans.append(call) or plan(call))
    for precision in ("tf32x3", "tf32"):
        monkeypatch.setattr(hardware, "product_precision", lambda _, p=precision: p)
        run(make_call())
    assert [call.value_precision for call in plans] == ["tf32x3", "tf32"]
    assert plans[0] != plans[1]


@pytest.mark.parametrize("size", [1e25, 1e-10, 3e37])
@pytest.mark.parametrize("D", [10, 70])
def test_norms_neither_overflow_nor_vanish(size: float, D: int) -> None:
    """The gradient of a row is inverse to its size; D = 70 is several blocks of channels."""
    query, key = normal(9, D), normal(20, D, seed=1)
    factor = torch.where(torch.arange(20) % 2 == 0, size, 1.0)[:, None]
    s, I = ops.select(query, key, 3)
    grad = normal(9, 3, seed=2)
    backward = backend.operators()["convnn::select_backward"]
    dq, dk = backward(grad, query, key, s, I, "cosine", True, True)
    large_q, large_k = backward(grad, size * query, factor * key, s, I, "cosine", True, True)
    assert torch.allclose(size * large_q.double(), dq.double(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(factor * large_k.double(), dk.double(), rtol=1e-4, atol=1e-5)
    tiny_q, tiny_k = backward(grad, 1e-14 * query, key, s, I, "cosine", True, True)
    assert not tiny_q.any()
    assert not tiny_k.isnan().any()


@pytest.mark.parametrize(("of_grad", "of_query"), [(1e-8, 1e3), (1e6, 1e-4)])
def test_float16_factors_of_any_size(of_grad: float, of_query: float) -> None:
    """Gradients of similarities beyond and below float16, whose products with q are not."""
    call = make_call(dtype=F16, rho="ones", metric="dot")
    call["query"] = (of_query * call["query"]).half()
    call["grad_similarities"] *= of_grad
    backward = backend.operators()["convnn::select_backward"]
    arguments = (call["query"], call["key"], call["similarities"], call["indices"], "dot")
    _, dk = backward(call["grad_similarities"], *arguments, False, True)
    reference = expected(call)["key"]
    assert (dk.double() - reference).abs().amax() <= 2**-9 * reference.abs().amax() + 2**-24


class _Kernels(TorchDispatchMode):
    """What PyTorch runs that is not allocation or a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith(
            ("empty", "new_empty", "view", "slice", "detach", "select", "alias")
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", [True, False])
def test_four_launches_and_nothing_else(weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from convnn_kernels.triton.launch import Plan

    launched: list[str] = []
    monkeypatch.setattr(
        Plan,
        "launch",
        lambda plan, pointers: launched.extend(each.kernel.name for each in plan.launches),
    )
    call = make_call(weight=weight)
    with _Kernels() as kernels:
        run(call)
    assert kernels.names == []
    assert launched == ["query_side_kernel", "sort_pairs_kernel", *["key_side_kernel"] * 2]
    launched.clear()
    run(call, ("query", "weight", "bias") if weight else ("query",))
    assert launched == ["query_side_kernel", "sort_pairs_kernel"][: 1 + weight]


def divide(monkeypatch: pytest.MonkeyPatch, rows: int, tiles: int) -> list[str]:
    """Divides queries into parts of so many tiles; the names of the kernels that are launched."""
    from convnn_kernels.triton import backward
    from convnn_kernels.triton.launch import Plan, forget_plans

    def parts(call: Any, keys: Any) -> tuple[int, int, int]:
        return rows, tiles, -(-call.N // (rows * tiles))

    launched: list[str] = []
    launch = Plan.launch

    def record(plan: Plan, pointers: Any) -> None:
        launched.extend(each.kernel.name for each in plan.launches)
        launch(plan, pointers)

    forget_plans()
    monkeypatch.setattr(backward, "_divide", parts)
    monkeypatch.setattr(Plan, "launch", record)
    return launched


@pytest.mark.parametrize(
    ("rows", "tiles", "metric", "rho", "dtype"),
    [
        (32, 1, "cosine", "softmax", F32),
        # The last part has a tile without queries.
        (32, 2, "cosine", "similarity", F16),
        (64, 1, "euclidean", "softmax", F32),
        (32, 3, "dot", "ones", F16),
    ],
    ids=str,
)
def test_parts_of_the_queries(
    rows: int,
    tiles: int,
    metric: str,
    rho: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    N = 150
    launched = divide(monkeypatch, rows, tiles)
    assert_close(make_call(metric=metric, rho=rho, dtype=dtype, N=N))
    parts = -(-N // (rows * tiles))
    assert parts > 1
    assert launched == parts * ["query_side_kernel", "sort_pairs_kernel", *["key_side_kernel"] * 2]


def test_parts_of_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of channels, each with its own sum of what is projected out."""
    query, key = normal(70, 70), normal(20, 70, seed=1)
    s, I = ops.select(query, key, 3)
    call = (normal(70, 3, seed=2), query, key, s, I, "cosine", True, True)
    backward = backend.operators()["convnn::select_backward"]
    dq, dk = backward(*call)
    launched = divide(monkeypatch, 32, 1)
    dq_of_parts, dk_of_parts = backward(*call)
    assert len(launched) == 12
    assert torch.equal(dq, dq_of_parts)
    assert torch.allclose(dk, dk_of_parts, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, backward(*call), (dq, dk_of_parts)))


def test_only_the_last_part_adds_up_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = divide(monkeypatch, 32, 1)
    assert_close(make_call(), ("query", "weight", "bias"))
    assert launched == ["query_side_kernel"] * 3 + ["sort_pairs_kernel"]


@pytest.mark.parametrize("allowed", [0, 2**17, 2**19, 2**26])
def test_parts_fit_and_have_all_queries(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from convnn_kernels.triton import backward
    from convnn_kernels.triton.launch import Plan

    sizes: list[tuple[int, int]] = []

    def keep(plan: Plan, pointers: Any) -> None:
        sizes.append((len(plan.launches) // 4, plan.workspace.bytes))

    monkeypatch.setattr(Plan, "launch", keep)
    monkeypatch.setattr(configs, "allowed_backward", lambda *_: allowed)
    monkeypatch.setattr(backward, "elements_at_a_time", lambda call: call.batch)
    divide, found = backward._divide, []
    monkeypatch.setattr(backward, "_divide", lambda *args: found.append(divide(*args)) or found[-1])
    run(make_call(N=1000, k=9))
    ((rows, tiles, parts),) = found
    assert rows * tiles * (parts - 1) < 1000 <= rows * tiles * parts
    ((launched, taken),) = sizes
    assert launched == parts
    if allowed == 2**26:
        assert parts == 1
    elif allowed:
        assert parts > 1
        assert allowed // 3 < taken <= allowed
    else:
        assert parts == 32  # of 32 queries


@pytest.mark.quick_one_in(3)
@pytest.mark.parametrize(
    ("lead", "each", "parts"), [((5,), 2, 3), ((2, 3), 3, 2), ((2, 3), 2, 4), ((3, 2), 4, 2)]
)
@pytest.mark.parametrize(
    ("metric", "weight", "dtype"), [("cosine", True, F16), ("euclidean", False, F32)], ids=str
)
def test_parts_of_the_batch(
    lead: tuple[int, ...],
    each: int,
    parts: int,
    metric: str,
    weight: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with all batch elements at once, but for the rounding of sums over the batch."""
    from convnn_kernels.triton import backward

    call = make_call(B=math.prod(lead), metric=metric, weight=weight, dtype=dtype)
    for name in ("grad_output", "grad_similarities", "similarities", "indices"):
        call[name] = call[name].unflatten(0, lead)
    for name in ("query", "key", "value"):
        # As heads lie in memory: neither dimension of the batch is contiguous.
        rows = call[name].unflatten(0, lead)
        call[name] = rows.transpose(-3, -2).contiguous().transpose(-3, -2)
    call["key"] = call["key"][..., :1, :, :].expand(call["key"].shape)
    launched = divide(monkeypatch, 128, 1)
    at_once = run(call)
    assert len(launched) == 4
    launched.clear()
    monkeypatch.setattr(backward, "elements_at_a_time", lambda call: each)
    backward.plan_at_once.cache_clear()
    results = run(call)
    assert launched == parts * ["query_side_kernel", "sort_pairs_kernel", *["key_side_kernel"] * 2]
    for name in NEEDS:
        if name in ("weight", "bias"):
            epsilon = torch.finfo(dtype).eps
            assert torch.allclose(results[name], at_once[name], rtol=4 * epsilon, atol=4 * epsilon)
        else:
            assert torch.equal(results[name], at_once[name]), name
    selection = run(call, ("query",))
    assert torch.equal(selection["query"], at_once["query"])


def test_parts_of_the_batch_of_other_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of five dimensions."""
    from convnn_kernels.triton import backward

    call = make_call(B=8)
    x = {name: X.unflatten(0, (2, 2, 2)) for name, X in call.items() if name in TENSORS}
    neighbors = x["similarities"], x["indices"]
    calls = {
        "select_backward": (
            *(x["grad_similarities"], x["query"], x["key"], *neighbors, "cosine"),
            *(True, True),
        ),
        "aggregate_backward": (
            *(x["grad_output"], x["value"], *neighbors, call["weight"], True, "softmax", 0.7),
            *(True, True, False, True),
        ),
    }
    for name, arguments in calls.items():
        run_operator = backend.operators()[f"convnn::{name}"]
        with monkeypatch.context() as patch:
            launched = divide(patch, 128, 1)
            at_once = run_operator(*arguments)
            patch.setattr(backward, "elements_at_a_time", lambda call: 4)
            backward.plan_at_once.cache_clear()
            launched.clear()
            results = run_operator(*arguments)
        assert launched.count("query_side_kernel") == 2
        for X, other in zip(results, at_once, strict=True):
            assert X.shape == other.shape
            assert torch.allclose(X, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "B2", "N", "M", "k"),
    [
        (8192, 1, 49, 49, 49),
        (20_000, 1, 16, 16, 16),
        (3000, 3, 17, 200, 200),
        (98, 49, 64, 144, 144),
    ],
)
def test_as_few_parts_of_the_batch_as_fit(batch: int, B2: int, N: int, M: int, k: int) -> None:
    from convnn_kernels.triton import backward
    from convnn_kernels.triton.batch_parts import batch_parts
    from convnn_kernels.triton.tensors import Layout

    C = 8
    Q, K = (Layout(batch // B2, B2, n, C, B2 * n * C, n * C, C) for n in (N, M))
    needed = frozenset(NEEDS)
    of_call = ("cosine", "softmax", 1.0, True, False, needed, F16, F16, "tf32", "tf32", 90)
    call = backward.Backward(Q, K, K, batch, batch, B2, N, M, k, *of_call)
    allowed = configs.allowed_backward(batch, N, M, C, C, k)
    each = backward.elements_at_a_time(call)
    parts = batch_parts(batch, B2, each)
    assert [part.first for part in parts[1:]] == [part.first + part.elements for part in parts[:-1]]
    assert sum(part.elements for part in parts) == batch
    most = max(part.elements for part in parts)
    assert backward.plan_backward(call._replace(B=most)).workspace.bytes <= allowed
    if len(parts) > 1:
        assert each % 16 == 0
        larger = -(-batch // (len(parts) - 1))
        assert backward.plan_backward(call._replace(B=larger)).workspace.bytes > 0.99 * allowed
    assert (len(parts) > 1) == (batch > 98)


def test_batch_elements_are_divided_where_queries_do_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from convnn_kernels.triton.launch import Plan, forget_plans

    taken: list[int] = []
    monkeypatch.setattr(Plan, "launch", lambda plan, _: taken.append(plan.workspace.bytes))
    monkeypatch.setattr(configs, "allowed_backward", lambda *_: 2**19)
    call = make_call(B=100, N=32, k=9)
    run(call)
    assert len(taken) > 1
    assert 2**17 < taken[0] <= 2**19
    taken.clear()
    monkeypatch.setattr(configs, "allowed_backward", lambda *_: 2**26)
    forget_plans()
    run(call)
    assert len(taken) == 1


def test_pairs_are_sorted_by_blocks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair that is present once, in its block, by tiles, slots and queries."""
    from convnn_kernels.triton.launch import Plan

    made: dict[str, Tensor] = {}
    launch = Plan.launch

    def keep(plan: Plan, pointers: Any) -> None:
        launch(plan, pointers)
        made.update({name: pointers.tensor(name) for name in ("p_pairs", "p_next")})

    monkeypatch.setattr(Plan, "launch", keep)
    call = make_call()
    run(call)
    I, M = call["indices"], call["key"].shape[1]
    B, N, k = I.shape
    keys, each = (
        configs.key_side(0, 32, 7, 10, N, M, k)["KEYS"],
        configs.rows_each(0, B, N, 7, k, 3),
    )
    blocks, tiles = -(-M // keys), -(-N // each)
    ends = made["p_next"].view(B, tiles, blocks)[:, -1]
    pairs = made["p_pairs"].view(B, N * k)
    present = (call["similarities"] != -math.inf) & (I < M)
    for b in range(B):
        begin = 0
        for block in range(blocks):
            chosen = present[b] & (I[b] // keys == block)
            i, j = chosen.nonzero(as_tuple=True)
            order = sorted(zip((i // each).tolist(), j.tolist(), i.tolist(), strict=True))
            found = pairs[b, begin : int(ends[b, block])].tolist()
            low = [j * keys + int(I[b, i, j]) % keys for _, j, i in order]
            wanted = [(i << 32) | each_low for (_, _, i), each_low in zip(order, low, strict=True)]
            assert found == wanted
            begin = int(ends[b, block])


@pytest.mark.parametrize("arch", [configs.INTERPRETER, 90])
def test_buffers_of_many_sizes_are_bounded(arch: int) -> None:
    """Counts and parts of chunks: no more numbers than the pairs and the rows together."""
    for B, N, M, k, C in (
        (64, 4096, 4096, 9, 64),
        (1, 10**6, 10**6, 9, 64),
        (1, 16384, 10**5, 32, 128),
        (1, 10**7, 64, 4, 64),
        (1, 64, 10**7, 4, 16),
        (256, 197, 197, 9, 768),
    ):
        keys = configs.key_side(arch, 16, C, C, N, M, k)
        blocks = -(-M // keys["KEYS"])
        rows = configs.rows_each(arch, B, N, C, k, blocks)
        bound = 8 * (N * k + N * C + M * C)
        assert -(-N // rows) * blocks <= bound
        if arch != configs.INTERPRETER:
            assert N * k // keys["CHUNK"] * keys["KEYS"] * C <= bound
        assert rows % 32 == 0
        assert rows <= 128 or rows % 128 == 0


def test_the_certificate_of_operators() -> None:
    """Through autograd, compared with eager PyTorch: more channels than a block has."""
    assert_forward(
        ops.forward,
        normal(40, 70),
        normal(50, 70, seed=1),
        normal(50, 66, seed=2),
        4,
        normal(66, 1, 4, seed=3),
        normal(66, seed=4),
    )
    assert_select(ops.select, normal(40, 70), normal(50, 70, seed=1), 4)
    I = torch.randint(50, (40, 4), generator=torch.Generator().manual_seed(0))
    assert_aggregate(ops.aggregate, normal(50, 66), normal(40, 4), I, normal(66, 1, 4, seed=3))
