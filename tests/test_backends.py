# SPDX-License-Identifier: MIT
"""The choice of a backend for CUDA tensors, with devices and backends faked on the CPU."""

import contextlib
import ctypes
import logging
import subprocess
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import convnn_kernels
from convnn_kernels import native, schemas
from convnn_kernels.backends import cuda, selection
from convnn_kernels.triton import backend as triton

x = torch.arange(12.0).view(4, 3)
refuses = triton.refuses
run = selection.cuda_kernel(torch.ops.convnn.select.default)


class OnDevice(Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = torch.device("cuda", 1)


class Fake:
    """Two backends that take tensors on any device, except for the reasons given here."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        # How often a backend was asked whether it can run on this machine, or run a call.
        self.questions = 0
        self.unavailable: dict[str, str | None] = {"triton": None, "cuda": None}
        self.refuses: dict[str, str | None] = {"triton": None, "cuda": None}
        self.fails: dict[str, Exception | None] = {"triton": None, "cuda": None}

    def answer(self, reason: str | None) -> str | None:
        self.questions += 1
        return reason

    def run(self, backend: str, name: str) -> str:
        self.calls.append(backend)
        if (error := self.fails[backend]) is not None:
            raise error
        return f"{name} on {backend}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    for name, module in (("triton", triton), ("cuda", cuda)):

        def unavailable(name: str = name) -> str | None:
            return fake.answer(fake.unavailable[name])

        def refuses(device: torch.device, *rest: Any, name: str = name) -> str | None:
            return fake.answer(fake.refuses[name])

        monkeypatch.setattr(module, "unavailable", unavailable)
        monkeypatch.setattr(module, "refuses", refuses)
    monkeypatch.setattr(triton, "run", lambda op, device, arguments: fake.run("triton", op))
    monkeypatch.setattr(cuda, "run", lambda op, arguments: fake.run("cuda", op))
    monkeypatch.setattr(selection, "_chosen", {})
    monkeypatch.setattr(selection, "_checked", {})
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


def test_a_backend_is_chosen_once(fake: Fake) -> None:
    run(x, x, 2)
    asked = fake.questions
    assert asked > 0
    run(x[1:], x, 3)
    assert fake.questions == asked


def test_other_dtypes_are_another_choice(fake: Fake) -> None:
    assert run(x, x, 2) == "convnn::select on triton"
    fake.refuses["triton"] = "it does not take float64"
    assert run(x.double(), x.double(), 2) == "convnn::select on cuda"
    assert run(x, x, 2) == "convnn::select on triton"


def test_a_forced_backend_is_another_choice(fake: Fake) -> None:
    run(x, x, 2)
    with convnn_kernels.backend("cuda"):
        asked = fake.questions
        assert run(x, x, 2) == "convnn::select on cuda"
        assert fake.questions > asked
    asked = fake.questions
    assert run(x, x, 2) == "convnn::select on triton"
    assert fake.questions == asked


def test_a_failed_compiler_ends_all_choices(fake: Fake) -> None:
    half = x.half()
    assert run(half, half, 2) == "convnn::select on triton"
    fake.fails["triton"] = triton.CannotCompile("no C compiler")
    with pytest.warns(UserWarning, match="Triton cannot compile here"):
        run(x, x, 2)
    assert run(half, half, 2) == "convnn::select on cuda"
    assert fake.calls == ["triton", "triton", "cuda", "cuda"]


def test_a_forced_backend_that_fails_is_named_as_it_was_forced(fake: Fake) -> None:
    fake.fails["triton"] = triton.CannotCompile("no C compiler")
    expected = "^backend: name must be a backend that can run here .* got 'triton'.*no C compiler"
    with (
        convnn_kernels.backend("triton"),
        pytest.warns(UserWarning, match="Triton cannot compile here"),
        pytest.raises(RuntimeError, match=expected),
    ):
        run(x, x, 2)


def test_cuda_takes_more_rows_than_triton(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU that both support."""
    monkeypatch.setattr(triton, "refuses", lambda device, *rest: refuses(OnDevice.device, *rest))
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    most = x[:1].expand(10**9, 3)
    with caplog.at_level(logging.INFO, "convnn_kernels"):
        assert run(most, most, 2) == "convnn::select on triton"
        more = x[:1].expand(10**9 + 1, 3)
        assert run(x, more, 2) == "convnn::select on cuda"
        assert run(x, x, 2) == "convnn::select on triton"
    assert messages(caplog)[1:] == [
        "convnn::select runs on cuda: triton cannot: it takes up to 1,000,000,000 rows"
    ]


def test_arguments_are_checked_before_a_backend_is_chosen(fake: Fake) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="k must be at least 1, got 0"):
            run(x, x, 0)
        assert not fake.calls
    run(x, x, 2)
    with pytest.raises(RuntimeError, match="k must be at least 1, got 0"):
        run(x, x, 0)


