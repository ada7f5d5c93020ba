# SPDX-License-Identifier: MIT
"""The sources of the campaign, and how many slips are made of each by rule."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    path: str
    wanted: int
    skip: str = ""  # what this matches is left as it is: it decides speed, or sizes, and no result


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


def _lines(words: str) -> str:
    """A pattern of the lines in which one of these patterns is found."""
    return f".*({words}).*"


# An estimate of work, by which threads share it.
_WORK = r"double\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"

SOURCES = [
    Source("csrc/cpu/select.h", 7, _lines("screen_pays|kScreens &&|p.d >= 16")),
    Source("csrc/cpu/select_few.h", 6, _lines("kRangeWork|kEnoughTasks|kSeveralTasks")),
    Source("csrc/cpu/best_columns.h", 7),
    Source("csrc/cpu/screen.h", 5),
    Source("csrc/cpu/rank.h", 5),
    Source("csrc/cpu/column_ranges.h", 3, _lines("kPreparing|together|apart")),
    Source("csrc/cpu/normalize.h", 2),
    Source("csrc/cpu/modulate.h", 3),
    Source("csrc/cpu/exponential.h", 2),
    Source("csrc/cpu/register_tile.h", 4),
    Source("csrc/cpu/wide_rows.h", 3),
    Source("csrc/cpu/vector.h", 3, _lines("__aarch64__|avx512|_mm512")),
    Source("csrc/cpu/aggregate.h", 5, _lines("kBytes|kLine|kFarWeightBlocks|kNear")),
    Source("csrc/cpu/aggregate_backward.h", 8),
    Source("csrc/cpu/select_backward.h", 3),
    Source("csrc/cpu/select.cpp", 5, _WORK + "|" + _lines("kColumnsPerRow|costs")),
    Source("csrc/cpu/inverse_list.cpp", 3, _WORK),
    Source("csrc/cpu/key_ranges.cpp", 3, _lines("pairs")),
    Source("csrc/cpu/parallel.h", 2),
    Source("csrc/cpu/aggregate_backward.cpp", 3, _WORK),
    Source("csrc/cpu/select_backward.cpp", 2, _WORK),
    Source("csrc/cpu/forward_backward.cpp", 2),
    Source("csrc/checks.h", 9),
    Source("csrc/torch_operators.h", 8, _lines("kMostInPlace")),
    Source("csrc/tensor.h", 2),
    Source("convnn_kernels/checks.py", 8),
    Source("convnn_kernels/ops.py", 4),
    Source("convnn_kernels/autograd.py", 5),
    Source("convnn_kernels/transforms.py", 4),
    Source("convnn_kernels/functional.py", 4),
    Source("convnn_kernels/key_ranges.py", 4),
    Source("convnn_kernels/nn/convnn.py", 5),
    Source("convnn_kernels/nn/attention.py", 5),
    Source("convnn_kernels/nn/candidates.py", 3),
    Source("convnn_kernels/nn/ranges.py", 3),
    Source("convnn_kernels/nn/hybrid.py", 3),
    Source("convnn_kernels/nn/positional.py", 3),
    Source("convnn_kernels/nn/searching.py", 2),
    Source("convnn_kernels/nn/settings.py", 2),
    Source("convnn_kernels/nn/replaceable.py", 2),
    Source("convnn_kernels/nn/replace.py", 3),
    Source("convnn_kernels/triton/sweep.py", 4),
    Source("convnn_kernels/triton/finish.py", 4),
    Source("convnn_kernels/triton/select_medium.py", 4),
    Source("convnn_kernels/triton/select_network.py", 3),
    Source("convnn_kernels/triton/aggregate.py", 4),
    Source("convnn_kernels/triton/query_side.py", 4),
    Source("convnn_kernels/triton/key_side.py", 4),
    Source("convnn_kernels/triton/value_grad.py", 3),
    Source("convnn_kernels/triton/inverse_list.py", 3),
    Source("convnn_kernels/triton/modulate.py", 3),
    Source("convnn_kernels/triton/norms.py", 3),
    Source("convnn_kernels/triton/order.py", 3),
    Source("csrc/cuda/select.cuh", 3),
    Source("csrc/cuda/aggregate.cuh", 2),
    Source("csrc/cuda/aggregate_backward.cuh", 3),
    Source("csrc/cuda/key_side.cuh", 3),
    Source("csrc/cuda/query_side.cuh", 3),
    Source("csrc/cuda/hopper_finish.cuh", 3),
    Source("csrc/cuda/pairs.cuh", 2),
    Source("csrc/cuda/sort.cuh", 2),
    Source("csrc/cuda/modulate.cuh", 2),
]
