# SPDX-License-Identifier: MIT
"""The suites: named lists of groups, the most informative first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .peers import PEERS, TRAINING
from .runner import Case, Effort, Group
from .workloads import (
    CPU_FEW,
    CPU_LAYERS,
    CPU_RANGES,
    CPU_SEARCH,
    DECODING,
    GPU_FLOAT32,
    GPU_LAYERS,
    GPU_SELECT,
    GPU_VGG11,
    GPU_VIT,
    SEARCH,
    SEARCH_PHOTOGRAPHS,
    TINY,
    VGG11,
    VIT_TINY,
    Workload,
)

_FORWARD = TRAINING[:1]

# Layers that can replace one another in a model.
MODELS = ("convnn-all", "convnn-random", "convnn-spatial", "eager", "sdpa", "conv2d")
_SDPA = ("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
_SEARCH = ("matmul", "matmul-topk", "faiss", "flashlib", "keops")


def _cases(
    workload: Workload, peers: Iterable[str], passes: Sequence[str] = TRAINING
) -> tuple[Case, ...]:
    """Each peer with those of the passes that it supports."""
    return tuple(
        Case(workload, peer, each)
        for peer in peers
        for each in passes
        if each in PEERS[peer].passes
    )


def _layer(workload: Workload) -> Group:
    """Beside attention, exact search and eager PyTorch."""
    small = workload.batch * workload.tokens**2 <= 2**24
    peers = ["mm", "copy", "select", "faiss", "convnn-all", "sdpa"]
    peers += ["select-avx2", "select-avx512", "convnn-all-avx2", "convnn-all-avx512"]
    # PyTorch does not always choose its faster kernel.
    peers += ["sdpa-math", "eager"] if small else []
    cases = _cases(workload, peers)
    cases += _cases(replace(workload, source="random"), ("select", "convnn-all"), _FORWARD)
    effort = Effort(8 if small else 15, fewest_rounds=5)
    memory = MODELS if workload == CPU_LAYERS[1] else ()
    return Group(f"layer {workload.shape}", cases, effort, memory)


def _beside_convolution(workload: Workload) -> Group:
    peers = ("conv2d", "aggregate-dense", "aggregate-dense-avx2", "convnn-dense", "aggregate")
    cases = _cases(workload, peers)
    for count in (32, 64):
        restricted = replace(workload, candidates=count)
        cases += _cases(restricted, ("convnn-random", "convnn-spatial"))
    return Group(f"beside Conv2d {workload.shape}", cases, Effort(8))


def _overhead() -> Group:
    """A call so small that its time is that of the host."""
    peers, passes = ("sdpa", "convnn-all", "functional"), ("forward", "inference")
    effort = Effort(5, fewest_rounds=15, sample_seconds=0.02)
    return Group("host overhead", _cases(TINY, peers, passes), effort)


def _bfloat16(workload: Workload) -> Group:
    peers = ("mm", "select", "convnn-all", "convnn-all-avx2", "convnn-all-avx512", "sdpa")
    cases = _cases(replace(workload, dtype="bfloat16"), peers)
    return Group(f"bfloat16 {workload.shape}", cases, Effort(8))


def _few(workload: Workload) -> Group:
    peers = ("select-dot", "select-dot-avx2", "select-dot-avx512", "eager-dot")
    return Group(f"few queries {workload.shape}", _cases(workload, peers), Effort(4))


def _decoding() -> Group:
    peers = ("convnn-dot", "convnn-dot-avx2", "convnn-dot-avx512", "sdpa", "sdpa-math")
    return Group(f"decoding {DECODING.shape}", _cases(DECODING, peers, _FORWARD), Effort(4))


def _key_ranges(workload: Workload) -> Group:
    peers = ("mm", "select", "select-causal", "select-window", "select-packed", "select-alone")
    return Group(
        f"key ranges {workload.dtype} {workload.shape}", _cases(workload, peers), Effort(5)
    )


def _against_n(tokens: int, effort: Effort) -> Group:
    """Time and memory on a photograph."""
    w = Workload(1, tokens, 64, 9)
    return Group(f"against N {w.shape}", _cases(w, MODELS), effort, memory=MODELS)


def cpu(device: str) -> list[Group]:
    return [
        *(_layer(w) for w in CPU_LAYERS),
        *(_beside_convolution(w) for w in CPU_LAYERS[1:3]),
        _overhead(),
        *(_few(w) for w in CPU_FEW),
        _decoding(),
        *(_key_ranges(w) for w in CPU_RANGES),
        *(_bfloat16(w) for w in CPU_LAYERS[1:]),
        *(_against_n(n, Effort(s)) for n, s in ((256, 3), (1024, 3), (4096, 5), (16384, 5))),
    ]


def quick(device: str) -> list[Group]:
    return [_against_n(tokens, Effort(2, most_rounds=10)) for tokens in (256, 1024)]


def operators(device: str) -> list[Group]:
    """Each operator beside every peer."""
    peers = ["mm", "copy", "select", "aggregate", "convnn-all", "convnn-random", "convnn-spatial"]
    peers += ["eager", "compiled", "eager-aggregate", "eager-random", "eager-spatial"]
    peers += [*_SDPA, "sdpa-math", "conv2d", *_SEARCH]
    layers = (GPU_VIT, *GPU_LAYERS) if device == "cuda" else CPU_LAYERS[:4]
    groups = [Group(f"operators {w}", _cases(w, peers), Effort(15)) for w in layers]
    searches = SEARCH if device == "cuda" else CPU_SEARCH
    search = ("mm", "copy", "select", *_SEARCH)
    return groups + [Group(f"search {w}", _cases(w, search), Effort(8)) for w in searches]


def layers(device: str) -> list[Group]:
    """The layers of VGG-11 one by one, then both models as a whole."""
    groups = []
    for i, workload in enumerate(VGG11, 1):
        w = workload if device == "cuda" else replace(workload, batch=16)
        peers = ("mm", "conv2d", "convnn-dense", "aggregate-dense", "eager-dense")
        groups.append(Group(f"VGG-11 layer {i} {w.shape}", _cases(w, peers), Effort(4)))
    vgg = tuple(f"vgg11-{layer}" for layer in ("conv2d", "hybrid", "convnn"))
    vit = tuple(f"vit-{layer}" for layer in ("attention", "convnn", "local"))
    batches = (128, 64) if device == "cuda" else (8, 2)
    for name, w, models in (
        ("VGG-11", Workload(batches[0], 1024, 3, 9, "random"), vgg),
        ("ViT-Tiny", replace(VIT_TINY, batch=batches[1], source="random"), vit),
    ):
        groups.append(Group(f"model {name}", _cases(w, models), Effort(15), memory=models))
    return groups


# GPU


_SHORT = Effort(3, fewest_rounds=5, most_rounds=30)


def _on_random_features(workload: Workload, *peers: str) -> tuple[Case, ...]:
    return _cases(replace(workload, source="random"), peers)


def _gpu_select(workload: Workload) -> Group:
    """Beside the product that only writes the similarity matrix, and its topk."""
    peers = ("mm", "copy", "select", "matmul", "matmul-topk")
    cases = _on_random_features(workload, *peers) + _cases(workload, ("select",))
    return Group(f"gpu select {workload.shape}", cases, _SHORT)


def _gpu_search(workload: Workload, photographs: Workload) -> Group:
    cases = _cases(workload, ("mm", "copy", "select", *_SEARCH))
    cases += _cases(photographs, ("select", "flashlib"))
    return Group(f"gpu search {workload.shape}", cases, _SHORT)


def _gpu_layer(workload: Workload, *peers: str) -> Group:
    cases = _cases(workload, ("mm", "copy", "select", "aggregate", "convnn-all", *peers, *_SDPA))
    cases += _on_random_features(workload, "select", "convnn-all")
    return Group(f"gpu layer {workload.shape}", cases, _SHORT, ("convnn-all", "sdpa"))


def _gpu_vit() -> Group:
    ours = ("convnn-all", "convnn-random", "select")
    cases = _cases(GPU_VIT, ("mm", "copy", *ours, *_SDPA)) + _on_random_features(GPU_VIT, *ours)
    return Group(f"gpu ViT-Tiny {GPU_VIT.shape}", cases, _SHORT, ("convnn-all", "sdpa"))


def _gpu_vgg(layer: int, workload: Workload) -> Group:
    ours = ("convnn-dense", "convnn-dense-random")
    cases = _cases(workload, ("mm", "conv2d", *ours, "aggregate-dense"))
    cases += _on_random_features(workload, *ours)
    return Group(f"gpu VGG-11 layer {layer} {workload.shape}", cases, Effort(2, 5, 30))


def _gpu_float32() -> Group:
    cases: tuple[Case, ...] = ()
    for dtype in ("float32", "bfloat16"):
        w = replace(GPU_FLOAT32, dtype=dtype)
        cases += _cases(w, ("mm", "copy", "select", "convnn-all"))
        cases += _on_random_features(w, "select", "convnn-all")
    return Group(f"gpu float32 {GPU_FLOAT32.shape}", cases, _SHORT)


def _gpu_host() -> Group:
    """Host time of a call of the smallest shape, and a replay of its graph."""
    peers = [f"{kind}-{name}" for kind in ("host", "graph") for name in ("sdpa", "cuda", "triton")]
    return Group("gpu host", _cases(TINY, peers), Effort(3, fewest_rounds=15))


def _gpu_backends(workload: Workload) -> Group:
    """Both GPU backends in the same rounds."""
    peers = [f"{each}-{name}" for each in ("select", "convnn") for name in ("triton", "cuda")]
    return Group(f"gpu backends {workload}", _cases(workload, ("mm", *peers), _FORWARD), _SHORT)


def gpu(device: str) -> list[Group]:
    """About six minutes."""
    if device != "cuda":
        raise ValueError("the suite gpu needs --device cuda")
    searches = [*zip(SEARCH, SEARCH_PHOTOGRAPHS, strict=True)]
    curves = [Workload(1, 4**e, 64, 9, dtype="bfloat16") for e in range(4, 9)]
    return [
        _gpu_layer(GPU_LAYERS[0]),
        _gpu_select(GPU_SELECT[0]),
        _gpu_search(*searches[1]),
        _gpu_vit(),
        *(_gpu_vgg(i, w) for i, w in enumerate(GPU_VGG11, 1)),
        _gpu_host(),
        _gpu_float32(),
        _gpu_layer(GPU_LAYERS[1]),
        _gpu_layer(GPU_LAYERS[4], "eager"),
        *(_gpu_select(w) for w in GPU_SELECT[1:]),
        *(_gpu_search(*pair) for pair in (searches[0], *searches[2:])),
        *(_gpu_layer(w) for w in GPU_LAYERS[2:4]),
        *(Group(f"gpu against N {w.shape}", _cases(w, MODELS), _SHORT, MODELS) for w in curves),
        *(_gpu_backends(w) for w in (VIT_TINY, GPU_LAYERS[0])),
    ]


def _backends(device: str) -> tuple[str, ...]:
    return ("triton", "cuda") if device == "cuda" else ("triton",)


# A row of S in one tile; in several tiles; groups of columns; a dense convolution.
_RIGHT = {
    "small": Workload(16, 197, 64, 9, "random"),
    "tiles": Workload(16, 400, 64, 9, "random"),
    "large": Workload(2, 4096, 64, 9, "random"),
    "dense": Workload(4, 1024, 64, 9, "random", outputs=128),
}


def right(device: str) -> list[Group]:
    """Every operator, backend and dtype, checked and not timed; on a CPU only a few small ones."""
    peers = ("select", "aggregate", "convnn-all", "convnn-random")
    rows = [(name, w, each) for name, w in _RIGHT.items() for each in peers if name != "dense"]
    rows = [row for row in rows if row[0] != "tiles" or row[2] == "select"]
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
    """The kernels of the suite gpu on random features, with what each is compared with."""
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
            # The other peers are measured only once.
            here = peers if backend == "triton" else peers[:1]
            cases = _on_random_features(w, *(here or ("host-sdpa", f"host-{backend}")))
            effort = Effort(0.4, 3, 8) if device == "cuda" else Effort(0, 1, 1)
            groups.append(Group(name, cases, effort, backend=backend))
    return groups


@dataclass(frozen=True)
class Suite:
    """groups: takes the device, "cpu" or "cuda"; shapes for a CPU take minutes at most."""

    purpose: str
    groups: Callable[[str], list[Group]]


SUITES = {
    "cpu": Suite("a layer beside what it replaces, on a CPU", cpu),
    "gpu": Suite("a layer beside what it replaces, on a GPU", gpu),
    "right": Suite("every operator, backend and dtype of a GPU, checked and not timed", right),
    "time": Suite("the GPU kernels one by one", time),
    "quick": Suite("two small shapes, in seconds", quick),
    "operators": Suite("each operator beside every peer", operators),
    "layers": Suite("the layers of VGG-11, and whole models", layers),
}

DEFAULT = {"cpu": "cpu", "cuda": "gpu"}
