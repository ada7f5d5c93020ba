# SPDX-License-Identifier: MIT
"""Whether a layer computes attention, seen from its results."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convnn_kernels.nn.adapters import MultiheadAdapter, SelfAttentionAdapter, Target
from convnn_kernels.nn.replaceable import CannotReplaceError

Adapter = type[MultiheadAdapter] | type[SelfAttentionAdapter]
TOLERANCE = 1e-4  # of the largest output; float32 is accurate to 1e-6


def require_attention(old: nn.Module, adapter: Adapter) -> int:
    """Compares a layer with its adapter in the setting that is attention: k = N, no weight.

    It is a copy of the layer that is called: in float32 on the CPU, in eval mode, with random
    weights, since those of the layer may be zero. Layer and random number generators remain as
    they are.

    Returns:
        The length of the tuple that the layer returns; 0 if it returns a tensor.

    Raises:
        CannotReplaceError: if the results differ, or the layer cannot be called with tokens alone.
    """
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=cpu, dtype=torch.float32)

    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.no_grad(),
    ):
        twin = _attempt("it cannot be copied to the CPU", _copy_to_cpu, old)
        for parameter in twin.parameters():
            inputs = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(draw(*parameter.shape) / inputs**0.5)
        new = adapter(twin, Target(1, is_plain=True)).eval()
        for keys, args, options in adapter.probes(twin, draw):
            expected = _attempt("it cannot be called with tokens alone", twin, *args, **options)
            new.outputs = _number_of_outputs(expected)
            new.layer.k = keys
            got = _attempt("its swapped form fails", new, *args, **options)
            _require_equal(*(each[0] if new.outputs else each for each in (got, expected)))
    return new.outputs


def _copy_to_cpu(old: nn.Module) -> nn.Module:
    twin = copy.deepcopy(old)
    if any(parameter.is_meta for parameter in twin.parameters()):
        twin.to_empty(device="cpu")
    return twin.to("cpu", torch.float32).eval()


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


def _require_equal(got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape:
        shapes = f"{list(expected.shape)}, not {list(got.shape)}"
        raise CannotReplaceError(f"its result is not that of attention: it has shape {shapes}")
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise CannotReplaceError(
            f"its result for a random input is not that of attention: off by {error:.1%}"
        )
