# SPDX-License-Identifier: MIT
"""Replacing causal self-attention, in the styles of GPT-2 and of transformers."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import one_thread
from torch import Tensor, nn

from convnn_kernels.nn import ConvNNAttention, RandomCandidates, replace

pytestmark = one_thread


class Conv1D(nn.Module):
    """The linear layer of transformers' GPT-2, whose weight is transposed."""

    __module__ = "transformers.pytorch_utils"
    __qualname__ = "Conv1D"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Gpt2(nn.Module):
    """As in transformers: a mask takes the place of is_causal."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.num_heads = 2
        self.scaling = (width // 2) ** -0.5 / 2
        self.c_attn = Conv1D(3 * width, width)
        self.c_proj = Conv1D(width, width)
        self.attn_dropout = nn.Dropout(0.1)
        self.resid_dropout = nn.Dropout(0.2)
        self.is_causal = True

    def forward(
        self,
        hidden_states: Tensor,
        cache: object = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = (split(each, 2) for each in self.c_attn(hidden_states).chunk(3, -1))
        is_causal = kwargs.get("is_causal")
        is_causal = self.is_causal if is_causal is None else is_causal
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attention_mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=is_causal and attention_mask is None,
            scale=self.scaling,
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2))), None


class Bidirectional(Gpt2):
    """As in CLIP: causal only if it is called so."""

    def __init__(self) -> None:
        super().__init__()
        self.is_causal = False


class NanoGpt(nn.Module):
    """Always causal, with tokens as the only argument."""

    def __init__(self, window: int | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.c_attn = nn.Linear(8, 24, bias=False)
        self.c_proj = nn.Linear(8, 8, bias=False)
        self.attn_dropout = nn.Dropout(0.1)
        self.resid_dropout = nn.Dropout(0.1)
        self.n_head, self.n_embd, self.dropout = 2, 8, 0.1
        self.window, self.transposed = window, transposed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(each, 2) for each in self.c_attn(x).chunk(3, -1))
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.window is not None:
            allowed = allowed.triu(1 - self.window)
        allowed = allowed.T if self.transposed else allowed
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, allowed, dropout)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def swapped(old: nn.Module, **settings: Any) -> Any:
    """A swapped copy of the layer."""
    model = nn.Sequential(copy.deepcopy(old))
    done = replace(model, **{"attention": "kvt", "k": 7, **settings})
    assert done.swapped == {"0": "ConvNNAttention"}
    return model[0]


def first(result: Tensor | tuple[Tensor, None]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("kind", [Gpt2, NanoGpt])
def test_a_causal_layer(kind: type[nn.Module]) -> None:
    old = kind().double().eval()
    new = swapped(old)
    x = torch.randn(2, 7, 8).double().requires_grad_()
    y, expected = first(new(x)), first(old(x))
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, grad)[0])
    assert new.is_causal
    # With fewer neighbors, it still does not see the future.
    few = swapped(old, attention="convnn", k=3)
    changed = torch.cat([x[:, :4], torch.randn(2, 3, 8).double()], 1)
    assert torch.equal(first(few(changed))[:, :4], first(few(x))[:, :4])
    parts = (few.layer.dropout.p, few.proj_drop.p)
    assert parts == ((0.1, 0.2) if kind is Gpt2 else (0.1, 0.1))


@pytest.mark.parametrize("kind", [Gpt2, Bidirectional])
def test_a_mask_or_is_causal_takes_the_place_of_the_default(kind: type[nn.Module]) -> None:
    old = kind().double().eval()
    new = swapped(old)
    x = torch.randn(2, 7, 8).double()
    assert not torch.allclose(old(x, is_causal=True)[0], old(x, is_causal=False)[0])
    for is_causal in (None, True, False):
        torch.testing.assert_close(new(x, is_causal=is_causal)[0], old(x, is_causal=is_causal)[0])
    padding = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    padding[1, ..., :2] = False
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    window = causal.triu(-2)
    for allowed in (padding, causal[None, None], window[None, None], causal & padding):
        lowest = torch.finfo(x.dtype).min
        added = torch.zeros(allowed.shape).double().masked_fill(~allowed, lowest)
        for mask in (allowed, added):
            expected, _ = old(x, attention_mask=mask)
            # Where a query sees nothing, the old layer sees all by the lowest number.
            seen = allowed.any(-1).expand(2, 1, 7)[:, 0]
            for flag in ({}, {"is_causal": True}, {"is_causal": False}):
                got, _ = new(x, attention_mask=mask, **flag)
                torch.testing.assert_close(got[seen], expected[seen])
    with pytest.raises(ValueError, match="attention_mask must let each query see the keys of one"):
        new(x, attention_mask=(torch.eye(7) == 0)[None, None])


def test_a_layer_without_dropout_takes_masks() -> None:
    old = Gpt2().eval()
    old.attn_dropout.p = 0.0
    new, x = swapped(old), torch.randn(2, 7, 8)
    window = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril().triu(-2)
    torch.testing.assert_close(new(x, attention_mask=window)[0], old(x, attention_mask=window)[0])


class Timm(Bidirectional):
    """As in timm: PyTorch refuses a mask and is_causal together."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:  # type: ignore[override]
        if attn_mask is not None and is_causal:
            raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
        return super().forward(x, attention_mask=attn_mask, is_causal=is_causal)


