# SPDX-License-Identifier: MIT
"""The operators behave as built-in ones do under compile, export, autocast, vmap and autograd."""

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from convnn_kernels import functional

convnn = torch.ops.convnn

B, N, M, D, C, O, R, K = 2, 6, 9, 4, 5, 7, 8, 3
FUNCTIONS = {
    "forward": functional.convnn,
    "select": functional.select_neighbors,
    "aggregate": functional.aggregate_neighbors,
}
OPS = list(FUNCTIONS)


def weight_of(kind: str | None, k: int = K, dtype: torch.dtype = torch.float32) -> Tensor | None:
    shapes = {"dense": (O, C, k), "depthwise": (C, 1, k)}
    return None if kind is None else torch.randn(shapes[kind], dtype=dtype)


def example(
    op: str,
    n: int = N,
    m: int = M,
    k: int = K,
    batch: tuple[int, ...] = (B,),
    dtype: torch.dtype = torch.float32,
    weight: str | None = "depthwise",
) -> list[Any]:
    """Arguments of a call of `op`, up to weight."""
    if op == "aggregate":
        similarity_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            torch.randn(*batch, m, C, dtype=dtype),
            torch.randn(*batch, n, k, dtype=similarity_dtype),
            torch.randint(m, (*batch, n, k)),
            weight_of(weight, k, dtype),
        ]
    query_and_key = [torch.randn(*batch, rows, D, dtype=dtype) for rows in (n, m)]
    if op == "select":
        return [*query_and_key, k]
    value = torch.randn(*batch, m, C, dtype=dtype)
    return [*query_and_key, value, k, weight_of(weight, k, dtype)]


