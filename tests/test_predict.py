# SPDX-License-Identifier: MIT
"""tools.predict and tools.sass: how often code is executed, what it occupies, and the tables."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton here")
pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")

from benchmarks.workloads import Workload
from tools import expected, predict, sass

KERNELS = Path(__file__).parent.parent / "convnn_kernels" / "triton"
SOURCE = {
    1: "for i in range(0, n):",
    2: "for j in range(0, m):",
    3: "while any(left):",
    4: "if wanted:",
    5: "x = tl.inline_asm_elementwise(PTX, ...)",
    6: "y = a // b",
    7: "z = b",
    8: "w = z",
}


def code(text: str) -> sass.Program:
    """Machine code as nvdisasm prints it, from lines such as `1: @P0 BRA .L_x_0` or `.L_x_0:`."""
    lines = ['.text.a_kernel:\n\t.section\t.text.a_kernel,"ax",@progbits']
    for i, each in enumerate(filter(None, map(str.strip, text.splitlines()))):
        if found := re.match(r"(\d): (.*)", each):
            instruction = re.sub(r"((?:\.L_x_|\$)\w+\$?\w*)$", r"`(\1)", found[2])
            lines.append(f'\t//## File "/any/where/a.py", line {found[1]}')
            lines.append(f"        /*{16 * i:04x}*/                   {instruction} ;")
        else:
            lines.append(each)
    return sass.parse("\n".join(lines))


def walk(
    text: str,
    loops: Mapping[str, Any] | None = None,
    branches: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """How often each instruction is executed, by its first operand, R1, R2, ..."""
    program = code(text)
    found = sass.Walk(program, lambda line: SOURCE[line[1]], loops or {}, branches or {})
    return {
        program.instructions[i].operands.split(",")[0]: times
        for block, times in zip(found.blocks, found.executed, strict=True)
        for i in block.instructions
        if program.instructions[i].operands.startswith("R")
    }


def inlined(text: str) -> sass.Program:
    """As code(), from lines such as `2<4<1: MOV R1`: of line 2, in a function that line 4 calls."""
    lines = []
    for i, each in enumerate(filter(None, map(str.strip, text.splitlines()))):
        if found := re.match(r"([\d<]+): (.*)", each):
            *calls, outer = [f'"/any/where/a.cuh", line {n}' for n in found[1].split("<")]
            calls = [
                a + " inlined at " + b for a, b in zip(calls, [*calls[1:], outer], strict=False)
            ]
            lines += [f"\t//## File {call}" for call in (*calls, outer)]
            instruction = re.sub(r"(\.L_x_\w+)$", r"`(\1)", found[2])
            lines.append(f"        /*{16 * i:04x}*/                   {instruction} ;")
        else:
            lines.append(each)
    return sass.parse("\n".join(lines))


def test_parse_inlined_functions() -> None:
    program = inlined("2<4<1: MOV R1\n3: MOV R2")
    lines = [each.line for each in program.instructions]
    two, four, one, three = (("/any/where/a.cuh", n) for n in (2, 4, 1, 3))
    assert lines == [(*two, four, one), three]


def test_parse() -> None:
    program = code("1: MOV R1, 0x1\n.L_x_0:\n2: @!P0 LDG.E.128 R4, desc[UR4][R2.64]\n1: EXIT")
    assert program.labels[".L_x_0"] == 1
    assert program.instructions[1] == sass.Instruction(
        ("/any/where/a.py", 2), True, "LDG.E.128", "R4, desc[UR4][R2.64]"
    )
    assert [each.opcode for each in program.instructions] == ["MOV", "LDG.E.128", "EXIT"]
    assert not program.instructions[0].conditional


NESTED = """
    1: MOV R1
    1: @!P0 BRA .L_x_3
    .L_x_0:
    1: MOV R2
    2: @!P1 BRA .L_x_2
    .L_x_1:
    2: MOV R3
    2: @P2 BRA .L_x_1
    .L_x_2:
    1: MOV R4
    1: @P3 BRA .L_x_0
    .L_x_3:
    1: MOV R5
    1: EXIT
    .L_x_4:
    1: BRA .L_x_4
