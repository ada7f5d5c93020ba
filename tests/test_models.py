# SPDX-License-Identifier: MIT
"""The models of the paper: their sizes and layers, and other attention beside ConvNN."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import as_run, vgg11, vit_tiny
from benchmarks.models.peers import Attention, LocalAttention, SparseAttention
from benchmarks.models.vgg import CONFIGURATIONS
from benchmarks.models.vit import sinusoids
from benchmarks.paper.rows import REDUCED, ROWS, TABLE_1, TABLE_2
from convnn_kernels.nn import (
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    SpatialCandidates,
)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "layer", "ten", "hundred"),
    [
        (vgg11, "hybrid", 130_015_690, 130_384_420),
        # Without the fusion of section 4.2.3; not in the paper.
        (vgg11, "conv2d", 128_812_810, 129_181_540),
        (vgg11, "convnn", 128_812_810, 129_181_540),
        (vit_tiny, "attention", 5_479_306, 5_496_676),
        (vit_tiny, "kvt", 5_479_306, 5_496_676),
        (vit_tiny, "sparse", 5_479_306, 5_496_676),
        (vit_tiny, "convnn", 5_500_042, 5_517_412),
        (vit_tiny, "local", 4_299_658, 4_317_028),
    ],
)
def test_parameters(make: Callable[..., nn.Module], layer: str, ten: int, hundred: int) -> None:
    with torch.device("meta"):
        assert parameters(make(10, layer)) == ten
        assert parameters(make(100, layer)) == hundred


@pytest.mark.parametrize(
    ("depth", "parameters_of_torchvision"),
    [(11, 132_868_840), (13, 133_053_736), (16, 138_365_992), (19, 143_678_248)],
)
def test_configurations_of_vgg(depth: int, parameters_of_torchvision: int) -> None:
    """Those of torchvision's vgg11_bn, ... with 1000 classes."""
    with torch.device("meta"):
        model = vgg11(1000, "conv2d", channels=CONFIGURATIONS[depth])
    assert parameters(model) == parameters_of_torchvision


def test_parameters_do_not_depend_on_the_branch_ratio() -> None:
    for row in TABLE_1[1:]:
        assert row.parameters(10, reduced=False) == 130_015_690, row.name


@pytest.mark.parametrize("row", [*TABLE_1, *TABLE_2], ids=lambda row: row.name)
def test_parameters_are_those_of_the_paper(row) -> None:
    """The paper truncates to three decimals."""
    for dataset, classes in (("cifar10", 10), ("cifar100", 100)):
        printed = row.paper.parameters[dataset]
        # The table has one number for all rows, which is wrong for the plain convolutions.
        if row.name != "vgg11/conv2d":
            count = row.parameters(classes, reduced=False)
            assert f"{count // 1000 / 1000:.3f}M" == printed


@functools.cache
def gflops_of(name: str) -> float:
    return ROWS[name].gflops(10, reduced=False)


@pytest.mark.slow
def test_gflops() -> None:
    """Those of the paper, except for products that its FLOP counter counts otherwise."""
    gflops = {row.name: gflops_of(row.name) for row in TABLE_2}
    assert gflops["vit/attention"] == pytest.approx(2.507, abs=5e-4)
    assert gflops["vit/local"] == pytest.approx(1.991, abs=5e-3)
    # Of ConvNN the paper counts the products with rho, but not the depthwise convolution.
    assert gflops["vit/convnn-all"] == pytest.approx(2.333, abs=4e-3)
    tokens, width, blocks, k, r = 197, 192, 12, 9, 32
    search, taps = 2 * tokens * tokens * width, 2 * tokens * k * width
    assert gflops["vit/attention"] - gflops["vit/convnn-all"] == pytest.approx(
        blocks * (search - taps) / 1e9
    )
    assert gflops["vit/convnn-all"] - gflops["vit/convnn-random-32"] == pytest.approx(
        blocks * 2 * tokens * (tokens - r) * width / 1e9
    )