def is_floating(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def with_grad(args: list[Any]) -> list[Any]:
    """The same values as leaves that require gradients."""
    return [arg.detach().clone().requires_grad_() if is_floating(arg) else arg for arg in args]


def outputs_of(op: str, *args: Any) -> tuple[Tensor, ...]:
    """The differentiable outputs."""
    results = getattr(convnn, op)(*args)
    return (results,) if op == "aggregate" else results[:-1]


def ramp_like(output: Tensor) -> Tensor:
    ramp = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return ramp.view_as(output)


def loss_of(op: str, *args: Any) -> Tensor:
    """A sum with unequal weights, so that every entry has a different gradient."""
    return sum((output * ramp_like(output)).sum() for output in outputs_of(op, *args))


def gradients(op: str, args: list[Any]) -> list[Tensor]:
    args = with_grad(args)
    loss_of(op, *args).backward()
    return [arg.grad for arg in args if is_floating(arg)]


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Schemas and fakes


@pytest.mark.parametrize("name", OPS)
def test_functions_have_the_arguments_of_the_schema(name: str) -> None:
    schema = getattr(convnn, name).default._schema
    arguments = [
        (each.name, each.default_value if each.has_default_value() else inspect.Parameter.empty)
        for each in schema.arguments
    ]
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    # A radius is applied to what the operator finds.
    of_operator = [each for each in parameters if each.name != "within"]
    assert [(each.name, each.default) for each in of_operator] == arguments
    assert not any(each.kwarg_only for each in schema.arguments)


OPTIONS = {
    "plain": {},
    "dense": {"weight": "dense", "bias": True},
    "depthwise": {"weight": "depthwise", "bias": True, "scale": 2.0},
    "no-weight": {"weight": None, "bias": True, "rho": "similarity"},
    "ones": {"weight": "dense", "rho": "ones", "metric": "dot"},
    "all": {"weight": "depthwise", "restricted": True, "order": "index", "metric": "euclidean"},
    "each": {"weight": "dense", "restricted": True, "for_each": True},
    "float64": {"weight": "dense", "dtype": torch.float64},
    "bfloat16": {"weight": "depthwise", "dtype": torch.bfloat16},
}


def call_with(op: str, options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments of a call of `op` with those of the options that it has."""
    dtype = options.get("dtype", torch.float32)
    kind = options.get("weight")
    args = example(op, dtype=dtype, weight=kind)
    named = {}
    if op != "select":
        if options.get("bias"):
            named["bias"] = torch.randn(O if kind == "dense" else C, dtype=dtype)
        named |= {name: options[name] for name in ("rho", "scale") if name in options}
    if op != "aggregate":
        named |= {name: options[name] for name in ("metric", "order") if name in options}
        if options.get("restricted"):
            lead = (B,) if options.get("for_each") else ()
            named["candidates"] = torch.rand(*lead, M).argsort(dim=-1)[..., :R]
            named["self_indices"] = torch.randint(M, (*lead, N))
            named["key_mask"] = torch.rand(B, M) < 0.7
            named["key_range"] = torch.randint(M + 1, (*lead, N, 2)).sort(dim=-1).values
            named["exclude_self"] = bool(lead)
    return args, named


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_opcheck(op: str, options: dict[str, Any], requires_grad: bool) -> None:
    args, named = call_with(op, options)
    if requires_grad:
        args = with_grad(args)
    torch.library.opcheck(getattr(convnn, op).default, tuple(args), named)


@pytest.mark.parametrize("need_query", [False, True])
@pytest.mark.parametrize("need_key", [False, True])
def test_opcheck_select_backward(need_query: bool, need_key: bool) -> None:
    query, key, k = example("select")
    similarities, indices = convnn.select(query, key, k)
    args = (torch.randn_like(similarities), query, key, similarities, indices, "cosine")
    torch.library.opcheck(convnn.select_backward.default, (*args, need_query, need_key))


@pytest.mark.parametrize("needs", [(True,) * 4, (False,) * 4, (True, False, False, True)])
@pytest.mark.parametrize("kind", [None, "depthwise", "dense"])
def test_opcheck_aggregate_backward(kind: str | None, needs: tuple[bool, ...]) -> None:
    args = example("aggregate", weight=kind)
    grad_output = torch.randn_like(convnn.aggregate(*args))
    torch.library.opcheck(
        convnn.aggregate_backward.default, (grad_output, *args, True, "softmax", 1.0, *needs)
    )


def forward_backward_args(
    kind: str | None, rho: str, with_similarities: bool, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Arguments of forward_backward, up to scale."""
    query, key, value, k, weight = example("forward", dtype=dtype, weight=kind)
    output, similarities, indices = convnn.forward(query, key, value, k, weight, rho=rho)
    grad_similarities = ramp_like(similarities) if with_similarities else None
    results = (similarities, indices)
    grads = (torch.randn_like(output), grad_similarities)
    return (*grads, query, key, value, weight, *results, True, "cosine", rho, 1.0)


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("needs", [(True,) * 5, (False,) * 5, (True, False, True, False, True)])
@pytest.mark.parametrize("with_similarities", [False, True])
@pytest.mark.parametrize("kind", [None, "depthwise", "dense"])
def test_opcheck_forward_backward(
    kind: str | None, with_similarities: bool, needs: tuple[bool, ...]
) -> None:
    args = forward_backward_args(kind, "softmax", with_similarities)
    torch.library.opcheck(convnn.forward_backward.default, (*args, *needs))
    candidates = torch.arange(2, args[3].shape[-2])
    torch.library.opcheck(convnn.forward_backward.default, (*args, *needs, candidates))


@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
@pytest.mark.parametrize("with_similarities", [False, True])
@pytest.mark.parametrize("kind", [None, "depthwise", "dense"])
def test_forward_backward_equals_its_parts(
    kind: str | None, with_similarities: bool, rho: str
) -> None:
    args = forward_backward_args(kind, rho, with_similarities, torch.float64)
    grad_output, grad_similarities, query, key, value, weight, s, I = args[:8]
    grad_value, grad_rho, grad_weight, grad_bias = convnn.aggregate_backward(
        grad_output, value, s, I, weight, True, rho, 1.0, *[True] * 4
    )
    grad_s = grad_rho if grad_similarities is None else grad_rho + grad_similarities
    of_select = convnn.select_backward(grad_s, query, key, s, I, "cosine", True, True)
    expected = (*of_select, grad_value, grad_weight, grad_bias)
    for needs in ((True,) * 5, *torch.eye(5, dtype=torch.bool).tolist()):
        results = convnn.forward_backward(*args, *needs)
        for result, right, needed in zip(results, expected, needs, strict=True):
            torch.testing.assert_close(result, right if needed else right.new_empty(0))


# With a gradient of weight or bias there is a call for each entry, otherwise a single one.
@pytest.mark.parametrize("needs", [(True,) * 5, (True, True, True, False, False)])
@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 2)], ids=str)
def test_vmap_of_forward_backward(dims: tuple[int | None, ...], needs: tuple[bool, ...]) -> None:
    args = forward_backward_args("depthwise", "softmax", True, torch.float64)
    grads = mapped(list(args[:2]), dims)

    def call(*grads: Tensor) -> tuple[Tensor, ...]:
        return convnn.forward_backward(*grads, *args[2:], *needs)

    results = torch.vmap(call, dims)(*grads)
    for result, right, needed in zip(results, one_by_one(call, dims, grads), needs, strict=True):
        if needed:
            torch.testing.assert_close(result, right)


def test_meta_tensors(op: str) -> None:
    args = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in example(op)]
    assert all(output.is_meta for output in outputs_of(op, *args))
    for arg, grad in zip(filter(is_floating, args), gradients(op, args), strict=True):
        assert grad.is_meta
        assert grad.shape == arg.shape


# Compilation


class CountingBackend:
    """The compiler backend "aot_eager", which counts its compilations."""

    def __init__(self) -> None:
        self.compilations = 0
        self._compile = torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return self._compile(graph, inputs)


SIZES = [  # batch, N, M, k
    (2, 6, 9, 3),
    (3, 7, 11, 4),
    (5, 17, 13, 2),
    (4, 2, 30, 7),
    (7, 33, 12, 12),
]


