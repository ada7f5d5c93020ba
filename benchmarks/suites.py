# SPDX-License-Identifier: MIT
"""What is measured by name: groups of workloads and peers, the most telling first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .peers import PEERS
from .runner import Case, Effort, Group
from .workloads import (
    GPU_FLOAT32,
    GPU_LAYERS,
    GPU_SELECT,
    GPU_VGG11,
    GPU_VIT,
    LONG,
    REQUIRED,
    SEARCH,
    SEARCH_PHOTOGRAPHS,
    TINY,
    VGG11,
    VIT_TINY,
    Workload,
    scaled,
)

_BOTH = ("forward", "forward+backward")
_FORWARD = _BOTH[:1]

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
    """The shapes that the project is held to: beside attention, exact search, eager PyTorch."""
    groups = []
    for workload in REQUIRED:
        small = workload.batch * workload.tokens**2 <= 2**24
        peers = ["mm", "copy", "select", "faiss", "convnn-all", "sdpa"]
        # The kernel that PyTorch does not choose is the faster one at a few sizes only.
        peers += ["sdpa-math", "eager"] if small else []
        avx2 = ["select-avx2", "convnn-avx2"] if small else ["select-avx2"]
        random = replace(workload, source="random")
        groups.append(
            Group(
                f"required {workload.shape}",
                (
                    *_cases(workload, peers),
                    *_cases(random, ("select", "convnn-all"), _FORWARD),
                    *_cases(workload, avx2, _FORWARD),
                ),
                Effort(8 if small else 15, fewest_rounds=5 if small else 3),
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
    """Times of N = 1024 ... 32768 for a fit.

    A sample has several passes at each size, so that all of them are measured warm: after a pass of
    another size, the next one waits for memory.
    """
    sizes = [Workload(1, 2**e, 64, 9, "random") for e in range(10, 16)]
    cases = [Case(workload, peer) for workload in sizes for peer in ("convnn-all", "convnn-random")]
    effort = Effort(10, fewest_rounds=5, sample_seconds=0.06)
    return Group("growth with N", tuple(cases), effort)


def _overhead() -> Group:
    """A call so small that its time is that of the host."""
    cases = [
        Case(TINY, peer, passes)
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
            (Workload(1, 256, 64, 9), 3),
            (Workload(1, 1024, 64, 9), 3),
            (Workload(1, 4096, 64, 9), 5),
            (Workload(1, 16384, 64, 9), 5),
        )
    ]


def cpu(device: str) -> list[Group]:
    return [
        *_required(),
        *_beside_convolution(),
        _overhead(),
        _growth(),
        *_bfloat16(),
        *_curves(),
    ]


def quick(device: str) -> list[Group]:
    effort = Effort(2, most_rounds=10)
    return [
        Group(f"against N {w.shape}", _cases(w, _MODELS), effort, memory=_MODELS)
        for w in (Workload(1, 256, 64, 9), Workload(1, 1024, 64, 9))
    ]


def _fit(workload: Workload, device: str) -> Workload:
    """As it is on a GPU; on a CPU in float32 and with as many pairs as fit into a minute."""
    if device == "cuda":
        return workload
    if workload.keys is not None:
        # Half as many keys are no map.
        return scaled(replace(workload, dtype="float32", source="random"), 2**27)
    return scaled(replace(workload, dtype="float32"), 2**24)


def _unique(workloads: Iterable[Workload]) -> list[Workload]:
    return list(dict.fromkeys(workloads))


_ATTENTION = ("sdpa", "sdpa-flash", "sdpa-math", "sdpa-efficient", "sdpa-cudnn")
_SEARCH = ("matmul", "matmul-topk", "cdist-topk", "faiss", "faiss-gpu", "cuvs", "flashlib", "keops")
_OPERATORS = ("select", "aggregate", "convnn-all", "convnn-random", "convnn-spatial")
_EAGER = ("eager", "compiled", "eager-aggregate", "eager-random", "eager-spatial")
_LOCAL = ("flex-local", "local", "natten", "kvt")


def _operators_at(workload: Workload, peers: Iterable[str], seconds: float) -> Group:
    return Group(f"operators {workload}", _cases(workload, ("mm", "copy", *peers)), Effort(seconds))


def operators(device: str) -> list[Group]:
    """Each operator beside every peer, on the paper's shapes, long sequences and searches."""
    tokens = [_fit(w, device) for w in (VIT_TINY, *LONG)]
    everyone = (*_OPERATORS, *_EAGER, *_ATTENTION, *_LOCAL, "conv2d", *_SEARCH)
    groups = [_operators_at(w, everyone, 15) for w in _unique(tokens)]
    random = [replace(w, source="random") for w in _unique(tokens)[:2]]
    groups += [_operators_at(w, (*_OPERATORS, "sdpa"), 8) for w in random]
    searches = _unique(_fit(w, device) for w in SEARCH)
    return groups + [_operators_at(w, ("select", *_SEARCH), 8) for w in searches]


