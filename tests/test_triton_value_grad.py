# SPDX-License-Identifier: MIT
"""The gradient of value under a dense weight, with few keys, in Triton's interpreter.

It needs a process of its own, started with ``TRITON_INTERPRET=1``, as those of test_triton.py.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convnn_kernels
from convnn_kernels.triton import aggregate_backward as module
from convnn_kernels.triton import backend, configs
from convnn_kernels.triton.launch import Plan, forget_plans
from python_ref import assert_aggregate

pytestmark = in_interpreter

F32, F16 = torch.float32, torch.float16
GRADIENTS = ("value", "similarities", "weight", "bias")


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget_plans()
    with convnn_kernels.backend("triton"):
        yield
    monkeypatch.undo()
    forget_plans()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F16) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def make_call(
    B: int = 3,
    N: int = 12,
    M: int = 10,
    C: int = 9,
    O: int = 18,
    k: int = 3,
    rho: str = "similarity",
    whole: bool = False,
) -> dict[str, Any]:
    """The arguments of aggregate_backward but for the needed gradients: missing neighbors of all
    kinds, a hub, and a key that nobody chose. `whole`: of whole numbers."""
    I = torch.randint(1, M - 1, (B, N, k), generator=generator(3))
    I[:, :, 0] = M - 1
    grad, value, s, W = (
        normal(*shape, seed=seed, dtype=F32)
        for seed, shape in enumerate([(B, N, O), (B, M, C), (B, N, k), (O, C, k)])
    )
    if whole:
        grad, value, s, W = ((2 * X).round().clamp(-3, 3) for X in (grad, value, s, W))
    s[0, 1], s[-1, 2, k - 1] = -math.inf, -math.inf
    I[0, 3, k - 1], I[-1, N - 1, 0] = -1, M
    call = {"grad_output": grad.half(), "value": value.half(), "similarities": s, "indices": I}
    return call | {"weight": W.half(), "has_bias": False, "rho": rho, "scale": 1.0}


def run(call: dict[str, Any], *needed: str) -> Tensor:
    """The gradient of value, and that of what else is needed."""
    needs = (name in ("value", *needed) for name in GRADIENTS)
    return backend.operators()["convnn::aggregate_backward"](*call.values(), *needs)[0]


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels, as they are launched."""
    names: list[str] = []
    launch = Plan.launch

    def note(plan: Plan, pointers: Any) -> None:
        names.extend(each.kernel.name for each in plan.launches)
        launch(plan, pointers)

    monkeypatch.setattr(Plan, "launch", note)
    return names


@pytest.mark.parametrize(
    ("lead", "N", "M", "C", "O", "k", "rho"),
    [
        # Several batch elements in a program, and fewer in the last one; one of them.
        ((7,), 5, 5, 20, 33, 4, "ones"),
        ((3,), 16, 16, 40, 16, 2, "similarity"),
        ((2, 2), 4, 13, 16, 40, 3, "softmax"),
        # Several blocks of keys, of queries or of both.
        ((2,), 37, 20, 33, 5, 3, "softmax"),
        ((2,), 9, 100, 7, 64, 2, "ones"),
        ((), 130, 65, 17, 20, 1, "similarity"),
    ],
    ids=str,
)
def test_gradients(
    monkeypatch: pytest.MonkeyPatch,
    lead: tuple[int, ...],
    N: int,
    M: int,
    C: int,
    O: int,
    k: int,
    rho: str,
) -> None:
    """Missing neighbors, a hub, keys that nobody chose."""
    names = launched(monkeypatch)
    I = torch.randint(M - 1, (*lead, N, k), generator=generator())
    I[..., 0] = M - 1
    s = normal(*lead, N, k, seed=1, dtype=F32)
    s[..., 1, :], s[..., 3, k - 1] = -math.inf, -math.inf
    value, W = normal(*lead, M, C, seed=2), normal(O, C, k, seed=3) / 8
    operator = torch.ops.convnn.aggregate
    scale = 0.7 if rho == "softmax" else 1.0
    assert_aggregate(operator, value, s, I, W, normal(O, seed=4), rho, scale)
    assert "value_grad_one_hot_kernel" in names


@pytest.mark.parametrize("rho", ["ones", "similarity"])
@pytest.mark.parametrize(("B", "N", "M"), [(5, 7, 6), (2, 40, 70)])
def test_both_ways_are_equal(
    monkeypatch: pytest.MonkeyPatch, rho: str, B: int, N: int, M: int
) -> None:
    """Of whole numbers, whose sums are exact."""
    call = make_call(B, N, M, rho=rho, whole=True)
    names = launched(monkeypatch)
    dv = run(call)
    assert "value_grad_dense_kernel" not in names
    forget_plans()
    monkeypatch.setattr(configs, "allows_one_hot", lambda *_: False)
    assert torch.equal(run(call), dv)
    assert "value_grad_dense_kernel" in names
    assert dv.any()
    assert not dv[:, 0].any()


@pytest.mark.parametrize("rho", ["softmax", "similarity"])
@pytest.mark.parametrize(
    ("B", "N", "M", "C"),
    [
        (5, 7, 6, 9),
        # Several blocks of keys, of channels, or of both.
        (2, 40, 70, 9),
        (3, 12, 10, 80),
        (1, 33, 70, 40),
    ],
)
def test_gradient_of_similarities_both_ways(
    monkeypatch: pytest.MonkeyPatch, rho: str, B: int, N: int, M: int, C: int
) -> None:
    """Of whole numbers, from the products of the gradient of value and by a kernel of its own."""
    call = make_call(B, N, M, C, rho=rho, whole=True)
    operator = backend.operators()["convnn::aggregate_backward"]
    names = launched(monkeypatch)
    ds = operator(*call.values(), True, True, False, False)[1]
    assert "rho_grad_dense_kernel" not in names
    names.clear()
    alone = operator(*call.values(), False, True, False, False)[1]
    assert "rho_grad_dense_kernel" in names
    assert torch.equal(ds, alone)
    assert ds.any()
    missing = call["similarities"].isinf() | (call["indices"] < 0) | (call["indices"] >= M)
    assert missing.any()
    assert not ds[missing].any()


