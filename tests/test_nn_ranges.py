# SPDX-License-Identifier: MIT
"""Layers in which a token sees a range of others only: causal, windows, packed sequences."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import allowed_by, one_thread
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, stack_module_state, vmap

import python_ref
from convnn_kernels import functional
from convnn_kernels.functional import Order, segment_ranges, window_ranges
from convnn_kernels.nn import (
    AllCandidates,
    Candidates,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    RandomCandidates,
    SpatialCandidates,
)
from convnn_kernels.nn.ranges import intersection, read_mask

pytestmark = one_thread


def sequence(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def heads(x: Tensor, projection: nn.Linear | None, count: int) -> Tensor:
    assert projection is not None
    return projection(x).unflatten(-1, (count, -1)).transpose(1, 2)


def masked_attention(layer: ConvNNAttention, x: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
    """scaled_dot_product_attention with the projections of a layer."""
    q = heads(x, layer.query_projection, layer.num_heads)
    k = heads(key, layer.key_projection, layer.num_heads)
    v = heads(key, layer.value_projection, layer.num_heads)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return layer.output_projection(y.transpose(1, 2).flatten(2))


# ConvNN1d and ConvNN2d

CAUSAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding": 2},
    "identity": {"projections": "identity", "order": "index"},
    "pixel": {"positional_encoding": "both", "coordinates": "pixel"},
    "self": {"candidates": AllCandidates(include_self=True)},
    "without self": {"candidates": AllCandidates(exclude_self=True)},
    "own similarity": {"candidates": AllCandidates(True, self_similarity=0.3)},
    "every third": {"candidates": SpatialCandidates(stride=3)},
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_layer_does_not_see_the_future(name: str) -> None:
    layer = ConvNN1d(4, 5, k=3, causal=True, **CAUSAL[name]).double()
    x = sequence(2, 4, 12)
    y = layer(x)
    assert y.shape == (2, 5, 12)
    for length in (1, 2, 7):
        torch.testing.assert_close(layer(x[..., :length]), y[..., :length])
        changed = x.clone()
        changed[..., length:] = sequence(2, 4, 12 - length)
        assert torch.equal(layer(changed)[..., :length], y[..., :length])


@pytest.mark.parametrize("name", CAUSAL)
def test_the_neighbors_of_a_causal_layer(name: str) -> None:
    layer = ConvNN1d(4, 5, k=3, causal=True, **CAUSAL[name]).double()
    x = sequence(2, 4, 12)
    shape, padding = (12,), layer.padding
    query, key = layer._query_and_key(x, layer._tokens(x), shape)
    own = torch.arange(12) + padding
    s, I = python_ref.select(
        query,
        key,
        3,
        layer.candidates(shape, padding, x.device),
        own if layer.candidates.include_self or layer.candidates.exclude_self else None,
        order=layer.order,
        key_range=torch.stack([torch.zeros_like(own), own + 1], -1),
        exclude_self=layer.candidates.exclude_self,
    )
    if layer.candidates.self_similarity is not None:
        s = s.masked_fill(I.eq(own.unsqueeze(-1)) & (s != -torch.inf), 0.3)
    similarities, indices = layer.neighbors(x)
    torch.testing.assert_close(similarities, s)
    assert torch.equal(indices, I)


def test_causal_convolution_is_recovered() -> None:
    layer = ConvNN1d(
        4,
        5,
        k=3,
        padding=2,
        projections="coordinates",
        rho="ones",
        metric="euclidean",
        order="index",
        positional_encoding="similarity",
        coordinates="pixel",
        causal=True,
    ).double()
    x = sequence(2, 4, 9)
    expected = F.conv1d(F.pad(x, (2, 0)), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    strided = copy.deepcopy(layer)
    strided.stride = 2
    torch.testing.assert_close(strided(x), expected[..., ::2])


def test_a_causal_map_is_seen_row_by_row() -> None:
    layer = ConvNN2d(3, 3, k=4, padding=1, causal=True).double()
    x = sequence(2, 3, 4, 5)
    y = layer(x)
    changed = x.clone()
    changed[:, :, 2, 3:] = 9.0
    changed[:, :, 3] = -9.0
    got = layer(changed).flatten(2)
    assert torch.equal(got[..., :13], y.flatten(2)[..., :13])
    assert not torch.equal(got, y.flatten(2))


def test_random_candidates_are_those_before() -> None:
    layer = ConvNN1d(4, 4, k=3, causal=True, candidates=RandomCandidates(6))
    _, indices = layer.neighbors(torch.randn(2, 4, 20))
    assert bool((indices <= torch.arange(20).unsqueeze(-1)).all())


# ConvNNAttention


@pytest.mark.parametrize("aggregation", ["sum", "depthwise"])
@pytest.mark.parametrize("window", [None, 1, 4, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_recovered(causal: bool, window: int | None, aggregation: Any) -> None:
    """With k = M; also of the last tokens to a cache, with gradients."""
    layer = ConvNNAttention(
        8, 2, k=11, metric="dot", aggregation=aggregation, causal=causal, window=window
    ).double()
    x = sequence(2, 11, 8).requires_grad_()
    for N in (11, 3, 1):
        query = x[:, -N:]
        allowed = allowed_by(window_ranges(N, 11, window, causal), 11)
        expected = masked_attention(layer, query, x, allowed)
        y = layer(query, x)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        inputs = [x, *(p for name, p in layer.named_parameters() if name != "weight")]
        for a, b in zip(
            torch.autograd.grad(y, inputs, grad),
            torch.autograd.grad(expected, inputs, grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("coordinates", ["unit", "pixel"])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 4}, {"window": 3, "causal": 1}])
def test_the_last_tokens_with_a_cache(options: dict[str, Any], coordinates: Any) -> None:
    """A query has the range and the coordinate of its place among the keys."""
    options = {name: bool(v) if name == "causal" else v for name, v in options.items()}
    layer = ConvNNAttention(
        8, 2, k=3, positional_encoding="both", coordinates=coordinates, **options
    ).double()
    x = sequence(2, 9, 8)
    whole = layer(x)
    for N in (1, 4, 9):
        torch.testing.assert_close(layer(x[:, -N:], x), whole[:, -N:])
    # Queries that lie before all keys see none.
    y = layer(x, x[:, -2:])
    assert y.shape == (2, 9, 8)
    if options.get("causal"):
        assert not y[:, :7].any()


@pytest.mark.parametrize(
    "candidates",
    [
        AllCandidates(),
        AllCandidates(include_self=True),
        AllCandidates(include_self=True, self_similarity=0.3),
        AllCandidates(exclude_self=True),
    ],
    ids=repr,
)
def test_growing_sequence_token_by_token(candidates: Candidates) -> None:
    layer = ConvNNAttention(
        *(8, 2, 3),
        causal=True,
        window=5,
        positional_encoding="similarity",
        coordinates="pixel",
        candidates=candidates,
    ).double()
    x = sequence(2, 12, 8)
    whole = layer(x)
    for end in range(1, 13):
        step = layer(x[:, end - 1 : end], x[:, :end])
        torch.testing.assert_close(step, whole[:, end - 1 : end])


def test_a_window_of_one_sees_the_token_itself() -> None:
    layer = ConvNNAttention(8, 2, k=3, window=1)
    _, indices = layer.neighbors(torch.randn(2, 6, 8))
    assert torch.equal(indices[..., 0], torch.arange(6).expand(2, 2, 6))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 4}]
)
@pytest.mark.parametrize("self_given", [False, True])
def test_packed_sequences_equal_each_alone(options: dict[str, Any], self_given: bool) -> None:
    candidates = AllCandidates(include_self=self_given)
    layer = ConvNNAttention(8, 2, k=4, candidates=candidates, **options)
    lengths = [5, 1, 0, 9, 16]
    x = torch.randn(2, sum(lengths), 8)
    packed = layer(x, key_range=segment_ranges(lengths))
    torch.testing.assert_close(packed, layer(x, key_range=segment_ranges(lengths, **options)))
    alone = torch.cat([layer(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone)


def test_ranges_of_each_batch_element_and_head() -> None:
    layer = ConvNNAttention(8, 2, k=9, metric="dot", aggregation="sum").double()
    x = sequence(3, 9, 8)
    for shape in ((9, 2), (3, 9, 2), (3, 2, 9, 2)):
        ranges = torch.randint(0, 10, shape).sort(-1).values
        ranges[..., 0] = (ranges[..., 0] - 1).clamp(min=0)
        ranges[..., 1] = torch.maximum(ranges[..., 1], ranges[..., 0] + 1)
        allowed = allowed_by(ranges, 9)
        allowed = allowed.unsqueeze(1) if ranges.dim() == 3 else allowed
        y = layer(x, key_range=ranges)
        torch.testing.assert_close(y, masked_attention(layer, x, x, allowed))
        mask = torch.rand(3, 9) < 0.7
        _, indices = layer.neighbors(x, key_mask=mask, key_range=ranges)
        seen = torch.zeros(3, 2, 9, 9, dtype=torch.bool)
        s, _ = layer.neighbors(x, key_mask=mask, key_range=ranges)
        seen.scatter_(-1, indices, s != -torch.inf)
        seen[..., 0] = ((indices == 0) & (s != -torch.inf)).any(-1)
        both = (allowed & mask[:, None, None]).expand(3, 2, 9, 9)
        assert torch.equal(seen, both)


@pytest.mark.parametrize("at", [[5, 3], [-1, 4], [2, 10], [3, 7]])
def test_a_wrong_range_is_not_hidden_by_that_of_the_layer(at: list[int]) -> None:
    """The window and causal leave nothing of them, but their values are wrong."""
    layer = ConvNNAttention(8, 2, k=3, causal=True, window=2)
    ranges = torch.tensor([at]).expand(9, 2)
    x = torch.randn(2, 9, 8)
    if at == [3, 7]:
        assert layer(x, key_range=ranges).shape == (2, 9, 8)
        return
    message = rf"key_range must be 0 <= begin <= end <= 9, got {at[0]} and {at[1]} at"
    with pytest.raises(RuntimeError, match=message):
        layer(x, key_range=ranges)


def test_intersection() -> None:
    given = torch.tensor([[0, 4], [2, 2], [1, 3], [6, 8]])
    own = torch.tensor([[2, 6], [0, 9], [3, 9], [0, 2]])
    got = intersection(given, own, 9)
    expected = [set(range(*a)) & set(range(*b)) for a, b in zip(given, own, strict=True)]
    assert [set(range(*each)) for each in got.tolist()] == expected
    assert bool((got[:, 0] <= got[:, 1]).all())


# exclude_self


@pytest.mark.parametrize(
    "candidates",
    [
        AllCandidates(exclude_self=True),
        RandomCandidates(7, include_self=False, exclude_self=True),
        SpatialCandidates(7, include_self=False, exclude_self=True),
    ],
    ids=lambda each: type(each).__name__,
)
def test_the_token_itself_is_excluded(candidates: Candidates) -> None:
    sequence_layer = ConvNN1d(4, 4, k=3, padding=1, candidates=candidates)
    _, indices = sequence_layer.neighbors(torch.randn(2, 4, 9))
    assert not (indices == torch.arange(1, 10).unsqueeze(-1)).any()
    attention = ConvNNAttention(8, 2, k=3, candidates=candidates)
    x = torch.randn(2, 9, 8)
    s, indices = attention.neighbors(x)
    assert not ((indices == torch.arange(9).unsqueeze(-1)) & (s != -torch.inf)).any()
    # The query is not among the keys of cross-attention.
    attention.neighbors(x, torch.randn(2, 20, 8))
    assert "exclude_self=True" in repr(candidates)
    assert "exclude_self" not in repr(AllCandidates())


def test_the_similarities_without_self() -> None:
    layer = ConvNN1d(4, 4, k=11, projections="identity", candidates=AllCandidates()).double()
    x = sequence(2, 4, 12)
    layer.candidates = AllCandidates(exclude_self=True)
    s, I = layer.neighbors(x)
    S = python_ref.similarity(x.mT, x.mT).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(s, S.sort(-1, descending=True).values[..., :11])
    assert (s != -torch.inf).all()
    assert torch.equal(I.sort(-1).values[0, 3], torch.tensor([*range(3), *range(4, 12)]))


# Transforms, state, settings

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: ConvNN1d(4, 5, k=3, padding=1, causal=True), (3, 4, 12)),
    "2d": (lambda: ConvNN2d(4, 5, k=3, causal=True), (3, 4, 6, 6)),
    "attention": (lambda: ConvNNAttention(8, 2, k=3, causal=True, window=4), (3, 10, 8)),
    "positions": (
        lambda: ConvNNAttention(8, k=3, causal=True, positional_encoding="both"),
        (3, 10, 8),
    ),
    "exclude": (
        lambda: ConvNNAttention(8, 2, k=3, candidates=AllCandidates(exclude_self=True)),
        (3, 10, 8),
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_vmap_over_layers_and_inputs(name: str) -> None:
    make, shape = LAYERS[name]
    layers = [make() for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(shape)
    base = copy.deepcopy(layers[0]).to("meta")
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    expected = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(y, expected)
    each = vmap(lambda one: layers[0](one.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(each, expected[0])


@pytest.mark.slow
@every_layer
def test_compile_with_any_length(name: str) -> None:
    torch.compiler.reset()
    make, shape = LAYERS[name]
    layer = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for length in (12, 16, 21):
        x = torch.randn([length if size in (6, 10, 12) else size for size in shape])
        torch.testing.assert_close(compiled(x), layer(x))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.quick_one_in(5)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_layer
def test_jit_trace(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    traced = torch.jit.trace(layer, x)
    shorter = x[:, :-2] if x.shape[-1] == 8 else x[..., :-2]  # tokens, or a sequence or map
    for inputs in (x, shorter):
        torch.testing.assert_close(traced(inputs), layer(inputs))


def test_fx_keeps_ranges() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ConvNNAttention(8, 2, k=3, causal=True)

        def forward(self, x: Tensor, ranges: Tensor) -> Tensor:
            return self.layer(x, key_range=ranges)

    model, x, ranges = Model(), torch.randn(2, 9, 8), segment_ranges([4, 5])
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x, ranges), model(x, ranges))


@every_layer
def test_state_and_copies(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    other = make()
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
        assert repr(same) == repr(layer)


def test_modules_that_were_pickled_before_there_were_ranges() -> None:
    for layer, x in (
        (ConvNN1d(4, 4, k=3), torch.randn(2, 4, 9)),
        (ConvNNAttention(8, 2, k=3), torch.randn(2, 9, 8)),
    ):
        old = copy.deepcopy(layer)
        for module in old.modules():
            for name in ("causal", "window", "exclude_self"):
                vars(module).pop(name, None)
        assert torch.equal(old(x), layer(x))
        assert repr(old) == repr(layer)


def test_what_layers_show() -> None:
    assert "causal=True" in repr(ConvNN1d(4, 4, causal=True))
    assert "causal" not in repr(ConvNN1d(4, 4))
    attention = repr(ConvNNAttention(8, window=np.int64(4), causal=np.bool_(True)))
    assert "window=4, causal=True" in attention
    assert "window" not in repr(ConvNNAttention(8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNN1d(4, 4, causal=1), "ConvNN1d: causal must be True or False, got 1"),
        (
            lambda: ConvNN1d(4, 4, causal=True, standardize=True, positional_encoding="both"),
            "ConvNN1d: standardize must be False with causal=True, .*, got True",
        ),
        (lambda: ConvNNAttention(8, causal="no"), "ConvNNAttention: causal must be True or False"),
        (
            lambda: ConvNNAttention(8, window=0),
            "ConvNNAttention: window must be a whole number of at least 1, got 0",
        ),
        (
            lambda: AllCandidates(True, exclude_self=True),
            "AllCandidates: include_self must be False with exclude_self=True, got True",
        ),
        (
            lambda: RandomCandidates(4, exclude_self=True),
            "RandomCandidates: include_self must be False with exclude_self=True, got True",
        ),
        (
            lambda: AllCandidates(exclude_self=None),
            "AllCandidates: exclude_self must be True or False, got None",
        ),
    ],
)
def test_wrong_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (torch.zeros(8, 2).long(), r"key_range must have shape \[9, 2\], got shape \[8, 2\]"),
        (torch.zeros(18).long(), r"key_range must have shape \[9, 2\], got shape \[18\]"),
        (
            torch.zeros(3, 9, 2).long(),
            r"key_range must have shape \[2, 9, 2\], got shape \[3, 9, 2\]",
        ),
        (torch.zeros(2, 3, 9, 2).long(), r"key_range must have shape \[2, 4, 9, 2\], got"),
        (torch.zeros(9, 2), "key_range must be int64, got float32"),
        ([[0, 2]] * 9, "key_range must be a tensor, got"),
    ],
)
def test_wrong_ranges(ranges: Any, message: str) -> None:
    for causal in (False, True):
        layer = ConvNNAttention(8, 4, k=3, causal=causal)
        for call in (layer, layer.neighbors):
            with pytest.raises(ValueError, match=f"ConvNNAttention: {message}"):
                call(torch.zeros(2, 9, 8), key_range=ranges)


# Masks that are ranges


@pytest.mark.parametrize("is_bool", [True, False])
def test_masks_are_read_as_ranges_and_keys(is_bool: bool) -> None:
    for _ in range(50):
        batch, H, N, M = (int(torch.randint(1, n, ())) for n in (4, 3, 6, 7))
        ranges = torch.randint(0, M + 1, (batch, H, N, 2)).sort(-1).values
        keys = torch.rand(batch, 1, 1, M) < 0.7
        allowed = allowed_by(ranges, M) & keys
        added = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        seen = read_mask("attn_mask", allowed if is_bool else added, batch, N)
        got = torch.ones(batch, H, N, M, dtype=torch.bool)
        if seen.key_mask is not None:
            assert seen.key_mask.shape == (batch, M)
            got &= seen.key_mask[:, None, None]
        if seen.key_range is not None:
            by_range = allowed_by(seen.key_range, M)
            got &= by_range.unsqueeze(1) if seen.key_range.dim() == 3 else by_range
        assert torch.equal(got, allowed)


def test_the_simplest_form_of_a_mask() -> None:
    padding = torch.ones(3, 1, 1, 6, dtype=torch.bool)
    padding[1, ..., 2] = False
    for mask in (padding, padding.expand(3, 2, 4, 6)):
        seen = read_mask("attn_mask", mask, 3, 4)
        assert torch.equal(seen.key_mask, padding[:, 0, 0])
        assert seen.key_range is None
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    seen = read_mask("attn_mask", causal[None, None], 3, 4)
    assert seen.key_mask is None
    assert torch.equal(seen.key_range, window_ranges(4, causal=True))
    for mask in (causal[None, None].expand(3, 1, 4, 4), causal.expand(3, 2, 4, 4)):
        seen = read_mask("attn_mask", mask, 3, 4)
        assert seen.key_range.shape == (3, 4, 2) if mask.shape[1] == 1 else (3, 2, 4, 2)


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 1]]).bool(),
        torch.tensor([[0.0, -5.0], [0.0, 0.0]]),
        torch.tensor([[0.0, -9.0], [0.0, -9.0]]),
        torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        torch.tensor([[0.0, torch.nan], [0.0, 0.0]]),
    ],
)
def test_other_masks_and_biases_raise(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"m must let each query see the keys of one range, .*"):
        read_mask("m", mask[None, None], 1, len(mask))


def test_a_mask_without_elements() -> None:
    seen = read_mask("m", torch.ones(2, 1, 0, 0, dtype=torch.bool), 2, 0)
    assert (seen.key_mask, seen.key_range) == (None, None)


@pytest.mark.parametrize("order", ["similarity", "index"])
def test_missing_neighbors_at_the_beginning(order: Order) -> None:
    """The first tokens have fewer than k: the last taps of the weight are not used."""
    layer = ConvNNAttention(
        6, k=3, causal=True, projections="identity", aggregation="dense", order=order
    )
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 5, 6)
    first = functional.convnn(x[:, :1], x[:, :1], x[:, :1], 1, layer.weight[..., :1].contiguous())
    torch.testing.assert_close(layer(x)[:, :1], layer.output_projection(first))
