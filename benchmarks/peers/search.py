# SPDX-License-Identifier: MIT
"""Exact search for the k nearest: what libraries offer, on rows that were normalized beforehand.

On unit rows the order by inner product, by euclidean distance and by cosine is the same. The
normalization, which `select` does in its call, is not in their times; nor is a transfer or the
building of an index.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..workloads import Inputs, Workload
from .base import Call, Peer, Unavailable, nothing, whole_matrices

_Search = Callable[[Tensor, Tensor, int], Callable[[], tuple[Tensor, ...]]]


def _module(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed (pip install {install}): {error}") from error


def _unit_rows(workload: Workload, inputs: Inputs) -> tuple[Tensor, Tensor]:
    query, key = inputs.query.detach(), inputs.key.detach()
    return F.normalize(query, dim=-1), F.normalize(key, dim=-1)


def _peer(
    label: str,
    prepare: _Search,
    computes: str = "select",
    bytes_needed: Callable[[Workload, bool], float] = nothing,
    ours_to_run: bool = True,
) -> Peer:
    def build(workload: Workload, inputs: Inputs) -> Call:
        query, key = _unit_rows(workload, inputs)
        search = prepare(query, key, workload.k)
        if not ours_to_run:
            # Written from their documentation: where they do not run, that is not our failure.
            try:
                search()
            except Exception as error:
                raise Unavailable(f"did not run: {type(error).__name__}: {error}") from error
        return Call(search, {"query": inputs.query, "key": inputs.key})

    return Peer(label, computes, build, ("forward",), bytes_needed=bytes_needed)


def _matmul(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (query @ key.mT,)


def _matmul_topk(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.topk(query @ key.mT, k, dim=-1))


def _cdist_topk(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    if query.dtype not in (torch.float32, torch.float64):
        raise Unavailable("torch.cdist takes float32 and float64")

    def search() -> tuple[Tensor, ...]:
        distance, indices = torch.topk(torch.cdist(query, key), k, dim=-1, largest=False)
        return 1 - 0.5 * distance.square(), indices

    return search


def _faiss_cpu(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    faiss = _module("faiss", "faiss-cpu")
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


def _faiss_gpu(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    faiss = _module("faiss", "faiss-gpu-cu12")
    _module("faiss.contrib.torch_utils", "faiss-gpu-cu12")
    if query.device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        raise Unavailable("needs a GPU and a build of FAISS with GPU support")
    resources = faiss.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()
    queries, keys = query.float(), key.float()

    def search() -> tuple[Tensor, ...]:
        found = [
            faiss.knn_gpu(resources, q, rows, k, metric=faiss.METRIC_INNER_PRODUCT)
            for q, rows in zip(queries, keys, strict=True)
        ]
        similarities, indices = zip(*found, strict=True)
        return torch.stack(similarities), torch.stack(indices)

    return search


def _cuvs(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    brute_force = _module("cuvs.neighbors.brute_force", "cuvs-cu12")
    if query.device.type != "cuda":
        raise Unavailable("needs a GPU")
    indexes = [brute_force.build(rows, metric="inner_product") for rows in key.float()]
    queries = query.float()

    def search() -> tuple[Tensor, ...]:
        found = [
            brute_force.search(index, rows, k) for index, rows in zip(indexes, queries, strict=True)
        ]
        return (
            torch.stack([torch.as_tensor(s, device=query.device) for s, _ in found]),
            torch.stack([torch.as_tensor(i, device=query.device).long() for _, i in found]),
        )

    return search


def _flashlib(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    flash_knn = _module("flashlib", "flashlib").flash_knn
    if query.device.type != "cuda":
        raise Unavailable("needs a GPU")

    def search() -> tuple[Tensor, ...]:
        distance, indices = flash_knn(query, key, k)
        return 1 - 0.5 * distance.float(), indices.long()

    return search


def _keops(query: Tensor, key: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    LazyTensor = _module("pykeops.torch", "pykeops").LazyTensor
    if query.dtype != torch.float32:
        raise Unavailable("KeOps searches float32 here")
    similarity = (LazyTensor(query[:, :, None, :]) | LazyTensor(key[:, None, :, :])) * -1

    def search() -> tuple[Tensor, ...]:
        distance, indices = similarity.Kmin_argKmin(k, dim=2)
        return -distance, indices.long()

    return search


PEERS = {
    "matmul": _peer("matmul alone", _matmul, "product", whole_matrices(1, 1)),
    "matmul-topk": _peer("matmul + topk", _matmul_topk, bytes_needed=whole_matrices(2, 2)),
    "cdist-topk": _peer("cdist + topk", _cdist_topk, bytes_needed=whole_matrices(2, 2)),
    "faiss": _peer("FAISS, exact inner product", _faiss_cpu),
    "faiss-gpu": _peer("FAISS on the GPU, exact inner product", _faiss_gpu, ours_to_run=False),
    "cuvs": _peer("cuVS, exact inner product", _cuvs, ours_to_run=False),
    "flashlib": _peer("flashlib.flash_knn", _flashlib, ours_to_run=False),
    "keops": _peer("KeOps Kmin_argKmin", _keops, ours_to_run=False),
}