def test_gflops_of_the_paper_follow_from_its_profiler() -> None:
    """All figures of the paper follow from one rule; ours count all products.

    The profiler counts linear layers, 1×1 convolutions and matrix and elementwise products, but no
    Conv1d and no convolution with padding="same". All tokens of the padded map are queries.
    """

    def printed(flops: float) -> str:
        return f"{int(flops / 1e6) / 1e3:.3f}"

    maps, inputs = (32, 16, 8, 8, 4, 4, 2, 2), (3, 64, 128, 256, 256, 512, 512, 512)
    outputs = (*inputs[1:], 512)
    classifier = 2 * (25088 * 4096 + 4096 * 4096 + 4096 * 10)
    fusions = sum(2 * n**2 * c**2 for n, c in zip(maps, outputs, strict=True))
    search = sum(2 * (n + 2) ** 4 * c for n, c in zip(maps, inputs, strict=True))
    positions = sum(2 * (n + 2) ** 4 * 2 for n in maps)
    assert printed(classifier + fusions) == "0.293"
    assert printed(classifier + fusions + search) == "0.325"
    assert printed(classifier + fusions + search + positions) == "0.331"
    # Ours count all convolutions, including the aggregation; only tokens of the map are queries.
    taps = sum(2 * n**2 * 9 * i * o for n, i, o in zip(maps, inputs, outputs, strict=True))
    our_search = sum(2 * n**2 * (n + 2) ** 2 * c for n, c in zip(maps, inputs, strict=True))
    our_positions = sum(2 * n**2 * (n + 2) ** 2 * 2 for n in maps)
    for name, flops in {
        "vgg11/conv2d": classifier + taps,
        "vgg11/hybrid-0.5": classifier + fusions + taps + our_search,
        "vgg11/hybrid-1-positions": classifier + fusions + taps + our_search + our_positions,
    }.items():
        assert gflops_of(name) == pytest.approx(flops / 1e9), name

    N, E, blocks, k, r = 197, 192, 12, 9, 32
    rest = 2 * 196 * 768 * E + blocks * N * (2 * 12 * E * E + 2 * E) + 2 * E * 10
    assert printed(rest + blocks * 4 * N * N * E) == "2.507"
    # With one and with three elementwise N×N products, such as scaling and masking.
    assert printed(rest + blocks * (4 * N * N * E + N * N)) == "2.508"
    assert printed(rest + blocks * (4 * N * N * E + 3 * N * N)) == "2.509"
    modulation = blocks * N * k * E
    assert printed(rest + blocks * 2 * N * N * E + modulation) == "2.333"
    # Only the keys of the candidates are projected.
    saved = blocks * 2 * (N - r) * E * E
    assert printed(rest - saved + blocks * 2 * N * r * E + modulation) == "2.037"


DOCUMENTED = {
    "VGG-11, Conv2D": "vgg11/conv2d",
    "VGG-11, λ > 0": "vgg11/hybrid-0.5",
    "... with positions": "vgg11/hybrid-0.5-positions",
    "ViT-Tiny, attention": "vit/attention",
    "... local attention": "vit/local",
    "... sparse attention": "vit/sparse",
    "... KVT, k = 9": "vit/kvt-9",
    "... KVT, k = 100": "vit/kvt-100",
    "... ConvNN, all": "vit/convnn-all",
    "... ConvNN, r = 32": "vit/convnn-random-32",
}


@pytest.mark.slow
def test_gflops_of_the_documentation() -> None:
    """The table in docs/layers.md has the figures of the paper and ours."""
    text = (Path(__file__).parent.parent / "docs" / "layers.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines()]
    table = {line[0]: line[1:] for line in cells if line and line[0] in DOCUMENTED}
    assert table.keys() == DOCUMENTED.keys()
    for label, (printed, ours) in table.items():
        row = ROWS[DOCUMENTED[label]]
        assert row.paper is not None
        assert printed == f"{row.paper.gflops:.3f}", label
        assert ours == f"{gflops_of(row.name):.3f}", label
    assert {row.paper.gflops for row in (*TABLE_1, *TABLE_2)} == {
        float(p) for p, _ in table.values()
    }


def reduced_vgg(**options) -> nn.Module:
    return vgg11(10, **{**REDUCED["vgg11"], **options})


def reduced_vit(**options) -> nn.Module:
    return vit_tiny(10, **{**REDUCED["vit"], "depth": 2, **options})


@pytest.mark.parametrize("layer", ["conv2d", "convnn", "hybrid"])
def test_vgg_step(layer: str) -> None:
    model = reduced_vgg(layer=layer)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None for p in model.parameters())
    kind = {"conv2d": nn.Conv2d, "convnn": ConvNN2d, "hybrid": HybridBranch2d}[layer]
    assert sum(type(each) is kind for each in model.features) == 8
    assert sum(type(each) is nn.BatchNorm2d for each in model.features) == 8


