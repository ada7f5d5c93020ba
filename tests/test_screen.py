# SPDX-License-Identifier: MIT
"""A screen in bfloat16 changes the time of a selection and not one bit of its result."""

from collections.abc import Callable

import pytest
import torch

# Shapes large enough for a screen. Each case says what makes its bound easy, useless or impossible.
CODE = """
    import hashlib
    import torch

    def cases():
        def features(*shape):
            return torch.randn(*shape)

        yield "random", features(2, 100, 64), features(2, 1500, 64), 9
        yield "odd number of columns", features(1, 100, 33), features(1, 2500, 33), 16
        yield "k close to a quarter", features(1, 100, 48), features(1, 1200, 48), 280
        yield "far from the origin", features(1, 100, 128) + 5, features(1, 2000, 128) + 5, 32
        yield "all keys equal", features(1, 100, 64), torch.ones(1, 2048, 64), 9
        yield "pairs of equal keys", features(1, 100, 64), features(1, 1024, 64).repeat(1, 2, 1), 9
        yield "whole numbers", features(1, 100, 64).round(), features(1, 2100, 64).round(), 9
        close = features(1, 1, 64) + 1e-4 * features(1, 2000, 64)
        yield "nearly equal keys", close[:, :110], close, 9
        sizes = torch.logspace(-6, 6, 2000).reshape(1, -1, 1)
        yield "norms of twelve decades", features(1, 100, 64), features(1, 2000, 64) * sizes, 9
        yield "subnormal", features(1, 100, 64) * 1e-20, features(1, 2000, 64) * 1e-22, 9
        yield "too large to bound", features(1, 100, 64) * 1e25, features(1, 2000, 64), 9
        broken = features(1, 2000, 64)
        broken[0, 7], broken[0, 1100, 3], broken[0, 1500, 5] = torch.nan, torch.inf, -torch.inf
        yield "NaN and infinity", features(1, 100, 64), broken, 9
        yield "zeros", torch.zeros(1, 100, 64), features(1, 2000, 64), 9
        yield "many pieces and a tail", features(1, 100, 100), features(1, 1500, 100), 9
        yield "k of all groups", features(1, 100, 64), features(1, 2048, 64), 120
        yield "one neighbor", features(1, 100, 64), broken, 1
        least, large = 2.0**-149, 2.0**59
        tiny = torch.zeros(1, 2048, 16)
        tiny[0, :, 0] = tiny[0, :1024, 2] = tiny[0, 1024:, 1] = least
        query = torch.zeros(1, 100, 16)
        query[..., 0] = query[..., 1] = large
        query[..., 2] = 0.625 * large
        yield "elements as small as can be", query, tiny, 9
        tiny = torch.zeros(1, 1024, 16)
        tiny[..., :2] = least
        yield "all below zero by nothing", -query, tiny, 120

    torch.manual_seed(0)
    for name, query, key, k in cases():
        mask = torch.rand(key.shape[:-1]) < 0.9
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for metric in ("cosine", "dot"):
                for self_indices in (None, torch.arange(query.shape[-2])):
                    for key_mask in (None, mask):
                        similarities, indices = torch.ops.convnn.select(
                            query.to(dtype), key.to(dtype), k, None, self_indices, key_mask, metric
                        )
                        bits = similarities.view(torch.int32).numpy().tobytes()
                        digest = hashlib.sha256(bits + indices.numpy().tobytes()).hexdigest()
                        print(name, dtype, metric, self_indices is None, key_mask is None, digest)
"""


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="no bfloat16 products on this processor"
)
def test_a_screen_changes_no_bit(run_python: Callable[..., str]) -> None:
    code = "import convnn_kernels" + CODE.replace("\n    ", "\n")
    plain, screened = (
        run_python(code, CONVNN_CPU_ISA=isa).splitlines() for isa in ("avx512", "avx512bf16")
    )
    assert len(plain) == 18 * 24
    assert [line for line, other in zip(plain, screened, strict=True) if line != other] == []
