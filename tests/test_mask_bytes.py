# SPDX-License-Identifier: MIT
"""A mask whose bytes are other than 0 and 1 is the mask that PyTorch reads: 0 is False.

Such are ``(mask.to(torch.uint8) * 2).view(torch.bool)``, and masks of other programs, which C++
must not read as bool. The tests of the CUDA kernels on the host and of the Triton kernels in the
interpreter use them, too.
"""

from typing import Any

import pytest
import torch
from inputs import with_any_bytes
from torch import Tensor, nn

from convnn_kernels import native
from convnn_kernels.functional import select_neighbors
from convnn_kernels.nn import ConvNNAttention, replace

# N, M, k, whether the keys are shared by the batch: packed keys, a few queries, folded batches.
SHAPES = {
    "packed": (70, 90, 9, False),
    "few queries": (1, 90, 5, False),
    "shared keys": (70, 90, 9, True),
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("given", ["keys", "self", "candidates"])
@pytest.mark.parametrize("shape", SHAPES)
def test_select(shape: str, given: str, dtype: torch.dtype, instruction_set: str) -> None:
    N, M, k, shared = SHAPES[shape]
    query, key = torch.randn(3, N, 5, dtype=dtype), torch.randn(3, M, 5, dtype=dtype)
    mask = torch.rand(3, M) < 0.6
    if shared:
        key, mask = key[:1].expand(3, -1, -1), mask[:1].expand(3, -1).contiguous()
    options: dict[str, Any] = {
        "keys": {},
        "self": {"self_indices": torch.arange(N)},
        "candidates": {"candidates": torch.randperm(M)[:40], "self_indices": torch.arange(N)},
    }[given]
    with native.use_cpu_instruction_set(instruction_set):
        expected = select_neighbors(query, key, k, key_mask=mask, **options)
        for bytes_of_mask in (with_any_bytes(mask), twos(mask)):
            got = select_neighbors(query, key, k, key_mask=bytes_of_mask, **options)
            assert torch.equal(got[1], expected[1])
            assert torch.equal(got[0], expected[0])


def twos(mask: Tensor) -> Tensor:
    return (mask.to(torch.uint8) * 2).view(torch.bool)


def test_there_are_other_bytes() -> None:
    """The negative control of `with_any_bytes`."""
    mask = torch.rand(3, 50) < 0.6
    given = with_any_bytes(mask)
    assert given.view(torch.uint8).unique().tolist() == [0, 1, 2, 128, 255]
    assert given.tolist() == mask.tolist()


def test_masks_of_layers() -> None:
    x, mask = torch.randn(2, 9, 8), torch.rand(2, 9) < 0.6
    layer = ConvNNAttention(8, 2, k=4)
    assert torch.equal(layer(x, key_mask=with_any_bytes(mask)), layer(x, key_mask=mask))
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    replace(model, attention="kvt", k=4)
    hidden, own = torch.ones(9, 9, dtype=torch.bool).triu(1), mask.clone()
    own[:, 0] = True
    pairs = [
        {"key_padding_mask": ~own},
        {"attn_mask": hidden},
        {"key_padding_mask": ~own, "attn_mask": hidden},
    ]
    for options in pairs:
        given = {name: with_any_bytes(X) for name, X in options.items()}
        assert torch.equal(model[0](x, x, x, **given)[0], model[0](x, x, x, **options)[0])
