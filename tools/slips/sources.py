# SPDX-License-Identifier: MIT
"""The sources of the campaign, and how many slips are made of each by rule."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    path: str
    wanted: int
    skip: str = ""  # lines in which this is found: they decide speed, or sizes, and no result


AREAS = KERNELS, ENTRY, PYTHON, TRITON, CUDA = (
    "CPU kernels",
    "checks and entry",
    "Python",
    "Triton kernels",
    "CUDA kernels",
)


def area_of(path: str) -> str:
    if path.startswith("csrc/cuda/"):
        return CUDA
    if path.startswith("convnn_kernels/triton/"):
        return TRITON
    if path.startswith("csrc/"):
        entry = path.count("/") == 1 or path.endswith("torch_operators.cpp")
        return ENTRY if entry else KERNELS
    return PYTHON


SOURCES = [
    Source("csrc/cpu/select.h", 6, "screen_pays|kScreens &&|p.d >= 16"),
    Source("csrc/cpu/select_few.h", 5, "kRangeWork|kEnoughTasks|kSeveralTasks|kMostScreenedRows"),
    Source("csrc/cpu/best_columns.h", 6),
    Source("csrc/cpu/screen.h", 4, "double above"),
    Source("csrc/cpu/rank.h", 4),
    Source("csrc/cpu/column_ranges.h", 2, "kPreparing|together|apart|ColumnRange all"),
    Source("csrc/cpu/normalize.h", 1),
    Source("csrc/cpu/modulate.h", 2),
    Source("csrc/cpu/register_tile.h", 3, "vectors % 8"),
    Source("csrc/cpu/vector.h", 2, "__aarch64__|avx512|_mm512"),
    Source("csrc/cpu/aggregate.h", 4, "kBytes|kLine|kFarWeightBlocks|kNear"),
    Source("csrc/cpu/aggregate_backward.h", 7, "p.forward.k \\* p.forward.c \\*"),
    Source("csrc/cpu/select_backward.h", 2),
    Source("csrc/cpu/select.cpp", 4, "double\\(|kColumnsPerRow|costs"),
    Source("csrc/cpu/inverse_list.cpp", 2, "double\\("),
    Source("csrc/cpu/key_ranges.cpp", 2, "pairs"),
    Source("csrc/cpu/parallel.h", 1),
    Source("csrc/cpu/aggregate_backward.cpp", 2, "double\\("),
    Source("csrc/cpu/select_backward.cpp", 1, "double\\("),
    Source("csrc/cpu/forward_backward.cpp", 1),
    Source("csrc/checks.h", 8),
    Source("csrc/torch_operators.h", 7, "kMostInPlace"),
    Source("csrc/tensor.h", 1),
    Source("convnn_kernels/checks.py", 7),
    Source("convnn_kernels/ops.py", 3),
    Source("convnn_kernels/autograd.py", 4),
    Source("convnn_kernels/transforms.py", 3),
    Source("convnn_kernels/functional.py", 3),
    Source("convnn_kernels/key_ranges.py", 3),
    Source("convnn_kernels/nn/convnn.py", 4),
    Source("convnn_kernels/nn/attention.py", 4),
    Source("convnn_kernels/nn/candidates.py", 2),
    Source("convnn_kernels/nn/ranges.py", 2),
    Source("convnn_kernels/nn/hybrid.py", 2),
    Source("convnn_kernels/nn/positional.py", 2),
    Source("convnn_kernels/nn/searching.py", 1),
    Source("convnn_kernels/nn/settings.py", 1),
    Source("convnn_kernels/nn/replaceable.py", 1),
    Source("convnn_kernels/nn/replace.py", 2),
    Source("convnn_kernels/triton/sweep.py", 3),
    Source("convnn_kernels/triton/finish.py", 3),
    Source("convnn_kernels/triton/select_medium.py", 3),
    Source("convnn_kernels/triton/select_network.py", 2),
    Source("convnn_kernels/triton/aggregate.py", 3),
    Source("convnn_kernels/triton/query_side.py", 3),
    Source("convnn_kernels/triton/key_side.py", 3),
    Source("convnn_kernels/triton/value_grad.py", 2),
    Source("convnn_kernels/triton/inverse_list.py", 2),
    Source("convnn_kernels/triton/modulate.py", 2),
    Source("convnn_kernels/triton/norms.py", 2),
    Source("convnn_kernels/triton/order.py", 2),
    Source("csrc/cuda/select.cuh", 2),
    Source("csrc/cuda/aggregate.cuh", 1),
    Source("csrc/cuda/aggregate_backward.cuh", 2),
    Source("csrc/cuda/key_side.cuh", 2),
    Source("csrc/cuda/query_side.cuh", 2),
    Source("csrc/cuda/hopper_finish.cuh", 2),
    Source("csrc/cuda/pairs.cuh", 1),
    Source("csrc/cuda/sort.cuh", 1),
    Source("csrc/cuda/modulate.cuh", 1),
]
