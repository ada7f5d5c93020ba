# SPDX-License-Identifier: MIT
"""Exact search for the k nearest by other libraries, on rows that were normalized beforehand.

On unit rows the order by inner product, by Euclidean distance and by cosine is the same. Their
times do not include the normalization, which is part of a call of `select`, nor transfers or the
building of an index.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..workloads import Inputs, Workload
from .base import Call, Peer, Unavailable

_Search = Callable[[], tuple[Tensor, ...]]


def _module(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed (pip install {install}): {error}") from error


def _matmul(query: Tensor, key: Tensor, k: int) -> _Search:
    return lambda: (query @ key.mT,)


def _matmul_topk(query: Tensor, key: Tensor, k: int) -> _Search:
    return lambda: tuple(torch.topk(query @ key.mT, k, dim=-1))


# The core for which OpenBLAS has its fastest kernels with these instructions.
_CORES = {"AVX512": "SkylakeX", "AVX2": "Haswell"}


def _import_faiss() -> Any:
    """FAISS at its best. The OpenBLAS of its wheels does not know newer processors, and takes the
    kernels of old ones there unless it is told otherwise when it is loaded.
    """
    before = os.environ.get("OPENBLAS_CORETYPE")
    if core := _CORES.get(torch.backends.cpu.get_cpu_capability()):
        os.environ["OPENBLAS_CORETYPE"] = core
    try:
        return _module("faiss", "faiss-cpu")
    finally:
        os.environ.pop("OPENBLAS_CORETYPE", None)
        if before is not None:
            os.environ["OPENBLAS_CORETYPE"] = before


def _faiss(query: Tensor, key: Tensor, k: int) -> _Search:
    faiss = _import_faiss()
    if query.device.type != "cpu" or query.dtype != torch.float32:
        raise Unavailable("FAISS on the CPU searches float32")
    faiss.omp_set_num_threads(torch.get_num_threads())
    queries, indexes = query.numpy(), []
    for rows in key.numpy():
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        indexes.append(index)

    def search() -> tuple[Tensor, ...]:
        found = [index.search(rows, k) for index, rows in zip(indexes, queries, strict=True)]
        similarities, indices = zip(*found, strict=True)
        if len(found) == 1:
            return torch.from_numpy(similarities[0])[None], torch.from_numpy(indices[0])[None]
        return (
            torch.stack([torch.from_numpy(each) for each in similarities]),
            torch.stack([torch.from_numpy(each) for each in indices]),
        )

    return search


def _flashlib(query: Tensor, key: Tensor, k: int) -> _Search:
    flash_knn = _module("flashlib", "flashlib").flash_knn
    if query.device.type != "cuda":
        raise Unavailable("needs a GPU")

    def search() -> tuple[Tensor, ...]:
        distance, indices = flash_knn(query, key, k)
        return 1 - 0.5 * distance.float(), indices.long()

    return search


def _keops(query: Tensor, key: Tensor, k: int) -> _Search:
    LazyTensor = _module("pykeops.torch", "pykeops").LazyTensor
    if query.dtype != torch.float32:
        raise Unavailable("KeOps searches float32 here")
    similarity = (LazyTensor(query[:, :, None, :]) | LazyTensor(key[:, None, :, :])) * -1

    def search() -> tuple[Tensor, ...]:
        distance, indices = similarity.Kmin_argKmin(k, dim=2)
        return -distance, indices.long()

    return search


def _peer(
    label: str,
    prepare: Callable[[Tensor, Tensor, int], _Search],
    computes: str = "select",
    matrices: tuple[int, int] = (0, 0),
    may_fail: bool = False,
) -> Peer:
    """may_fail: the library compiles its own kernels; if that fails, the peer is skipped."""

    def build(workload: Workload, inputs: Inputs) -> Call:
        query, key = (F.normalize(X.detach(), dim=-1) for X in (inputs.query, inputs.key))
        search = prepare(query, key, workload.k)
        if may_fail:
            try:
                search()
            except Exception as error:
                raise Unavailable(f"did not run: {type(error).__name__}: {error}") from error
        return Call(search, {"query": inputs.query, "key": inputs.key})

    return Peer(label, computes, build, ("forward",), matrices=matrices)


PEERS = {
    "matmul": _peer("matmul alone", _matmul, "product", (1, 1)),
    "matmul-topk": _peer("matmul + topk", _matmul_topk, matrices=(2, 2)),
    "faiss": _peer("FAISS, exact inner product", _faiss),
    "flashlib": _peer("flashlib.flash_knn", _flashlib, may_fail=True),
    "keops": _peer("KeOps Kmin_argKmin", _keops, may_fail=True),
}
