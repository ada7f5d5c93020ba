# SPDX-License-Identifier: MIT
"""Which instruction set the CPU library uses: the fastest, once measured, unless told otherwise."""

import ctypes
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from instruction_sets import INSTRUCTION_SETS

from convnn_kernels import native
from convnn_kernels.functional import select_neighbors

TESTS = Path(__file__).parent
ROOT = TESTS.parent
USABLE = native.usable_cpu_instruction_sets()
several_sets = pytest.mark.skipif(
    len(set(USABLE) - {"portable"}) < 2, reason="there is nothing to choose between"
)


def test_the_usable_sets_are_those_of_the_processor() -> None:
    assert sorted(USABLE) == sorted(INSTRUCTION_SETS)
    assert USABLE[-1] == "portable"


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_switch_holds_within_the_block(name: str) -> None:
    before = native.cpu_instruction_set()
    with native.use_cpu_instruction_set(name):
        assert native.cpu_instruction_set() == name
        with native.use_cpu_instruction_set(None):
            assert native.cpu_instruction_set() == before
        assert native.cpu_instruction_set() == name
        with pytest.raises(RuntimeError, match="own"), native.use_cpu_instruction_set("portable"):
            assert native.cpu_instruction_set() == "portable"
            raise RuntimeError("own")
        assert native.cpu_instruction_set() == name
    assert native.cpu_instruction_set() == before


@pytest.mark.parametrize("name", ["abacus", "", "AVX2"])
def test_a_set_that_cannot_run_changes_nothing(name: str) -> None:
    before = native.cpu_instruction_set()
    message = rf"run here \({', '.join(USABLE)}\), got '{name}'"
    with pytest.raises(ValueError, match=message), native.use_cpu_instruction_set(name):
        pass
    assert native.cpu_instruction_set() == before


@pytest.mark.parametrize("name", [b"avx2", 3])
def test_a_set_is_named_by_a_string(name: Any) -> None:
    message = f"name must be a string or None, got {type(name).__name__}"
    with pytest.raises(TypeError, match=message), native.use_cpu_instruction_set(name):
        pass


def test_the_switch_reaches_every_thread_and_the_kernels() -> None:
    """Sums without fused multiply-adds, which only portable has, are rounded differently."""
    if len(INSTRUCTION_SETS) == 1:
        pytest.skip("one instruction set")
    x = torch.randn(200, 61)
    fused = select_neighbors(x, x, 9)[0]
    found = []
    with native.use_cpu_instruction_set("portable"):
        thread = threading.Thread(target=lambda: found.append(select_neighbors(x, x, 9)[0]))
        thread.start()
        thread.join()
        found.append(select_neighbors(x, x, 9)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[0], fused)
    assert torch.equal(select_neighbors(x, x, 9)[0], fused)


def test_the_switch_comes_before_the_environment(run_forked: Callable[..., str]) -> None:
    code = """
        from convnn_kernels import native
        with native.use_cpu_instruction_set("portable"):
            print(native.cpu_instruction_set())
        print(native.cpu_instruction_set() or "none")
    """
    assert run_forked(code, CONVNN_CPU_ISA="abacus").split() == ["portable", "none"]


