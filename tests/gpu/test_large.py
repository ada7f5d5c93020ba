# SPDX-License-Identifier: MIT
"""More than 2**31 elements, along rows and along columns, and more than 65,535 batch rows."""

import pytest
import torch

ops = torch.ops.convnn
pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.cuda_only]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_more_than_2_31_elements(layout: str, device: torch.device) -> None:
    """For each query one of the last keys is far nearer than all others."""
    N, M, D, k = 64, 2**22 + 5, 520, 3
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": torch.float16}
    query = torch.randint(-3, 4, (N, D), **options)
    shape = (M, D) if layout == "contiguous" else (D, M)
    key = torch.randint(-1, 2, shape, **options)
    key = key if layout == "contiguous" else key.mT
    assert (M - 1) * key.stride(0) + (D - 1) * key.stride(1) >= 2**31
    nearest = M - 1 - 3 * torch.arange(N, device=device)
    key[nearest] = 3 * query.sign()
    s, I = ops.select(query, key, k, metric="dot")
    assert torch.equal(I[:, 0], nearest)
    chosen = key[I.flatten()].view(N, k, D).float()
    assert torch.equal(s, torch.einsum("nd,nkd->nk", query.float(), chosen))

    value = key.detach().requires_grad_()
    I = nearest.unsqueeze(1)
    Y = ops.aggregate(value, torch.ones(N, 1, device=device), I, rho="ones")
    assert torch.equal(Y, key[nearest])
    (grad,) = torch.autograd.grad(Y, value, query)
    assert torch.equal(grad[nearest], query)
    grad[nearest] = 0
    assert not grad.any()


def test_more_than_65535_batch_rows(device: torch.device) -> None:
    B, N, M, D, k = 70_000, 4, 5, 8, 2
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, N, D), (B, M, D), (B, M, D))
    tensors = [torch.randint(-3, 4, s, generator=generator).float() for s in shapes]
    results = []
    for where in (device, torch.device("cpu")):
        X = [x.to(where).requires_grad_() for x in tensors]
        Y, s, I = ops.forward(*X, k, metric="dot", rho="similarity")
        grads = torch.autograd.grad([Y, s], X, [torch.ones_like(Y), torch.ones_like(s)])
        results.append([T.cpu() for T in (Y, s, I, *grads)])
        if where == device == torch.device("cpu"):
            break
    # Small integers: every sum is exact.
    assert all(map(torch.equal, *results))