"""


def test_nested_loops() -> None:
    found = walk(NESTED, {"for i in": 5, "for j in": 7})
    assert found == {"R1": 1, "R2": 5, "R3": 35, "R4": 5, "R5": 1}


@pytest.mark.parametrize(("trips", "inner"), [(0, 0), (0.25, 1.25), (2.5, 12.5)])
def test_a_loop_without_trips_is_skipped(trips: float, inner: float) -> None:
    found = walk(NESTED, {"for i in": 5, "for j in": trips})
    assert found == {"R1": 1, "R2": 5, "R3": inner, "R4": 5, "R5": 1}
    none = walk(NESTED, {"for i in": 0, "for j in": trips})
    assert none == {"R1": 1, "R2": 0, "R3": 0, "R4": 0, "R5": 1}


UNROLLED = """
    1: MOV R1
    1: @P0 BRA .L_x_9
    1: @P1 BRA .L_x_1
    .L_x_0:
    1: MOV R2
    1: @P2 BRA .L_x_0
    .L_x_1:
    1: MOV R3
    1: @P3 BRA .L_x_2
    1: MOV R4
    .L_x_2:
    1: @P4 BRA .L_x_9
    1: MOV R5
    .L_x_9:
    1: MOV R6
    1: EXIT
"""


@pytest.mark.parametrize("trips", range(12))
def test_an_unrolled_loop(trips: int) -> None:
    """R2 has four trips, R4 two and R5 one."""
    found = walk(UNROLLED, {"for i in": trips})
    assert 4 * found["R2"] + 2 * found["R4"] + found["R5"] == trips
    assert found["R4"] <= 1
    assert found["R5"] <= 1
    assert found["R3"] == (trips > 0)
    assert found["R1"] == found["R6"] == 1


# What is left of the trips is a loop, too. R7 is for a number of trips that there is not.
REST_IS_A_LOOP = """
    1: MOV R1
    1: @P0 BRA .L_x_9
    1: @P1 BRA .L_x_1
    1: MOV R7
    .L_x_1:
    1: @P2 BRA .L_x_3
    .L_x_2:
    1: MOV R2
    1: MOV R8
    1: MOV R9
    1: MOV R10
    1: MOV R11
    1: MOV R12
    1: MOV R13
    1: @P3 BRA .L_x_2
    .L_x_3:
    1: @P4 BRA .L_x_4
    1: MOV R4
    .L_x_4:
    1: @P5 BRA .L_x_9
    .L_x_5:
    1: MOV R5
    1: @P6 BRA .L_x_5
    .L_x_9:
    1: MOV R6
    1: EXIT
"""


@pytest.mark.parametrize("trips", range(12))
def test_an_unrolled_loop_with_a_loop_for_the_rest(trips: int) -> None:
    found = walk(REST_IS_A_LOOP, {"for i in": trips})
    assert 4 * found["R2"] + 2 * found["R4"] + found["R5"] == trips
    assert found["R4"] <= 1
    assert found["R5"] <= 1
    assert found["R7"] == 0
    assert found["R1"] == found["R6"] == 1


UNROLLED_WITH_A_LOOP = """
    1: MOV R1
    1: @P0 BRA .L_x_1
    .L_x_0:
    2: LDG R2
    2: LDG R3
    2: LDG R4
    2: LDG R5
    1: @P1 BRA .L_x_0
    .L_x_1:
    1: @P2 BRA .L_x_9
    .L_x_2:
    2: LDG R6
    1: @P3 BRA .L_x_2
    .L_x_9:
    1: MOV R7
    1: EXIT
