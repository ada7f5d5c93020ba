# SPDX-License-Identifier: MIT
"""Replacing layers of models in the style of torchvision and timm."""

import doctest
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_kernels.nn import (
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    replace,
)


class Block(nn.Module):
    """A residual block in torchvision's style."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 8, stride=2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.conv1(x)).mean((2, 3)))


class EncoderBlock(nn.Module):
    """The encoder block of torchvision's vision transformer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        y, _ = self.self_attention(normed, normed, normed, need_weights=False)
        return x + y


class FusedAttention(nn.Module):
    """Attention in timm's style."""

    def __init__(self, dim: int = 8, num_heads: int = 2, qkv_bias: bool = True, **options) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = options.get("scale", (dim // num_heads) ** -0.5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim) if options.get("qk_norm") else nn.Identity()
        self.k_norm = nn.LayerNorm(dim) if options.get("qk_norm") else nn.Identity()
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.2)
        if options.get("position_bias"):
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, num_heads))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, scale=self.scale)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Vit(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": FusedAttention(**options)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        for block in self.blocks:
            x = x + block["attn"](x)
        return x


def test_convolutions_of_a_residual_network() -> None:
    model = ResNet()
    done = replace(model, conv2d="convnn", candidates=lambda: RandomCandidates(16))
    assert done.swapped == {
        "layer1.0.conv1": "ConvNN2d",
        "layer1.0.conv2": "ConvNN2d",
        "layer1.1.conv2": "ConvNN2d",
    }
    assert done.left == {
        "conv1": "stride (2, 2)",
        "layer1.1.conv1": "stride (2, 2)",
        "layer1.1.downsample.0": "stride (2, 2)",
    }
    layer = model.layer1[0].conv1
    assert isinstance(layer, ConvNN2d)
    assert (layer.k, layer.padding, layer.bias) == (9, 1, None)
    assert isinstance(layer.candidates, RandomCandidates)
    assert layer.candidates is not model.layer1[0].conv2.candidates
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    text = str(done)
    assert "3 layers swapped, 3 left" in text
    assert "left conv1: stride (2, 2)" in text


def test_hybrid_branches() -> None:
    model = ResNet().double().eval()
    done = replace(model, conv2d="hybrid", branch_ratio=0.25, k=4)
    assert len(done.swapped) == 3
    layer = model.layer1[0].conv1
    assert isinstance(layer, HybridBranch2d)
    assert layer.convnn is not None
    assert (layer.convnn.out_channels, layer.convnn.k) == (1, 4)
    assert not layer.training
    assert model(torch.randn(2, 3, 16, 16).double()).dtype == torch.float64


def test_layers_from_a_function() -> None:
    model = ResNet().double().eval()
    x = torch.randn(2, 3, 16, 16).double()
    expected = model(x)
    done = replace(model, conv2d=ConvNN2d.from_conv2d)
    assert len(done.swapped) == 3
    assert done.left["conv1"].startswith("from_conv2d: kernel_size must be 1x1, 3x3 or 5x5")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, dilation=2, padding=2), "dilation (2, 2)"),
        (nn.Conv2d(4, 4, 3, groups=2, padding=1), "groups 2"),
        (nn.Conv2d(4, 4, 1), "a 1x1 kernel has no neighbors"),
        (nn.Conv2d(4, 4, (3, 1), padding="same"), "kernel 3x1 is not square and odd"),
        (nn.Conv2d(4, 4, 2, padding="same"), "kernel 2x2 is not square and odd"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
        (nn.Conv2d(4, 4, 3), "padding (0, 0) changes the size of the map"),
        (type("StdConv2d", (nn.Conv2d,), {})(4, 4, 3, padding=1), "StdConv2d is more than a"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_to_leave_a_convolution(conv: nn.Conv2d, reason: str) -> None:
    model = nn.Sequential(conv)
    done = replace(model, conv2d="convnn")
    assert not done.swapped
    assert done.left["0"].startswith(reason)
    assert model[0] is conv


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("scale", [0.5, 0.2])
def test_fused_qkv(qkv_bias: bool, scale: float) -> None:
    model = Vit(qkv_bias=qkv_bias, scale=scale).double().eval()
    x = torch.randn(2, 3, 16, 16).double()
    expected = model(x)
    done = replace(model, attention="kvt", k=16)
    assert done.swapped == dict.fromkeys(["blocks.0.attn", "blocks.1.attn"], "ConvNNAttention")
    assert not done.left
    torch.testing.assert_close(model(x), expected)
    assert model.patch_embed.weight.requires_grad


def test_convnn_attention_keeps_the_projections() -> None:
    model = Vit()
    old = model.blocks[0]["attn"]
    replace(model, attention="convnn", candidates=lambda: RandomCandidates(12))
    new = model.blocks[0]["attn"].layer
    assert isinstance(new, ConvNNAttention)
    assert (new.k, new.metric, new.aggregation, new.dropout.p) == (9, "cosine", "depthwise", 0.1)
    joined = [new.query_projection, new.key_projection, new.value_projection]
    assert torch.equal(torch.cat([linear.weight for linear in joined]), old.qkv.weight)
    assert torch.equal(torch.cat([linear.bias for linear in joined]), old.qkv.bias)
    assert torch.equal(new.output_projection.weight, old.proj.weight)
    assert model.blocks[0]["attn"].proj_drop.p == 0.2
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="attn_mask must be None"):
        model.blocks[0]["attn"](torch.randn(2, 16, 8), torch.zeros(16, 16))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True}, "its q_norm, k_norm would be lost"),
        ({"position_bias": True}, "its relative_position_bias_table would be lost"),
    ],
)
def test_reasons_to_leave_fused_attention(options: dict, reason: str) -> None:
    done = replace(Vit(**options), attention="convnn")
    assert not done.swapped
    assert done.left == {"blocks.0.attn": reason, "blocks.1.attn": reason}