def test_vgg_is_that_of_the_paper() -> None:
    """Each layer has batch norm and ReLU; pooling between stages; three linear layers on 7×7."""
    with torch.device("meta"):
        model = vgg11(10)
    step = ["HybridBranch2d", "BatchNorm2d", "ReLU"]
    pool = ["MaxPool2d"]
    expected = 2 * (step + pool) + 3 * (2 * step + pool)
    assert [type(layer).__name__ for layer in model.features] == expected
    widths = [each.num_features for each in model.features if type(each) is nn.BatchNorm2d]
    assert widths == [64, 128, 256, 256, 512, 512, 512, 512]
    branch = model.features[0].convnn
    assert (branch.k, branch.padding, branch.rho, branch.projections) == (9, 1, "ones", "identity")
    assert branch.value_projection is None
    assert model.pool.output_size in (7, (7, 7))
    assert [str(layer) for layer in model.classifier] == [
        "Flatten(start_dim=1, end_dim=-1)",
        "Linear(in_features=25088, out_features=4096, bias=True)",
        "ReLU()",
        "Dropout(p=0.5, inplace=False)",
        "Linear(in_features=4096, out_features=4096, bias=True)",
        "ReLU()",
        "Dropout(p=0.5, inplace=False)",
        "Linear(in_features=4096, out_features=10, bias=True)",
    ]


