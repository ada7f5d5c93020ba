# SPDX-License-Identifier: MIT
"""The built CUDA library, without a GPU: symbols, resources of its kernels, and the example.

CONVNN_CUDA_BUILD is the build folder, which CI sets.
"""

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import convnn_kernels  # noqa: F401
from convnn_kernels.backends import gradients, hopper

ROOT = Path(__file__).parent.parent
BUILD = Path(os.environ.get("CONVNN_CUDA_BUILD", ""))
LIBRARY = BUILD / "libconvnn_cuda.so"
MOST_STACK = 64

needs_build = pytest.mark.skipif(
    "CONVNN_CUDA_BUILD" not in os.environ, reason="needs CONVNN_CUDA_BUILD"
)
# Disassembled code: before a loop, within it, in a branch that leaves it and returns, and after it.
SASS = """
		Function : _Z11loop_kernelv
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   {before} ;                 /* 0x00000a00ff017624 */
                                                              /* 0x000fe400078e00ff */
        /*0010*/                   {inside} ;                 /* 0x0000000000027919 */
        /*0020*/              @P1 BRA 0x60 ;                  /* 0x0000000000027919 */
        /*0030*/             @!P0 BRA 0x10 ;                  /* 0x0000000000027919 */
        /*0040*/                   {after} ;                  /* 0x0000000000027919 */
        /*0050*/                   EXIT ;                     /* 0x0000000000027919 */
        /*0060*/                   {aside} ;                  /* 0x0000000000027919 */
        /*0070*/                   BRA 0x30 ;                 /* 0x0000000000027919 */
        /*0080*/                   BRA 0x80;                  /* 0x0000000000027919 */
"""


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def introspect() -> ModuleType:
    (path,) = BUILD.glob("introspect*.so")
    return module("introspect", path)


def module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_build
def test_what_it_asks_of_torch_is_in_the_stable_c_interface() -> None:
    folder = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    headers = ["stable/c/shim.h", "inductor/aoti_torch/c/shim.h"]
    declared = set(re.findall(r"\w+", "".join((folder / name).read_text() for name in headers)))
    undefined = {
        line.split()[-1].partition("@")[0]
        for line in output("nm", "--dynamic", "--undefined-only", LIBRARY).splitlines()
    }
    assert not [name for name in undefined if re.search(r"(2at|3c10|5torch)", name)]
    asked = {name for name in undefined if name.startswith(("aoti_torch_", "torch_"))}
    assert "aoti_torch_get_current_cuda_stream" in asked
    assert not asked - declared
    # The CUDA runtime is linked statically.
    assert not [name for name in undefined if name.startswith("cuda")]
    assert "cudart" not in output("readelf", "--dynamic", LIBRARY)


@needs_build
def test_it_has_no_search_path() -> None:
    dynamic = output("readelf", "--dynamic", LIBRARY)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def kernels_for_hopper_only() -> set[str]:
    """What the sources launch that are built for sm_90a alone."""
    build = (ROOT / "CMakeLists.txt").read_text()
    (sources,) = re.findall(r"set\(hopper_sources\s+([^)]*)\)", build)
    texts = [(ROOT / source).read_text() for source in sources.split()]
    return set(re.findall(r'"(\w+_kernel)"', "".join(texts)))


@needs_build
def test_introspect_knows_every_kernel() -> None:
    built = introspect()
    kernels = built.cuda_kernels()
    # What introspect.py reads in its place.
    assert kernels == json.loads((BUILD / "cuda_kernels.json").read_text())
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    names = set(re.findall(r"__launch_bounds__\([^)]*\) void (\w+_kernel)\(", sources))
    assert len(names) > 20
    for architecture in built.cuda_architectures():
        if architecture.startswith("sm_"):
            of_it = [name for name in kernels if name.startswith(f"{architecture} ")]
            is_hopper = architecture == "sm_90a"
            expected = names if is_hopper else names - kernels_for_hopper_only()
            assert {re.split(r"[ <]", name)[1] for name in of_it} == expected
    for numbers in kernels.values():
        assert 16 <= numbers["registers"] <= 255
        assert 0 < numbers["occupancy_percent"] <= 100


