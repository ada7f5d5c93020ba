# SPDX-License-Identifier: MIT
"""Every layer as a PyTorch module: gradients, compilation, autocast, copies, the meta device."""

import copy
import functools
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from convnn_kernels.nn import (
    AllCandidates,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    SpatialCandidates,
)

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1d": (functools.partial(ConvNN1d, 3, 4, k=3), (2, 3, 10)),
    "1d-ones": (
        functools.partial(ConvNN1d, 3, 4, k=3, padding=1, projections="value", rho="ones"),
        (2, 3, 10),
    ),
    "2d": (
        functools.partial(
            ConvNN2d,
            3,
            4,
            k=3,
            padding=1,
            positional_encoding="both",
            candidates=SpatialCandidates(4),
        ),
        (2, 3, 4, 5),
    ),
    "2d-vgg": (
        functools.partial(ConvNN2d, 3, 4, k=5, padding=1, projections="identity", rho="ones"),
        (2, 3, 4, 5),
    ),
    "2d-depthwise": (
        functools.partial(
            ConvNN2d, 3, 3, k=3, projections="identity", aggregation="depthwise", metric="dot"
        ),
        (2, 3, 4, 5),
    ),
    "2d-as-run": (
        functools.partial(
            ConvNN2d,
            3,
            4,
            k=3,
            padding=1,
            positional_encoding="both",
            coordinate_order="xy",
            standardize=True,
            candidates=SpatialCandidates(4, spacing="ends", self_similarity=0.5),
        ),
        (2, 3, 4, 5),
    ),
    "hybrid": (functools.partial(HybridBranch2d, 3, 4), (2, 3, 4, 5)),
    "hybrid-conv": (functools.partial(HybridBranch2d, 3, 4, branch_ratio=0.0), (2, 3, 4, 5)),
    "hybrid-convnn": (functools.partial(HybridBranch2d, 3, 4, branch_ratio=1.0), (2, 3, 4, 5)),
    "attention": (functools.partial(ConvNNAttention, 6, 2, k=4), (2, 9, 6)),
    "attention-as-run": (
        functools.partial(
            ConvNNAttention, 6, 2, k=4, candidates=AllCandidates(True, self_similarity=2.0)
        ),
        (2, 9, 6),
    ),
    "kvt": (
        functools.partial(ConvNNAttention, 6, 2, k=4, metric="dot", aggregation="sum"),
        (2, 9, 6),
    ),
}


class Convolution(nn.Module):
    """A ConvNN2d that is equivalent to a convolution."""

    def __new__(cls, **options) -> ConvNN2d:  # type: ignore[misc]
        return ConvNN2d.from_conv2d(nn.Conv2d(3, 4, 3, padding=1, **options))


LAYERS["from_conv2d"] = (Convolution, (2, 3, 4, 5))

every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, **options) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    return make(**options), torch.randn(shape, dtype=options.get("dtype"))


@every_layer
def test_gradients(name: str) -> None:
    layer, x = build(name, dtype=torch.float64)
    names = list(dict(layer.named_parameters()))

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    parameters = [p.detach().requires_grad_(True) for p in layer.parameters()]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(True), *parameters), fast_mode=True)


@every_layer
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """DistributedDataParallel waits for the gradients of all parameters."""
    layer, x = build(name)
    layer(x).square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.quick_one_in(5)
@every_layer
def test_learns(name: str) -> None:
    layer, x = build(name)
    with torch.no_grad():
        target = build(name)[0](x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every_layer
def test_state_dict_and_copies(name: str) -> None:
    layer, x = build(name)
    other, _ = build(name)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    y = layer(x)
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), y)


@every_layer
def test_construction_on_meta(name: str) -> None:
    with torch.device("meta"):
        layer, x = build(name)
    assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} == {"meta"}
    shape = layer(x).shape
    expected, x = build(name)
    assert expected(x).shape == shape
    # Initialized as FSDP does it: allocated first, then reset module by module.
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(x).isfinite().all()
    on_device, x = build(name, device="meta")
    assert {p.device.type for p in on_device.parameters()} == {"meta"}


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    layer, x = build(name)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x.requires_grad_(True))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@every_layer
def test_bfloat16(name: str) -> None:
    layer, x = build(name, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize("name", [name for name, (_, shape) in LAYERS.items() if len(shape) == 4])
def test_channels_last_is_preserved(name: str) -> None:
    layer, x = build(name)
    expected = layer(x)
    assert expected.is_contiguous()
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    torch.testing.assert_close(y, expected, check_stride=False)
    torch.testing.assert_close(layer(x.mT.contiguous().mT), expected)


@every_layer
@pytest.mark.filterwarnings("error")
def test_empty_batch(name: str) -> None:
    layer, x = build(name)
    y = layer(x[:0])
    assert y.shape == (0, *layer(x).shape[1:])
    y.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "hybrid-conv"])
def test_compile_with_dynamic_batch(name: str) -> None:
    torch.compiler.reset()
    layer, _ = build(name)
    # All batch sizes must share one graph, for which the code of Inductor does not matter.
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    _, shape = LAYERS[name]
    frames = set()
    for batch in (8, 12, 7):
        x = torch.randn(batch, *shape[1:], requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        torch.testing.assert_close(grad, expected)
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["2d", pytest.param("hybrid", marks=pytest.mark.left_out), "attention"]
)
def test_inductor(name: str) -> None:
    torch.compiler.reset()
    layer, x = build(name)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.quick_one_in(2)
@pytest.mark.parametrize("fixed", [False, True])
def test_random_candidates_compile(fixed: bool) -> None:
    torch.compiler.reset()
    layer = ConvNNAttention(4, k=2, candidates=RandomCandidates(4, fixed_in_eval=fixed))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 50, 4)
    assert not torch.equal(compiled(x), compiled(x))
    torch.manual_seed(1)
    y = compiled(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), y)
    layer.eval()
    assert torch.equal(compiled(x), compiled(x)) == fixed
    if fixed:
        torch.testing.assert_close(compiled(x), layer(x))


def test_checkpointing_repeats_the_draw() -> None:
    layer = ConvNN2d(3, 3, k=2, candidates=RandomCandidates(5))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    torch.manual_seed(0)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.slow
def test_distributed_data_parallel(run_python: Callable[..., str]) -> None:
    run_python(
        """
        import os, torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        import convnn_kernels.nn as cnn

        os.environ.update(MASTER_ADDR="127.0.0.1")
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        model = torch.nn.Sequential(
            cnn.HybridBranch2d(3, 4, candidates=cnn.RandomCandidates(16, fixed_in_eval=True)),
            cnn.ConvNN2d(4, 4, k=4),
            torch.nn.Flatten(2),
            cnn.ConvNNAttention(64, 2, k=2),
        )
        parallel = DistributedDataParallel(model)
        for _ in range(3):
            parallel(torch.randn(2, 3, 8, 8)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        dist.destroy_process_group()
        """
    )
