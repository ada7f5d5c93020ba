# SPDX-License-Identifier: MIT
"""What is measured by name: groups of workloads and peers, the most telling first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .peers import PEERS
from .runner import Case, Effort, Group
from .workloads import REQUIRED, Workload

_BOTH = ("forward", "forward+backward")

# What one would put into a model in place of another.
_MODELS = ("convnn-all", "convnn-random", "convnn-spatial", "eager", "sdpa", "conv2d")


def _cases(
    workload: Workload, peers: Iterable[str], passes: Sequence[str] = _BOTH
) -> tuple[Case, ...]:
    """Each of these passes that a peer has."""
    return tuple(
        Case(workload, peer, each)
        for peer in peers
        for each in passes
        if each in PEERS[peer].passes
    )


def _required() -> list[Group]:
    """The rows of issue 3: the operators beside attention, exact search and eager PyTorch."""
    groups = []
    for workload in REQUIRED:
        small = workload.batch * workload.tokens**2 <= 2**24
        peers = ["mm", "select", "faiss", "convnn-all", "sdpa"]
        # The kernel that PyTorch does not choose is the faster one at a few sizes only.
        peers += ["sdpa-math", "eager"] if small else []
        random = replace(workload, source="random")
        groups.append(
            Group(
                f"required {workload.shape}",
                (
                    *_cases(workload, peers),
                    *_cases(random, ("select", "convnn-all"), ("forward",)),
                    *_cases(workload, ("select-avx2", "convnn-avx2"), ("forward",)),
                ),
                Effort(12 if small else 30, fewest_rounds=5),
                memory=_MODELS if workload == REQUIRED[1] else (),
            )
        )
    return groups


def _beside_convolution() -> list[Group]:
    groups = []
    for workload in REQUIRED[1:3]:
        cases = _cases(workload, ("conv2d", "aggregate-dense", "convnn-dense", "aggregate"))
        for count in (32, 64):
            restricted = replace(workload, candidates=count)
            cases += _cases(restricted, ("convnn-random", "convnn-spatial"))
        groups.append(Group(f"beside Conv2d {workload.shape}", cases, Effort(8)))
    return groups


def _growth() -> Group:
    """Times of N = 1024 ... 32768 for a fit."""
    sizes = [Workload(1, 2**e, 64, 9, "random") for e in range(10, 16)]
    cases = [Case(workload, peer) for workload in sizes for peer in ("convnn-all", "convnn-random")]
    return Group("growth with N", tuple(cases), Effort(10, fewest_rounds=5))


def _overhead() -> Group:
    """A call so small that its time is that of the host."""
    tiny = Workload(1, 8, 8, 2, "random")
    cases = [
        Case(tiny, peer, passes)
        for peer in ("sdpa", "convnn-all", "functional")
        for passes in ("forward", "inference")
    ]
    return Group("host overhead", tuple(cases), Effort(5, fewest_rounds=15, sample_seconds=0.02))


def _bfloat16() -> list[Group]:
    return [
        Group(
            f"bfloat16 {workload.shape}",
            _cases(replace(workload, dtype="bfloat16"), ("mm", "select", "convnn-all", "sdpa")),
            Effort(8),
        )
        for workload in REQUIRED[2:4]
    ]


def _curves() -> list[Group]:
    """Time and memory against N, on a photograph."""
    return [
        Group(f"against N {w.shape}", _cases(w, _MODELS), Effort(seconds), memory=_MODELS)
        for w, seconds in (
            (Workload(1, 256, 64, 9), 4),
            (Workload(1, 1024, 64, 9), 4),
            (Workload(1, 4096, 64, 9), 6),
            (Workload(1, 16384, 64, 9), 6),
        )
    ]


def cpu() -> list[Group]:
    return [
        *_required(),
        *_beside_convolution(),
        _overhead(),
        _growth(),
        *_bfloat16(),
        *_curves(),
    ]


def quick() -> list[Group]:
    effort = Effort(2, most_rounds=10)
    return [
        Group(f"against N {w.shape}", _cases(w, _MODELS), effort, memory=_MODELS)
        for w in (Workload(1, 256, 64, 9), Workload(1, 1024, 64, 9))
    ]


@dataclass(frozen=True)
class Suite:
    purpose: str
    groups: Callable[[], list[Group]]


SUITES = {
    "cpu": Suite("the CPU kernels against their goals, and what they replace", cpu),
    "quick": Suite("two small shapes, in seconds", quick),
}
