# SPDX-License-Identifier: MIT
"""Replacing layers of models in the style of torchvision and timm."""

import copy
import doctest
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from convnn_kernels.nn import (
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    replace,
)
from tools.replace_models import row


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
        norm = options.get("norm", lambda width: nn.Identity())
        self.q_norm = norm(dim // num_heads)
        self.k_norm = norm(dim // num_heads)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.2)
        if options.get("position_bias"):
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, num_heads))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
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
    done = replace(model, conv2d="convnn", candidates=lambda: RandomCandidates(49))
    assert done.swapped == {
        "conv1": "ConvNN2d",
        "layer1.0.conv1": "ConvNN2d",
        "layer1.0.conv2": "ConvNN2d",
        "layer1.1.conv1": "ConvNN2d",
        "layer1.1.conv2": "ConvNN2d",
    }
    assert done.left == {"layer1.1.downsample.0": "a 1x1 kernel has no neighbors"}
    assert (model.conv1.k, model.conv1.stride, model.conv1.padding) == (49, 2, 3)
    layer = model.layer1[0].conv1
    assert isinstance(layer, ConvNN2d)
    assert (layer.k, layer.padding, layer.bias) == (9, 1, None)
    assert isinstance(layer.candidates, RandomCandidates)
    assert layer.candidates is not model.layer1[0].conv2.candidates
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    text = str(done)
    assert "5 layers swapped, 1 left" in text
    assert "left layer1.1.downsample.0: a 1x1 kernel has no neighbors" in text