def test_a_mask_or_is_causal_but_not_both() -> None:
    old = Timm().eval()
    new, x = swapped(old), torch.randn(2, 7, 8)
    window = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril(1).triu(-2)
    for options in ({}, {"is_causal": True}, {"attn_mask": window, "is_causal": False}):
        torch.testing.assert_close(new(x, **options)[0], old(x, **options)[0])
    with pytest.raises(ValueError, match="is_causal must be None or False with attn_mask, got Tru"):
        new(x, window, True)


class Rotated(Gpt2):
    """With a sine of the position, which is that of the token by default."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        positions = kwargs.pop("position_ids", None)
        if positions is not None:
            default = torch.arange(hidden_states.shape[1])
            hidden_states = hidden_states + (positions - default).sin().unsqueeze(-1)
        return super().forward(hidden_states, **kwargs)


def test_positions_that_have_no_effect() -> None:
    x, positions = torch.randn(2, 7, 8), torch.arange(7).flip(0).unsqueeze(0)
    new = swapped(Gpt2().eval())
    assert torch.equal(new(x, position_ids=positions)[0], new(x)[0])
    for layer in (Rotated(), NanoGpt()):
        new = swapped(layer.eval())
        with pytest.raises(ValueError, match="position_ids must be None or False, got Tensor"):
            new(x, position_ids=positions)


def test_a_conv1d_becomes_linear() -> None:
    old = Gpt2().double()
    old.c_proj.requires_grad_(False)
    old.c_attn.bias.requires_grad_(False)
    layer = swapped(old).layer
    assert isinstance(layer, ConvNNAttention)
    assert torch.equal(layer.output_projection.weight, old.c_proj.weight.T)
    assert torch.equal(layer.output_projection.bias, old.c_proj.bias)
    assert layer.output_projection.weight.is_contiguous()
    names = [name for name, p in layer.named_parameters() if not p.requires_grad]
    assert sorted(names) == [
        "key_projection.bias",
        "output_projection.bias",
        "output_projection.weight",
        "query_projection.bias",
        "value_projection.bias",
    ]
    layer.query_projection.weight.data.zero_()  # a copy
    assert old.c_attn.weight.abs().min() > 0


def test_a_layer_that_is_always_causal_says_so() -> None:
    new, x = swapped(NanoGpt().eval()), torch.randn(2, 7, 8)
    assert torch.equal(new(x, is_causal=True), new(x))
    with pytest.raises(ValueError, match="is_causal must be None or True, got False"):
        new(x, is_causal=False)


def test_a_cache_is_refused_with_a_hint() -> None:
    new, x = swapped(Gpt2().eval()), torch.randn(2, 7, 8)
    with pytest.raises(ValueError, match=r"cache must be None or False \(call the model with use_"):
        new(x, cache=[x])
    assert new(x, use_cache=False)[1] is None


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (NanoGpt(window=3), "its result for a random input is not that of attention: off by"),
        (NanoGpt(window=64), "its result for 600 tokens is not that of attention: off by"),
        (NanoGpt(transposed=True), "its result for a random input is not that of attention"),
    ],
)
def test_other_ranges_of_a_layer_are_a_reason(layer: nn.Module, reason: str) -> None:
    assert replace(nn.Sequential(layer), attention="kvt").left["0"].startswith(reason)


class MaskedTwice(Gpt2):
    """A mask is taken together with the causal one."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        allowed = torch.ones(2 * hidden_states.shape[1:2], dtype=torch.bool).tril()
        if attention_mask is not None:
            if attention_mask.dtype != torch.bool:
                attention_mask = attention_mask == 0
            allowed = allowed & attention_mask
        return super().forward(hidden_states, attention_mask=allowed)


class Adding(Conv1D):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("more", torch.zeros(8))


def test_reasons_to_leave_a_causal_layer() -> None:
    extra, cross = Gpt2(), Gpt2()
    extra.c_proj.register_buffer("more", torch.zeros(8))
    cross.q_attn = Conv1D(8, 8)
    other = Gpt2()
    other.c_proj = Adding()
    model = nn.Sequential(MaskedTwice(), extra, cross, other)
    done = replace(model, attention="kvt")
    assert done.left["0"].startswith("its result for a random input is not that of attention")
    assert done.left["1"] == "its c_proj.more would be lost"
    assert done.left["2"] == "its q_attn would be lost"
    assert done.left["3"] == "its c_proj is a Adding, not a Linear"


class OnlyPadding(Gpt2):
    """A mask is that of the first query."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        mask = None if attention_mask is None else attention_mask[..., :1, :]
        return super().forward(hidden_states, attention_mask=mask)


def test_masks_over_pairs_that_the_old_layer_reads_in_another_way_raise() -> None:
    old = OnlyPadding().eval()
    new, x = swapped(old), torch.randn(2, 7, 8)
    padding = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    padding[1, ..., 4:] = False
    torch.testing.assert_close(new(x, padding)[0], old(x, padding)[0])
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask must mask the same keys for every query,"):
        new(x, causal)


@pytest.mark.slow
def test_a_causal_layer_compiles_and_is_one_node_of_a_traced_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt2, self.plain, self.nano = Gpt2(), Bidirectional(), NanoGpt()

        def forward(self, x: Tensor) -> Tensor:
            x = self.gpt2(x)[0]
            return self.nano(self.plain(x, is_causal=True)[0])

    model, x = Model().eval(), torch.randn(2, 7, 8)
    expected = model(x)
    assert len(replace(model, attention="kvt", k=7).swapped) == 3
    torch.testing.assert_close(model(x), expected)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_with_candidates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NanoGpt())
    replace(model, attention="convnn", k=3, candidates=lambda: RandomCandidates(5))
    model(torch.randn(2, 20, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