"""


@pytest.mark.parametrize("trips", range(12))
def test_an_unrolled_loop_with_a_loop_for_all_of_the_rest(trips: int) -> None:
    found = walk(UNROLLED_WITH_A_LOOP, {"for i in": trips})
    assert found["R2"] == found["R5"] == trips // 4
    assert found["R6"] == trips % 4
    assert found["R1"] == found["R7"] == 1


def test_two_loops_of_one_line_that_are_not_one() -> None:
    """A function in two places: loads of three and of two tensors."""
    two = UNROLLED_WITH_A_LOOP.replace("    2: LDG R5\n", "")
    two = two.replace("    2: LDG R6\n", "    2: LDG R6\n    2: LDG R8\n")
    found = walk(two, {"for i in": 6})
    assert found["R2"] == found["R6"] == 6


def test_a_condition_that_comes_first() -> None:
    text = """
        1: MOV R1
        .L_x_0:
        3: MOV R2
        3: @P0 BRA .L_x_1
        1: MOV R3
        1: BRA .L_x_0
        .L_x_1:
        1: MOV R4
        1: EXIT
    """
    found = walk(text, {"while any": 0.5})
    assert found == {"R1": 1, "R2": 1.5, "R3": 0.5, "R4": 1}


BRANCH = "4: MOV R1\n4: @P0 BRA .L_x_0\n4: MOV R2\n.L_x_0:\n4: MOV R3\n4: EXIT"
FAR_BRANCH = """
    4: MOV R1
    4: @P0 BRA .L_x_0
    .L_x_1:
    4: MOV R3
    4: EXIT
    .L_x_0:
    4: MOV R2
    4: BRA .L_x_1
"""


@pytest.mark.parametrize("text", [BRANCH, FAR_BRANCH])
@pytest.mark.parametrize(("told", "times"), [({}, 1), ({"if wanted": 0.2}, 0.2)])
def test_what_an_if_may_skip(text: str, told: dict[str, float], times: float) -> None:
    found = walk(text, branches=told)
    assert found == pytest.approx({"R1": 1, "R2": times, "R3": 1})


OTHER_ORDER = """
    4: MOV R1
    4: @P0 BRA .L_x_0
    7: MOV R3
    7: BRA .L_x_1
    .L_x_0:
    5: MOV R2
    .L_x_1:
    8: MOV R4
    8: EXIT
"""


@pytest.mark.parametrize("lines", [("5", "7"), ("7", "5")])
def test_an_else(lines: tuple[str, str]) -> None:
    """What the source has first is what the number is about."""
    text = OTHER_ORDER.replace("7: MOV", f"{lines[1]}: MOV").replace("5: MOV", f"{lines[0]}: MOV")
    text = text.replace("7: BRA", f"{lines[1]}: BRA")
    found = walk(text, branches={"if wanted": 0.2})
    first = "R2" if lines[0] == "5" else "R3"
    second = "R3" if lines[0] == "5" else "R2"
    assert found == pytest.approx({"R1": 1, first: 0.2, second: 0.8, "R4": 1})


def test_an_if_that_calls_a_function() -> None:
    """Which is above it in the source, and in the machine code behind what stands for an `else`."""
    text = """
        4: @P0 BRA .L_x_0
        4: MOV R1
        4: BRA .L_x_1
        .L_x_0:
        1: MOV R2
        1: @P1 BRA .L_x_0
        .L_x_1:
        4: MOV R3
        4: EXIT
    """
    found = walk(text, {"for i in": 5}, {"if wanted": 0.2})
    assert found == pytest.approx({"R1": 0.8, "R2": 1, "R3": 1})


def test_lanes_that_have_parted() -> None:
    """Nothing that is told is about their branch, though it has the same line."""
    text = FAR_BRANCH.replace("@P0 BRA", "BRA.DIV UR4,")
    assert walk(text, branches={"if wanted": 0.2}) == {"R1": 1, "R2": 0, "R3": 1}


def test_the_way_to_a_loop_is_taken() -> None:
    """Though the branch has another line, and what comes next is the way around."""
    text = """
        6: @P0 BRA .L_x_0
        6: MOV R1
        6: BRA .L_x_2
        .L_x_0:
        1: MOV R2
        1: @P1 BRA .L_x_0
        .L_x_2:
        1: MOV R3
        1: EXIT
    """
    assert walk(text, {"for i in": 3}) == {"R1": 0, "R2": 3, "R3": 1}


def test_loops_and_branches_of_one_line() -> None:
    """As inline PTX has them: numbers in their order."""
    text = """
        5: @P0 BRA .L_x_1
        5: MOV R1
        .L_x_0:
        5: MOV R2
        5: @P1 BRA .L_x_0
        .L_x_1:
        5: MOV R3
        .L_x_2:
        5: MOV R4
        5: @P3 BRA .L_x_3
        5: MOV R5
        .L_x_3:
        5: @P2 BRA .L_x_2
        5: EXIT
    """
    found = walk(text, {"x = tl.inline": [0.5, 6]}, {"x = tl.inline": [0.9, 0.25]})
    assert found == {"R1": 0.5, "R2": 0.5, "R3": 1, "R4": 6, "R5": 1.5}


TWICE_INLINED = """
    4: MOV R1
    .L_x_0:
    2<7: MOV R2
    2<7: @P0 BRA .L_x_0
    .L_x_1:
    2<3<8: MOV R3
    2<3<8: @P1 BRA .L_x_1
    4: MOV R4
    4: EXIT