def test_hybrid_branches() -> None:
    model = ResNet().double().eval()
    done = replace(model, conv2d="hybrid", branch_ratio=0.25, k=4)
    assert len(done.swapped) == 5
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
    assert len(done.swapped) == 5
    assert done.left["conv1"].startswith("from_conv2d: kernel_size must be 1x1, 3x3 or 5x5")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, dilation=2, padding=2), "dilation (2, 2)"),
        (nn.Conv2d(4, 4, 3, groups=2, padding=1), "groups 2"),
        (nn.Conv2d(4, 4, 3, (2, 1), padding=1), "stride (2, 1)"),
        (
            nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False),
            "its weights are frozen, and new ones would be random",
        ),
        (nn.Conv2d(4, 4, 1), "a 1x1 kernel has no neighbors"),
        (nn.Conv2d(4, 4, (3, 1), padding="same"), "kernel 3x1 is not square and odd"),
        (nn.Conv2d(4, 4, 2, padding="same"), "kernel 2x2 is not square and odd"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
        (nn.Conv2d(4, 4, 3), "padding (0, 0) is not half the kernel"),
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
    with pytest.raises(ValueError, match="attn_mask must let each query see the keys of one range"):
        model.blocks[0]["attn"](torch.randn(2, 16, 8), torch.eye(16) == 0)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_queries_and_keys(norm: type[nn.Module]) -> None:
    model = Vit(norm=norm).double().eval()
    for block in model.blocks:
        nn.init.uniform_(block["attn"].k_norm.weight)
    x = torch.randn(2, 3, 16, 16).double()
    expected = model(x)
    done = replace(model, attention="kvt", k=16)
    assert len(done.swapped) == 2
    torch.testing.assert_close(model(x), expected)


def test_extra_parts_are_a_reason_to_leave_attention() -> None:
    done = replace(Vit(position_bias=True), attention="convnn")
    assert not done.swapped
    reason = "its relative_position_bias_table would be lost"
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
    for shape in ((5, 7), (6, 5, 7)):
        for hidden in (torch.rand(shape) < 0.2, torch.rand(shape)):
            with pytest.raises(ValueError, match="attn_mask must let each query see the keys of"):
                new(query, key, value, attn_mask=hidden)
    with pytest.raises(
        ValueError, match=r"attn_mask must be None or have shape \[5, 7\] or \[6, 5"
    ):
        new(query, key, value, attn_mask=torch.zeros(7, 5))


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


PAIRS = {
    "causal": lambda N, M: torch.ones(N, M, dtype=torch.bool).tril(),
    "window": lambda N, M: torch.ones(N, M, dtype=torch.bool).tril(2).triu(-1),
    "blocks": lambda N, M: (torch.arange(N) // 2)[:, None] == torch.arange(M) // 2,
    "columns": lambda N, M: (torch.arange(M) != 1).expand(N, M),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_over_pairs_of_multihead_attention(batch_first: bool, name: str) -> None:
    old = nn.MultiheadAttention(8, 2, batch_first=batch_first).double().eval()
    new = copy.deepcopy(nn.Sequential(old))
    replace(new, attention="kvt", k=6)
    query, key = (torch.randn(3, n, 8).double() for n in (5, 6))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    added = torch.zeros(3, 6).double().masked_fill(padding, -torch.inf)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    hidden = ~PAIRS[name](5, 6)
    for mask in (hidden, torch.zeros(5, 6).double().masked_fill(hidden, -torch.inf)):
        for attn_mask in (mask, mask.expand(6, -1, -1)):
            for key_padding_mask in (None, padding if mask is hidden else added):
                options = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
                expected, _ = old(query, key, key, **options)
                got, _ = new[0](query, key, key, **options)
                seen = ~expected.isnan()  # of a query that sees no key
                torch.testing.assert_close(got[seen], expected[seen])
    single = key[0] if batch_first else key[:, 0]
    hidden = ~PAIRS[name](6, 6)
    expected, _ = old(single, single, single, attn_mask=hidden)
    torch.testing.assert_close(new[0](single, single, single, attn_mask=hidden)[0], expected)


def test_masks_of_each_batch_element_and_head() -> None:
    old = nn.MultiheadAttention(8, 2, batch_first=True).double()
    new = copy.deepcopy(nn.Sequential(old))
    replace(new, attention="kvt", k=6)
    x = torch.randn(3, 6, 8).double()
    hidden = torch.ones(6, 6, 6, dtype=torch.bool)
    for i, each in enumerate(hidden):
        each.fill_(True).masked_fill_(PAIRS["window"](6, 6).roll(i % 3, 0), False)
    expected, _ = old(x, x, x, attn_mask=hidden)
    torch.testing.assert_close(new[0](x, x, x, attn_mask=hidden)[0], expected)
    empty, none = x[:0], hidden[:0]
    assert new[0](empty, empty, empty, attn_mask=none)[0].shape == (0, 6, 8)


@pytest.mark.parametrize("need_weights", [False, True])
def test_is_causal_of_multihead_attention(need_weights: bool) -> None:
    """The mask is not read; with more keys than queries, it is of the first ones."""
    old = nn.MultiheadAttention(8, 2, batch_first=True).double()
    new = copy.deepcopy(nn.Sequential(old))
    replace(new, attention="kvt", k=7)
    for N, M in ((5, 5), (5, 7), (7, 5)):
        query, key = torch.randn(2, N, 8).double(), torch.randn(2, M, 8).double()
        options = {"attn_mask": ~PAIRS["causal"](N, M), "need_weights": need_weights}
        expected, _ = old(query, key, key, is_causal=True, **options)
        got, _ = new[0](query, key, key, is_causal=True, **options)
        torch.testing.assert_close(got, expected)
        options["attn_mask"] = torch.rand(N, M) < 0.5
        assert torch.equal(new[0](query, key, key, is_causal=True, **options)[0], got)


@pytest.mark.quick_one_in(5)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("training", [False, True])
def test_causal_transformer_encoder(training: bool, is_causal: bool | None) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().train(training)
    x = torch.randn(2, 6, 8).double()
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    padding = torch.zeros(2, 6, dtype=torch.float64)
    padding[1, 4:] = -torch.inf
    expected = model(x, mask, is_causal=is_causal)
    padded = model(x, mask, padding, is_causal=is_causal)
    done = replace(model, attention="kvt", k=6)
    assert list(done.swapped) == ["layers.0.self_attn", "layers.1.self_attn"]
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask, is_causal=is_causal), expected)
        torch.testing.assert_close(model(x, mask, padding, is_causal=is_causal), padded)
    if is_causal is True:
        torch.compiler.reset()
        compiled = torch.compile(model.layers[0], fullgraph=True, backend="aot_eager")
        y = model.layers[0](x, mask, is_causal=True)
        torch.testing.assert_close(compiled(x, mask, is_causal=True), y)


@pytest.mark.parametrize("tgt_is_causal", [None, True])
def test_transformer_decoder(tgt_is_causal: bool | None) -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).double()
    x, memory = torch.randn(2, 5, 8).double(), torch.randn(2, 6, 8).double()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    expected = model(x, memory, mask, tgt_is_causal=tgt_is_causal)
    without = model(x, memory)
    done = replace(model, attention="kvt", k=6)
    assert not done.left
    names = ("layers.0.self_attn", "layers.0.multihead_attn")
    assert set(names) < set(done.swapped)
    torch.testing.assert_close(model(x, memory, mask, tgt_is_causal=tgt_is_causal), expected)
    torch.testing.assert_close(model(x, memory), without)