@pytest.mark.parametrize(
    ("where", "counts"), [("before", 0), ("inside", 1), ("aside", 1), ("after", 0)]
)
def test_a_spill_within_a_loop_is_found(where: str, counts: int) -> None:
    resources = module("resources", ROOT / "csrc" / "cuda" / "resources.py")
    for access in ("STL.64 [R1+0x8], R6", "@P0 LDL.LU R4, [R1]"):
        lines = dict.fromkeys(("before", "inside", "aside", "after"), "S2R R2, SR_TID.X")
        sass = SASS.format(**(lines | {where: access}))
        assert resources.stack_in_loops(sass) == {"_Z11loop_kernelv": counts}
        # Another architecture, in either order; an operand that is a predicate.
        none = SASS.format(**lines)
        for both in (sass + none, none + sass):
            assert resources.stack_in_loops(both) == {"_Z11loop_kernelv": counts}
        assert "@P1 BRA 0x" in sass
        uniform = sass.replace("@P1 BRA 0x", "BRA.U UP0, 0x")
        assert resources.stack_in_loops(uniform) == {"_Z11loop_kernelv": counts}


def test_code_that_is_not_understood_is_an_error() -> None:
    resources = module("resources", ROOT / "csrc" / "cuda" / "resources.py")
    with pytest.raises(ValueError, match="cannot parse any instruction of _Z11loop_kernelv"):
        resources.stack_in_loops("Function : _Z11loop_kernelv\n\tSTL [R1], R2\n")


@needs_build
def test_no_kernel_spills() -> None:
    command = [sys.executable, ROOT / "csrc" / "cuda" / "resources.py", LIBRARY]
    assert "group_maxima_kernel<float, true>" in output(*command, "--most-stack", str(MOST_STACK))
    failed = subprocess.run([*command, "--most-stack", "-1"], capture_output=True, text=True)
    assert failed.returncode != 0
    assert "more than -1 bytes of stack" in failed.stderr


@needs_build
def test_a_cpu_pytorch_says_why_it_does_not_load_it() -> None:
    if torch.version.cuda is not None:
        pytest.skip("a CUDA PyTorch")
    with pytest.raises(OSError, match=r"libtorch_cuda\.so: cannot open"):
        ctypes.CDLL(str(LIBRARY))


# With a library in the place of that of a CUDA PyTorch, which the build has for linking.
LOAD = """
    import ctypes, itertools, json, torch, convnn_kernels
    ctypes.CDLL({stub!r}, mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library({library!r})
"""