"""


def walk_inlined(
    text: str, loops: Mapping[str, Any], branches: Mapping[str, Any] | None = None
) -> dict[str, float]:
    program = inlined(text)
    found = sass.Walk(program, lambda line: SOURCE[line[1]], loops, branches or {})
    return {
        program.instructions[i].operands: times
        for block, times in zip(found.blocks, found.executed, strict=True)
        for i in block.instructions
        if re.fullmatch(r"R\d", program.instructions[i].operands)
    }


def test_a_function_that_is_inlined_twice() -> None:
    """Its loop is named with a line that calls it, directly or not."""
    loops = {"for j in @ w = z": 5, "for j in @ z = b": 3}
    assert walk_inlined(TWICE_INLINED, loops) == {"R1": 1, "R2": 3, "R3": 5, "R4": 1}
    with pytest.raises(KeyError, match="for j in"):
        walk_inlined(TWICE_INLINED, {"for j in @ y = a": 5, "for j in @ z = b": 3})


def test_an_if_that_calls_an_inlined_function() -> None:
    """Whose own lines are anywhere: the line that calls it counts, which is behind the `if`."""
    text = """
        4<7: @P0 BRA .L_x_0
        8<7: MOV R1
        8<7: BRA .L_x_1
        .L_x_0:
        1<6<7: MOV R2
        .L_x_1:
        4<7: MOV R3
        4<7: EXIT
    """
    found = walk_inlined(text, {}, {"if wanted": 0.2})
    assert found == pytest.approx({"R1": 0.8, "R2": 0.2, "R3": 1})


def test_an_instruction_from_behind_an_else() -> None:
    """It was moved before the branch that follows the `if`."""
    text = """
        4<8: @P0 BRA .L_x_0
        5<8: MOV R1
        7<8: MOV R2
        7<8: MOV R3
        7<8: BRA .L_x_1
        .L_x_0:
        1<6<8: MOV R4
        .L_x_1:
        4<8: EXIT
    """
    found = walk_inlined(text, {}, {"if wanted": 0.2})
    assert found == pytest.approx({"R1": 0.8, "R2": 0.8, "R3": 0.8, "R4": 0.2})


def test_a_loop_with_a_break() -> None:
    """It is not taken; what it leaves the loop from is executed as often as the loop."""
    text = """
        1: MOV R1
        .L_x_0:
        1: MOV R2
        4: @P0 BRA .L_x_1
        1: MOV R3
        1: @P1 BRA .L_x_0
        .L_x_1:
        1: MOV R4
        1: EXIT
    """
    assert walk(text, {"for i in": 5}) == {"R1": 1, "R2": 5, "R3": 5, "R4": 1}
    found = walk(text, {"for i in": 5}, {"if wanted": 0.2})
    assert found == {"R1": 1, "R2": 5, "R3": 1, "R4": 1}


def test_copies_of_a_loop_that_may_each_end_it() -> None:
    text = """
        1: MOV R1
        .L_x_0:
        1: MOV R2
        1: @P0 BRA .L_x_1
        1: MOV R3
        1: @P1 BRA .L_x_1
        1: MOV R4
        1: @P2 BRA .L_x_0
        .L_x_1:
        1: MOV R5
        1: EXIT
    """
    found = walk(text, {"for i in": 9})
    assert found == {"R1": 1, "R2": 3, "R3": 3, "R4": 3, "R5": 1}


WANTED_UNROLLED = """
    1: MOV R1
    4: @P0 BRA .L_x_1
    2: LDS R7
    2: MOV R8
    .L_x_1:
    1: @P1 BRA .L_x_2
    .L_x_0:
    2: LDS R2
    3: LDS R3
    3: LDS R3
    2: LDS R4
    3: LDS R3
    3: LDS R3
    1: @P2 BRA .L_x_0
    .L_x_2:
    5: @P3 BRA .L_x_9
    2: LDS R5
    3: LDS R5
    .L_x_9:
    4: MOV R6
    4: EXIT