def test_parts_of_rho_that_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "WORKSPACE", 2**11)
    names = launched(monkeypatch)
    call = make_call(C=80)
    run(call, "similarities")
    assert "rho_grad_dense_kernel" in names


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_its_keys(what: float) -> None:
    """Other keys have the bits that they have without it, also those of its batch element."""
    call = make_call()
    clean = run(call)
    call["grad_output"][1, 4] = what
    dirty = run(call)
    hit = torch.zeros(dirty.shape[:2], dtype=torch.bool)
    hit[1, call["indices"][1, 4]] = True
    assert torch.equal(dirty[~hit], clean[~hit])
    assert not dirty[hit].isfinite().any()


def test_infinite_gradients_of_both_signs() -> None:
    """Infinity of one sign stays what it is, both together are NaN."""
    call = make_call(B=1, N=4, M=6, O=1, k=1, rho="ones")
    call["similarities"].zero_()
    call["indices"] = torch.tensor([1, 2, 2, 3]).view(1, 4, 1)
    call["grad_output"] = torch.tensor([math.inf, math.inf, -math.inf, 1.0]).view(1, 4, 1).half()
    dv = run(call)[0]
    W = call["weight"][0, :, 0]
    assert torch.equal(dv[1], W.sign() * math.inf)
    assert dv[2].isnan().all()
    assert torch.equal(dv[3], W)
    assert not dv[[0, 4, 5]].any()


def test_products_beyond_float16() -> None:
    """Of which only the sum, or what rho leaves of them, is in its range."""
    call = make_call(B=1, N=4, M=6, O=4, k=1)
    call["similarities"][:] = torch.tensor([1.0, -15 / 16, 2.0**-10, 1.0])[:, None]
    call["indices"] = torch.tensor([1, 1, 2, 3]).view(1, 4, 1)
    call["grad_output"][:, :3], call["weight"][:] = 2.0**15, 2.0
    dv = run(call)[0]
    assert (dv[1] == 2.0**14).all()
    assert (dv[2] == 2.0**8).all()
    small = 2.0 * call["grad_output"][0, 3].double().sum()
    assert torch.allclose(dv[3].double(), small, rtol=2**-10)


def test_missing_neighbors_add_nothing() -> None:
    """Not even where the gradient of the output is not finite."""
    call = make_call()
    clean = run(call)
    call["grad_output"][0, 1] = math.nan
    assert torch.equal(run(call), clean)


@pytest.mark.parametrize(("B", "M"), [(7, 10), (2, 40)])
def test_nothing_is_written_beyond_the_end(monkeypatch: pytest.MonkeyPatch, B: int, M: int) -> None:
    """The last program has fewer batch elements than others, or fewer keys."""
    made: list[Tensor] = []

    def empty(X: Tensor, needed: bool) -> Tensor:
        size = X.numel() if needed else 0
        made.append(X.new_full((size + 500,), 7.0))
        return made[-1][:size].view(X.shape if needed else 0)

    monkeypatch.setattr(module, "empty_gradient", empty)
    call = make_call(B=B, M=M)
    dv = run(call)
    assert dv.data_ptr() == made[0].data_ptr()
    assert (made[0][dv.numel() :] == 7.0).all()


class _Kernels(TorchDispatchMode):
    """What PyTorch runs, but for allocations and views, and for tensors without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        views = ("empty", "new_empty", "view", "slice", "detach")
        if not name.startswith(views) and args[0].numel():
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_one_launch_and_no_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the gradients of similarities and weight read, too."""
    plans: list[Plan] = []
    monkeypatch.setattr(Plan, "launch", lambda plan, pointers: plans.append(plan))
    call = make_call(N=40, rho="ones")
    with _Kernels() as kernels:
        run(call)
    names = [launch.kernel.name for plan in plans for launch in plan.launches]
    assert names == ["dense_inputs_kernel", "value_grad_one_hot_kernel"]
    assert kernels.names == []
    inputs = 4 * call["indices"].numel() + 2 * call["weight"].numel()
    assert sum(plan.workspace.bytes for plan in plans) <= inputs + 2 * 256


def test_outputs_that_cancel_across_blocks() -> None:
    """P is rounded once, as in one product over all outputs: parts of it would be far larger."""
    B, N, C, O, k = 1, 16, 16, 64, 2
    G, W = normal(B, N, O, dtype=F32), 8 + 0.1 * normal(O, C, k, seed=1, dtype=F32)
    G[..., O // 2 :] = -G[..., : O // 2].flip(-1)
    call = make_call(B=B, N=N, M=N, C=C, O=O, k=k, rho="ones")
    I = torch.stack([torch.randperm(N, generator=generator(i))[:k] for i in range(N)])[None]
    call |= {"grad_output": G.half(), "weight": W.half(), "indices": I}
    call["similarities"] = torch.zeros(B, N, k)
    P = torch.einsum("bno,ocj->bnjc", G.half().double(), W.half().double()).flatten(1, 2)[0]
    exact, eager = torch.zeros(N, C).double(), torch.zeros(N, C).half()
    exact.index_add_(0, I.flatten(), P)
    eager.index_add_(0, I.flatten(), P.half())
    found = run(call)[0].double()
    error, of_eager = ((X.double() - exact).abs().max() for X in (found, eager))
    assert error <= 2 * of_eager + 2 * 2**-10 * exact.abs().max()