def test_a_shared_layer_remains_shared() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), nn.Sequential(conv))
    replace(model, conv2d="convnn")
    assert isinstance(model[0], ConvNN2d)
    assert model[0] is model[2][0]


def test_attention_that_is_not_recognized_is_named() -> None:
    class InnerAttention(nn.Module):
        pass

    class OuterAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = InnerAttention()

    model = nn.Sequential(OuterAttention(), EncoderBlock(), ConvNNAttention(8))
    done = replace(model, attention="convnn", k=3)
    assert done.swapped == {"1.self_attention": "ConvNNAttention"}
    assert done.left == {"0.inner": "not an attention layer of a known form"}


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


class ChannelAttention(FusedAttention):
    """Attention between channels, with the parts of attention between tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (self.scale * q.mT @ k).softmax(-1)  # [B, heads, d, d]
        return self.proj((v @ weights.mT).transpose(1, 2).flatten(2))


class PairAttention(FusedAttention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x.new_ones(len(x), self.num_heads, x.shape[1], x.shape[1])


def test_frozen_remains_frozen_and_a_hook_is_a_reason() -> None:
    """Row 5."""
    hooked = nn.TransformerEncoderLayer(16, 2, batch_first=True).requires_grad_(False)
    hooked.self_attn.register_forward_hook(lambda *_: None)
    frozen = nn.TransformerEncoderLayer(16, 2, batch_first=True).requires_grad_(False)
    model = nn.ModuleDict({"hooked": hooked, "frozen": frozen})
    done = replace(model, attention="kvt", k=5)
    assert list(done.swapped) == ["frozen.self_attn"]
    assert done.left == {"hooked.self_attn": "its forward hooks would be lost"}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_subclass_of_linear_is_a_reason() -> None:
    """Row 6."""

    class Lora(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 9.0

    model = Vit()
    model.blocks[0]["attn"].qkv = Lora(8, 24)
    model.blocks[1]["attn"].proj = Lora(8, 8)
    done = replace(model, attention="kvt", k=5)
    assert done.left == {
        "blocks.0.attn": "its qkv is a Lora, not a Linear",
        "blocks.1.attn": "its proj is a Lora, not a Linear",
    }


def test_what_only_looks_like_attention_is_left() -> None:
    """Row 7."""
    model = nn.Sequential(ChannelAttention(), PairAttention())
    done = replace(model, attention="kvt", k=5)
    assert not done.swapped
    assert re.fullmatch(r"its result .* is not that of attention: off by \d+.\d%", done.left["0"])
    assert done.left["1"] == "it also returns attention weights"


class SeparateAttention(nn.Module):
    """Attention in the style of transformers: ViT, or BERT where the output is elsewhere."""

    def __init__(self, width: int = 8, names: str = "q_proj k_proj v_proj", out: str = "") -> None:
        super().__init__()
        self.num_attention_heads = 2
        self.scaling = (width // 2) ** -0.5
        self.attention_dropout = 0.1
        self.names = names.split()
        self.out = out
        for name in filter(None, [*self.names, out]):
            self.add_module(name, nn.Linear(width, width))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        q, k, v = (
            self.get_submodule(name)(hidden_states).unflatten(-1, (2, -1)).transpose(1, 2)
            for name in self.names
        )
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, scale=self.scaling)
        y = y.transpose(1, 2).flatten(2)
        return self.get_submodule(self.out)(y) if self.out else y, None


@pytest.mark.parametrize(
    ("names", "out"),
    [
        ("q_proj k_proj v_proj", "o_proj"),
        ("query key value", ""),
        ("q_lin k_lin v_lin", "out_lin"),
    ],
)
def test_separate_projections(names: str, out: str) -> None:
    old = SeparateAttention(8, names, out).double().eval()
    old.get_submodule(names.split()[0]).requires_grad_(False)
    model = nn.ModuleDict({"attention": old})
    parameters = {id(p): p.requires_grad for p in model.parameters()}
    done = replace(model, attention="kvt", k=7)
    assert done.swapped == {"attention": "ConvNNAttention"}
    new = model["attention"]
    x = torch.randn(2, 7, 8).double()
    y, weights = new(x)
    assert weights is None
    torch.testing.assert_close(y, old(x)[0])
    assert {id(p): p.requires_grad for p in model.parameters()} == parameters
    assert new.layer.dropout.p == 0.1


def test_masks_of_separate_projections() -> None:
    old = SeparateAttention().double().eval()
    model = nn.ModuleDict({"attention": old})
    replace(model, attention="kvt", k=7)
    new, x = model["attention"], torch.randn(2, 7, 8).double()
    allowed = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    allowed[1, ..., 4:] = False
    added = torch.zeros(2, 1, 1, 7).double().masked_fill(~allowed, -torch.inf)
    for mask in (allowed, allowed.expand(2, 1, 7, 7), added, allowed[1].expand(1, 1, 7, 7)):
        expected, _ = old(hidden_states=x, attention_mask=mask)
        torch.testing.assert_close(new(hidden_states=x, attention_mask=mask)[0], expected)
        torch.testing.assert_close(new(x, mask, is_causal=False, cache=None)[0], expected)
    pairs = torch.stack([torch.ones(7, 7).tril(), torch.ones(7, 7).triu(-2).tril(2)]).bool()
    causal = torch.zeros(7, 7).double().masked_fill(~pairs[0], torch.finfo(torch.float64).min)
    for mask in (pairs[0], pairs[1], pairs.unsqueeze(1), pairs.unsqueeze(1) & allowed, causal):
        expected, _ = old(x, mask)
        seen = ~expected.isnan()
        torch.testing.assert_close(new(x, mask)[0][seen], expected[seen])
    see = "attention_mask must let each query see the keys of one range, less some that it hides"
    for mask, message in (
        (torch.eye(7) == 0, see),
        (torch.rand(2, 1, 1, 7), see),
        (torch.rand(2, 1, 7, 7), see),
        (allowed.expand(2, 2, 7, 7), r"attention_mask must be None or have shape .*, got \[2, 2"),
        (allowed[:, 0], r"attention_mask must be None or have shape .*, got \[2, 1, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            new(x, mask)
    with pytest.raises(ValueError, match="is_causal must be None or False, got True"):
        new(x, is_causal=True)


def changed(change: Callable[[nn.Module], object], layer: nn.Module | None = None) -> nn.Module:
    layer = FusedAttention() if layer is None else layer
    change(layer)
    return layer


class Lora(nn.Linear):
    pass


class Sharded(nn.Parameter):
    pass


class Rope(FusedAttention):
    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Maps(FusedAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2).mT).mT.unflatten(-1, x.shape[2:])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            changed(lambda layer: layer.register_forward_pre_hook(lambda *_: None)),
            "its forward pre-hooks would be lost",
        ),
        (
            changed(lambda layer: layer.qkv.register_full_backward_hook(lambda *_: None)),
            "the backward hooks of its qkv would be lost",
        ),
        (
            changed(lambda layer: layer.register_state_dict_post_hook(lambda *_: None)),
            "its state_dict hooks would be lost",
        ),
        (
            changed(lambda layer: layer.proj.weight.register_hook(lambda grad: grad)),
            "the hooks of its proj.weight would be lost",
        ),
        (
            changed(lambda layer: parametrizations.weight_norm(layer.qkv)),
            "its qkv is parametrized",
        ),
        (
            changed(lambda layer: setattr(layer, "forward", lambda x: x)),
            "it has a forward of its own instance",
        ),
        (changed(lambda layer: layer.compile()), "it is compiled: swap first, then compile"),
        (
            changed(lambda layer: setattr(layer, "q_proj", Lora(8, 8)), SeparateAttention()),
            "its q_proj is a Lora, not a Linear",
        ),
        (
            changed(lambda layer: setattr(layer, "v_proj", nn.Linear(8, 4)), SeparateAttention()),
            "heads whose widths do not add up to that of the tokens",
        ),
        (
            changed(lambda layer: setattr(layer, "is_decoder", True), SeparateAttention()),
            "it is part of a decoder, which may pass it other keys",
        ),
        (
            changed(lambda layer: layer.register_buffer("index", torch.zeros(3))),
            "its index would be lost",
        ),
        (
            changed(lambda layer: setattr(layer, "attn_drop", nn.AlphaDropout())),
            "its attn_drop is a AlphaDropout, not a Dropout",
        ),
        (
            changed(lambda layer: setattr(layer.qkv, "weight", Sharded(torch.zeros(24, 8)))),
            "its qkv.weight is a Sharded",
        ),
        (Rope(), "its forward takes rope"),
        (
            Maps(),
            "it cannot be called with tokens alone: mat1 and mat2 shapes cannot be multiplied "
            "(16x5 and 8x24)",
        ),
        (
            changed(lambda layer: layer.register_forward_hook(print), nn.MultiheadAttention(8, 2)),
            "its forward hooks would be lost",
        ),
        (
            changed(
                lambda layer: setattr(layer, "out_proj", Lora(8, 8)), nn.MultiheadAttention(8, 2)
            ),
            "its out_proj is a Lora, not a Linear",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_to_leave_attention(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer)
    assert replace(model, attention="kvt", k=5).left == {"0": reason}
    assert model[0] is layer


@pytest.mark.parametrize("conv2d", ["convnn", "hybrid", ConvNN2d.from_conv2d])
def test_additions_to_a_convolution_are_a_reason(conv2d: object) -> None:
    layers = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)))
    layers[0].register_forward_hook(lambda *_: None)
    parametrizations.weight_norm(layers[1])
    layers[2].forward = layers[2].forward
    layers[4].weight = layers[3].weight
    done = replace(layers, conv2d=conv2d)
    assert done.left == {
        "0": "its forward hooks would be lost",
        "1": "it is parametrized",
        "2": "it has a forward of its own instance",
        "3": "its weight is shared with another layer",
        "4": "its weight is shared with another layer",
    }


def test_a_function_that_returns_no_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    done = replace(model, conv2d=lambda conv: None if conv is model[0] else nn.Sequential())
    assert done.left == {"0": "its function returned a NoneType, not a module"}
    assert done.swapped == {"1": "Sequential"}


def test_separate_projections_learn_as_convnn() -> None:
    model = nn.Sequential(SeparateAttention(8, "query key value"))
    replace(model, attention="convnn", k=3)
    model(torch.randn(2, 7, 8))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (model[0].layer.metric, model[0].layer.output_projection) == ("cosine", None)


def test_a_compiled_layer_is_left() -> None:
    model = nn.Sequential(torch.compile(FusedAttention(), backend="eager"))
    done = replace(model, attention="kvt")
    assert done.left == {"0._orig_mod": "it is compiled: swap first, then compile"}


def test_a_frozen_fused_projection_remains_frozen() -> None:
    for attention in ("kvt", "convnn"):
        model = Vit()
        model.blocks[0]["attn"].requires_grad_(False)
        model.blocks[1]["attn"].qkv.bias.requires_grad_(False)
        replace(model, attention=attention)
        assert not any(p.requires_grad for p in model.blocks[0].parameters())
        frozen = [n for n, p in model.blocks[1].named_parameters() if not p.requires_grad]
        assert frozen == [
            f"attn.layer.{name}_projection.bias" for name in ("query", "key", "value")
        ]


def test_modes_of_parts_remain() -> None:
    model = nn.Sequential(FusedAttention().train())
    model[0].proj_drop.eval()
    replace(model, attention="kvt")
    assert (model[0].training, model[0].layer.dropout.training) == (True, True)
    assert not model[0].proj_drop.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_probe_leaves_no_trace(dtype: torch.dtype) -> None:
    class Noisy(FusedAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(len(x), 1, 1)

    layer = Noisy(norm=lambda _: nn.BatchNorm2d(2)).to(dtype).train()
    state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        done = replace(nn.Sequential(layer), attention="kvt")
    assert done.left["0"].startswith("its result for a random input is not that of attention")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in layer.modules())
    assert all(p.grad is None for p in layer.parameters())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("attention", ["kvt", "convnn"])
def test_a_layer_of_zeros_and_a_layer_on_the_meta_device(attention: str) -> None:
    """What is compared does not depend on the values of the weights."""
    zeros = nn.Sequential(ChannelAttention(), FusedAttention())
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    assert list(replace(zeros, attention=attention).swapped) == ["1"]
    with torch.device("meta"):
        model = nn.Sequential(ChannelAttention(), FusedAttention())
        assert list(replace(model, attention=attention).swapped) == ["1"]
    assert all(p.is_meta for p in model.parameters())


def test_swapped_layers_are_not_swapped_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), FusedAttention(), SeparateAttention())
    assert len(replace(model, conv2d="hybrid", attention="kvt").swapped) == 3
    again = replace(model, conv2d="hybrid", attention="kvt")
    assert (again.swapped, again.left) == ({}, {})


def test_a_shared_part_of_a_layer_is_a_reason() -> None:
    """A fused projection becomes three, which would no longer be tied to its other uses."""
    tied = nn.Sequential(FusedAttention(), FusedAttention())
    tied[1].qkv = tied[0].qkv
    with_head = nn.ModuleDict({"attention": FusedAttention()})
    with_head["head"] = with_head["attention"].qkv
    reason = "its qkv is shared with another module"
    assert replace(tied, attention="kvt").left == {"0": reason, "1": reason}
    assert replace(with_head, attention="kvt").left == {"attention": reason}


def test_what_may_be_shared() -> None:
    """A whole layer, and parts without parameters."""
    layer = FusedAttention()
    other = FusedAttention()
    other.attn_drop = layer.attn_drop
    model = nn.Sequential(layer, nn.Sequential(layer), other)
    assert list(replace(model, attention="kvt").swapped) == ["0", "1.0", "2"]
    assert model[0] is model[1][0]


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_shared_layer_that_one_place_must_keep_is_left(compiled_first: bool) -> None:
    layer = FusedAttention()
    places = [layer, nn.Sequential(torch.compile(layer, backend="eager")), FusedAttention()]
    model = nn.Sequential(*(places[1::-1] if compiled_first else places[:2]), places[2])
    plain, compiled = ("1", "0.0._orig_mod") if compiled_first else ("0", "1.0._orig_mod")
    done = replace(model, attention="kvt")
    assert done.left == {
        compiled: "it is compiled: swap first, then compile",
        plain: "it is shared with a place where it is left",
    }
    assert list(done.swapped) == ["2"]
    assert model[int(plain)] is layer


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.MultiheadAttention])
@pytest.mark.parametrize(
    ("add", "name"),
    [
        (lambda layer: layer.register_buffer("mask", torch.ones(2)), "mask"),
        (lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(2))), "gain"),
        (lambda layer: layer.add_module("lora", nn.Linear(2, 2)), "lora"),
    ],
)
def test_extra_parts_of_plain_layers_are_a_reason(
    kind: type[nn.Module], add: Callable[[nn.Module], object], name: str
) -> None:
    model = nn.Sequential(FusedAttention(), nn.MultiheadAttention(8, 2), nn.Conv2d(3, 3, 3, 1, 1))
    at = {nn.Linear: "0", nn.MultiheadAttention: "1", nn.Conv2d: "2"}[kind]
    add(model[0].qkv if kind is nn.Linear else model[int(at)])
    its = f"qkv.{name}" if kind is nn.Linear else name
    for conv2d in (ConvNN2d.from_conv2d, "hybrid"):
        done = replace(copy.deepcopy(model), attention="kvt", conv2d=conv2d)
        assert done.left == {at: f"its {its} would be lost"}


def test_an_alias_of_a_weight_is_a_reason() -> None:
    model = nn.Sequential(FusedAttention(), nn.Conv2d(3, 3, 3, padding=1))
    model[0].table = model[0].qkv.weight
    model[1].kernel = model[1].weight
    done = replace(model, attention="kvt", conv2d="hybrid")
    assert done.left == {
        "0": "its table is shared with another layer",
        "1": "its kernel would be lost",
    }


def test_a_convolution_whose_weight_is_a_tensor_is_left() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight
    done = replace(nn.Sequential(conv), conv2d="convnn")
    assert done.left == {"0": "its weights are frozen, and new ones would be random"}


def test_a_complex_convolution_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, dtype=torch.complex64))
    for conv2d in ("convnn", "hybrid"):
        assert replace(model, conv2d=conv2d).left == {"0": "dtype torch.complex64"}


class Masked(FusedAttention):
    """Attention that reads a bool mask as the mask of what is hidden."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        return super().forward(x, attn_mask)