@pytest.mark.parametrize("bias", [False, True])
def test_multihead_attention(bias: bool) -> None:
    model = nn.Sequential(EncoderBlock(), EncoderBlock()).double().eval()
    model[0].self_attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True).double()
    x = torch.randn(3, 10, 8).double()
    expected = model.eval()(x)
    done = replace(model, attention="kvt", k=10)
    assert list(done.swapped) == ["0.self_attention", "1.self_attention"]
    torch.testing.assert_close(model(x), expected)
    assert model[1].self_attention.layer.dropout.p == 0.1


@pytest.mark.parametrize("batch_first", [False, True])
def test_calls_of_multihead_attention(batch_first: bool) -> None:
    old = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    holder = nn.ModuleDict({"attention": old})
    replace(holder, attention="kvt", k=7)
    new = holder["attention"]
    query, key, value = (torch.randn(3, n, 8).double() for n in (5, 7, 7))
    padding = torch.rand(3, 7) < 0.3
    padding[:, 0] = False
    if not batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    for mask in (None, padding, torch.zeros(3, 7).double().masked_fill(padding, -torch.inf)):
        expected, _ = old(query, key, value, key_padding_mask=mask)
        got, weights = new(query, key, value, key_padding_mask=mask)
        assert weights is None
        torch.testing.assert_close(got, expected)
    single = torch.randn(7, 8).double()
    torch.testing.assert_close(new(single, single, single)[0], old(single, single, single)[0])
    for mask in ({"attn_mask": torch.zeros(5, 7)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask must be None"):
            new(query, key, value, **mask)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"add_bias_kv": True}, "tokens added to keys and values"),
        ({"add_zero_attn": True}, "tokens added to keys and values"),
        ({"kdim": 4}, "keys or values of another width"),
    ],
)
def test_reasons_to_leave_multihead_attention(options: dict, reason: str) -> None:
    done = replace(nn.Sequential(nn.MultiheadAttention(8, 2, **options)), attention="convnn")
    assert done.left == {"0": reason}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().train(training)
    x = torch.randn(2, 6, 8).double()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    expected = model(x, src_key_padding_mask=padding)
    done = replace(model, attention="kvt", k=6)
    assert list(done.swapped) == ["layers.0.self_attn", "layers.1.self_attn"]
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding])


def test_masked_attention_of_a_decoder_is_left() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    done = replace(model, attention="convnn", k=3)
    assert done.left == {"self_attn": "the self-attention of a decoder is masked"}
    assert done.swapped == {"multihead_attn": "ConvNNAttention"}
    assert model(torch.randn(2, 5, 8), torch.randn(2, 6, 8)).shape == (2, 5, 8)


def test_a_shared_layer_remains_shared() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), nn.Sequential(conv))
    replace(model, conv2d="convnn")
    assert isinstance(model[0], ConvNN2d)
    assert model[0] is model[2][0]


class SeparateAttention(nn.Module):
    """Attention with three linear layers, as in other libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))


def test_attention_that_is_not_recognized_is_named() -> None:
    class OuterAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SeparateAttention()

    model = nn.Sequential(OuterAttention(), EncoderBlock(), ConvNNAttention(8))
    done = replace(model, attention="convnn", k=3)
    assert done.swapped == {"1.self_attention": "ConvNNAttention"}
    assert done.left == {"0.inner": "not nn.MultiheadAttention, nor of qkv, proj and num_heads"}


def test_the_example_of_the_documentation() -> None:
    """The example in docs/layers.md prints what it says."""
    text = (Path(__file__).parent.parent / "docs" / "layers.md").read_text()
    examples = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if ">>>" in block]
    assert len(examples) == 1
    failed = doctest.DocTestRunner().run(
        doctest.DocTestParser().get_doctest(examples[0], {}, "layers.md", None, 0)
    )
    assert failed.attempted >= 4
    assert failed.failed == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv2d": "conv"}, "conv2d must be 'convnn', 'hybrid' or a function .*, got 'conv'"),
        ({"attention": "sdpa"}, "attention must be 'convnn', 'kvt' or a function .*, got 'sdpa'"),
        ({"conv2d": ConvNN2d(3, 3)}, "conv2d must be .* a function from the old layer to the new"),
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"branch_ratio": -1.0}, "branch_ratio must be between 0 and 1, got -1.0"),
        ({"candidates": RandomCandidates(9)}, "candidates must be a function .*, got RandomCand"),
        ({"conv2d": None}, "conv2d or attention must say what to swap for, .*, got neither"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    model = ResNet()
    with pytest.raises(ValueError, match=f"replace: {message}"):
        replace(model, **{"conv2d": "convnn", **settings})
    assert not any(isinstance(module, ConvNN2d) for module in model.modules())


def test_a_model_that_is_a_layer() -> None:
    with pytest.raises(ValueError, match="model must contain the layers to swap, got Conv2d"):
        replace(nn.Conv2d(3, 3, 3), conv2d="convnn")
