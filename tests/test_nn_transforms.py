# SPDX-License-Identifier: MIT
"""Layers under the transforms of PyTorch.

torch.jit.trace, torch.fx, torch.func, compiled autograd, AOTInductor.
"""

import copy
import io
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.func import functional_call, grad, stack_module_state, vmap

from convnn_kernels import functional
from convnn_kernels.nn import (
    AllCandidates,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    SpatialCandidates,
)

MAP, SEQUENCE, TOKENS = (3, 4, 6, 6), (3, 4, 12), (3, 10, 8)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: ConvNN1d(4, 5, k=3, padding=1), SEQUENCE),
    "2d": (lambda: ConvNN2d(4, 5, k=3), MAP),
    "2d-coordinates": (lambda: ConvNN2d(4, 5, k=3, padding=1, positional_encoding="both"), MAP),
    "2d-spatial": (lambda: ConvNN2d(4, 5, k=3, candidates=SpatialCandidates(9)), MAP),
    "2d-random": (lambda: ConvNN2d(4, 5, k=3, candidates=RandomCandidates(9)), MAP),
    "2d-fixed": (lambda: ConvNN2d(4, 5, k=3, candidates=fixed(9)).eval(), MAP),
    "2d-as-run": (
        lambda: ConvNN2d(
            4,
            5,
            k=3,
            padding=1,
            positional_encoding="both",
            coordinate_order="xy",
            standardize=True,
            candidates=SpatialCandidates(9, spacing="ends", self_similarity=0.5),
        ),
        MAP,
    ),
    "from_conv2d": (lambda: ConvNN2d.from_conv2d(nn.Conv2d(4, 5, 3, padding=1)), MAP),
    "hybrid": (lambda: HybridBranch2d(4, 6, candidates=SpatialCandidates(16)), MAP),
    "attention": (lambda: ConvNNAttention(8, 2, k=3), TOKENS),
    "attention-coordinates": (lambda: ConvNNAttention(8, k=3, positional_encoding="both"), TOKENS),
    "attention-fixed": (lambda: ConvNNAttention(8, 2, k=3, candidates=fixed(6)).eval(), TOKENS),
    "attention-as-run": (
        lambda: ConvNNAttention(8, 2, k=3, candidates=AllCandidates(True, self_similarity=2.0)),
        TOKENS,
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def fixed(r: int) -> RandomCandidates:
    return RandomCandidates(r, fixed_in_eval=True)


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    return make(), torch.randn(shape)


def seeded(layer: Callable[..., Tensor], *args: Tensor) -> Tensor:
    torch.manual_seed(7)
    return layer(*args)


# torch.jit.trace


@pytest.mark.quick_one_in(5)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_layer
def test_jit_trace(name: str) -> None:
    layer, x = build(name)
    # A check would call the layer again, which draws other candidates.
    traced = torch.jit.trace(layer, x[:1], check_trace=name != "2d-random")
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for each in (traced, torch.jit.load(file)):
        for inputs in (x[:1], x):
            assert torch.equal(seeded(each, inputs), seeded(layer, inputs))
    inputs, same = (x.clone().requires_grad_() for _ in range(2))
    seeded(traced, inputs).square().sum().backward()
    seeded(layer, same).square().sum().backward()
    torch.testing.assert_close(inputs.grad, same.grad)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_layer
def test_jit_trace_for_other_sizes(name: str) -> None:
    layer, x = build(name)
    traced = torch.jit.trace(layer, x, check_trace=False)
    for more in (3, -1):
        if name.startswith("attention"):
            other = torch.randn(2, x.shape[1] + more, x.shape[2])
        else:
            other = torch.randn(2, x.shape[1], *(size + more for size in x.shape[2:]))
        torch.testing.assert_close(seeded(traced, other), seeded(layer, other))


# torch.fx


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNN2d(3, 8, k=4), nn.ReLU(), HybridBranch2d(8, 8))
        self.attention = ConvNNAttention(8, 2, k=4)
        self.cross = ConvNNAttention(8, 1, k=2)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens)
        return self.cross(tokens, memory, key_mask=mask)


