# SPDX-License-Identifier: MIT
"""Whether a layer computes attention, seen from its results."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convnn_kernels.functional import window_ranges
from convnn_kernels.nn.adapters import (
    Draw,
    Mask,
    MultiheadAdapter,
    Probe,
    SelfAttentionAdapter,
    Target,
    dropout_of,
)
from convnn_kernels.nn.replaceable import CannotReplaceError

Adapted = MultiheadAdapter | SelfAttentionAdapter
Adapter = type[MultiheadAdapter] | type[SelfAttentionAdapter]
MANY = 600  # tokens, so that attention in windows of fewer is told apart
TOLERANCE = 1e-4  # of the largest output; float32 is accurate to 1e-6


class Seen(NamedTuple):
    """What was seen of a layer's calls; see the attributes of SelfAttentionAdapter."""

    outputs: int
    masks: tuple[Mask, ...]
    is_causal: bool
    reads_is_causal: bool
    ignores_positions: bool

    @classmethod
    def of(cls, adapter: Adapted) -> "Seen":
        return cls(*(getattr(adapter, name) for name in cls._fields))

    def give(self, adapter: Adapted) -> None:
        for name, value in zip(self._fields, self, strict=True):
            setattr(adapter, name, value)


def require_attention(old: nn.Module, adapter: Adapter) -> Seen:
    """Compares a layer with its adapter in the setting that is attention: k = N, no weight.

    It is a copy of the layer that is called: in float32 on the CPU, in eval mode, with random
    weights, since those of the layer may be zero. Layer and random number generators remain as
    they are.

    Returns:
        What the adapter needs to know of the layer's calls.

    Raises:
        CannotReplaceError: if the results differ, or the layer cannot be called with tokens alone.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.no_grad(),
    ):
        twin = _attempt("it cannot be copied to the CPU", _copy_to_cpu, old, draw)
        new = adapter(twin, Target(1, is_plain=True))
        new.eval()
        probes = adapter.probes(twin, draw)
        plain = [probe for probe in probes if probe.mask is None]
        if isinstance(new, SelfAttentionAdapter):
            _require_attention(twin, new, plain)
            masks = _masks(twin, new, probes)
            _require_all_tokens(twin, new, draw)
            _require_no_other_dropout(twin, new, plain[0])
            new.masks = masks
        else:
            for probe in plain:
                _require_same(twin, new, probe)
    return Seen.of(new)


def _copy_to_cpu(old: nn.Module, draw: Draw) -> nn.Module:
    twin = copy.deepcopy(old)
    if any(parameter.is_meta for parameter in twin.parameters()):
        twin.to_empty(device="cpu")
    twin.to("cpu", torch.float32)
    twin.eval()
    for parameter in twin.parameters():
        inputs = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.copy_(draw(*parameter.shape) / inputs**0.5)
    return twin


def _require_attention(twin: nn.Module, new: SelfAttentionAdapter, probes: list[Probe]) -> None:
    """Sees whether a layer is causal, and which options it takes or ignores."""
    reason = _difference(twin, new, *probes)
    if reason is not None:
        new.is_causal = True
        if _difference(twin, new, *probes) is not None:
            new.is_causal = False
            raise reason  # what keeps it from being attention to all tokens
    positions = torch.tensor([[3, 1, 4, 0, 2]])
    for attribute, options in (
        ("reads_is_causal", {"is_causal": not new.is_causal}),
        ("ignores_positions", {"position_ids": positions}),
    ):
        setattr(new, attribute, True)
        difference = _difference(twin, new, probes[0]._replace(options=options))
        setattr(new, attribute, difference is None)


def _difference(twin: nn.Module, new: Adapted, *probes: Probe) -> CannotReplaceError | None:
    """What tells the results of a layer from those of its adapter; None if nothing does."""
    try:
        for probe in probes:
            _require_same(twin, new, probe)
    except CannotReplaceError as reason:
        return reason
    return None


def _require_same(twin: nn.Module, new: Adapted, probe: Probe) -> None:
    what = "it cannot be called with tokens alone"
    expected = _attempt(what, twin, *probe.args, **probe.options)
    new.outputs = _number_of_outputs(expected)
    new.layer.k = probe.keys
    new.masks = () if probe.mask is None else (probe.mask,)
    got = _attempt("its swapped form fails", new, *probe.args, **probe.options)
    _require_equal(*(each[0] if new.outputs else each for each in (got, expected)))


def _masks(twin: nn.Module, new: SelfAttentionAdapter, probes: list[Probe]) -> tuple[Mask, ...]:
    """The kinds of masks that the layer reads as its adapter does; at least one if it has any."""
    masks, reasons = [], []
    for probe in probes:
        if probe.mask is None:
            continue
        reason = _difference(twin, new, probe)
        if reason is None:
            masks.append(probe.mask)
        else:
            reasons.append(reason)
    if reasons and not masks:
        raise reasons[0]
    return tuple(masks)


def _require_all_tokens(twin: nn.Module, new: SelfAttentionAdapter, draw: Draw) -> None:
    """Raises if tokens far from each other are not among the keys; the last queries show it."""
    tokens = draw(1, MANY, new.layer.embed_dim)
    expected = _attempt(f"it cannot be called with {MANY} tokens", twin, tokens)
    new.layer.k = MANY
    key_range = window_ranges(4, MANY, causal=True) if new.is_causal else None
    got = new.layer(tokens[:, -4:], tokens, key_range=key_range)
    _require_equal(got, (expected[0] if new.outputs else expected)[:, -4:], f"for {MANY} tokens")


def _require_no_other_dropout(twin: nn.Module, new: SelfAttentionAdapter, probe: Probe) -> None:
    """Raises if a layer without dropout that is known has another result in training."""
    dropout = dropout_of(twin)
    if (dropout.p if isinstance(dropout, nn.Dropout) else dropout) > 0:
        return
    twin.training = True  # alone: its parts, such as a dropout of its output, are kept
    reason = _difference(twin, new, probe)
    if reason is not None:
        raise CannotReplaceError(
            "in training, its result is not that of attention without dropout"
        ) from reason


def _attempt(what: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return call(*args, **options)
    except Exception as error:
        first_line = [*str(error).splitlines(), type(error).__name__][0]
        raise CannotReplaceError(f"{what}: {first_line}") from error


def _number_of_outputs(result: Any) -> int:
    if isinstance(result, Tensor):
        return 0
    if type(result) is not tuple or not result or not isinstance(result[0], Tensor):
        raise CannotReplaceError(f"it returns a {type(result).__name__}")
    if any(each is not None for each in result[1:]):
        raise CannotReplaceError("it also returns attention weights")
    return len(result)


def _require_equal(got: Tensor, expected: Tensor, where: str = "for a random input") -> None:
    if got.shape != expected.shape:
        shapes = f"{list(expected.shape)}, not {list(got.shape)}"
        raise CannotReplaceError(f"its result is not that of attention: it has shape {shapes}")
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise CannotReplaceError(f"its result {where} is not that of attention: off by {error:.1%}")