def layers(device: str) -> list[Group]:
    """The layers of VGG-11 one by one, then both models as a whole."""
    groups = []
    for i, workload in enumerate(VGG11, 1):
        w = workload if device == "cuda" else replace(workload, batch=16)
        peers = ("mm", "conv2d", "convnn-dense", "aggregate-dense", "eager-dense")
        groups.append(Group(f"VGG-11 layer {i} {w.shape}", _cases(w, peers), Effort(4)))
    vgg = tuple(f"vgg11-{layer}" for layer in ("conv2d", "hybrid", "convnn"))
    vit = tuple(f"vit-{layer}" for layer in ("attention", "convnn", "local"))
    images = (128, 64) if device == "cuda" else (8, 2)
    for name, (tokens, channels), models, batch in zip(
        ("VGG-11", "ViT-Tiny"), ((1024, 3), (197, 192)), (vgg, vit), images, strict=True
    ):
        w = Workload(batch, tokens, channels, 9, "random")
        groups.append(Group(f"model {name}", _cases(w, models), Effort(15), memory=models))
    return groups


def memory(device: str) -> list[Group]:
    """Peak memory against N; timed only as often as a median needs."""
    peers = (*_MODELS, "compiled", "matmul-topk", "local", "kvt")
    largest = 65536 if device == "cuda" else 16384
    effort = Effort(0, fewest_rounds=3)
    return [
        Group(f"memory {w.shape}", _cases(w, peers), effort, memory=peers)
        for w in (Workload(1, 4**e, 64, 9) for e in range(4, 9))
        if w.tokens <= largest
    ]


def scaling(device: str) -> list[Group]:
    """One of N, k, D and R at a time, on a photograph."""
    base = Workload(1, 4096, 64, 9, dtype="bfloat16" if device == "cuda" else "float32")
    peers = (*_MODELS, "flex-local", "local", "kvt", "faiss", "flashlib", "keops")
    sizes = [4**e for e in range(4, 9) if device == "cuda" or e < 8]
    groups = [
        Group(f"against N {w.shape}", _cases(w, peers), Effort(6), memory=_MODELS)
        for w in (replace(base, tokens=tokens) for tokens in sizes)
    ]
    few = ("convnn-all", "convnn-random", "eager", "sdpa")
    groups += [
        Group(f"against k {w.shape}", _cases(w, few), Effort(4))
        for w in (replace(base, k=k) for k in (1, 4, 9, 16, 32, 64, 100))
    ]
    groups += [
        Group(f"against D {w.shape}", _cases(w, few), Effort(4))
        for w in (replace(base, channels=channels) for channels in (16, 32, 64, 128, 256))
    ]
    return groups + [
        Group(
            f"against R {w.candidates}",
            _cases(w, ("convnn-all", "convnn-random", "convnn-spatial", "sdpa", "conv2d")),
            Effort(4),
        )
        for w in (replace(base, candidates=count) for count in (16, 64, 256, 1024))
    ]


def backends(device: str) -> list[Group]:
    """The implementations of the same operators against each other."""
    if device == "cuda":
        peers = [f"{op}-{name}" for op in ("select", "convnn") for name in ("triton", "cuda")]
        shapes: Sequence[Workload] = (VIT_TINY, *LONG[:4])
    else:
        peers = [f"{op}-{isa}" for op in ("select", "convnn") for isa in ("avx2", "portable")]
        peers = ["select", "convnn-all", *peers]
        shapes = REQUIRED[:3]
    return [Group(f"backends {w}", _cases(w, ("mm", *peers), _FORWARD), Effort(8)) for w in shapes]


