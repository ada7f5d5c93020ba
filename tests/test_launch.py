# SPDX-License-Identifier: MIT
"""Launches of Triton kernels without a GPU: when a compiled variant is launched directly, and when
the launch is left to Triton."""

import importlib.util
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, not its interpreter",
)

NUMBERS = {"rows": 10, "N": 10, "M": 12, "C": 32, "O": 32, "k": 3, "scale": 1.0, "B2": 1}
STRIDES = {"stride_vb1": 0, "stride_vb2": 0, "stride_vm": 32}
CONSTANTS = {"ALIGN": 16, "RHO": 0}
CONFIG = {"BLOCK_N": 16, "BLOCK_C": 32, "BLOCK_K": 4, "num_warps": 4}


class Device:
    """In the place of Triton's driver."""

    def __init__(self) -> None:
        self.number = 0

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 100 + device


class Recorder:
    """What reaches Triton's own launch, and Triton's launcher directly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.driver import driver

        from convnn_kernels.triton.aggregate import aggregate_depthwise_kernel
        from convnn_kernels.triton.launch import Launch

        self.by_triton: list[list[torch.Tensor | None]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.device = Device()
        self.kernel = aggregate_depthwise_kernel
        monkeypatch.setattr(type(driver), "active", self.device)
        monkeypatch.setattr(self.kernel, "variants", {})
        monkeypatch.setattr(
            Launch, "by_triton", lambda launch, pointers: self._by_triton(launch, pointers)
        )

    def _by_triton(self, launch: Any, pointers: Any) -> Any:
        self.by_triton.append([pointers.tensor(name) for name in launch.pointers])
        return (lambda *arguments: self.direct.append(arguments)), "function", "metadata"

    def launch(
        self,
        tensors: dict[str, Any],
        config: dict[str, int] | None = None,
        names: dict[str, str | None] | None = None,
        **numbers: Any,
    ) -> None:
        from convnn_kernels.triton.launch import Plan, Pointers

        arguments = NUMBERS | STRIDES | CONSTANTS | numbers
        plan = Plan([self.kernel.prepare(7, config or CONFIG, names, **arguments)])
        plan(Pointers(torch.device("cpu"), **tensors))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def tensors() -> dict[str, Any]:
    return {
        "p_value": torch.zeros(12, 32),
        "p_similarities": torch.zeros(10, 3),
        "p_indices": torch.zeros(10, 3, dtype=torch.int64),
        "p_weight": None,
        "p_bias": torch.zeros(32),
        "p_output": torch.zeros(10, 32),
    }


def test_a_variant_is_launched_directly_from_the_second_time_on(recorder: Recorder) -> None:
    first, second = tensors(), tensors()
    recorder.launch(first)
    assert [X is Y for X, Y in zip(recorder.by_triton[0], first.values(), strict=True)] == [
        True
    ] * 6
    assert not recorder.direct
    # Other sizes are of the same variant.
    recorder.launch(second, N=11, M=13, k=2, stride_vm=64)
    assert len(recorder.by_triton) == 1
    programs, y, z, stream, function, metadata, *hooks = recorder.direct[0][:9]
    assert (programs, y, z, stream) == (7, 1, 1, 100)
    assert (function, metadata, hooks) == ("function", "metadata", [None] * 3)
    arguments = NUMBERS | STRIDES | CONSTANTS | CONFIG | {"N": 11, "M": 13, "k": 2, "stride_vm": 64}
    addresses = {name: X if X is None else X.data_ptr() for name, X in second.items()}
    expected = [(addresses | arguments)[name] for name in recorder.kernel.names]
    assert list(recorder.direct[0][9:]) == expected


def unaligned(X: torch.Tensor) -> torch.Tensor:
    return torch.zeros(X.numel() + 1, dtype=X.dtype)[1:].view(X.shape)


OTHERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "dtype": lambda X: {"p_value": X["p_value"].half()},
    "alignment": lambda X: {"p_output": unaligned(X["p_output"])},
    "absent": lambda X: {"p_bias": None},
    "present": lambda X: {"p_weight": torch.zeros(32, 1, 3)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_pointers_are_another_variant(recorder: Recorder, other: str) -> None:
    recorder.launch(tensors())
    changed = tensors() | OTHERS[other](tensors())
    recorder.launch(changed)
    recorder.launch(tensors())
    recorder.launch(tensors() | OTHERS[other](tensors()))
    assert (len(recorder.by_triton), len(recorder.direct)) == (2, 2)


@pytest.mark.parametrize(
    "numbers", [{"C": 33}, {"C": 1}, {"M": 2**31}, {"stride_vm": -(2**31) - 1}, {"RHO": 1}]
)
def test_other_numbers_are_another_variant(recorder: Recorder, numbers: dict[str, int]) -> None:
    recorder.launch(tensors())
    recorder.launch(tensors(), **numbers)
    recorder.launch(tensors(), **numbers)
    assert (len(recorder.by_triton), len(recorder.direct)) == (2, 1)


@pytest.mark.parametrize("option", ["BLOCK_N", "num_warps"])
def test_another_configuration_is_another_variant(recorder: Recorder, option: str) -> None:
    recorder.launch(tensors())
    recorder.launch(tensors(), CONFIG | {option: 8})
    assert len(recorder.by_triton) == 2


def test_each_device_has_its_own_variant(recorder: Recorder) -> None:
    recorder.launch(tensors())
    recorder.device.number = 1
    recorder.launch(tensors())
    recorder.launch(tensors())
    assert len(recorder.by_triton) == 2
    assert recorder.direct[0][3] == 101


@pytest.mark.parametrize(
    "setting",
    ["launch_enter_hook", "launch_exit_hook", "debug", "add_stages_inspection_hook"],
)
def test_triton_launches_while_it_is_watched(
    recorder: Recorder, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    recorder.launch(tensors())
    if setting in ("debug", "add_stages_inspection_hook"):
        monkeypatch.setattr(knobs.runtime, setting, True)
    else:
        monkeypatch.setattr(getattr(knobs.runtime, setting), "calls", [print])
    recorder.launch(tensors())
    assert (len(recorder.by_triton), len(recorder.direct)) == (2, 0)


def test_a_missing_pointer_is_an_error(recorder: Recorder) -> None:
    recorder.launch(tensors())
    incomplete = tensors()
    del incomplete["p_bias"]
    with pytest.raises(KeyError, match="p_bias"):
        recorder.launch(incomplete)


def test_a_kernel_may_find_a_pointer_under_another_name(recorder: Recorder) -> None:
    given = tensors() | {"p_other": torch.zeros(32)}
    for _ in range(2):
        recorder.launch(given, names={"p_bias": "p_other", "p_weight": None})
    assert recorder.by_triton[0][3:5] == [None, given["p_other"]]
    assert recorder.direct[0][9:][3:5] == (None, given["p_other"].data_ptr())
    # An absent pointer is another variant.
    recorder.launch(given, names={"p_bias": None})
    assert recorder.by_triton[1][4] is None


def test_launches_of_a_plan_follow_one_another(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one allocation; each may have been compiled or not."""
    from convnn_kernels.triton.launch import Plan, Pointers

    def launch(programs: int, **numbers: int) -> Any:
        arguments = NUMBERS | STRIDES | CONSTANTS | numbers
        return recorder.kernel.prepare(programs, CONFIG, **arguments)

    allocated, allocate = [], Pointers.allocate

    def note(pointers: Any, workspace: Any) -> None:
        allocated.append(workspace.bytes)
        allocate(pointers, workspace)

    monkeypatch.setattr(Pointers, "allocate", note)
    buffers = {"p_output": (320, torch.float32), "p_bias": (32, torch.float32)}
    given = {name: X for name, X in tensors().items() if name not in buffers}
    Plan([launch(3)], **buffers)(Pointers(torch.device("cpu"), **given))
    # The second is of the variant that is compiled, the first of another one.
    Plan([launch(4, C=33), launch(5), launch(6, N=11)], **buffers)(
        Pointers(torch.device("cpu"), **given)
    )
    assert allocated == [1280 + 256] * 2
    assert len(recorder.by_triton) == 2
    assert [arguments[0] for arguments in recorder.direct] == [5, 6]
    bias, output = (recorder.direct[0][9:][i] for i in (4, 5))
    assert bias == output + 1280