def test_equal_shapes_dtypes_and_options_are_checked_once(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setitem(selection._CHECKS, "convnn::select", lambda *call: checked.append(call))
    calls: list[tuple[Any, ...]] = [
        (x, x, 2),
        (x, x, 3),
        (x[1:], x, 2),
        (x.double(), x.double(), 2),
        (x.as_subclass(OnDevice), x.as_subclass(OnDevice), 2),
        (x, x, 2, None, torch.arange(4)),
        (x, x, 2, None, None, None, "dot"),
    ]
    for args in (*calls, *calls):
        run(*args)
    assert len(checked) == len(calls)


def test_a_backend_forced_by_another_thread_meanwhile_is_not_remembered(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = dict(selection._CHECKS)

    def check(*arguments: Any) -> None:
        checks["convnn::select"](*arguments)
        monkeypatch.setattr(selection, "_forced", "cuda")

    monkeypatch.setitem(selection._CHECKS, "convnn::select", check)
    x = torch.randn(4, 3)
    assert run(x, x, 2) == "convnn::select on triton"
    monkeypatch.setattr(selection, "_forced", None)
    assert run(x, x, 2) == "convnn::select on triton"
    assert set(selection._chosen.values()) == {"triton"}


def test_few_checked_arguments_are_remembered(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose shapes never repeat would otherwise fill the memory."""
    monkeypatch.setattr(selection, "_MOST_CHECKED", 2)
    for k in (1, 2, 3, 4):
        run(x, x, k)
        assert 0 < len(selection._checked) <= 2


def test_the_cpu_library_is_opened_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice asks for the instruction set, because it depends on the environment."""
    opened = []
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda *args: opened.append(args) or real(*args))
    native._cpu_library.cache_clear()
    answers = [native.cpu_instruction_set()]
    for dtype in (torch.float32, torch.float16, torch.float64):
        run(x.to(dtype), x.to(dtype), 2)
        answers.append(native.cpu_instruction_set())
    assert len(opened) == 1
    assert len(set(answers)) == 1
    impossible = types.SimpleNamespace(convnn_cpu_instruction_set=lambda: None)
    monkeypatch.setattr(native, "_cpu_library", lambda: impossible)
    assert native.cpu_instruction_set() == ""


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, "cc"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    ],
    ids=["fails", "missing"],
)
def test_failed_compiler_is_recognized(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def select(*args: Any) -> None:
        raise error

    monkeypatch.setattr(triton, "operators", lambda: {"convnn::select": select})
    with pytest.raises(triton.CannotCompile):
        triton.run("convnn::select", x.device, (x, x, 2))


def test_other_errors_of_triton_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(triton, "operators", lambda: {"convnn::select": select})
    with pytest.raises(RuntimeError, match="illegal memory access") as found:
        triton.run("convnn::select", x.device, (x, x, 2))
    assert not isinstance(found.value, triton.CannotCompile)


def test_triton_runs_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton, "operators", lambda: {"convnn::select": lambda: current[0]})
    assert triton.run("convnn::select", OnDevice.device, ()) == 1
    assert current == [0]


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
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(cuda, "_built_for", lambda: ("sm_80", "compute_80"))
    assert cuda.refuses(device) == (
        "it was built for sm_80, compute_80, and cuda:1 has compute capability 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.refuses(device) is None
    assert cuda.refuses(x.device) == "it cannot run tensors on cpu"


def test_why_the_library_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    why = cuda.unavailable.__wrapped__
    monkeypatch.setattr(native, "load", lambda: {"cpu": "", "cuda": "not built"})
    assert why() == "not built"
    monkeypatch.setattr(native, "load", lambda: {"cpu": "", "cuda": ""})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why() is None


@pytest.mark.skipif(bool(native.load()["cuda"]), reason="the CUDA library cannot be loaded")
def test_the_cuda_library_implements_every_operator() -> None:
    for name in schemas.OPERATORS:
        name = name.replace("convnn::", "convnn_cuda::")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


WRONG = [
    ("select", {"candidates": [0, 4]}, "candidates must be in [0, 4), got 4 at position 1"),
    ("select", {"candidates": [3, 1, 3]}, "candidates must be distinct, got 3 more than once"),
    ("select", {"self_indices": [0, -1, 2, 3]}, "self_indices must be in [0, 4), got -1"),
    ("forward", {"candidates": [0, 4]}, "candidates must be in [0, 4), got 4 at position 1"),
    ("forward", {"self_indices": [0, 9, 2, 3]}, "self_indices must be in [0, 4), got 9"),
    ("aggregate", {"indices": [[0, 1], [2, 4]]}, "indices must be in [0, 4), got 4 at position 3"),
    *(
        (op, {"indices": [[0, 1], [2, 4]]}, "indices must be in [0, 4), got 4 at position 3")
        for op in ("select_backward", "aggregate_backward", "forward_backward")
    ),
]


def wrong_call(op: str, named: dict[str, Any]) -> tuple[Any, ...]:
    tensors = {name: torch.tensor(values) for name, values in named.items()}
    options = (tensors.get("candidates"), tensors.get("self_indices"), None, "dot")
    query, found = x[:2], (torch.ones(2, 2), tensors.get("indices"))
    needed = [True] * 5
    return {
        "select": (x, x, 2, *options),
        "forward": (x, x, x, 2, None, None, *options),
        "aggregate": (x, *found),
        "select_backward": (found[0], query, x, *found, "dot", *needed[:2]),
        "aggregate_backward": (query, x, *found, None, True, "ones", 1.0, *needed[:4]),
        "forward_backward": (
            *(query, None, query, x, x, None, *found, True, "dot", "ones", 1.0),
            *needed,
        ),
    }[op]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("op", "named", "message"), WRONG)