@needs_build
def test_it_stands_on_the_cuda_key(run_python: Callable[..., str]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("a CUDA PyTorch")
    load = LOAD.format(stub=str(BUILD / "libtorch_cuda.so"), library=str(LIBRARY))
    code = """
    of_all = [name.removeprefix("convnn::") for name in convnn_kernels.schemas.OPERATORS]
    for library, names in (
        ("convnn", ("forward", "select")),
        ("convnn_cuda", (*of_all, "hopper_forward", "hopper_select")),
    ):
        for name in names:
            name = f"{library}::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
    print(torch.ops.convnn_python.forward.default._schema.returns[-1].name)
    """
    assert run_python(load + code).split() == ["error"]


@needs_build
def test_what_the_kernels_for_hopper_take(run_python: Callable[..., str]) -> None:
    """As `hopper.TAKES` says."""
    if torch.version.cuda is not None:
        pytest.skip("a CUDA PyTorch")
    load = LOAD.format(stub=str(BUILD / "libtorch_cuda.so"), library=str(LIBRARY))
    code = """
    from convnn_kernels.backends import hopper
    taken, kinds = [], set()
    metrics, dtypes = ("cosine", "dot", "euclidean"), ("float16", "bfloat16", "float32", "float64")
    sizes, counts = (1, 63, 64, 65, 128, 129), (1, 10, 11, 32, 33, 64, 65)
    for metric, dtype, D, k in itertools.product(metrics, dtypes, sizes, counts):
        X = torch.zeros(1, 200, D, dtype=getattr(torch, dtype))
        for name, args in (
            ("select", (X, X, k, None, None, None, metric)),
            ("forward", (X, X, X, k, None, None, None, None, None, metric)),
        ):
            number, is_faster, refusal = hopper.ask(f"convnn::{name}", args)
            if not refusal:
                kind = hopper.kind_of(number)
                assert (kind.metric, kind.dtype) == (metric, X.dtype)
                assert D <= kind.D and k <= kind.k
                kinds.add(number)
                taken.append((dtype, metric, D, k))
    assert kinds == set(range(hopper.KINDS)), kinds
    dtypes, metrics, sizes, counts = ({*each} for each in zip(*taken))
    print(sorted(dtypes), sorted(metrics), max(sizes), max(counts))
    from convnn_kernels import schemas
    X, rows = torch.zeros(1, 200, 64, dtype=torch.half), torch.arange(200)
    for restriction in (
        {"candidates": rows},
        {"key_mask": torch.ones(1, 200, dtype=torch.bool)},
        {"self_indices": rows},
        {"key_range": torch.stack([rows, rows], -1)},
        {"candidates": rows[None]},
    ):
        for name, tensors in (("convnn::select", (X, X)), ("convnn::forward", (X, X, X))):
            arguments = schemas.arguments(name)(*tensors, 9)._replace(**restriction)
            print(hopper.ask(name, arguments)[2])
    """
    found = run_python(load + code).splitlines()
    assert found[0] == "['bfloat16', 'float16'] ['cosine', 'dot'] 128 64"
    refusals = ["", "", "self_indices are given", "key_range is given"]
    refusals += ["candidates are those of each batch element"]
    assert found[1::2] == found[2::2] == refusals
    assert hopper.TAKES == (
        "float16 and bfloat16, cosine and dot, D from 16 to 128, k up to 64, no self indices, "
        "no key range, candidates shared by the batch"
    )


@needs_build
def test_what_the_gradients_take(run_python: Callable[..., str]) -> None:
    """As `gradients.TAKES` says."""
    if torch.version.cuda is not None:
        pytest.skip("a CUDA PyTorch")
    load = LOAD.format(stub=str(BUILD / "libtorch_cuda.so"), library=str(LIBRARY))
    code = """
    taken = []
    dtypes = ("float16", "bfloat16", "float32", "float64")
    for dtype, D, C, k in itertools.product(dtypes, (1, 64, 65), (1, 64, 65), (1, 16, 17)):
        number = torch.zeros(1, dtype=getattr(torch, dtype))
        X, V = (number.expand(4, 4096, each) for each in (D, C))
        s = torch.zeros(1, dtype=torch.float64 if dtype == "float64" else torch.float32)
        s, I = s.expand(4, 4096, k), torch.zeros(1, dtype=torch.long).expand(4, 4096, k)
        options = (False, "cosine", "softmax", 1.0, *[True] * 5)
        if torch.ops.convnn_cuda.forward_backward_choice(V, None, X, X, V, None, s, I, *options):
            taken.append((dtype, D, C, k))
    print(len(taken), *(sorted({*each}) for each in zip(*taken)))
    """
    found = run_python(load + code)
    assert found.strip() == "16 ['bfloat16', 'float16'] [1, 64] [1, 64] [1, 16]"
    assert gradients.TAKES == "float16 and bfloat16, D and C up to 64, k up to 16"


@needs_build
def test_example_agrees_with_the_operator() -> None:
    def numbers(count: int, step: int) -> torch.Tensor:
        return torch.tensor([float(i * step % 7 - 3) for i in range(count)])

    query, key, value = numbers(80, 3).view(5, 16), numbers(192, 5).view(12, 16), numbers(36, 2)
    Y, s, I = torch.ops.convnn.forward(query, key, value.view(12, 3), 3, metric="dot")
    lines = output(BUILD / "examples" / "neighbors").splitlines()
    assert lines[0] == "cpu"
    for i in range(5):
        neighbors = re.findall(r"key +(\d+) \((\S+)\)", lines[1 + i])
        assert [int(index) for index, _ in neighbors] == I[i].tolist()
        assert [float(similarity) for _, similarity in neighbors] == s[i].tolist()
        row = [float(x) for x in lines[1 + i].partition("->")[2].split()]
        torch.testing.assert_close(torch.tensor(row), Y[i], atol=1e-5, rtol=0.0)