def test_pointers_of_another_call() -> None:
    from convnn_kernels.triton.launch import Pointers, Workspace

    def taken(dtype: torch.dtype) -> Pointers:
        other = Pointers(torch.device("cpu"), p_y=torch.ones(3))
        other.allocate(Workspace(p_z=(3, dtype)))
        view = other.tensor("p_z")
        assert view is not None
        view.fill_(7)
        pointers = Pointers(torch.device("cpu"), p_x=None)
        pointers.take(other, "p_y", "p_z")
        return pointers

    pointers = taken(torch.float32)
    # The memory of the other call lives as long as these pointers.
    assert [pointers.tensor(name).tolist() for name in ("p_y", "p_z")] == [[1.0] * 3, [7.0] * 3]
    assert pointers.kind == taken(torch.float32).kind != taken(torch.int32).kind


def test_memory_that_is_replaced_is_freed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from convnn_kernels.triton.launch import Pointers, Workspace

    part = torch.zeros(8)
    pointers, gone = Pointers(torch.device("cpu"), p_part=part), weakref.ref(part)
    del part
    assert gone() is not None
    empty, alive = torch.empty, []

    def allocate(*args: Any, **named: Any) -> torch.Tensor:
        alive.append(gone())
        return empty(*args, **named)

    monkeypatch.setattr(torch, "empty", allocate)
    pointers.allocate(Workspace(p_part=(8, torch.float32)))
    assert alive == [None]