_SDPA = ("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
_SHORT = Effort(3, fewest_rounds=5, most_rounds=30)


def _gpu_select(workload: Workload) -> Group:
    """Beside the product that only writes S, and its topk."""
    random = replace(workload, source="random")
    cases = _cases(random, ("mm", "copy", "select", "matmul", "matmul-topk"))
    cases += _cases(workload, ("select",))
    return Group(f"gpu select {workload.shape}", cases, _SHORT)


def _gpu_search(workload: Workload, photographs: Workload) -> Group:
    cases = _cases(workload, ("mm", "copy", "select", *_SEARCH)) + _cases(photographs, ("select",))
    return Group(f"gpu search {workload.shape}", cases, _SHORT)


def _gpu_layer(workload: Workload, *peers: str) -> Group:
    """Both ways beside attention; photographs first, and ours on random features, too."""
    cases = _cases(workload, ("mm", "copy", "select", "aggregate", "convnn-all", *peers, *_SDPA))
    cases += _cases(replace(workload, source="random"), ("select", "convnn-all"))
    memory = ("convnn-all", "sdpa")
    return Group(f"gpu layer {workload.shape}", cases, _SHORT, memory)


def _gpu_vgg(layer: int, workload: Workload) -> Group:
    peers = ("mm", "conv2d", "convnn-dense", "convnn-dense-random", "aggregate-dense")
    cases = _cases(workload, peers)
    cases += _cases(replace(workload, source="random"), ("convnn-dense", "convnn-dense-random"))
    return Group(f"gpu VGG-11 layer {layer} {workload.shape}", cases, Effort(2, 5, 30))


def _gpu_float32() -> Group:
    peers = ("mm", "copy", "select", "convnn-all")
    cases: tuple[Case, ...] = ()
    for dtype in ("float32", "bfloat16"):
        for source in ("photographs", "random"):
            w = replace(GPU_FLOAT32, dtype=dtype, source=source)
            cases += _cases(w, peers if source == "photographs" else peers[2:])
    return Group(f"gpu float32 {GPU_FLOAT32.shape}", cases, _SHORT)


def _gpu_host() -> Group:
    """What the host takes for a call of the smallest shape, and a replay of its graph."""
    peers = [f"{kind}-{name}" for kind in ("host", "graph") for name in ("sdpa", "cuda", "triton")]
    return Group("gpu host", _cases(TINY, peers, _FORWARD), Effort(3, fewest_rounds=15))


def gpu(device: str) -> list[Group]:
    """What a GPU is held to, in about six minutes; the most telling first."""
    random_vit = replace(GPU_VIT, source="random")
    curves = [Workload(1, 4**e, 64, 9, dtype="bfloat16") for e in range(4, 9)]
    groups = [
        _gpu_layer(GPU_LAYERS[0]),
        _gpu_select(GPU_SELECT[0]),
        _gpu_search(SEARCH[1], SEARCH_PHOTOGRAPHS[1]),
        Group(
            f"gpu ViT-Tiny {GPU_VIT.shape}",
            _cases(GPU_VIT, ("mm", "copy", "convnn-all", "convnn-random", "select", *_SDPA))
            + _cases(random_vit, ("convnn-all", "convnn-random", "select")),
            _SHORT,
            ("convnn-all", "sdpa"),
        ),
        *(_gpu_vgg(i, w) for i, w in enumerate(GPU_VGG11, 1)),
        _gpu_host(),
        _gpu_float32(),
        _gpu_layer(GPU_LAYERS[1]),
        _gpu_layer(GPU_LAYERS[4], "eager"),
        *(_gpu_select(w) for w in GPU_SELECT[1:]),
        *(
            _gpu_search(w, photographs)
            for w, photographs in zip(SEARCH, SEARCH_PHOTOGRAPHS, strict=True)
            if w.k != 16
        ),
        *(_gpu_layer(w) for w in GPU_LAYERS[2:4]),
        *(
            Group(f"gpu against N {w.shape}", _cases(w, _MODELS), _SHORT, memory=_MODELS)
            for w in curves
        ),
        *backends("cuda")[:2],
    ]
    return groups if device == "cuda" else [_fitted(group) for group in groups]


def _backends(device: str) -> tuple[str, ...]:
    return ("triton", "cuda") if device == "cuda" else ("triton",)


# Few columns in one launch; groups of columns; a dense convolution.
_RIGHT = {
    "small": Workload(16, 197, 64, 9, "random"),
    "large": Workload(2, 4096, 64, 9, "random"),
    "dense": Workload(4, 1024, 64, 9, "random", outputs=128),
}


def right(device: str) -> list[Group]:
    """Every operator, backend and dtype, checked and not timed; on a CPU a few small ones."""
    peers = ("select", "aggregate", "convnn-all", "convnn-random")
    rows = [(name, w, each) for name, w in _RIGHT.items() for each in peers if name != "dense"]
    rows += [("dense", _RIGHT["dense"], each) for each in ("convnn-dense", "aggregate-dense")]
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16")
    if device != "cuda":  # Triton's interpreter has no bfloat16
        rows = [(n, replace(w, batch=1, tokens=16, channels=16), p) for n, w, p in rows[2::3]]
        dtypes = dtypes[:2]
    return [
        Group(
            f"{name} {peer} {dtype} {backend}",
            _cases(replace(w, dtype=dtype), (peer,)),
            Effort(0, 0, 0),
            backend=backend,
        )
        for name, w, peer in rows
        for dtype in dtypes
        for backend in _backends(device)
    ]


def time(device: str) -> list[Group]:
    """The kernels of the goals, on random features, beside what they are held against."""
    half = replace(GPU_FLOAT32, dtype="bfloat16")
    rows: list[tuple[Workload, Sequence[str]]] = [
        (GPU_LAYERS[0], ("convnn-all", *_SDPA[1:])),
        *((w, ("select", "matmul")) for w in GPU_SELECT),
        (GPU_VIT, ("convnn-all", "convnn-random", *_SDPA[1:])),
        *((w, ("convnn-dense", "conv2d")) for w in dict.fromkeys(GPU_VGG11)),
        (TINY, ()),
        *((w, ("convnn-all", *_SDPA[1:])) for w in (half, GPU_FLOAT32, *GPU_LAYERS[1:4])),
        *((w, ("select",)) for w in SEARCH),
    ]
    if device != "cuda":
        rows = [(TINY, ("convnn-all", "sdpa"))]
    groups = []
    for w, peers in rows:
        for backend in _backends(device):
            name = f"{(peers or ('host',))[0]} {w.shape} {w.dtype} {backend}"
            # What is not ours is measured once.
            here = peers if backend == "triton" else peers[:1]
            cases = _cases(replace(w, source="random"), here or ("host-sdpa", f"host-{backend}"))
            effort = Effort(0.4, 3, 8) if device == "cuda" else Effort(0, 1, 1)
            groups.append(Group(name, cases, effort, backend=backend))
    return groups


def _fitted(group: Group) -> Group:
    cases = (replace(case, workload=_fit(case.workload, "cpu")) for case in group.cases)
    return replace(group, cases=tuple(dict.fromkeys(cases)))


@dataclass(frozen=True)
class Suite:
    """groups: for a device, "cpu" or "cuda"; CPU variants are scaled to minutes."""

    purpose: str
    groups: Callable[[str], list[Group]]


SUITES = {
    "cpu": Suite("the CPU kernels against their goals, and what they replace", cpu),
    "gpu": Suite("what a GPU is held to, in about six minutes", gpu),
    "right": Suite("every operator, backend and dtype of a GPU, checked and not timed", right),
    "time": Suite("the kernels of a GPU one by one, in a minute and a half", time),
    "quick": Suite("two small shapes, in seconds", quick),
    "operators": Suite("each operator beside every peer", operators),
    "layers": Suite("layers of VGG-11, and whole models", layers),
    "memory": Suite("peak memory against N", memory),
    "scaling": Suite("time against N, k, D and R", scaling),
    "backends": Suite("backend against backend, instruction set against instruction set", backends),
}

DEFAULT = {"cpu": "cpu", "cuda": "gpu"}
