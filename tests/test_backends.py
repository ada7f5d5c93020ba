# SPDX-License-Identifier: MIT
"""The choice of a backend for CUDA tensors, with devices and backends faked on the CPU."""

import ctypes
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import convnn_kernels
from convnn_kernels import native
from convnn_kernels.backends import cuda, selection
from convnn_kernels.triton import backend as triton

x = torch.arange(12.0).view(4, 3)
run = selection.cuda_kernel(torch.ops.convnn.select.default)


class Fake:
    """Two backends that take what is on "the device", say what for, and note their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.unavailable: dict[str, str | None] = {"triton": None, "cuda": None}
        self.refuses: dict[str, str | None] = {"triton": None, "cuda": None}
        self.fails: dict[str, Exception | None] = {"triton": None, "cuda": None}

    def run(self, backend: str, name: str, args: tuple[Any, ...]) -> str:
        self.calls.append(backend)
        if (error := self.fails[backend]) is not None:
            raise error
        return f"{name} on {backend}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    for name, module in (("triton", triton), ("cuda", cuda)):
        monkeypatch.setattr(module, "unavailable", lambda name=name: fake.unavailable[name])
        monkeypatch.setattr(module, "refuses", lambda args, name=name: fake.refuses[name])
        monkeypatch.setattr(module, "run", lambda op, args, name=name: fake.run(name, op, args))
    monkeypatch.setattr(selection, "_told", set())
    monkeypatch.setattr(selection, "_failures", {})
    return fake


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_triton_is_the_default(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "convnn_kernels"):
        assert [run(x, x, 2) for _ in range(3)] == ["convnn::select on triton"] * 3
    assert messages(caplog) == ["convnn::select runs on triton: the default for CUDA tensors"]


@pytest.mark.parametrize("where", ["unavailable", "refuses"])
def test_cuda_where_triton_cannot(where: str, fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    getattr(fake, where)["triton"] = "it has the day off"
    with caplog.at_level(logging.INFO, "convnn_kernels"):
        assert [run(x, x, 2) for _ in range(3)] == ["convnn::select on cuda"] * 3
    assert messages(caplog) == ["convnn::select runs on cuda: triton cannot: it has the day off"]


def test_forced_cuda(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "convnn_kernels"), convnn_kernels.backend("cuda"):
        assert run(x, x, 2) == "convnn::select on cuda"
    assert messages(caplog) == ["convnn::select runs on cuda: forced"]
    assert run(x, x, 2) == "convnn::select on triton"


def test_forced_cuda_that_cannot_run_the_call(fake: Fake) -> None:
    fake.refuses["cuda"] = "it was built for sm_80, and cuda:0 has compute capability 7.5"
    with convnn_kernels.backend("cuda"), pytest.raises(RuntimeError) as error:
        run(x, x, 2)
    assert str(error.value) == (
        "convnn::select: the forced backend 'cuda' cannot run tensors on cpu: "
        "it was built for sm_80, and cuda:0 has compute capability 7.5"
    )
    assert not fake.calls


def test_forced_cuda_that_is_not_there(fake: Fake) -> None:
    fake.unavailable["cuda"] = "not built: nvcc was not found"
    with pytest.raises(RuntimeError) as error, convnn_kernels.backend("cuda"):
        pass
    assert str(error.value) == (
        "backend: name must be a backend that can run here ('triton', 'cpu'), "
        "got 'cuda': not built: nvcc was not found"
    )


def test_neither_can(fake: Fake) -> None:
    fake.unavailable["triton"], fake.refuses["cuda"] = "no Triton", "too old"
    with pytest.raises(RuntimeError) as error:
        run(x, x, 2)
    assert str(error.value) == (
        "convnn::select: no backend can run tensors on cpu: "
        "triton: no Triton; cuda: too old; cpu: it takes tensors on cpu only"
    )


def test_cuda_takes_over_where_triton_cannot_compile(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fails["triton"] = triton.CannotCompile("no C compiler")
    with caplog.at_level(logging.INFO, "convnn_kernels"):
        with pytest.warns(UserWarning, match="Triton cannot compile here: no C compiler") as told:
            assert run(x, x, 2) == "convnn::select on cuda"
        assert run(x, x, 2) == "convnn::select on cuda"
    assert len(told) == 1
    assert fake.calls == ["triton", "cuda", "cuda"]
    assert "convnn::select runs on cuda: triton cannot: it cannot compile: no C compiler" in (
        messages(caplog)
    )


def test_arguments_are_checked_before_a_backend_is_asked(fake: Fake) -> None:
    with pytest.raises(RuntimeError, match="k must be between 1 and 4"):
        run(x, x, 5)
    assert not fake.calls


def test_the_cpu_library_is_opened_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call asks which instruction set there is: the answer depends on the environment."""
    opened = []
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda *args: opened.append(args) or real(*args))
    native._instruction_set_question.cache_clear()
    answers = [native.cpu_instruction_set()]
    for _ in range(3):
        run(x, x, 2)
        answers.append(native.cpu_instruction_set())
    assert len(opened) == 1
    assert len(set(answers)) == 1
    monkeypatch.setattr(native, "_instruction_set_question", lambda: lambda: None)
    assert native.cpu_instruction_set() == ""