CHOICE_SOURCES = ("choice.cpp", "remembered.cpp", "timing.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("choice") / "libchoice.so"
    sources = [TESTS / "choice_program.cpp"]
    sources += [ROOT / "csrc" / "cpu" / name for name in CHOICE_SOURCES]
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.chosen.restype = library.read_text.restype = ctypes.c_int64
    library.measure_made_up.restype = ctypes.c_int64
    library.replace_file.restype = ctypes.c_bool
    return library


@pytest.mark.parametrize(
    ("picoseconds", "expected"),
    [
        ((1000,), 0),
        ((1000, 1000, 1000), 0),
        ((1000, 960), 0),  # within 5%, the preferred set stays
        ((1000, 940), 1),
        ((1050, 1000), 0),
        ((1051, 1000), 1),
        ((1000, 2200, 1060, 1600), 0),
        ((2200, 1000, 2300, 3000), 1),
        ((1100, 1040, 1000), 1),  # the first that is close to the fastest, which is the third
        ((3000, 2000, 2000), 1),
        ((10**15, 1), 1),
    ],
)
def test_the_fastest_is_chosen(
    program: ctypes.CDLL, picoseconds: tuple[int, ...], expected: int
) -> None:
    count = len(picoseconds)
    assert program.chosen((ctypes.c_int64 * count)(*picoseconds), ctypes.c_int64(count)) == expected


def test_what_is_measured_is_the_least_cpu_time_of_the_thread(program: ctypes.CDLL) -> None:
    """Neither what other threads compute, nor waiting for them, nor a disturbed round counts."""
    times = (ctypes.c_int64 * 3)()
    start = time.thread_time()
    microseconds = program.measure_made_up(times)
    assert 0 < microseconds <= 1e6 * (time.thread_time() - start)
    waits, disturbed, longer = times
    assert waits < 0.75 * longer
    assert disturbed < 0.75 * longer


KEY, TIMES = "A processor 00a20f12; 0.1.0 abc; first second third", [11, 22, 33]


def text_of(program: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(4096)
    program.write_text(KEY.encode(), (ctypes.c_int64 * 3)(*TIMES), text)
    return text.value.decode()


def times_in(program: ctypes.CDLL, text: str, key: str = KEY) -> list[int]:
    times = (ctypes.c_int64 * 3)()
    count = program.read_text(text.encode(), key.encode(), times)
    assert count in (0, 3), "some of the times"
    return list(times)[:count]


def test_times_are_read_as_they_were_written(program: ctypes.CDLL) -> None:
    assert times_in(program, text_of(program)) == TIMES


def test_other_texts_are_not_read(program: ctypes.CDLL) -> None:
    text = text_of(program)
    assert not times_in(program, text, key=KEY.replace("12;", "13;"))
    for length in range(len(text)):
        assert not times_in(program, text[:length]), f"{length} bytes of {len(text)}"
    for old, new in [
        (" 22 ", " -22 "),
        (" 22 ", " 0 "),
        (" 22 ", " 22.5 "),
        (" 22 ", " nan "),
        (" 22 ", " 99999999999999999999 "),
        (" second 22", ""),
        (" 22 ", "  22 "),
        (" 33", " 33 fourth 44"),
        (" 33\n", " 33\n\n"),
        ("third 33", "fourth 33"),
        ("convnn_kernels", "another program"),
    ]:
        assert old in text
        assert not times_in(program, text.replace(old, new)), (old, new)
    assert not times_in(program, "\x00\xff" * 2000)


def test_a_file_is_replaced_at_once(program: ctypes.CDLL, tmp_path: Path) -> None:
    """Readers of the old file keep it, and nothing else is left in the folder."""
    path = tmp_path / "one" / "two" / "file.txt"
    assert program.replace_file(bytes(path), b"old\n")
    with path.open() as old:
        assert program.replace_file(bytes(path), b"new\n")
        assert old.read() == "old\n"
    assert path.read_text() == "new\n"
    assert os.listdir(path.parent) == ["file.txt"]


def test_where_no_file_can_be_written(program: ctypes.CDLL, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not program.replace_file(bytes(tmp_path / "file" / "in" / "it"), b"text")
    (tmp_path / "folder" / "in_place").mkdir(parents=True)
    assert not program.replace_file(bytes(tmp_path / "folder" / "in_place"), b"text")
    assert os.listdir(tmp_path / "folder") == ["in_place"]


# In a process of its own: the choice as JSON, after a call.
CHOICE = """
    import json, torch, convnn_kernels
    from convnn_kernels import native
    x = torch.randn(20, 8)
    torch.ops.convnn.select(x, x, 3)
    print(json.dumps({**native.cpu_choice(), "name": native.cpu_instruction_set()}))
"""


@pytest.fixture
def choose(run_forked: Callable[..., str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Has another process choose, by default with a cache in tmp_path."""

    def run(**environment: str) -> dict[str, Any]:
        return json.loads(run_forked(CHOICE, **{"CONVNN_CACHE": str(tmp_path), **environment}))

    return run


Choose = Callable[..., dict[str, Any]]


@several_sets
def test_a_choice_is_measured_once_and_remembered(choose: Choose, tmp_path: Path) -> None:
    first = choose()
    assert first["source"] == "measured"
    assert first["milliseconds"] > 0
    assert first["is_kept"]
    (file,) = tmp_path.iterdir()
    assert first["file"] == str(file)
    assert list(first["picoseconds"]) == [n for n in USABLE if n != "portable"]
    assert first["name"] == first["instruction_set"]
    assert first["name"] in first["picoseconds"]
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    second = choose()
    assert second == {**first, "source": "remembered", "milliseconds": None}
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


@several_sets
def test_remembered_times_decide(choose: Choose, tmp_path: Path) -> None:
    sets = list(choose()["picoseconds"])
    (file,) = tmp_path.iterdir()
    title, key, _ = file.read_text().splitlines()
    for last, expected in [(960, sets[0]), (900, sets[-1])]:
        times = {**dict.fromkeys(sets, 1000), sets[-1]: last}
        line = " ".join(f"{name} {value}" for name, value in times.items())
        file.write_text(f"{title}\n{key}\n{line}\n")
        found = choose()
        assert (found["source"], found["picoseconds"]) == ("remembered", times)
        assert found["instruction_set"] == found["name"] == expected


@pytest.fixture(scope="module")
def remembered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that a process wrote."""
    folder = tmp_path_factory.mktemp("remembered")
    code = "from convnn_kernels import native; native.cpu_choice()"
    status, _, error = processes.run_forked(
        code, 60, processes.environment(CONVNN_CACHE=str(folder))
    )
    assert status == 0, error
    (file,) = folder.iterdir()
    return file


@pytest.mark.quick_one_in(3)
@several_sets
@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "another processor", "sets"])
def test_a_file_that_does_not_fit_is_replaced(
    choose: Choose, remembered: Path, tmp_path: Path, damage: str
) -> None:
    text = remembered.read_text()
    title, key, times = text.splitlines(keepends=True)
    file = tmp_path / remembered.name
    file.write_bytes(
        {
            "empty": b"",
            "garbage": bytes(range(256)) * 1000,
            "truncated": text[: len(text) // 2].encode(),
            "another processor": (title + "Z80 " + key + times).encode(),
            "sets": text.replace("avx2", "abacus").encode(),
        }[damage]
    )
    assert choose()["source"] == "measured"
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text().startswith(title + key)
    assert choose()["source"] == "remembered"


@pytest.mark.quick_one_in(2)
@several_sets
@pytest.mark.parametrize(
    "environment",
    [
        {"CONVNN_CACHE": "0"},
        {"CONVNN_CACHE": "relative/path"},
        {"CONVNN_CACHE": "", "XDG_CACHE_HOME": "", "HOME": ""},
        {"CONVNN_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "relative"},
    ],
)
def test_without_a_folder_nothing_is_remembered(
    choose: Choose, environment: dict[str, str]
) -> None:
    found = choose(**environment)
    assert (found["source"], found["file"], found["is_kept"]) == ("measured", None, False)


@several_sets
def test_a_folder_that_cannot_be_written_is_no_error(choose: Choose, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = choose(CONVNN_CACHE=str(tmp_path / "file"))
    assert (found["source"], found["is_kept"]) == ("measured", False)


@several_sets
def test_the_folder_of_the_user(choose: Choose, tmp_path: Path) -> None:
    home, cache = tmp_path / "home", tmp_path / "cache"
    in_cache = choose(CONVNN_CACHE="", XDG_CACHE_HOME=str(cache), HOME=str(home))
    assert Path(in_cache["file"]).parent == cache / "convnn_kernels"
    # The specification of XDG says to ignore relative paths.
    in_home = choose(CONVNN_CACHE="", XDG_CACHE_HOME="relative", HOME=str(home))
    assert Path(in_home["file"]).parent == home / ".cache" / "convnn_kernels"


def test_a_set_that_is_asked_for_is_not_timed(choose: Choose, tmp_path: Path) -> None:
    for name in INSTRUCTION_SETS:
        found = choose(CONVNN_CPU_ISA=name)
        assert found["name"] == name
        assert found["source"] == "requested"
        assert found["instruction_set"] == name
        assert not found["picoseconds"]
    assert not list(tmp_path.iterdir())


def test_nothing_is_timed_before_the_first_call(
    run_forked: Callable[..., str], tmp_path: Path
) -> None:
    code = """
        import convnn_kernels, convnn_kernels.nn
        from convnn_kernels import native
        from convnn_kernels.backends import selection
        assert native.cpu_can_run() and selection.available()["cpu"] is None
        with native.use_cpu_instruction_set("portable"):
            assert native.cpu_instruction_set() == "portable"
    """
    run_forked(code, CONVNN_CACHE=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@several_sets
def test_several_processes_at_once(choose: Choose, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: choose(), range(4)))
    (file,) = tmp_path.iterdir()
    assert {each["file"] for each in found} == {str(file)}
    assert choose()["source"] == "remembered"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_measures(run_forked: Callable[..., str]) -> None:
    """The new process has no such thread, and must not wait for it."""
    code = """
        import os, signal, threading, warnings
        from convnn_kernels import native
        warnings.simplefilter("ignore")
        native.usable_cpu_instruction_sets()
        thread = threading.Thread(target=native.cpu_instruction_set)
        thread.start()
        children = []
        while thread.is_alive() or not children:
            children.append(os.fork())
            if children[-1] == 0:
                signal.alarm(20)
                native.cpu_instruction_set()
                os._exit(0)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0, "a new process waits"
        print(len(children))
    """
    assert int(run_forked(code)) > 0