"""


@pytest.mark.parametrize(("wanted", "copies"), [([4, 2], 2), ([3], 1), ([], 1)])
def test_a_loop_that_the_source_wants_unrolled(wanted: list[int], copies: int) -> None:
    """In so many copies that each line has the same accesses in all; those before and behind it are
    for what is left of its trips."""
    program = code(WANTED_UNROLLED)
    unrolled = {1: wanted}
    found = sass.Walk(
        program,
        lambda line: SOURCE[line[1]],
        {"for i in": 7},
        {},
        lambda line: unrolled.get(line[1], []),
    )
    times = dict(zip(["R1", "R7", "for", "R2", "if", "R5", "R6"], found.executed, strict=False))
    assert times["R2"] == 7 / copies
    assert times["R7"] == times["R5"] == (copies == 1)
    assert times["R1"] == times["R6"] == 1


def test_a_loop_for_the_rest_that_comes_first() -> None:
    """Only where functions are known to be inlined; then it is not executed."""
    text = """
        1<4: MOV R1
        .L_x_0:
        2<4: LDG R2
        1<4: @P0 BRA .L_x_0
        .L_x_1:
        2<4: LDG R3
        2<4: LDG R4
        2<4: LDG R4
        2<4: LDG R4
        1<4: @P1 BRA .L_x_1
        4: EXIT
    """
    found = walk_inlined(text, {"for i in": 6})
    assert found == {"R1": 1, "R2": 0, "R3": 1.5, "R4": 1.5}


DIVISION = """
    6: MOV R1
    6: @P0 BRA .L_x_0
    6: MOV R2
    6: BRA .L_x_1
    .L_x_0:
    6: MOV R3
    6: CALL.REL.NOINC $__internal_0_$__cuda_sm20_div_s64
    .L_x_1:
    6: MOV R4
    6: EXIT
    $__internal_0_$__cuda_sm20_div_s64:
    6: MOV R5
    6: MOV R6
    6: RET.REL.NODEC R8