def test_vit_is_that_of_the_paper() -> None:
    """Computed from the weights: pre-norm, a class token in front, no final norm."""
    model = reduced_vit(layer="attention").double().eval()
    w = model.state_dict()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = images.unflatten(2, (8, 4)).unflatten(4, (8, 4)).permute(0, 2, 4, 1, 3, 5)
    x = patches.flatten(3).flatten(1, 2) @ w["patches.weight"].flatten(1).T + w["patches.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = torch.cat([w["class_token"].expand(2, -1, -1), norm(x, "patch_norm")], 1)
    x = x + sinusoids(65, 48)
    for i in range(2):
        y = norm(x, f"blocks.{i}.attention_norm")
        q, k, v = (
            y @ w[f"blocks.{i}.attention.{name}_projection.weight"].T
            for name in ("query", "key", "value")
        )
        y = (q @ k.mT / 48**0.5).softmax(-1) @ v
        x = x + y @ w[f"blocks.{i}.attention.output_projection.weight"].T
        y = norm(x, f"blocks.{i}.mlp_norm") @ w[f"blocks.{i}.mlp.0.weight"].T
        y = F.gelu(y + w[f"blocks.{i}.mlp.0.bias"])
        x = x + y @ w[f"blocks.{i}.mlp.3.weight"].T + w[f"blocks.{i}.mlp.3.bias"]
    expected = x[:, 0] @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("layer", ["attention", "convnn", "kvt", "local", "sparse"])
def test_dropout_of_vit(layer: str) -> None:
    with torch.device("meta"):
        model = vit_tiny(10, layer)
    for block in model.blocks:
        dropout = block.attention.dropout
        assert (dropout.p if isinstance(dropout, nn.Dropout) else dropout) == 0.1
        assert [each.p for each in block.mlp if isinstance(each, nn.Dropout)] == [0.1, 0.1]


def test_dropout_of_what_attention_adds() -> None:
    block = reduced_vit(layer="attention", dropout=0.0, residual_dropout=1.0).blocks[0]
    x = torch.randn(2, 65, 48)
    torch.testing.assert_close(block(x), x + block.mlp(block.mlp_norm(x)))
    block.eval()
    assert not torch.allclose(block(x), x + block.mlp(block.mlp_norm(x)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("k", [1, 4, 9, 16, 25])
def test_small_maps_have_enough_keys(k: int) -> None:
    model = reduced_vgg(k=k).eval()
    sizes = []
    for layer in model.features:
        if isinstance(layer, HybridBranch2d):
            layer.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == [32, 16, 8, 8, 4, 4, 2, 2]


@pytest.mark.parametrize("layer", ["attention", "convnn", "kvt", "local", "sparse"])
def test_vit_step(layer: str) -> None:
    model = reduced_vit(layer=layer, window=16, stride=8)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("row", TABLE_2, ids=lambda row: row.name)
def test_vit_step_as_run(row) -> None:
    """Under autocast, as the command for a GPU has it."""
    model = row.as_run().build(10, reduced=True, depth=2, k=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 3, 32, 32))
    F.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(block.attention_dropout.p == 0.1 for block in model.blocks)


AS_RUN_COMPILED = (
    *("vit/local", "vit/kvt-9", "vit/sparse", "vit/convnn-random-32"),
    *("vgg11/hybrid-0.5-random-36", "vgg11/hybrid-0.5-spatial-36"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_RUN_COMPILED)
@pytest.mark.parametrize("training", [False, True])
def test_rows_as_run_compile(name: str, training: bool) -> None:
    """As one graph and with bfloat16, for --compile and --amp; the graph draws the same numbers."""
    row = ROWS[name].as_run()
    options = {"depth": 1} if row.family == "vit" else {}
    model = row.build(10, reduced=True, **options).train(training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, results = torch.randn(2, 3, 32, 32), []
    for each in (model, compiled):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(each(x))
    torch.testing.assert_close(*results)


def test_kvt_and_convnn_differ() -> None:
    kvt = reduced_vit(layer="kvt").blocks[0].attention
    convnn = reduced_vit(layer="convnn").blocks[0].attention
    assert isinstance(kvt, ConvNNAttention)
    assert isinstance(convnn, ConvNNAttention)
    assert (kvt.metric, kvt.weight) == ("dot", None)
    assert convnn.metric == "cosine"
    assert (convnn.weight == 1).all()


def test_kvt_with_all_neighbors_is_attention() -> None:
    attention = reduced_vit(layer="attention").eval()
    kvt = reduced_vit(layer="kvt", k=65).eval()
    kvt.load_state_dict(attention.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(kvt(x), attention(x))


def masked_attention(layer: Attention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = layer.query_projection(x), layer.key_projection(x), layer.value_projection(x)
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return layer.output_projection(weights @ v)


@pytest.mark.parametrize("length", [1, 5, 8, 21])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_local_attention(length: int, window: int) -> None:
    layer = LocalAttention(6, window).double()
    x = torch.randn(2, length, 6, dtype=torch.float64)
    mask = torch.tensor([[abs(i - j) <= window for j in range(length)] for i in range(length)])
    torch.testing.assert_close(layer(x), masked_attention(layer, x, mask))


def test_sparse_attention() -> None:
    layer = SparseAttention(6, stride=4).double()
    x = torch.randn(2, 14, 6, dtype=torch.float64)
    mask = torch.tensor(
        [[abs(i - j) < 4 or (i - j) % 4 == 0 for j in range(14)] for i in range(14)]
    )
    torch.testing.assert_close(layer(x), masked_attention(layer, x, mask))


def test_random_candidates_of_the_padded_map() -> None:
    """Padding is drawn like any other token, and all are candidates if there are fewer than r."""
    candidates = as_run.PaddedRandomCandidates(16)
    assert candidates.include_self
    drawn = [candidates((4, 4), 1, torch.device("cpu")) for _ in range(50)]
    assert all(rows is not None and rows.unique().numel() == 16 for rows in drawn)
    assert torch.cat([rows for rows in drawn if rows is not None]).unique().numel() == 36
    torch.manual_seed(0)
    rows = candidates((4, 4), 1, torch.device("cpu"))
    torch.manual_seed(0)
    assert rows is not None
    assert rows.tolist() == torch.randperm(36)[:16].tolist()
    assert as_run.PaddedRandomCandidates(37)((4, 4), 1, torch.device("cpu")) is None
    # With as many as there are, they are drawn all the same.
    assert as_run.PaddedRandomCandidates(36)((4, 4), 1, torch.device("cpu")) is not None


@pytest.mark.parametrize(("size", "side"), [(32, 4), (32, 32), (8, 6), (4, 4)])
def test_spatial_candidates_in_rows_of_the_unpadded_map(size: int, side: int) -> None:
    steps = torch.linspace(0, size - 1, side).long().tolist()
    expected = [y * size + x for y in steps for x in steps]
    rows = as_run.FlatRowCandidates(side)((size, size), 1, torch.device("cpu"))
    assert rows is not None
    assert rows.tolist() == expected
    assert as_run.FlatRowCandidates(size + 1)((size, size), 1, torch.device("cpu")) is None


@pytest.mark.parametrize("length", [5, 8, 21])
def test_rotary_local_attention(length: int) -> None:
    """Pair by pair: queries 2w ahead of the first key of their block's window, padding included."""
    w, d = 4, 6
    layer = as_run.RotaryLocalAttention(12, w, head_dim=d).double()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    q, k, v = layer.query_projection(x), layer.key_projection(x), layer.value_projection(x)
    spare = -length % w
    k, v = (F.pad(each, (0, 0, 0, spare)) for each in (k, v))
    frequencies = (1.0 / 10000.0 ** (torch.arange(0, d, 2) / d)).double()

    def rotated(x: Tensor, position: int) -> Tensor:
        as_complex = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        turned = as_complex * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat([turned.real, turned.imag], -1)

    expected = torch.empty(2, length, d, dtype=torch.float64)
    for i in range(length):
        start = (i // w - 1) * w
        others = [j for j in range(start, start + 3 * w) if 0 <= j < length + spare]
        others = [j for j in others if abs(i - j) <= w]
        keys = torch.stack([rotated(k[:, j], j - start) for j in others], 1)
        logits = (rotated(q[:, i], 2 * w + i % w).unsqueeze(1) * keys).sum(-1) * d**-0.5
        expected[:, i] = (logits.softmax(-1).unsqueeze(-1) * v[:, others]).sum(1)
    torch.testing.assert_close(layer(x), layer.output_projection(expected))


def test_band_attention() -> None:
    layer = as_run.BandAttention(6, 5).double()
    x = torch.randn(2, 14, 6, dtype=torch.float64)
    mask = torch.tensor([[abs(i - j) <= 2 for j in range(14)] for i in range(14)])
    torch.testing.assert_close(layer(x), masked_attention(layer, x, mask))
    dropped = as_run.BandAttention(6, 5, dropout=0.5).double().eval()
    assert not torch.equal(dropped(x), dropped(x))


def test_attention_to_the_k_most_similar() -> None:
    """In evaluation that of KVT; in training it drops weights."""
    layer = as_run.TopKAttention(6, 3, dropout=0.5).double().eval()
    kvt = ConvNNAttention(6, 1, 3, metric="dot", aggregation="sum", dtype=torch.float64)
    kvt.load_state_dict(layer.state_dict())
    x = torch.randn(2, 14, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), kvt(x))
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    # A query of which all weights are dropped gets nothing; channels are not dropped alone.
    mixed = layer.attend(x, x, x)
    assert mixed.flatten(0, 1)[(mixed == 0).any(-1).flatten()].abs().sum() == 0


def test_candidates_with_the_token_twice() -> None:
    """Its own similarity is -0.1 among the candidates and 1 as the first neighbor."""
    candidates = functools.partial(SpatialCandidates, 5, spacing="ends")
    layer = as_run.CandidateAttention(6, 4, candidates()).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    q, k, v = layer.query_projection(x), layer.key_projection(x), layer.value_projection(x)
    drawn = [0, 2, 4, 6, 8]
    expected, twice = torch.zeros(2, 9, 6, dtype=torch.float64), 0
    for b in range(2):
        for i in range(9):
            similar = {j: -0.1 if i == j else (q[b, i] @ k[b, j] / 6**0.5).item() for j in drawn}
            nearest = sorted(similar, key=lambda j: -similar[j])[:3]
            twice += i in nearest
            rho = torch.tensor([1.0, *(similar[j] for j in nearest)], dtype=torch.float64)
            for tap, (j, weight) in enumerate(zip([i, *nearest], rho.softmax(0), strict=True)):
                expected[b, i] += weight * layer.weight[:, 0, tap] * v[b, j]
    assert 0 < twice < 10
    torch.testing.assert_close(layer(x), layer.output_projection(expected))


def test_positions() -> None:
    table = sinusoids(50, 6)
    assert table.shape == (50, 6)
    assert table[7, 2].item() == pytest.approx(torch.tensor(7 / 10000 ** (2 / 6)).sin().item())
    assert table[7, 3].item() == pytest.approx(torch.tensor(7 / 10000 ** (2 / 6)).cos().item())
    assert not any("positions" in name for name in reduced_vit().state_dict())


def test_vit_depends_on_positions() -> None:
    model = reduced_vit(layer="attention").eval()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(model(x), model(x.flip(-1).unflatten(-1, (8, 4)).flip(-1).flatten(3)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_every_row_builds() -> None:
    with torch.device("meta"):
        for row in (*ROWS.values(), *(row.as_run() for row in ROWS.values())):
            size = row.image_size(reduced=True)
            model = row.build(10, reduced=True).eval()
            # The reduced ViT has 65 tokens, fewer than k = 100.
            if row.options.get("k", 0) <= 65:
                assert model(torch.empty(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vgg11(10, "conv"), "vgg11: layer must be one of .*, got 'conv'"),
        (lambda: vgg11(10, k=5), "vgg11: k must be a square number unless kernel_size is given"),
        (lambda: vit_tiny(10, "none"), "vit_tiny: layer must be one of .*, got 'none'"),
        (lambda: vgg11(10, candidates=RandomCandidates(9)), "vgg11: candidates must be a function"),
        (
            lambda: vit_tiny(10, "convnn-candidates"),
            "vit_tiny: candidates must be a function .* layer='convnn-candidates', got None",
        ),
        (
            lambda: vit_tiny(10, candidates=RandomCandidates(9)),
            "vit_tiny: candidates must be a function",
        ),
        (lambda: vit_tiny(10, patch_size=15), "patch_size must divide image_size 224, got 15"),
    ],
)
def test_wrong_settings(make, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make()
