# SPDX-License-Identifier: MIT
"""Which tests are relevant for a source: those first that notice most."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from tools.slips.testing import Stage

_ONE_PROCESS = "not gpu and not triton and not host_cuda"

_SELECTION_TESTS = """
    row_sizes batches_in_parts mask_bytes few_keys select within key_range strides best_columns
    screen screen_bound amx_emulation few_queries key_range_cpu huge_sizes reproducibility
"""
_CONVOLUTION_TESTS = """
    row_sizes rounding aggregate aggregate_backward select_backward forward_backward gradients
    strides forward forward_gradients huge_sizes reproducibility
"""
_KERNEL_TESTS = f"{_CONVOLUTION_TESTS} {_SELECTION_TESTS} functional errors"
_NN_TESTS = """
    nn_modules nn_convnn nn_attention nn_candidates nn_ranges nn_few_tokens nn_self_similarity
    defaults nn_details wrong_modules nn_transforms nn_replace nn_replace_causal models paper
"""
_OPERATOR_TESTS = """
    errors wrong_calls checked_values wrong_functions schemas functional key_ranges key_range
    defaults
    backward_arguments vmap_arguments devices storage huge_sizes torch_integration backends
    fake_cuda_device
"""

_ALL_CASES = "row_sizes rounding batches_in_parts random_cases"

# A pattern of sources, the tests to begin with, and the others.
_NATIVE: list[tuple[str, str, str]] = [
    (
        "csrc/checks.h",
        "errors wrong_calls checked_values storage devices",
        "forward_backward " + _OPERATOR_TESTS,
    ),
    (
        "csrc/t*.h",
        "errors wrong_calls checked_values dispatch storage leaks forward_backward strides "
        "key_range huge_sizes few_keys",
        _OPERATOR_TESTS + _CONVOLUTION_TESTS + _SELECTION_TESTS,
    ),
    (
        "csrc/cpu/torch_operators.cpp",
        "errors leaks reproducibility",
        _OPERATOR_TESTS + _KERNEL_TESTS,
    ),
    ("csrc/cpu/floating_point_mode.h", "reproducibility", _KERNEL_TESTS),
    ("csrc/cpu/select.cpp", f"huge_sizes select few_keys strides {_ALL_CASES}", _SELECTION_TESTS),
    ("csrc/cpu/key_ranges.cpp", f"key_range_cpu {_ALL_CASES}", _SELECTION_TESTS),
    ("csrc/cpu/select_backward*", f"select_backward {_ALL_CASES}", _CONVOLUTION_TESTS),
    ("csrc/cpu/*gg*", f"aggregate_backward {_ALL_CASES}", _CONVOLUTION_TESTS),
    ("csrc/cpu/normalize.h", f"select_backward {_ALL_CASES}", _KERNEL_TESTS),
    ("csrc/cpu/forward_backward.cpp", f"huge_sizes {_ALL_CASES}", _CONVOLUTION_TESTS),
    ("csrc/cpu/*backward*", _ALL_CASES, _CONVOLUTION_TESTS),
    ("csrc/cpu/modulate.h", _ALL_CASES, _CONVOLUTION_TESTS),
    ("csrc/cpu/inverse_list.cpp", _ALL_CASES, _CONVOLUTION_TESTS),
    ("csrc/cpu/parallel.h", f"huge_sizes {_ALL_CASES}", _KERNEL_TESTS),
    ("csrc/cpu/screen.h", f"screen screen_bound best_columns {_ALL_CASES}", _SELECTION_TESTS),
    ("csrc/cpu/[!pvfw]*", f"best_columns select {_ALL_CASES}", _SELECTION_TESTS),
    ("csrc/*", _ALL_CASES, _KERNEL_TESTS),
]
_PYTHON: list[tuple[str, str, str]] = [
    ("*/checks.py", "errors wrong_calls storage", _OPERATOR_TESTS),
    ("*/ops.py", "schemas devices dispatch backends", _OPERATOR_TESTS),
    (
        "*/autograd.py",
        "gradients forward_gradients backward_arguments dispatch torch_integration nn_transforms",
        "forward_backward " + _OPERATOR_TESTS,
    ),
    (
        "*/transforms.py",
        "vmap_arguments torch_integration",
        _OPERATOR_TESTS + " nn_modules nn_transforms",
    ),
    ("*/functional.py", "functional within defaults", _OPERATOR_TESTS),
    ("*/key_ranges.py", "key_ranges key_range", _OPERATOR_TESTS),
    ("*/nn/candidates.py", "nn_candidates nn_details defaults", _NN_TESTS),
    ("*/nn/convnn.py", "nn_convnn nn_details nn_self_similarity nn_ranges", _NN_TESTS),
    ("*/nn/attention.py", "nn_attention nn_ranges", _NN_TESTS),
    ("*/nn/ranges.py", "nn_ranges", _NN_TESTS),
    ("*/nn/*replace*.py", "nn_replace nn_replace_causal", _NN_TESTS),
    ("*/nn/adapters.py", "nn_replace nn_replace_causal", _NN_TESTS),
    ("*/nn/searching.py", "nn_self_similarity nn_convnn", _NN_TESTS),
    ("*/nn/*.py", "nn_modules nn_convnn nn_attention", _NN_TESTS + " nn_replace"),
    ("*.py", "functional errors", _OPERATOR_TESTS + _NN_TESTS),
]
_TRITON: list[tuple[str, str, str]] = [
    ("*_small.py", "triton_small triton_backward_small", "triton triton_bounds triton_backward"),
    ("*select_network.py", "triton_small", "triton triton_bounds"),
    ("*medium*.py", "triton_medium", "triton triton_bounds"),
    ("*candidates*.py", "triton_backward_candidates", "triton_backward triton"),
    ("*value_grad*.py", "triton_value_grad", "triton_backward triton"),
    ("*inverse_list.py", "triton_value_grad triton_backward", "triton"),
    ("*side*.py", "triton_backward", "triton_backward_candidates triton"),
    ("*backward*.py", "triton_backward triton_backward_small", "triton"),
    ("*grad*.py", "triton_backward triton_value_grad", "triton"),
    ("*finish.py", "triton_finish triton_key_range", "triton_sweep triton triton_bounds"),
    ("*sweep.py", "triton_sweep", "triton_bounds triton_finish triton_key_range triton"),
    ("*ranges.py", "triton_key_range", "triton_sweep triton"),
    ("*.py", "triton triton_sweep", "triton_small triton_medium triton_finish triton_backward"),
]
_CUDA: list[tuple[str, str, str]] = [
    ("*hopper_dense*", "host_cuda_dense", ""),
    ("*hopper*", "host_cuda_hopper", "host_cuda_sweep host_cuda_dense host_cuda_key_range"),
    ("*mma_sweep*", "host_cuda_sweep", "host_cuda_hopper"),
    ("*/select.cu*", "host_cuda_key_range host_cuda", "host_cuda_hopper"),
    ("*", "host_cuda", "host_cuda_key_range host_cuda_hopper"),
]
# The tests of the host program that CI leaves out; here they count as slow.
_NOT_IN_CI = "further or portable or orders_of_threads or computed_twice or rows_by_groups"


def _files(tree: Path, names: str) -> tuple[str, ...]:
    found: list[str] = []
    for name in names.split():
        found += sorted(
            str(path.relative_to(tree)) for path in (tree / "tests").glob(f"test_{name}.py")
        )
    return tuple(dict.fromkeys(found))


def _rows(path: str) -> list[tuple[str, str, str]]:
    if path.startswith("csrc/cuda/"):
        return _CUDA
    if path.startswith("convnn_kernels/triton/"):
        return _TRITON
    return _NATIVE if path.startswith("csrc/") else _PYTHON


def stages(path: str, tree: Path) -> list[Stage]:
    """The stages of tests of a source, in the order in which they run."""
    rows = _rows(path)
    first_names, other_names = next((a, b) for pattern, a, b in rows if fnmatch(path, pattern))
    first = _files(tree, first_names)
    others = tuple(name for name in _files(tree, other_names) if name not in first)
    if rows is _CUDA:
        return [
            Stage("first", first, "host_cuda", f"not ({_NOT_IN_CI}) and not execution_layer"),
            *([Stage("quick", others, "host_cuda", f"not ({_NOT_IN_CI})")] if others else []),
            Stage("slow", first, "host_cuda", _NOT_IN_CI),
        ]
    if rows is _TRITON:
        interpreted = (("TRITON_INTERPRET", "1"),)
        return [
            Stage("first", first, "triton and not slow", environment=interpreted),
            Stage("quick", others, "triton and not slow", environment=interpreted),
            Stage("slow", first, "triton and slow", environment=interpreted),
        ]
    quick = f"not slow and {_ONE_PROCESS}"
    sanitized = _files(tree, "sanitized") if rows is _NATIVE else ()
    return [
        Stage("first", first, quick),
        Stage("quick", others, quick),
        Stage("processes", (*first, *others), quick),
        Stage(
            "slow",
            (*sanitized, *first, *others),
            f"slow and {_ONE_PROCESS}",
            "not planted",
            (("CONVNN_SANITIZERS", "1"),),
        ),
    ]
