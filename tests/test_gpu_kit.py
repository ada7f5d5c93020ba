# SPDX-License-Identifier: MIT
"""The kit for a GPU machine: what is refused, what is put where, and the keys of Triton's cache."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import gpu_kit


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit of the sources as they are, in a checkout of its own."""
    folder, cached = tmp_path / "kit", tmp_path / "kit" / "triton" / "KEY"
    cached.mkdir(parents=True)
    (cached / "kernel.cubin").write_text("code")
    group = {"child_paths": {"kernel.cubin": "/elsewhere/KEY/kernel.cubin"}}
    (cached / "__grp__kernel.json").write_text(json.dumps(group))
    (folder / "lib").mkdir()
    (folder / "lib" / "libconvnn_cuda.so").write_text("library")
    digests = {part: gpu_kit.sources(part) for part in ("lib", "triton", "rest")}
    manifest = {"commit": "0123456789abcdef", "triton key": "k", **digests}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(gpu_kit, "sources", digests.__getitem__)
    monkeypatch.setattr(gpu_kit, "REPOSITORY", tmp_path)
    for name in ("TRITON_CACHE_DIR", "PYTHONPATH", "CONVNN_KIT_TRITON", "CONVNN_COMMIT"):
        monkeypatch.setenv(name, "")
    return folder


def test_a_kit_is_put_in_its_place(kit: Path, tmp_path: Path) -> None:
    del os.environ["CONVNN_COMMIT"]
    assert gpu_kit.install(kit) == "0123456789abcdef"
    assert (tmp_path / "convnn_kernels" / "lib" / "libconvnn_cuda.so").read_text() == "library"
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    (group,) = cache.glob("*/__grp__*")
    (path,) = json.loads(group.read_text())["child_paths"].values()
    assert Path(path).read_text() == "code"
    assert cache in Path(path).parents
    assert os.environ["CONVNN_COMMIT"] == "0123456789abcdef"
    if importlib.util.find_spec("triton"):
        with pytest.raises(AssertionError, match="not the Triton of the kit"):
            gpu_kit.check_triton()


def test_what_a_kit_lacks_is_said(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the run goes on without it."""
    shutil.rmtree(kit / "triton")
    shutil.rmtree(kit / "lib")
    assert gpu_kit.install(kit)
    said = capsys.readouterr().out
    assert "the kit has no lib: " in said
    assert "the kit has no triton: " in said
    assert os.environ["CONVNN_KIT_TRITON"] == ""


def test_a_kit_of_other_sources_is_refused(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((kit / "manifest.json").read_text())
    (kit / "manifest.json").write_text(json.dumps(manifest | {"triton": "other"}))
    with pytest.raises(gpu_kit.Refused, match=r"^the kit of 0123456789ab .* sources \(triton\): "):
        gpu_kit.install(kit)
    assert gpu_kit.install(kit / "none") is None
    assert "there is no kit" in capsys.readouterr().out


needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)

KEYS = """
import convnn_kernels.triton.{module}
from convnn_kernels.triton import backend
from convnn_kernels.triton.launch import KERNELS
backend.operators()
KERNELS["{kernel}"].jit.cache_key
print(sorted((name, kernel.jit.cache_key) for name, kernel in KERNELS.items()))
"""


@pytest.mark.slow
@needs_compiler
def test_keys_do_not_depend_on_what_runs_first(run_python: Callable[..., str]) -> None:
    """Otherwise a cache that one process has filled is of no use to the next."""
    pytest.importorskip("triton")
    first = [
        ("sweep", "sweep_kernel"),
        ("exact_topk", "exact_topk_kernel"),
        ("select_small", "select_small_kernel"),
        ("key_side", "key_side_kernel"),
    ]
    keys = {run_python(KEYS.format(module=module, kernel=kernel)) for module, kernel in first}
    assert len(keys) == 1


@needs_compiler
def test_no_kernel_uses_two_constants_of_one_name() -> None:
    """Triton's key has them in the order of their modules' addresses: it differs by process."""
    pytest.importorskip("triton")
    from convnn_kernels.triton import backend
    from convnn_kernels.triton.launch import KERNELS

    backend.operators()
    assert KERNELS
    for kernel in KERNELS.values():
        assert kernel.jit.cache_key
        values: dict[str, set[str]] = {}
        for (name, _), (value, _) in kernel.jit.used_global_vals.items():
            values.setdefault(name, set()).add(repr(value))
        assert {name for name, all_of in values.items() if len(all_of) > 1} == set(), kernel.name


LAUNCHES = """
import json
from convnn_kernels.triton.launch import KERNELS
from tools import gpu_kit

launched = []

def note(launch, pointers):
    launched.append(launch.kernel.name)
    return lambda *arguments: None, None, None

gpu_kit._compile = note
gpu_kit.run_groups(0, 1)
print(json.dumps([sorted(KERNELS), launched]))
"""


@pytest.mark.slow
@needs_compiler
def test_every_kernel_is_compiled(run_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    kernels, launched = json.loads(run_python(LAUNCHES))
    assert {*launched} == {*kernels}