def test_failed_compiler_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(*args: Any) -> None:
        raise subprocess.CalledProcessError(1, "cc")

    monkeypatch.setitem(triton._OPERATORS, "convnn::select", select)
    with pytest.raises(triton.CannotCompile):
        triton.run("convnn::select", (x, x, 2))


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), ("sm_80",), True),
        ((8, 9), ("sm_80", "sm_90"), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((7, 5), ("sm_80", "compute_80"), False),
        ((12, 0), ("sm_100", "compute_100"), True),
        ((12, 0), ("sm_100",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a", "compute_90a"), False),
        ((9, 0), (), False),
    ],
)
def test_devices_that_code_runs_on(
    capability: tuple[int, int], built: tuple[str, ...], runs: bool
) -> None:
    assert cuda.runs_on(capability, built) == runs


def test_device_it_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(Tensor):
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(cuda, "_built_for", lambda: ("sm_80", "compute_80"))
    assert cuda.refuses((OnDevice(), 3)) == (
        "it was built for sm_80, compute_80, and cuda:1 has compute capability 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.refuses((OnDevice(), 3)) is None
    assert cuda.refuses((x,)) == "it cannot run tensors on cpu"


def test_why_the_library_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    why = cuda.unavailable.__wrapped__
    monkeypatch.setattr(native, "load", lambda: {"cpu": "", "cuda": "not built"})
    assert why() == "not built"
    monkeypatch.setattr(native, "load", lambda: {"cpu": "", "cuda": ""})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why() is None


def test_operators_of_the_library_have_the_schemas_of_ours() -> None:
    for name in ("forward", "select", "aggregate", "select_backward", "aggregate_backward"):
        ours, theirs = (
            str(getattr(getattr(torch.ops, library), name).default._schema)
            for library in ("convnn", "convnn_cuda")
        )
        assert ours.removeprefix("convnn::") == theirs.removeprefix("convnn_cuda::")


class Operators:
    """In place of ``torch.ops.convnn_cuda``."""

    def __getattr__(self, name: str) -> Any:
        return type("Operator", (), {"default": staticmethod(lambda *args: (name, len(args)))})


WRONG = [
    ("select", {"candidates": [0, 4]}, "candidates must be in [0, 4), got 4 at position 1"),
    ("select", {"candidates": [3, 1, 3]}, "candidates must be distinct, got 3 more than once"),
    ("select", {"self_indices": [0, -1, 2, 3]}, "self_indices must be in [0, 4), got -1"),
    ("forward", {"candidates": [0, 4]}, "candidates must be in [0, 4), got 4 at position 1"),
    ("forward", {"self_indices": [0, 9, 2, 3]}, "self_indices must be in [0, 4), got 9"),
]


@pytest.mark.parametrize(("op", "named", "message"), WRONG)
def test_index_values_are_reported_on_request(
    op: str, named: dict[str, list[int]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "convnn_cuda", Operators())
    tensors = {name: torch.tensor(values) for name, values in named.items()}
    options = (tensors.get("candidates"), tensors.get("self_indices"), None, "dot")
    args = {
        "select": (x, x, 2, *options, "similarity"),
        "forward": (x, x, x, 2, None, None, *options, "softmax", 1.0, "similarity"),
    }[op]
    monkeypatch.delenv("CONVNN_CHECK_INDICES", raising=False)
    assert cuda.run(f"convnn::{op}", args) == (op, len(args))
    monkeypatch.setenv("CONVNN_CHECK_INDICES", "1")
    with pytest.raises(RuntimeError) as error:
        cuda.run(f"convnn::{op}", args)
    assert str(error.value).startswith(f"convnn::{op}: {message}")


def test_indices_of_aggregate_are_reported_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "convnn_cuda", Operators())
    monkeypatch.setenv("CONVNN_CHECK_INDICES", "1")
    for value, last in (([[0, 1], [2, 3]], None), ([[0, 1], [2, 4]], 4)):
        args = (x, torch.ones(2, 2), torch.tensor(value), None, None, "softmax", 1.0)
        if last is None:
            assert cuda.run("convnn::aggregate", args) == ("aggregate", 7)
        else:
            with pytest.raises(RuntimeError, match=r"indices must be in \[0, 4\), got 4 at"):
                cuda.run("convnn::aggregate", args)


def test_forced_cuda_does_not_run_on_the_cpu(run_python: Callable[..., str]) -> None:
    """Where the backend can run, CONVNN_BACKEND=cuda refuses CPU tensors and says why."""
    code = """
        import torch
        from convnn_kernels.backends import selection, cuda
        import convnn_kernels
        cuda.unavailable = lambda: None
        x = torch.randn(5, 3)
        try:
            torch.ops.convnn.select(x, x, 2)
        except RuntimeError as error:
            print(error)
    """
    assert run_python(code, CONVNN_BACKEND="cuda").strip() == (
        "convnn::select: the forced backend 'cuda' cannot run tensors on cpu: "
        "it cannot run tensors on cpu"
    )