def test_fx_keeps_layers_as_leaves() -> None:
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == ["stem.0", "stem.1", "stem.2", "attention", "cross"]
    inputs = (torch.randn(2, 3, 5, 5), torch.randn(2, 7, 8), torch.rand(2, 7) < 0.6)
    assert torch.equal(traced(*inputs), model(*inputs))
    assert torch.equal(copy.deepcopy(traced)(*inputs), model(*inputs))
    # Its parameters are those of the model.
    traced(*inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_layer
def test_fx(name: str) -> None:
    layer, x = build(name)
    model = nn.Sequential(layer)
    traced = torch.fx.symbolic_trace(model)
    for inputs in (x, x[:1]):
        assert torch.equal(seeded(traced, inputs), seeded(model, inputs))


def test_fx_refuses_what_it_would_get_wrong() -> None:
    layer = ConvNN2d(3, 4)
    with pytest.raises(ValueError, match=r"ConvNN2d: .* trace nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(layer)
    layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    with pytest.raises(ValueError, match=r"ConvNN2d: torch\.fx cannot trace a layer with"):
        torch.fx.symbolic_trace(nn.Sequential(layer))


class Doubled(ConvNN2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class DoubledAttention(ConvNNAttention):
    def forward(self, query: Tensor) -> Tensor:
        return super().forward(2 * query)


class Named(ConvNN2d):
    """Without a forward of its own."""


def test_fx_refuses_a_forward_that_is_not_ours() -> None:
    """The traced model calls the layer, so what surrounds its forward would run twice."""
    replaced = ConvNN2d(3, 4)
    inner = replaced.forward
    replaced.forward = lambda x: inner(2 * x)
    for layer in (Doubled(3, 4), DoubledAttention(8), replaced):
        name = type(layer).__name__
        with pytest.raises(ValueError, match=rf"{name}: torch\.fx cannot trace a forward"):
            torch.fx.symbolic_trace(nn.Sequential(layer))
    model, x = nn.Sequential(Named(3, 4)), torch.randn(2, 3, 5, 5)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_fx_with_a_subclass_as_a_leaf() -> None:
    """What the error says."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Doubled) or super().is_leaf_module(module, name)

    model, x = nn.Sequential(Doubled(3, 4)), torch.randn(2, 3, 5, 5)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(x), model(x))


# torch.func


@every_layer
def test_vmap(name: str) -> None:
    layer, x = build(name)
    # One draw for all entries, as for a batch.
    mapped = vmap(lambda entry: layer(entry[None])[0], randomness="same")
    torch.testing.assert_close(seeded(mapped, x), seeded(layer, x))


@every_layer
def test_gradients_for_each_sample(name: str) -> None:
    layer, x = build(name)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], entry: Tensor) -> Tensor:
        return functional_call(layer, parameters, (entry[None],)).square().sum()

    grads = seeded(vmap(grad(loss), in_dims=(None, 0), randomness="same"), parameters, x)
    for i, entry in enumerate(x):
        layer.zero_grad()
        seeded(layer, entry[None]).square().sum().backward()
        for key, parameter in parameters.items():
            torch.testing.assert_close(grads[key][i], parameter.grad)


@every_layer
@pytest.mark.parametrize("in_dims", [(0, 0, None), (0, 0, 0)], ids=["one-input", "inputs"])
def test_ensemble(name: str, in_dims: tuple[int | None, ...]) -> None:
    layers = [LAYERS[name][0]() for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    shape = LAYERS[name][1]
    x = torch.randn(shape if in_dims[2] is None else (3, *shape))

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    y = seeded(vmap(call, in_dims, randomness="same"), parameters, buffers, x)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(y[i], seeded(layer, x if in_dims[2] is None else x[i]))


def test_vmap_draws_for_each_entry_where_asked() -> None:
    layer = ConvNN2d(4, 5, k=3, candidates=RandomCandidates(9))
    x = torch.randn(MAP[1:]).expand(MAP)
    calls = {
        mode: vmap(lambda entry: layer(entry[None])[0], randomness=mode)
        for mode in ("same", "different", "error")
    }
    assert torch.equal(*calls["same"](x)[:2])
    assert not torch.equal(*calls["different"](x)[:2])
    with pytest.raises(RuntimeError, match="randomness"):
        calls["error"](x)


def test_channels_last_under_vmap() -> None:
    layer = ConvNN2d(4, 5, k=3)
    x = torch.randn(2, *MAP)
    mapped = vmap(layer)(x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 3)))
    torch.testing.assert_close(mapped, vmap(layer)(x))
    assert mapped[0].is_contiguous(memory_format=torch.channels_last)
    assert vmap(layer)(x).is_contiguous()


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (1, 1), (5, 6)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_memory_format_is_that_of_a_convolution(
    size: tuple[int, int], channels: int, outputs: int, batch: int
) -> None:
    convolution = nn.Conv2d(channels, outputs, 1)
    layers = [ConvNN2d(channels, outputs, k=1), HybridBranch2d(channels, outputs)]
    contiguous = torch.randn(batch, channels, *size)
    last = contiguous.to(memory_format=torch.channels_last)
    for x in (contiguous, last, contiguous.mT.contiguous().mT):
        for layer in layers:
            assert layer(x).stride() == convolution(x).stride()


def test_some_channels_of_a_channels_last_map() -> None:
    x = torch.randn(2, 6, 5, 6).to(memory_format=torch.channels_last)[:, :3]
    assert ConvNN2d(3, 4)(x).stride() == nn.Conv2d(3, 4, 1)(x).stride()


# torch.export


@pytest.mark.parametrize("name", ["2d-as-run", "attention-as-run"])
def test_export_for_other_sizes(name: str) -> None:
    layer, x = build(name)
    sizes = dict.fromkeys((0, 1) if x.dim() == 3 else (0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    more = [size + 3 * (axis in sizes) for axis, size in enumerate(x.shape)]
    for inputs in (x, torch.randn(more)):
        torch.testing.assert_close(program.module()(inputs), layer(inputs))


# Compiled autograd


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled_backward(request: pytest.FixtureRequest) -> Iterator[Callable[[Tensor], None]]:
    torch.compiler.reset()

    def backward(loss: Tensor) -> None:
        with compiled_autograd._enable(torch.compile(backend=request.param)):
            loss.backward()

    yield backward
    torch.compiler.reset()


def aggregate(q: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
    similarities, indices = functional.select_neighbors(q, q, 2)
    return functional.aggregate_neighbors(v, similarities, indices, w, b, scale=2.0)


SHAPES = {"q": (2, 6, 4), "v": (2, 6, 5), "w": (7, 5, 2), "b": (7,)}
# A function of these tensors, and which of them get a gradient.
CALLS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "one tensor": (lambda q, v, w, b: functional.convnn(q, q, q, 2), "q"),
    "all": (lambda q, v, w, b: functional.convnn(q, q, v, 2, w, b), "qvwb"),
    "ones": (lambda q, v, w, b: functional.convnn(v, v, v, 2, w, b, rho="ones"), "vwb"),
    "similarities": (lambda q, v, w, b: torch.ops.convnn.forward(q, q, q, 2)[1], "q"),
    "bias": (lambda q, v, w, b: functional.convnn(q, q, v, 2, w, b), "b"),
    "both": (lambda q, v, w, b: torch.cat(torch.ops.convnn.forward(q, q, q, 2)[:2], -1), "q"),
    "select": (lambda q, v, w, b: functional.select_neighbors(q, q, 3)[0], "q"),
    "aggregate": (aggregate, "qvwb"),
}


@pytest.mark.parametrize(
    "name", [n if n == "all" else pytest.param(n, marks=pytest.mark.slow) for n in CALLS]
)
def test_compiled_autograd(name: str, compiled_backward: Callable[[Tensor], None]) -> None:
    call, needed = CALLS[name]
    tensors = {key: torch.randn(shape) for key, shape in SHAPES.items()}
    compiled, ordinary = (
        {key: each.clone().requires_grad_(key in needed) for key, each in tensors.items()}
        for _ in range(2)
    )
    compiled_backward(call(**compiled).square().sum())
    call(**ordinary).square().sum().backward()
    for key in needed:
        assert ordinary[key].grad is not None
        torch.testing.assert_close(compiled[key].grad, ordinary[key].grad)


@pytest.mark.slow
def test_compiled_autograd_with_other_options(
    compiled_backward: Callable[[Tensor], None],
) -> None:
    """Shapes alone do not tell one backward from another."""
    for options in ({"metric": "dot"}, {"metric": "euclidean"}, {"scale": 3.0}, {"rho": "ones"}):
        compiled, ordinary = (torch.randn(2, 6, 4) for _ in range(2))
        ordinary.copy_(compiled)
        for x, backward in ((compiled, compiled_backward), (ordinary, Tensor.backward)):
            x.requires_grad_()
            backward(functional.convnn(x, x, x, 2, **options).square().sum())
        torch.testing.assert_close(compiled.grad, ordinary.grad)


def test_compiled_autograd_where_there_is_no_gradient(
    compiled_backward: Callable[[Tensor], None],
) -> None:
    """It has zeros where an ordinary backward has None."""
    query, value = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 4)
    compiled_backward(functional.convnn(query, query, value, 2, rho="ones").sum())
    assert query.grad is None or not query.grad.any()


@pytest.mark.parametrize(
    "weight", [None, pytest.param((5, 1, 2), marks=pytest.mark.slow), (7, 5, 2)], ids=str
)
def test_compiled_autograd_of_similarities_alone(
    weight: tuple[int, ...] | None, compiled_backward: Callable[[Tensor], None]
) -> None:
    """What only the output depends on gets zeros of its own shape, which are added to the rest."""
    q, v = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 5, requires_grad=True)
    b = torch.randn(5 if weight is None else weight[0], requires_grad=True)
    w = None if weight is None else torch.randn(weight, requires_grad=True)
    others = [v, b] if w is None else [v, w, b]
    similarities = torch.ops.convnn.forward(q, q, v, 2, w, b)[1]
    compiled_backward(similarities.sum() + sum(other.sum() for other in others))
    assert q.grad is not None
    for other in others:
        assert torch.equal(other.grad, torch.ones_like(other))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["2d", "attention", *(pytest.param(n, marks=pytest.mark.left_out) for n in ("1d", "hybrid"))],
)
def test_layers_under_compiled_autograd(
    name: str, compiled_backward: Callable[[Tensor], None]
) -> None:
    layer, x = build(name)
    other = copy.deepcopy(layer)
    compiled_backward(layer(x).square().sum())
    other(x).square().sum().backward()
    for ours, expected in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


# AOTInductor


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["attention-fixed", pytest.param("2d-fixed", marks=pytest.mark.left_out)]
)
def test_aot_inductor_package_has_the_same_draw(name: str) -> None:
    layer, x = build(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {0: torch.export.Dim.DYNAMIC}
        if name.startswith("attention"):
            sizes[1] = torch.export.Dim.DYNAMIC
        program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
        assert torch.equal(program.module()(x), layer(x))
        package = torch._inductor.aoti_compile_and_package(program)
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(x), layer(x))
        if name.startswith("attention"):
            longer = torch.randn(2, 40, 8)
            torch.testing.assert_close(loaded(longer), layer(longer))