def test_index_values_on_a_gpu_are_reported_on_request(
    op: str,
    named: dict[str, Any],
    message: str,
    backend: str,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = selection.cuda_kernel(getattr(torch.ops.convnn, op).default)
    args = [X.as_subclass(OnDevice) if isinstance(X, Tensor) else X for X in wrong_call(op, named)]
    monkeypatch.delenv("CONVNN_CHECK_INDICES", raising=False)
    with convnn_kernels.backend(backend):
        assert kernel(*args) == f"convnn::{op} on {backend}"
        monkeypatch.setenv("CONVNN_CHECK_INDICES", "1")
        with pytest.raises(RuntimeError) as error:
            kernel(*args)
    assert str(error.value).startswith(f"convnn::{op}: {message}")
    assert fake.calls == [backend]


@pytest.mark.parametrize(("op", "named", "message"), WRONG)
def test_index_values_on_the_cpu_are_always_reported(
    op: str, named: dict[str, Any], message: str, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, Triton's interpreter would read out of bounds."""
    monkeypatch.delenv("CONVNN_CHECK_INDICES", raising=False)
    kernel = selection.cuda_kernel(getattr(torch.ops.convnn, op).default)
    with pytest.raises(RuntimeError) as error:
        kernel(*wrong_call(op, named))
    assert str(error.value).startswith(f"convnn::{op}: {message}")
    assert not fake.calls


def test_forced_cuda_does_not_run_on_the_cpu(run_forked: Callable[..., str]) -> None:
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
    assert run_forked(code, CONVNN_BACKEND="cuda").strip() == (
        "convnn::select: the forced backend 'cuda' cannot run tensors on cpu: "
        "it cannot run tensors on cpu"
    )