@pytest.mark.quick_one_in(4)
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("weight", [None, "depthwise", "dense"])
def test_compile_once_for_all_sizes(op: str, weight: str | None) -> None:
    counting = CountingBackend()
    compiled = torch.compile(
        lambda *args: outputs_of(op, *args), fullgraph=True, dynamic=True, backend=counting
    )
    for batch, n, m, k in SIZES:
        args = example(op, n, m, k, batch=(batch,), weight=weight)
        of_compiled, of_eager = with_grad(args), with_grad(args)
        results, expected = compiled(*of_compiled), outputs_of(op, *of_eager)
        for result, right in zip(results, expected, strict=True):
            assert torch.equal(result, right)
        torch.autograd.backward(results, [torch.ones_like(each) for each in results])
        torch.autograd.backward(expected, [torch.ones_like(each) for each in expected])
        for arg, right in zip(of_compiled, of_eager, strict=True):
            if is_floating(arg):
                torch.testing.assert_close(arg.grad, right.grad)
    assert counting.compilations == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("unknown", ["candidates", "keys", "queries"])
def test_compile_with_sizes_known_only_at_run_time(unknown: str) -> None:
    """The number of candidates, keys or queries may depend on the data."""

    def step(keep: Tensor, *args: Any) -> Tensor:
        query, key, value, k, weight = args
        rows = keep.nonzero().squeeze(1)
        if unknown == "candidates":
            return convnn.forward(query, key, value, k, weight, None, rows)[0]
        if unknown == "keys":
            return convnn.forward(query, key[:, rows], value[:, rows], k, weight)[0]
        return convnn.forward(query[:, rows], key, value, k, weight)[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    args = example("forward")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for kept in (K, N):
            keep = torch.arange(N if unknown == "queries" else M) < kept
            of_compiled, of_eager = with_grad(args), with_grad(args)
            output, expected = compiled(keep, *of_compiled), step(keep, *of_eager)
            assert torch.equal(output, expected)
            output.sum().backward()
            expected.sum().backward()
            for arg, right in zip(of_compiled, of_eager, strict=True):
                if is_floating(arg):
                    torch.testing.assert_close(arg.grad, right.grad)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_with_inductor(op: str) -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def step(*args: Any) -> tuple[Tensor, ...]:
        return tuple(output.relu() for output in outputs_of(op, *args))

    for batch, n, m, k in SIZES[:2]:
        args = example(op, n, m, k, batch=(batch,))
        of_compiled, of_eager = with_grad(args), with_grad(args)
        results = step(*of_compiled)
        expected = tuple(output.relu() for output in outputs_of(op, *of_eager))
        torch.testing.assert_close(results, expected)
        sum(each.sum() for each in results).backward()
        sum(each.sum() for each in expected).backward()
        for arg, right in zip(of_compiled, of_eager, strict=True):
            if is_floating(arg):
                torch.testing.assert_close(arg.grad, right.grad)


def test_export_with_dynamic_rows(op: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(C, 1, K))

        def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
            if op == "aggregate":
                return (convnn.aggregate(*args, self.weight),)
            if op == "select":
                return convnn.select(*args, K)
            return convnn.forward(*args, K, self.weight)

    def tensors(n: int, m: int) -> tuple[Tensor, ...]:
        return tuple(arg for arg in example(op, n, m, weight=None) if isinstance(arg, Tensor))

    rows = torch.export.Dim("N", min=2, max=4096)
    others = torch.export.Dim("M", min=K, max=4096)
    dims = [others, rows, rows] if op == "aggregate" else [rows, others, others]
    inputs = tensors(N, M)
    model = Model()
    program = torch.export.export(
        model, inputs, dynamic_shapes={"args": tuple({1: dim} for dim in dims[: len(inputs)])}
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).run_decompositions().module()
    for n, m in ((N, M), (31, 40), (2, K)):
        inputs = tensors(n, m)
        for result, right in zip(exported(*inputs), model(*inputs), strict=True):
            assert torch.equal(result, right)


# Autocast


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast(op: str, half: torch.dtype) -> None:
    args = example(op)
    # query, key and similarities decide which tokens are neighbors, and are not rounded.
    kept = {"forward": args[:2], "select": args[:2], "aggregate": args[1:2]}[op]
    cast = [
        arg.to(half) if is_floating(arg) and all(arg is not each for each in kept) else arg
        for arg in args
    ]
    with torch.autocast("cpu", dtype=half):
        results = outputs_of(op, *args)
    for result, right in zip(results, outputs_of(op, *cast), strict=True):
        assert result.dtype == right.dtype
        assert torch.equal(result, right)
    assert results[0].dtype == (torch.float32 if op == "select" else half)

    # Gradients have the dtypes of the arguments, whether backward runs inside or outside.
    outside, inside = with_grad(args), with_grad(args)
    with torch.autocast("cpu", dtype=half):
        loss = loss_of(op, *outside)
        loss_of(op, *inside).backward()
    loss.backward()
    right = gradients(op, cast)
    for arg, other in zip(outside, inside, strict=True):
        if is_floating(arg):
            expected = right.pop(0).to(arg.dtype)
            assert torch.equal(arg.grad, expected)
            assert torch.equal(other.grad, expected)


def test_autocast_casts_the_bias() -> None:
    query, key, value, k, weight = example("forward")
    bias = torch.randn(C, requires_grad=True)
    cast = value.bfloat16(), k, weight.bfloat16(), bias.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = convnn.forward(query, key, value, k, weight, bias)[0]
    assert torch.equal(output, convnn.forward(query, key, *cast)[0])
    output.sum().backward()
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_leaves_float64(op: str, half: torch.dtype) -> None:
    args = example(op, dtype=torch.float64)
    with torch.autocast("cpu", dtype=half):
        results = outputs_of(op, *args)
    for result, right in zip(results, outputs_of(op, *args), strict=True):
        assert result.dtype == torch.float64
        assert torch.equal(result, right)


def test_autocast_casts_each_argument_by_itself() -> None:
    query, key, value, k, weight = example("forward")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, similarities, _ = convnn.forward(query.double(), key.double(), value, k, weight)
        # As in PyTorch's operators, float16 is cast to bfloat16, too.
        other, _, _ = convnn.forward(query.half(), key.half(), value.half(), k, weight)
        with torch.autocast("cpu", enabled=False):
            plain = convnn.forward(query, key, value, k, weight)[0]
    assert output.dtype == other.dtype == torch.bfloat16
    assert similarities.dtype == torch.float64
    assert torch.equal(plain, convnn.forward(query, key, value, k, weight)[0])


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_autocast_keeps_neighbors(metric: str, half: torch.dtype) -> None:
    points = torch.rand(1, 500, 3) * torch.tensor([5, 5, 0.5]) + torch.tensor([60.0, 20, 0])
    expected = functional.select_neighbors(points, points, 16, metric=metric)
    output, *_ = convnn.forward(points, points, points, 16, metric=metric)
    with torch.autocast("cpu", half):
        neighbors = functional.select_neighbors(points, points, 16, metric=metric)
        rounded, *all_neighbors = convnn.forward(points, points, points, 16, metric=metric)
    for similarities, indices in (neighbors, all_neighbors):
        assert torch.equal(indices, expected[1])
        assert torch.equal(similarities, expected[0])
    assert rounded.dtype == half
    torch.testing.assert_close(rounded.float(), output, rtol=2e-2, atol=0)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_widens_the_narrower_of_query_and_key(half: torch.dtype) -> None:
    query, key, value, k, weight = example("forward")
    for narrow, wide in ((half, torch.float32), (half, torch.float64)):
        with torch.autocast("cpu", half):
            similarities, indices = convnn.select(query.to(narrow), key.to(wide), k)
            _, *others = convnn.forward(query.to(wide), key.to(narrow), value, k, weight)
        expected = convnn.select(query.to(narrow).to(wide), key.to(wide), k)
        assert torch.equal(similarities, expected[0])
        assert torch.equal(indices, expected[1])
        expected = convnn.select(query.to(wide), key.to(narrow).to(wide), k)
        assert torch.equal(others[0], expected[0])


@pytest.mark.usefixtures("_fresh_compiler")
def test_autocast_under_compile(op: str) -> None:
    args = example(op)
    compiled = torch.compile(outputs_of, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, expected = compiled(op, *args), outputs_of(op, *args)
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == right.dtype
        assert torch.equal(result, right)


# vmap


def mapped(args: list[Any], in_dims: tuple[int | None, ...], size: int = 3) -> list[Any]:
    """The arguments with an additional dimension of `size` at `in_dims`."""
    result = []
    for arg, dim in zip(args, in_dims, strict=True):
        if dim is None:
            result.append(arg)
        elif arg.is_floating_point():
            result.append(torch.stack([torch.randn_like(arg) for _ in range(size)], dim))
        else:
            result.append(torch.stack([arg.roll(i, -1) for i in range(size)], dim))
    return result


def one_by_one(
    call: Callable[..., Any], in_dims: tuple[int | None, ...], args: list[Any], size: int = 3
) -> tuple[Tensor, ...]:
    """The results that vmap must equal: one call for each entry, stacked."""
    results = [
        call(*[a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)])
        for i in range(size)
    ]
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


VMAP_IN_DIMS = {
    "forward": [
        (0, 0, 0, None, None),
        (0, None, None, None, None),
        (None, 1, None, None, None),
        (None, None, 2, None, None),
        (3, 1, 0, None, None),
        (None, None, None, None, 0),
        (0, None, 1, None, 2),
    ],
    "select": [(0, 0, None), (0, None, None), (None, 2, None), (3, 1, None)],
    "aggregate": [
        (0, 0, 0, None),
        (0, None, None, None),
        (None, 1, None, None),
        (None, None, 3, None),
        (3, 2, 1, None),
        (None, None, None, 1),
        (1, 0, None, 3),
    ],
}


@pytest.mark.parametrize(
    ("op", "in_dims"), [(op, in_dims) for op in OPS for in_dims in VMAP_IN_DIMS[op]], ids=str
)
def test_vmap(op: str, in_dims: tuple[int | None, ...]) -> None:
    def call(*args: Any) -> tuple[Tensor, ...]:
        results = getattr(convnn, op)(*args)
        return results if isinstance(results, tuple) else (results,)

    args = mapped(example(op), in_dims)
    results = torch.vmap(call, in_dims)(*args)
    for result, right in zip(results, one_by_one(call, in_dims, args), strict=True):
        assert torch.equal(result, right)

    # Gradients, including those of shared arguments, which are sums over the entries.
    of_vmap, of_loop = with_grad(args), with_grad(args)
    differentiable = 1 if op == "aggregate" else -1
    for results, leaves in (
        (torch.vmap(call, in_dims)(*of_vmap), of_vmap),
        (one_by_one(call, in_dims, of_loop), of_loop),
    ):
        sum(each.square().sum() for each in results[:differentiable]).backward()
        assert all(leaf.grad is not None for leaf in leaves if is_floating(leaf))
    for arg, right in zip(of_vmap, of_loop, strict=True):
        if is_floating(arg):
            torch.testing.assert_close(arg.grad, right.grad)


@pytest.mark.parametrize("for_each", [False, True], ids=["shared", "for_each"])
@pytest.mark.parametrize("name", ["candidates", "self_indices", "key_mask", "key_range"])
@pytest.mark.parametrize("op", ["forward", "select"])
def test_vmap_over_what_restricts(op: str, name: str, for_each: bool) -> None:
    args, named = call_with(op, OPTIONS["each" if for_each else "all"])
    lead = (3, B) if for_each else (3,)
    many = {
        "candidates": torch.rand(*lead, M).argsort(dim=-1)[..., :R],
        "self_indices": torch.randint(M, (*lead, N)),
        "key_mask": torch.rand(3, B, M) < 0.7,
        "key_range": torch.randint(M + 1, (*lead, N, 2)).sort(dim=-1).values,
    }[name]

    def call(each: Tensor) -> tuple[Tensor, ...]:
        return getattr(convnn, op)(*args, **named | {name: each})

    for result, right in zip(torch.vmap(call)(many), one_by_one(call, (0,), [many]), strict=True):
        assert torch.equal(result, right)
    # Mapped at the last dimension of those in front.
    results = torch.vmap(call, len(lead) - 1)(many.movedim(0, len(lead) - 1))
    for result, right in zip(results, one_by_one(call, (0,), [many]), strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("kind", ["all", "each"])
@pytest.mark.parametrize("op", ["forward", "select"])
def test_vmap_of_queries_with_the_same_restrictions(op: str, kind: str) -> None:
    args, named = call_with(op, OPTIONS[kind])
    many = torch.randn(3, *args[0].shape)

    def call(query: Tensor) -> tuple[Tensor, ...]:
        return getattr(convnn, op)(query, *args[1:], **named)

    for result, right in zip(torch.vmap(call)(many), one_by_one(call, (0,), [many]), strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize(
    ("name", "shape"), [("candidates", (2, 5)), ("self_indices", (2, N)), ("key_range", (2, N, 2))]
)
def test_vmap_refuses_what_an_entry_would_refuse(name: str, shape: tuple[int, ...]) -> None:
    """Its leading dimension is not the mapped one, although both have the size 2."""
    query, key, k = example("select", batch=())
    wrong = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=rf"{name} must have shape"):
        convnn.select(query, key, k, **{name: wrong})
    with pytest.raises(RuntimeError, match=rf"{name} must have shape"):
        torch.vmap(lambda query: convnn.select(query, key, k, **{name: wrong}))(
            torch.stack([query, query])
        )


def test_vmap_nested(op: str) -> None:
    outer, inner = (0, *[None] * 4)[: len(example(op))], (1, 0, *[None] * 3)[: len(example(op))]
    args = mapped(mapped(example(op), inner, 2), outer, 3)

    def call(*args: Any) -> tuple[Tensor, ...]:
        return outputs_of(op, *args)

    results = torch.vmap(torch.vmap(call, inner), outer)(*args)
    expected = one_by_one(lambda *args: one_by_one(call, inner, list(args), 2), outer, args, 3)
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def test_vmap_over_a_wrong_call() -> None:
    query, key, _ = example("select")
    with pytest.raises(RuntimeError, match=r"k must be at least 1, got 0"):
        torch.vmap(lambda query: convnn.select(query, key, 0))(torch.stack([query, query]))


# Derivatives


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(op: str, use_reentrant: bool) -> None:
    args = example(op)
    checkpointed, plain = with_grad(args), with_grad(args)
    checkpoint(loss_of, op, *checkpointed, use_reentrant=use_reentrant).backward()
    loss_of(op, *plain).backward()
    for arg, right in zip(checkpointed, plain, strict=True):
        if is_floating(arg):
            assert torch.equal(arg.grad, right.grad)


@pytest.mark.parametrize("weight", [None, "depthwise", "dense"])
def test_gradients_may_be_expanded_or_strided(op: str, weight: str | None) -> None:
    args = example(op, weight=weight)
    expected = None
    for of_ones in (
        lambda output: torch.ones_like(output, memory_format=torch.contiguous_format),
        lambda output: torch.ones(()).expand_as(output),
        lambda output: torch.ones_like(output.mT.contiguous()).mT,
        lambda output: torch.ones(*output.shape, 2)[..., 1],
    ):
        leaves = with_grad(args)
        outputs = outputs_of(op, *leaves)
        torch.autograd.backward(outputs, [of_ones(output) for output in outputs])
        grads = [leaf.grad for leaf in leaves if is_floating(leaf)]
        expected = expected or grads
        for grad, right in zip(grads, expected, strict=True):
            assert torch.equal(grad, right)

    leaves = with_grad(args)
    sum(output.sum() for output in outputs_of(op, *leaves)).backward()
    for leaf, right in zip(filter(is_floating, leaves), expected, strict=True):
        assert torch.equal(leaf.grad, right)


def test_similarities_of_forward_are_an_output() -> None:
    """Their gradient is that of `select`, and is added to that of the output."""
    args = example("forward", dtype=torch.float64)
    query, key, _, k, _ = args
    coefficients = torch.randn(B, N, K, dtype=torch.float64)

    def grads(through_output: bool, through_similarities: bool) -> tuple[Tensor, ...]:
        leaves = with_grad(args)
        output, similarities, _ = convnn.forward(*leaves)
        loss = similarities.new_zeros(())
        if through_output:
            loss = loss + output.square().sum()
        if through_similarities:
            loss = loss + (similarities * coefficients).sum()
        return torch.autograd.grad(loss, leaves[:2])

    leaves = with_grad([query, key])
    of_select = torch.autograd.grad((convnn.select(*leaves, k)[0] * coefficients).sum(), leaves)
    for both, output, similarities, select in zip(
        grads(True, True), grads(True, False), grads(False, True), of_select, strict=True
    ):
        assert torch.equal(similarities, select)
        torch.testing.assert_close(both, output + similarities)


def test_ones_gives_no_gradient_to_query_and_key() -> None:
    query, key, value, k, weight = with_grad(example("forward"))
    output, _, indices = convnn.forward(query, key, value, k, weight, rho="ones")
    output.sum().backward()
    assert query.grad is None
    assert key.grad is None
    assert value.grad is not None
    assert weight.grad is not None
    assert not indices.requires_grad

    # The gradient through the similarities remains.
    convnn.forward(query, key, value, k, weight, rho="ones")[1].sum().backward()
    assert query.grad is not None

    _, similarities, indices, _ = with_grad(example("aggregate"))
    convnn.aggregate(value, similarities, indices, rho="ones").sum().backward()
    assert similarities.grad is None


def test_only_gradients_asked_for(op: str) -> None:
    """An argument gets the same gradient alone as together with all others."""
    args = example(op, dtype=torch.float64)
    expected = gradients(op, args)
    for position in [i for i, arg in enumerate(args) if is_floating(arg)]:
        leaves = list(args)
        leaves[position] = args[position].clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(op, *leaves), leaves[position])
        assert torch.equal(grad, expected.pop(0))


def test_saves_inputs_similarities_and_indices_only() -> None:
    args = with_grad(example("forward", weight="dense"))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        _, similarities, indices = convnn.forward(*args)
    given = [arg for arg in args if isinstance(arg, Tensor)]
    allowed = {each.data_ptr() for each in (*given, similarities, indices)}
    assert saved
    assert {each.data_ptr() for each in saved} <= allowed


def test_no_graph_without_need(op: str) -> None:
    args = with_grad(example(op))
    with torch.no_grad():
        assert not any(output.requires_grad for output in outputs_of(op, *args))
    with torch.inference_mode():
        inferred = outputs_of(op, *args)
    for result, right in zip(inferred, outputs_of(op, *args), strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("batch", [(), (B,), (0,), (B, 0)], ids=str)
@pytest.mark.parametrize("n", [0, 1, N])
def test_outputs_are_made_as_pytorch_makes_them(op: str, batch: tuple[int, ...], n: int) -> None:
    args = example(op, n=n, batch=batch)
    for context, inferred in ((torch.no_grad, False), (torch.inference_mode, True)):
        with context():
            results = getattr(convnn, op)(*args)
            for result in results if isinstance(results, tuple) else (results,):
                like = torch.empty(result.shape, dtype=result.dtype)
                assert result.stride() == like.stride()
                assert result.is_inference() == like.is_inference() == inferred
                assert result.untyped_storage().nbytes() == like.untyped_storage().nbytes()


def first_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


IN_CONTEXT: dict[str, Callable[..., Tensor]] = {
    "plain": lambda call, first, rest: call(first, *rest),
    "no-grad": torch.no_grad()(lambda call, first, rest: call(first, *rest)),
    "inference": torch.inference_mode()(lambda call, first, rest: call(first, *rest)),
    "autocast": torch.autocast("cpu")(lambda call, first, rest: call(first, *rest)),
    "autograd": lambda call, first, rest: torch.autograd.grad(
        call(first.requires_grad_(), *rest).sum(), first
    )[0],
    "func-grad": lambda call, first, rest: torch.func.grad(lambda each: call(each, *rest).sum())(
        first
    ),
    "no-grad-outside": torch.no_grad()(
        lambda call, first, rest: torch.func.grad(lambda each: call(each, *rest).sum())(first)
    ),
    "vmap": lambda call, first, rest: torch.vmap(lambda each: call(each, *rest))(
        torch.stack([first, -first])
    ),
    "autograd-of-vmap": lambda call, first, rest: torch.autograd.grad(
        torch.vmap(lambda each: call(each, *rest))(
            torch.stack([first.requires_grad_(), -first])
        ).sum(),
        first,
    )[0],
    "compile": lambda call, first, rest: torch.compile(
        call, fullgraph=True, dynamic=True, backend="aot_eager"
    )(first, *rest),
    "meta": lambda call, first, rest: torch.empty_like(
        call(first.to("meta"), *[a.to("meta") if isinstance(a, Tensor) else a for a in rest]),
        device="cpu",
    ).zero_(),
}


@pytest.mark.quick_one_in(4)
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("context", IN_CONTEXT)
def test_functions_agree_with_operators(op: str, context: str) -> None:
    """Functions skip the autograd kernel if nothing needs it, without a visible difference."""
    first, *rest = example(op)
    results = [
        IN_CONTEXT[context](lambda *args: first_of(call(*args)), first.clone(), rest)  # noqa: B023
        for call in (FUNCTIONS[op], getattr(convnn, op))
    ]
    assert results[0].dtype == results[1].dtype
    assert results[0].requires_grad == results[1].requires_grad
    assert torch.equal(*results)


class Calls(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class FunctionCalls(TorchFunctionMode):
    """Records the functions of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A wrapper tensor that records the operators called with it."""

    ops: ClassVar[list[Any]] = []
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.ops.append(func)
        plain = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        return tree_map_only(Tensor, cls, func(*plain, **(kwargs or {})))


WITHOUT_GRADIENTS = [torch.no_grad, torch.inference_mode, contextlib.nullcontext]


@pytest.mark.parametrize("context", WITHOUT_GRADIENTS)
@pytest.mark.parametrize("mode", [Calls, FunctionCalls])
def test_modes_see_calls_without_gradients(
    op: str, mode: type[Calls | FunctionCalls], context: Callable[[], Any]
) -> None:
    args = example(op)
    with context():
        expected = first_of(getattr(convnn, op)(*args))
        for call in (FUNCTIONS[op], getattr(convnn, op).default):
            with mode() as calls:
                result = first_of(call(*args))
            assert calls.ops == [getattr(convnn, op).default]
            assert torch.equal(result, expected)


@pytest.mark.parametrize("context", WITHOUT_GRADIENTS)
def test_subclasses_see_calls_without_gradients(op: str, context: Callable[[], Any]) -> None:
    first, *rest = example(op)
    with context():
        expected = first_of(getattr(convnn, op)(first, *rest))
        for call in (FUNCTIONS[op], getattr(convnn, op)):
            Wrapped.ops.clear()
            result = first_of(call(Wrapped(first), *rest))
            assert Wrapped.ops == [getattr(convnn, op).default]
            assert isinstance(result, Wrapped)
            assert torch.equal(result.inner, expected)


@pytest.mark.parametrize("context", WITHOUT_GRADIENTS)
def test_fake_tensors_without_gradients(op: str, context: Callable[[], Any]) -> None:
    args = example(op)
    with context(), FakeTensorMode() as mode:
        fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
        results = [first_of(call(*fakes)) for call in (FUNCTIONS[op], getattr(convnn, op))]
    for result in results:
        assert isinstance(result, FakeTensor)
        assert result.shape == first_of(getattr(convnn, op)(*args)).shape


def test_functions_refuse_forward_mode(op: str) -> None:
    first, *rest = example(op)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(RuntimeError, match="forward-mode"):
            FUNCTIONS[op](dual, *rest)


SECOND = r"^convnn::(forward|select|aggregate)_backward: second derivatives are not implemented$"


@pytest.mark.parametrize("position", [0, 1])
def test_second_derivative_raises(op: str, position: int) -> None:
    args = with_grad(example(op, dtype=torch.float64))
    loss = sum(output.square().sum() for output in outputs_of(op, *args))
    (grad,) = torch.autograd.grad(loss, args[position], create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        grad.square().sum().backward()


def test_second_derivative_of_nested_func_grad_raises(op: str) -> None:
    first, *rest = example(op, dtype=torch.float64)

    def loss(first: Tensor) -> Tensor:
        return sum(output.square().sum() for output in outputs_of(op, first, *rest))

    with pytest.raises(RuntimeError, match=SECOND):
        torch.func.grad(lambda first: torch.func.grad(loss)(first).square().sum())(first)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.functional.hessian(loss, first)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_raises(op: str, mode: Callable[[], Any]) -> None:
    first, *rest = example(op)
    message = f"^convnn::{op}: forward-mode automatic differentiation is not implemented$"
    with mode(), forward_ad.dual_level():
        outputs_of(op, first, *rest)  # no tangent, no error
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(RuntimeError, match=message):
            outputs_of(op, dual, *rest)


def test_forward_mode_of_torch_func_raises(op: str) -> None:
    first, *rest = example(op)
    message = f"^convnn::{op}: forward-mode automatic differentiation is not implemented$"

    def loss(first: Tensor) -> Tensor:
        return loss_of(op, first, *rest)

    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(loss, (first,), (first,))
    with pytest.raises(RuntimeError, match=message):
        torch.func.jacfwd(loss)(first)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(torch.func.grad(loss), (first,), (first,))


def test_func_grad(op: str) -> None:
    args = example(op, dtype=torch.float64)
    positions = tuple(i for i, arg in enumerate(args) if is_floating(arg))
    results = torch.func.grad(lambda *args: loss_of(op, *args), positions)(*args)
    for result, right in zip(results, gradients(op, args), strict=True):
        assert torch.equal(result, right)


def test_func_vjp_and_jacrev(op: str) -> None:
    first, *rest = example(op, n=3, m=4, k=2, batch=(), dtype=torch.float64)

    def output(first: Tensor) -> Tensor:
        return outputs_of(op, first, *rest)[0]

    leaf = first.clone().requires_grad_()
    result, pull_back = torch.func.vjp(output, first)
    expected = torch.autograd.grad(output(leaf).sum(), leaf)[0]
    assert torch.equal(pull_back(torch.ones_like(result))[0], expected)
    rows = [
        torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in output(leaf).flatten()
    ]
    jacobian = torch.func.jacrev(output)(first)
    torch.testing.assert_close(jacobian.flatten(0, -leaf.dim() - 1), torch.stack(rows))


def test_gradients_for_each_sample(op: str) -> None:
    """vmap of grad gives a gradient for each entry, also for shared arguments."""
    args = example(op, dtype=torch.float64)
    positions = tuple(i for i, arg in enumerate(args) if is_floating(arg))
    in_dims = (0, *[None] * (len(args) - 1))
    args = mapped(args, in_dims)

    def grads(*args: Any) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *args: loss_of(op, *args), positions)(*args)

    results = torch.vmap(grads, in_dims)(*args)
    for result, right in zip(results, one_by_one(grads, in_dims, args), strict=True):
        torch.testing.assert_close(result, right)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_func_grad_under_autocast(op: str, half: torch.dtype) -> None:
    args = example(op)
    leaves = with_grad(args)
    with torch.autocast("cpu", dtype=half):
        result = torch.func.grad(lambda first: loss_of(op, first, *args[1:]))(args[0])
        loss_of(op, leaves[0], *args[1:]).backward()
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, leaves[0].grad)


# FLOPs


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


SEARCH = 2 * B * N * M * D
PER_SLOT = {None: 2 * C, "depthwise": 2 * C, "dense": 2 * C * O}


@pytest.mark.parametrize("kind", PER_SLOT)
def test_flops(kind: str | None) -> None:
    slots = B * N * K
    forward = example("forward", weight=kind)
    query, key, _, k, _ = forward
    candidates = torch.arange(R)
    assert flops(lambda: convnn.select(query, key, k)) == SEARCH
    assert flops(lambda: convnn.select(query, key, k, candidates)) == SEARCH // M * R
    aggregation = slots * PER_SLOT[kind]
    assert flops(lambda: convnn.aggregate(*example("aggregate", weight=kind))) == aggregation
    assert flops(lambda: convnn.forward(*forward)) == SEARCH + aggregation
    assert (
        flops(lambda: convnn.forward(*forward, candidates=candidates))
        == SEARCH // M * R + aggregation
    )

    # Backward: the convolution twice, or once if there is no weight to receive a gradient; the
    # product of its result with the neighbors, for rho; and one product each for query and key.
    convolutions = 1 if kind is None else 2
    backward = slots * (convolutions * PER_SLOT[kind] + 2 * C) + 2 * slots * 2 * D
    loss = loss_of("forward", *with_grad(forward))
    assert flops(loss.backward) == backward


def test_flops_of_backward_without_selection() -> None:
    """With rho="ones", query and key have a gradient through the similarities only."""
    args = example("forward", weight="dense")
    slots = B * N * K
    aggregation = slots * 2 * PER_SLOT["dense"]
    output, similarities, _ = convnn.forward(*with_grad(args), rho="ones")
    assert flops((output.sum() + similarities.sum()).backward) == aggregation + slots * 2 * 2 * D
    output, similarities, _ = convnn.forward(*with_grad(args), rho="ones")
    assert flops(output.sum().backward) == aggregation
    output, similarities, _ = convnn.forward(*with_grad(args), rho="ones")
    assert flops(similarities.sum().backward) == slots * 2 * 2 * D


def test_flops_of_select_backward_count_what_is_needed() -> None:
    query, key, k = example("select")
    loss = convnn.select(query.requires_grad_(), key, k)[0].sum()
    assert flops(loss.backward) == 2 * B * N * K * D


def test_vmap_that_loops_refuses_an_empty_dimension() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"convnn::forward: vmap .* at least 1, got 0"):
        torch.vmap(lambda weight: torch.ops.convnn.forward(x, x, x, 2, weight)[0])(
            torch.zeros(0, 3, 1, 2)
        )