class OnlyBool(FusedAttention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:
            assert attn_mask.dtype == torch.bool
        return super().forward(x, attn_mask)


class NoMask(FusedAttention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_masks_that_the_old_layer_reads_in_another_way_raise() -> None:
    model = nn.Sequential(Masked(), OnlyBool(), NoMask()).eval()
    old, x = copy.deepcopy(model), torch.randn(2, 7, 8)
    done = replace(model, attention="kvt", k=7)
    assert list(done.swapped) == ["0", "1"]
    assert "is not that of attention" in done.left["2"]
    allowed = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    allowed[1, ..., 4:] = False
    added = torch.zeros(2, 1, 1, 7).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(model[0](x, added), old[0](x, added))
    torch.testing.assert_close(model[1](x, allowed), old[1](x, allowed))
    with pytest.raises(ValueError, match=r"attn_mask must be None or float, .* got torch.bool"):
        model[0](x, allowed)
    with pytest.raises(ValueError, match=r"attn_mask must be None or bool, .* got torch.float32"):
        model[1](x, added)


class WithoutAttnDrop(FusedAttention):
    """Without dropout of the attention, but with dropout after the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class HiddenDropout(WithoutAttnDrop):
    def __init__(self) -> None:
        super().__init__()
        self.dropout_p = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), self.dropout_p, self.training)


def test_dropout_under_another_name_is_a_reason() -> None:
    model = nn.Sequential(HiddenDropout(), WithoutAttnDrop())
    done = replace(model, attention="kvt", k=7)
    assert done.left == {"0": "in training, its result is not that of attention without dropout"}
    assert list(done.swapped) == ["1"]


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_dropout_remains(training: bool) -> None:
    """Monte Carlo dropout: dropout alone is in training mode."""
    model = nn.Sequential(FusedAttention()).train(not training)
    model[0].attn_drop.train(training)
    replace(model, attention="kvt")
    assert model[0].layer.training != training
    assert model[0].layer.dropout.training == training
    assert model[0].layer.dropout.p == 0.1


def test_attention_in_wide_windows_is_left() -> None:
    class Window(FusedAttention):
        def forward(self, x: Tensor) -> Tensor:
            near = torch.arange(x.shape[1])
            return super().forward(x, (near[:, None] - near).abs() < 64)

    done = replace(nn.Sequential(Window()), attention="kvt")
    assert done.left["0"].startswith("its result for 600 tokens is not that of attention")


class Stubborn(FusedAttention):
    """As in LeViT of timm: train returns nothing."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Fixed(FusedAttention):
    """A layer whose parameters cannot be listed."""

    def parameters(self, recurse: bool = True) -> None:  # type: ignore[override]
        raise RuntimeError("no parameters here")


def test_layers_with_methods_of_their_own() -> None:
    model = nn.Sequential(nn.Sequential(Stubborn()), Fixed())
    done = replace(model, attention="kvt")
    assert list(done.swapped) == ["0.0"]
    assert done.left["1"].endswith("no parameters here")


@pytest.mark.parametrize("heads", [0, -1])
def test_a_number_of_heads_that_is_none(heads: int) -> None:
    model = nn.Sequential(changed(lambda layer: setattr(layer, "num_heads", heads)))
    assert replace(model, attention="kvt").left == {"0": f"num_heads {heads}"}


class Lenient(SeparateAttention):
    """As in transformers, where encoders pass their own options on."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states, attention_mask)


def test_options_of_the_encoder_that_change_nothing() -> None:
    model = nn.Sequential(Lenient()).eval()
    x = torch.randn(2, 7, 8)
    expected = model[0](x)[0]
    replace(model, attention="kvt", k=7)
    options = {"return_dict": True, "use_cache": True, "output_hidden_states": True}
    torch.testing.assert_close(model[0](x, **options)[0], expected)
    with pytest.raises(ValueError, match="output_attentions must be None or False"):
        model[0](x, output_attentions=True)


def test_wrong_calls_of_swapped_attention() -> None:
    model = nn.Sequential(Lenient())
    replace(model, attention="kvt", k=7)
    layer, x = model[0], torch.randn(2, 7, 8)
    with pytest.raises(ValueError, match=r"head_mask must be .*, got Tensor of shape \[2, 200\]$"):
        layer(x, head_mask=torch.ones(2, 200))
    with pytest.raises(ValueError, match="attn_mask must be None or False, got Tensor"):
        layer(x, attn_mask=torch.ones(2, 1, 1, 7) == 1)
    with pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"):
        layer(x, None, None, torch.ones(2))
    with pytest.raises(TypeError, match="missing the argument hidden_states"):
        layer()
    with pytest.raises(TypeError, match="several values for the argument attention_mask"):
        layer(x, None, attention_mask=None)
    with pytest.raises(
        ValueError, match=r"hidden_states must have shape \[B, N, 8\], got shape \[7, 8\]"
    ):
        layer(x[0])


def test_swapped_attention_is_one_node_of_a_traced_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.multihead = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fused = FusedAttention()
            self.separate = SeparateAttention()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.multihead(x, x, value=x, need_weights=False)[0]
            x = self.fused(x, attn_mask=mask)
            y, _ = self.separate(hidden_states=x, attention_mask=mask)
            return y

    model = Model().eval()
    replace(model, attention="kvt", k=5)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "multihead",
        "fused",
        "separate",
    ]
    x = torch.randn(2, 7, 8)
    mask = torch.rand(2, 1, 1, 7) < 0.8
    assert torch.equal(traced(x, mask), model(x, mask))


@pytest.mark.parametrize("attention", ["kvt", "convnn"])
def test_swapped_attention_draws_no_random_numbers(attention: str) -> None:
    model = nn.Sequential(FusedAttention(), nn.MultiheadAttention(8, 2), SeparateAttention())
    random = torch.get_rng_state()
    assert len(replace(model, attention=attention).swapped) == 3
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x")])
def test_an_error_of_a_function_leaves_the_model_as_it_was(error: Exception) -> None:
    def make() -> RandomCandidates:
        made.append(1)
        if len(made) == 2:
            raise error
        return RandomCandidates(4)

    made: list[int] = []
    model = nn.Sequential(FusedAttention(), FusedAttention())
    with pytest.raises(type(error), match="x"):
        replace(model, attention="kvt", candidates=make)
    assert all(type(layer) is FusedAttention for layer in model)

    def build(conv: nn.Conv2d) -> nn.Module:
        if conv is convs[1]:
            raise KeyError("x")
        return nn.Identity()

    convs = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    with pytest.raises(KeyError):
        replace(convs, conv2d=build)
    assert all(type(layer) is nn.Conv2d for layer in convs)


def test_candidates_are_not_shared() -> None:
    shared = RandomCandidates(4)
    model = nn.Sequential(FusedAttention(), FusedAttention())
    for make, message in (
        (lambda: shared, r"candidates must .* returns new .*, got RandomCandidates\(4, .*"),
        (lambda: 3, "candidates must .* returns new Candidates for each layer, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(model, attention="kvt", candidates=make)
    assert all(type(layer) is FusedAttention for layer in model)


def test_a_wrapped_model_raises() -> None:
    for name in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        wrapper = type(name, (nn.Sequential,), {})
        for model in (wrapper(FusedAttention()), nn.Sequential(wrapper(FusedAttention()))):
            with pytest.raises(ValueError, match=f"model must not be wrapped .*, got .*{name}"):
                replace(model, attention="kvt")


def test_a_model_that_is_no_module() -> None:
    for model in ("x", nn.Linear, [nn.Linear(2, 2)]):
        with pytest.raises(ValueError, match=r"replace: model must be an nn.Module, got"):
            replace(model, conv2d="convnn")
    with pytest.raises(ValueError, match=r"conv2d must be .*, got Tensor of shape \[3\]"):
        replace(nn.Sequential(), conv2d=torch.zeros(3))
    with pytest.raises(ValueError, match=r"conv2d must be .*, got .* of shape \[3\]"):
        replace(nn.Sequential(), conv2d=torch.zeros(3).numpy())


def test_the_table_of_models_takes_empty_parameters() -> None:
    model = nn.Sequential(FusedAttention())
    model[0].proj_drop.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    swapped, left, off = row(model, {"": torch.randn(2, 7, 8)}).split(" | ")
    assert (swapped, left) == ("1 × ConvNNAttention", "-")
    assert float(off) < 1e-5