"""


def test_divisions() -> None:
    """The subroutine is counted where there is no way around it."""
    walk_of_division = sass.Walk(code(DIVISION), lambda line: "", {}, {})
    found = walk(DIVISION)
    assert [found[f"R{i}"] for i in range(1, 5)] == [1, 1, 0, 1]
    always = code(DIVISION.replace("    6: @P0 BRA .L_x_0\n", "").replace("6: BRA .L_x_1", ""))
    way = sass.Walk(always, lambda line: "", {}, {})
    # Eight of its own, of which one is the call, and three.
    assert sass.cost(always, way, 1, {}).issued == 6 + 3
    local = code(DIVISION.replace("$__internal_0_$__cuda_sm20_div_s64", ".L_x_7"))
    assert sass.Walk(local, lambda line: "", {}, {}).executed == walk_of_division.executed


@pytest.mark.parametrize(
    ("text", "error", "named"),
    [
        (NESTED, KeyError, "for j in range"),
        (DIVISION.replace("$__internal_0_$__cuda_sm20", "$other"), ValueError, "other"),
        ("1: BRX R4 -0x10", ValueError, "BRX"),
        ("4: MOV R1\n.L_x_0:\n1: MOV R2\n1: BRA .L_x_0", ValueError, "without an end: for i in"),
    ],
)
def test_what_is_not_known_is_an_error(text: str, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=re.escape(named)):
        walk(text, {"for i in": 5} if error is KeyError else {"for ": 2})


def cost(text: str, warps: int = 4, sizes: Mapping[sass.Line, float] | None = None) -> sass.Cost:
    program = code(text + "\n1: EXIT")
    return sass.cost(program, sass.Walk(program, lambda line: "", {}, {}), warps, sizes or {})


@pytest.mark.parametrize(
    ("opcode", "clocks"),
    [
        ("FFMA", 1),
        ("IMAD.MOV.U32", 2),
        ("ISETP.GE.U32.AND", 2),
        ("FMNMX", 2),
        ("VIMNMX.U32", 2),
        ("F2FP.BF16.F32.PACK_AB", 2),
        ("MUFU.EX2", 8),
        ("I2F.U32.RP", 8),
        ("UIADD3", 0),
        ("BAR.SYNC.DEFER_BLOCKING", 0),
    ],
)
def test_pipes(opcode: str, clocks: int) -> None:
    found = cost(f"1: {opcode} R1\n1: {opcode} R1")
    assert found.issued == 3
    assert found.busiest_pipe() == 2 * clocks
    assert not found.unknown


def test_two_pipes_work_at_once() -> None:
    assert cost("1: FFMA R1\n" * 3 + "1: LOP3.LUT R1\n").busiest_pipe() == 3
    # IMAD has one half of the pipe of FFMA.
    assert cost("1: FFMA R1\n" * 4 + "1: IMAD R1\n").busiest_pipe() == 5
    assert cost("1: FFMA R1\n" * 1 + "1: IMAD R1\n" * 4).busiest_pipe() == 8


@pytest.mark.parametrize(
    ("instruction", "moved", "shared"),
    [
        ("LDG.E R1", 128, 0),
        ("LDG.E.U16 R1", 64, 0),
        ("@P0 LDG.E.128 R1", 512, 0),
        ("STG.E.64 [R1]", 256, 0),
        ("LDGSTS.E.BYPASS.128 [R1]", 512, 512),
        ("LDS.128 R1", 0, 512),
        ("STS.U8 [R1]", 0, 32),
        ("LDSM.16.M88.4 R1", 0, 512),
        ("STSM.16.MT88.2 [R1]", 0, 256),
        ("LDSM.16.M88 R1", 0, 128),
        ("SHFL.BFLY PT, R1", 0, 128),
        ("RED.E.ADD.S32.STRONG.GPU [R1]", 128, 0),
    ],
)
def test_widths(instruction: str, moved: int, shared: int) -> None:
    found = cost(f"1: {instruction}")
    assert (found.moved, found.shared) == (moved, shared)


def test_lanes_that_load_the_same() -> None:
    """Never more than the tensor has, in all warps together."""
    load = "1: LDG.E.128 R1"
    assert cost(load, 4, {("a.py", 1): 800.0}).moved == 200
    assert cost(load, 4, {("a.py", 1): 1e9, ("b.py", 1): 8.0}).moved == 512


@pytest.mark.parametrize(
    ("instruction", "products", "shared"),
    [
        # A quarter of 64 x 128 x 16; the second matrix is read from shared memory, or both are.
        ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24", 64 * 128 * 16 / 2, 1024),
        ("HGMMA.64x128x16.F32 R24, gdesc[UR4], gdesc[UR8], R24", 64 * 128 * 16 / 2, 1536),
        ("HGMMA.64x64x8.F32.TF32 R24, R4, gdesc[UR8], R24", 64 * 64 * 8, 512),
        ("HMMA.16816.F32.BF16 R4, R8, R2, R4", 2 * 16 * 8 * 16, 0),
        ("HMMA.1688.F32.TF32 R4, R8, R2, R4", 2 * 2 * 16 * 8 * 8, 0),
    ],
)
def test_products(instruction: str, products: float, shared: float) -> None:
    found = cost(f"1: {instruction}")
    assert (found.products, found.shared) == (products, shared)


def test_opcodes_that_are_not_known() -> None:
    found = cost("1: NEWOP.X R1\n1: FFMA R1")
    assert found.unknown == {"NEWOP"}
    assert found.issued == 3
    with pytest.raises(ValueError, match="UTMALDG"):
        cost("1: UTMALDG.2D [UR8]")


def test_shares_and_copies() -> None:
    """Of lanes that access memory, by line, and of what a descriptor is about."""
    program = code("""
        1: LDG.E.128 R1
        2: LDG.E R2
        2: STS.64 [R3]
        1: STS [R3]
        3: UTMALDG.3D [UR8]
        3: UBLKCP [UR8]
        1: EXIT
    """)
    way = sass.Walk(program, lambda line: "", {}, {})
    shares = {1: 1.0, 2: 0.25, 3: 1.0}
    copied = {3: 1000.0}
    found = sass.cost(
        program, way, 1, {}, lambda line: shares[line[1]], lambda line: copied.get(line[1])
    )
    assert found.moved == 512 + 32 + 2000
    assert found.shared == 64 + 128 + 2000
    assert found.issued == 7
    with pytest.raises(ValueError, match="UTMALDG"):
        sass.cost(program, way, 1, {}, lambda line: shares[line[1]])


@pytest.mark.parametrize(("is_shared", "moved", "shared"), [(False, 384, 0), (True, 0, 384)])
def test_pointers_to_either_memory(is_shared: bool, moved: float, shared: float) -> None:
    program = code("1: LD.E.64 R1\n1: ST.E [R1]\n1: EXIT")
    way = sass.Walk(program, lambda line: "", {}, {})
    found = sass.cost(program, way, 1, {}, generic_is_shared=is_shared)
    assert (found.moved, found.shared) == (moved, shared)


def test_bytes_of_tensors() -> None:
    text = """