def test_temporary_memory() -> None:
    from convnn_kernels.triton.launch import Pointers, Workspace

    workspace = Workspace(
        p_a=(3, torch.float32), p_b=(0, torch.int64), p_c=(5, torch.int64), p_d=(7, torch.int8)
    )
    pointers = Pointers(torch.device("cpu"))
    pointers.allocate(workspace)
    parts = {name: pointers.tensor(f"p_{name}") for name in "abcd"}
    for name, part in parts.items():
        assert part is not None
        count, dtype = workspace.sizes[f"p_{name}"]
        assert (part.numel(), part.dtype) == (count, dtype)
        assert count == 0 or part.data_ptr() == pointers.addresses[f"p_{name}"]
        assert workspace.offsets[f"p_{name}"] % 256 == 0
    for i, part in enumerate(parts.values()):
        part.fill_(i)
    assert [part.unique().tolist() for part in parts.values()] == [[0], [], [2], [3]]


def test_temporary_memory_that_is_used_twice() -> None:
    from convnn_kernels.triton.launch import Workspace

    small, large = (10, torch.float32), (1000, torch.float32)
    for earlier, later in ((small, large), (large, small)):
        workspace = Workspace({"p_a": small, "p_b": earlier}, {"p_c": later}, p_d=large)
        assert workspace.offsets == {"p_d": 0, "p_a": 4096, "p_b": 4352, "p_c": 4096}
        assert workspace.bytes == (8192 if later == large else 8448)
        assert set(workspace.sizes) == {"p_a", "p_b", "p_c", "p_d"}


def test_a_kind_is_what_the_pointers_are() -> None:
    from convnn_kernels.triton.launch import Pointers, Workspace

    def kind(dtype: torch.dtype = torch.float32, other: str = "p_x") -> int:
        pointers = Pointers(torch.device("cpu"), **{other: torch.zeros(4), "p_y": None})
        pointers.allocate(Workspace(p_z=(4, dtype)))
        return pointers.kind

    assert kind() == kind()
    assert len({kind(), kind(torch.float16), kind(other="p_z")}) == 3


@pytest.mark.slow
def test_calls_over_a_driver_that_does_nothing(run_python: Callable[..., str]) -> None:
    """With Triton's own launcher: what it is given directly is what Triton gives it."""
    program = """
        import torch
        from tools import host_time
        host_time.install_null_driver()
        from triton.backends.nvidia.driver import CudaLauncher
        host_time.take_cpu_tensors()
        calls, launch = [], CudaLauncher.__call__

        def note(launcher, *arguments):
            grid, stream, function, metadata = arguments[:3], *arguments[3:6]
            kinds = [type(X) if isinstance(X, float) else X for X in arguments[9:]]
            kinds = ["pointer" if hasattr(X, "data_ptr") else X for X in kinds]
            calls.append((launcher, grid, stream, function, metadata, kinds))
            launch(launcher, *arguments)

        CudaLauncher.__call__ = note
        found = []
        from convnn_kernels.triton.launch import KERNELS
        for call in host_time.calls(32, 1100, "dense").values():
            for kernel in KERNELS.values():
                for variants in kernel.variants.values():
                    variants.clear()
            for _ in range(2):
                calls.clear()
                call()
                found.append(list(calls))
        for first, second in zip(found[::2], found[1::2]):
            assert len(first) == len(second) > 3, (len(first), len(second))
            for before, after in zip(first, second):
                assert before[:5] == after[:5]
                pairs = list(zip(before[5], after[5]))
                assert "pointer" in before[5]
                # An address in the place of a tensor, and else the same.
                assert all(a == b or a == "pointer" and type(b) is int for a, b in pairs), pairs
        print(sum(map(len, found)))
    """
    assert int(run_python(program).split()[-1]) > 30