#loc = loc("/any/norms.py":88:0)
#loc4 = loc("/any/norms.py":56:22)
#loc5 = loc("/any/norms.py":56:40)
#loc6 = loc("/any/order.py":7:3)
#loc7 = loc(callsite(#loc6 at #loc4))
#loc8 = loc("b_x"(#loc4))
#loc9 = loc(callsite(#loc6 at #loc5))
  %1 = tt.load %p, %m, %o : tensor<16x32x!tt.ptr<bf16>, #blocked> loc(#loc8)
  %2 = tt.load %p : tensor<16x32x!tt.ptr<bf16>, #blocked> loc(#loc4)
  %3 = tt.load %p : tensor<8x!tt.ptr<i64>, #blocked> loc(#loc5)
  %4 = tt.load %q : !tt.ptr<f32> loc(#loc7)
  %5 = ttg.async_copy_global_to_local %p, %b : tensor<64x!tt.ptr<f16>> -> <64xf16> loc(#loc)
  %6 = tt.load %q : tensor<2x2x!tt.ptr<f32>> loc(#loc9)
  %7 = arith.addi %a, %b : tensor<64x!tt.ptr<f16>> loc(#loc)
"""
    assert predict.tensor_bytes(text) == {
        ("norms.py", 56): 16 * 32 * 2 + 8 * 8,
        ("order.py", 7): 4,
        ("norms.py", 88): 128,
    }


@pytest.mark.parametrize(("mean", "lanes"), [(0.3, 32), (2.0, 64), (40.0, 4)])
def test_the_largest_of_counts(mean: float, lanes: int) -> None:
    counts = torch.poisson(
        torch.full((20_000, lanes), mean), generator=torch.Generator().manual_seed(0)
    )
    assert expected.largest(mean, lanes) == pytest.approx(counts.amax(1).mean().item(), rel=0.02)


def test_every_kernel_is_expected() -> None:
    text = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    names = set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))
    assert names == set(expected.EXPECTED)
    # And there are lines that begin as is said.
    lines = {line.strip() for path in KERNELS.glob("*.py") for line in path.open()}
    for kernel in names:
        of = expected.EXPECTED[kernel]
        for begin in (*of.loops, *of.branches, *of.masks):
            assert any(line.startswith(begin) for line in lines), (kernel, begin)


def small(**options: Any) -> predict.Work:
    return predict.Work(
        "small", Workload(1, 132 * 128, 64, 9, "random", dtype="bfloat16"), **options
    )


def test_a_kernel_that_is_not_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, variant = predict.launches(small(operator="select"))[0]
    monkeypatch.delitem(expected.EXPECTED, launch.kernel.name)
    with pytest.raises(KeyError, match=launch.kernel.name):
        predict.predict(launch, variant)


@pytest.mark.slow
def test_a_launch() -> None:
    """Flops, and bytes of rows of V, of W and of what is stored, by another count."""
    launch, variant = next(
        each
        for each in predict.launches(small(weight="dense"))
        if each[0].kernel.name == "aggregate_dense_kernel"
    )
    found = predict.predict(launch, variant)
    N, k, C = 132 * 128, 9, 64
    flops = 2 * N * k * C * C
    assert found.tensor == pytest.approx(1e6 * flops / 790e12)
    # Every program has 128 rows, and reads the weight; indices and similarities are read for each j
    # and, of one j instead of all, twice before.
    moved = N * k * C * 2 + N // 128 * k * C * C * 2 + N * C * 2 + N * (k + 2) * 12
    # At the end of the loop, the loads of two steps that there are not count, though masked.
    assert 1 <= found.l2 / (1e6 * moved / 5.5e12) <= (k + 2) / k
    # A program more, for which one multiprocessor has two.
    launch.programs += 1
    more = predict.predict(launch, variant)
    assert more.issue == pytest.approx(2 * found.issue)
    assert more.l2 == pytest.approx(found.l2 * 133 / 132)


def row(work: str, least: float, **more: Any) -> predict.Row:
    kernel = {"kernel": "a_kernel", "launches": 2, "least": least}
    kernel |= dict.fromkeys(predict.TIMES, least)
    of = {"work": work, "least": least, "good": least / 0.65, "beside": "", "beside_us": None}
    return of | {"goal": None, "kernels": [kernel]} | more


def test_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document, result = tmp_path / "performance.md", tmp_path / "predicted.json"
    begin = "<!-- by hand: predicted by python -m tools.predict -->\n"
    document.write_text(f"before\n{begin}old\n<!-- end -->\nafter\n<!-- end -->\n")
    monkeypatch.setattr(predict, "DOCUMENT", document)
    monkeypatch.setattr(predict, "RESULT", result)
    rows = [
        row("select, D = 64", 65.0, beside="S written", beside_us=50.0, goal=1.0),
        row("select, D = 64, float32", 130.0, beside="bfloat16", goal=2.5),
        row(f"{predict._VGG} 1", 13.0),
        row(f"{predict._VGG} 2", 26.0),
    ]
    predict.finish(rows)
    for _ in range(2):
        predict.write(rows)
    text = document.read_text()
    assert text.startswith(f"before\n{begin}\n| work |")
    assert text.endswith("<!-- end -->\nafter\n<!-- end -->\n")
    assert "old" not in text
    assert "| select, D = 64 | 2 | 65 | 100 | S written 50 | 2 | ≤ 1, missed |" in text
    assert "| select, D = 64, float32 | 2 | 130 | 200 | bfloat16 100 | 2 | ≤ 2.5 |" in text
    assert "all, forward+backward | 4 | 39 | 60 |  |  |  |" in text
    assert "| select, D = 64 | `a_kernel` × 2 | 65.0 |" in text
    written = json.loads(result.read_text())
    assert written["rows"] == rows
    assert "not measured" in written["what"]


def test_attention() -> None:
    """4 B N^2 D flops forward and 10 backward, at the rates of FlashAttention-3."""
    w = Workload(64, 4096, 64, 9, dtype="bfloat16")
    flops = 64 * 4096**2 * 64
    assert predict._attention(w, False) == pytest.approx(4e6 * flops / 476e12)
    both = predict._attention(w, True)
    assert math.isclose(both, 4e6 * flops / 476e12 + 10e6 * flops / 453e12)
