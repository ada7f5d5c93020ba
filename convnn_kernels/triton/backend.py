# SPDX-License-Identifier: MIT
"""The host side of the Triton kernels: what is allocated, and what is launched with which strides.

Triton is imported when a kernel first runs. With ``TRITON_INTERPRET=1`` set before that, kernels
run in Triton's interpreter, on CPU tensors.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import checks

OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Row numbers are packed into 31 bits where neighbors are sorted by them.
_MOST_ROWS = 2**31 - 1

METRICS = {"cosine": 0, "dot": 1, "euclidean": 2}
RHOS = {"softmax": 0, "ones": 1, "similarity": 2}


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter. Triton reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = ".".join(map(str, OLDEST))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    compilers = filter(None, (os.environ.get("CC"), "clang", "gcc"))
    if not any(map(shutil.which, compilers)):
        return "Triton needs a C compiler at run time, and none was found"
    return None


def refuses(args: tuple[Any, ...]) -> str | None:
    """Why these kernels cannot run a call with `args`; None if they can."""
    for tensor in args:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"it does not take {str(tensor.dtype).removeprefix('torch.')}"
        if interpreted() and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        if tensor.device.type != ("cpu" if interpreted() else "cuda"):
            return f"it cannot run tensors on {tensor.device}"
        if any(size > _MOST_ROWS for size in tensor.shape):
            return f"it takes up to {_MOST_ROWS} rows, got shape {list(tensor.shape)}"
        if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return f"it needs compute capability 8.0, {tensor.device} is older"
    return None


class CannotCompile(RuntimeError):
    """Triton cannot compile on this machine, whatever the kernel."""


def run(name: str, args: tuple[Any, ...]) -> Any:
    """The results of operator `name` for all of its arguments, which have been checked.

    Raises:
        CannotCompile: if Triton finds no working C compiler.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with on_device:
            return _OPERATORS[name](*args)
    except subprocess.CalledProcessError as error:
        raise CannotCompile(str(error)) from error
    except RuntimeError as error:
        if "Failed to find C compiler" in str(error):
            raise CannotCompile(str(error)) from error
        raise


@functools.cache
def _kernels() -> SimpleNamespace:
    from convnn_kernels.triton import (
        aggregate,
        aggregate_backward,
        configs,
        inverse_list,
        modulate,
        offsets,
        order,
        select,
        select_backward,
        select_small,
    )

    modules = (
        modulate,
        inverse_list,
        select,
        select_small,
        select_backward,
        aggregate,
        aggregate_backward,
    )
    for module in (offsets, order, *modules):
        for function in vars(module).values():
            # Of a function that another one calls Triton must know the key of its cache before that
            # of the caller: else the caller's depends on which kernel happens to run first.
            getattr(function, "cache_key", None)
    kernels = {
        name: kernel
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }
    return SimpleNamespace(configs=configs, **kernels)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _arch(tensor: Tensor) -> int:
    return 0 if interpreted() else _capability(tensor.device)


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.element_size()


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _product_precision(tensor: Tensor) -> str:
    """How `tl.dot` multiplies float32; without effect for 16 bits."""
    return "tf32" if _bits(tensor) == 16 or _tf32() else "tf32x3"


def _fold(X: Tensor, last: int = 2) -> Tensor:
    """X with two leading dimensions before its `last` ones, and the elements of the last one next
    to each other: a view wherever there is one."""
    X = _with_adjacent_channels(X)
    lead, rest = X.shape[: X.dim() - last], X.shape[X.dim() - last :]
    if len(lead) < 2:
        return X.reshape(1, 1, *rest) if not lead else X.unsqueeze(1)
    return X if len(lead) == 2 else X.reshape(lead[:-1].numel(), lead[-1], *rest)


def _with_adjacent_channels(X: Tensor) -> Tensor:
    """X, copied if a row of it does not lie in one piece: to gather such rows would read a sector
    of memory for each channel. An expanded dimension is not copied out."""
    if X.stride(-1) == 1 or X.shape[-1] <= 1:
        return X
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in X.stride()[:-1])
    return X[once].contiguous().expand(X.shape)


def _strides(X: Tensor) -> tuple[int, int, int]:
    """Of a folded X [B1, B2, rows, channels], but for the last dimension.

    In a dimension of one, where a stride has no effect, it is what fits any number of channels.
    """
    B1, B2, rows, channels = X.shape
    return (
        X.stride(0) if B1 > 1 else 0,
        X.stride(1) if B2 > 1 else 0,
        X.stride(2) if rows > 1 else channels,
    )


def _alignment(*tensors: Tensor) -> int:
    """What all strides of folded tensors are multiples of, as far as kernels want to know."""
    return 16 if all(stride % 16 == 0 for X in tensors for stride in _strides(X)) else 1


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _check_values() -> bool:
    """Whether index values are read, and reported if out of range: always on CPU tensors."""
    return interpreted() or os.environ.get("CONVNN_CHECK_INDICES", "0") == "1"


def _norms(X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms, scales and inverse norms [B, N] of the rows of a folded X, and the scaled X.

    Only float16 has too small a range for a norm to overflow: its rows remain as they are.
    """
    kernels = _kernels()
    B1, B2, N, D = X.shape
    rows = B1 * B2 * N
    # Each of the three begins at a multiple of 16 bytes.
    facts = X.new_empty((3, _cdiv(rows, 4) * 4), dtype=torch.float32)
    norm, scale, inverse = facts[:, :rows].unflatten(1, (B1 * B2, N))
    rescale = X.dtype != torch.float16
    scaled = X.new_empty(X.shape) if rescale else X
    tile = kernels.configs.norms(_arch(X), D)
    kernels.norms_kernel[(_cdiv(rows, tile["ROWS"]),)](
        X,
        norm,
        scale,
        inverse,
        scaled,
        rows,
        N,
        D,
        B2,
        *_strides(X),
        RESCALE=rescale,
        ALIGN=_alignment(X),
        **tile,
    )
    return norm, scale, inverse, scaled


def _is_same(X: Tensor, Y: Tensor) -> bool:
    """Whether two tensors of one dtype are the same elements in memory."""
    return X.data_ptr() == Y.data_ptr() and X.shape == Y.shape and X.stride() == Y.stride()


def _select(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None,
    self_indices: Tensor | None,
    key_mask: Tensor | None,
    metric: str,
    order: str,
) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    configs = kernels.configs
    N, D = query.shape[-2:]
    M = key.shape[-2]
    if _check_values():
        checks.check_candidates("convnn::select", candidates, M)
        checks.check_self_indices("convnn::select", self_indices, M)
    s = query.new_empty((*query.shape[:-1], k), dtype=torch.float32)
    I = query.new_empty((*query.shape[:-1], k), dtype=torch.int64)
    if s.numel() == 0:
        return s, I
    candidates = None if candidates is None else candidates.contiguous()
    self_indices = None if self_indices is None else self_indices.contiguous()
    K = _fold(key)
    Q = K if _is_same(query, key) else _fold(query)
    B2, B = Q.shape[1], Q.shape[0] * Q.shape[1]
    arch, bits = _arch(Q), _bits(Q)
    columns = M if candidates is None else candidates.shape[0]
    mask = K if key_mask is None else _fold(key_mask, 1)
    mask_strides = (0, 0) if key_mask is None else mask.stride()[:2]
    norm_q = norm_k = inverse_q = inverse_k = Q
    if metric == "cosine":
        norm_k, _, inverse_k, K_scaled = _norms(K)
        norm_q, inverse_q = norm_k, inverse_k
        if Q is K:
            Q = K_scaled
        else:
            norm_q, _, inverse_q, Q = _norms(Q)
        K = K_scaled

    shared: dict[str, Any] = {
        "METRIC": METRICS[metric],
        "HAS_COLUMNS": candidates is not None,
        "HAS_MASK": key_mask is not None,
    }
    strides = (*_strides(Q), *_strides(K), *mask_strides)
    align = _alignment(Q, K)
    small = configs.has_small(bits, D, columns, k, metric)
    if small and (candidates is None or self_indices is None):
        tile = configs.small(arch, D, k, B * N)
        kernels.select_small_kernel[(B * _cdiv(N, tile["BLOCK_N"]),)](
            Q,
            K,
            inverse_q,
            inverse_k,
            Q if candidates is None else candidates,
            mask,
            Q if self_indices is None else self_indices,
            s,
            I,
            N,
            M,
            D,
            columns,
            k,
            B2,
            *strides,
            **shared,
            ALIGN=align,
            BY_INDEX=order == "index",
            HAS_SELF=self_indices is not None,
            **tile,
        )
        return s, I
    tile = configs.refine(arch, D, k)
    group = configs.group_size(arch, columns, k)
    own = Q if self_indices is None else self_indices
    unused = Q

    def refine(
        first: int,
        blocks: int,
        block_n: int,
        groups: Tensor | None,
        bound: Tensor | None,
        place: int,
    ) -> None:
        chosen = columns_sorted if groups is not None else candidates
        grid = (blocks * block_n // tile["ROWS"],)
        kernels.refine_kernel[grid](
            Q,
            K,
            norm_q,
            norm_k,
            unused if chosen is None else chosen,
            mask,
            own,
            unused if groups is None else groups,
            unused if bound is None else bound,
            s,
            I,
            first,
            N,
            M,
            D,
            columns,
            k,
            place,
            B2,
            _cdiv(N, block_n),
            *strides,
            **shared,
            ALIGN=align,
            BY_INDEX=order == "index" and bound is None,
            HAS_SELF=self_indices is not None,
            HAS_GROUPS=groups is not None,
            HAS_BOUND=bound is not None,
            GROUP=max(1, group),
            BLOCK_N=block_n,
            **tile,
        )

    columns_sorted = candidates
    if not group:
        blocks = B * _cdiv(N, tile["ROWS"])
        if k <= configs.LONGEST_LIST:
            refine(0, blocks, tile["ROWS"], None, None, 0)
            return s, I
        bound = torch.empty((B, N), dtype=torch.int64, device=Q.device)
        for place in range(0, k, configs.LONGEST_LIST):
            refine(0, blocks, tile["ROWS"], None, bound, place)
        return _finish_passes(s, I, M, order)

    # Groups of ascending columns: at a tie, the lower group then has the lower rows.
    if candidates is not None:
        columns_sorted = candidates.sort().values
    sweep = configs.sweep(arch, bits, D, metric == "euclidean")
    block_n, block_m = sweep["BLOCK_N"], sweep["BLOCK_M"]
    nominate = configs.nominate(arch, k)
    G = _cdiv(columns, group)
    # Whole tiles, and loads of 16 bytes, for any number of groups.
    stride_g = 16 * _cdiv(G, 16)
    row_blocks = _cdiv(N, block_n)
    blocks = B * row_blocks
    listed = 1 << nominate["LOG_LIST"]
    at_once = max(1, min(blocks, configs.WORKSPACE // (4 * block_n * (stride_g + listed))))
    maxima = torch.empty((at_once * block_n, stride_g), dtype=torch.float32, device=Q.device)
    groups = torch.empty((at_once * block_n, listed), dtype=torch.int32, device=Q.device)
    flags = None
    if candidates is not None or key_mask is not None:
        flags = torch.empty((B, stride_g), dtype=torch.int8, device=Q.device)
        flag_tile = configs.group_flags(group)
        kernels.group_flags_kernel[(B * _cdiv(stride_g, flag_tile["GROUPS"]),)](
            unused if columns_sorted is None else columns_sorted,
            mask,
            flags,
            M,
            columns,
            B2,
            stride_g,
            *mask_strides,
            HAS_COLUMNS=shared["HAS_COLUMNS"],
            HAS_MASK=shared["HAS_MASK"],
            **flag_tile,
        )
    column_tiles = stride_g * group // block_m
    for first in range(0, blocks, at_once):
        count = min(at_once, blocks - first)
        tiles_each = configs.tiles_each(arch, count, column_tiles)
        kernels.sweep_kernel[(count * _cdiv(column_tiles, tiles_each),)](
            Q,
            K,
            inverse_q,
            inverse_k,
            unused if columns_sorted is None else columns_sorted,
            mask,
            maxima,
            first,
            N,
            M,
            D,
            columns,
            B2,
            row_blocks,
            tiles_each,
            stride_g,
            *strides,
            **shared,
            ALIGN=align,
            PRECISION=configs.sweep_precision(bits, D, _tf32()),
            INTERPRETED=interpreted(),
            GROUP=group,
            ONE_BLOCK_D=0 < D <= sweep["BLOCK_D"],
            **sweep,
        )
        kernels.nominate_kernel[(count * block_n // nominate["ROWS"],)](
            maxima,
            unused if flags is None else flags,
            groups,
            first,
            N,
            G,
            row_blocks,
            stride_g,
            HAS_FLAGS=flags is not None,
            BLOCK_N=block_n,
            **nominate,
        )
        refine(first, count, block_n, groups, None, 0)
    return s, I


def _finish_passes(s: Tensor, I: Tensor, M: int, order: str) -> tuple[Tensor, Tensor]:
    """Neighbors of all passes in their order; until here, missing places have index -1."""
    if order == "index":
        I, by_index = torch.where(I < 0, M, I).sort(dim=-1, stable=True)
        return s.gather(-1, by_index), torch.where(I == M, 0, I)
    return s, I.clamp_(min=0)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor | None,
    bias: Tensor | None,
    candidates: Tensor | None,
    self_indices: Tensor | None,
    key_mask: Tensor | None,
    metric: str,
    rho: str,
    scale: float,
    order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    s, I = _select(query, key, k, candidates, self_indices, key_mask, metric, order)
    return _aggregate(value, s, I, weight, bias, rho, scale, known=True), s, I


def _is_dense(weight: Tensor | None, C: int) -> bool:
    """Whether weight is [O, C, k]; a weight [1, 1, k] is both, and dense."""
    return weight is not None and weight.shape[1] == C


def _aggregate(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rho: str,
    scale: float,
    known: bool = False,
) -> Tensor:
    """``known``: the indices are those of ``select``."""
    kernels = _kernels()
    N, k = similarities.shape[-2:]
    M, C = value.shape[-2:]
    if _check_values() and not known:
        checks.check_indices("convnn::aggregate", indices, M)
    O = C if weight is None else weight.shape[0]
    output = value.new_empty((*similarities.shape[:-1], O))
    if output.numel() == 0:
        return output
    s, I, V = similarities.contiguous(), indices.contiguous(), _fold(value)
    B2, B = V.shape[1], V.shape[0] * V.shape[1]
    arch = _arch(V)
    shared: dict[str, Any] = {"RHO": RHOS[rho], "HAS_BIAS": bias is not None}
    b = V if bias is None else bias.contiguous()
    if weight is not None and _is_dense(weight, C):
        tile = kernels.configs.aggregate_dense(arch, _bits(V), C, O, k)
        grid = (B * _cdiv(N, tile["BLOCK_N"]) * _cdiv(O, tile["BLOCK_O"]),)
        kernels.aggregate_dense_kernel[grid](
            V,
            s,
            I,
            weight.permute(2, 1, 0).contiguous(),
            b,
            output,
            N,
            M,
            C,
            O,
            k,
            scale,
            B2,
            *_strides(V),
            **shared,
            ALIGN=_alignment(V),
            PRECISION=_product_precision(V),
            **tile,
        )
    else:
        tile = kernels.configs.aggregate_depthwise(arch, C, k)
        grid = (B * _cdiv(N, tile["BLOCK_N"]) * _cdiv(C, tile["BLOCK_C"]),)
        kernels.aggregate_depthwise_kernel[grid](
            V,
            s,
            I,
            V if weight is None else weight.contiguous(),
            b,
            output,
            N,
            M,
            C,
            k,
            scale,
            B2,
            *_strides(V),
            **shared,
            ALIGN=_alignment(V),
            HAS_WEIGHT=weight is not None,
            **tile,
        )
    return output


def _inverse_list(
    similarities: Tensor, indices: Tensor, M: int, by_slot: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs sorted by key, the key of each, and where those of each key begin: inverse_list.py.

    Of similarities and indices [..., N, k], contiguous. Shapes are [B * N * k] twice and
    [B * M + 1]. Nothing is read back to the host.
    """
    kernels = _kernels()
    N, k = indices.shape[-2:]
    total = indices.numel()
    B = total // (N * k)
    largest = max(total, (B * M + 1) * (k if by_slot else 1))
    numbers: dict[str, Any] = {
        "dtype": torch.int32 if largest < 2**31 else torch.int64,
        "device": indices.device,
    }
    count, each = kernels.configs.inverse_list_parts(B, N * k, M)
    # One more in front: sums are of what comes before.
    places = torch.zeros(B * (M + 1) * count + 1, **numbers)
    pairs, keys = torch.empty(total, **numbers), torch.empty(total, **numbers)
    sizes = (N, M, k, B, count, each)
    options = {"BY_SLOT": by_slot, **kernels.configs.sort()}
    kernels.count_pairs_kernel[(B * count,)](similarities, indices, places[1:], *sizes, **options)
    places.cumsum_(0)
    offsets = places[: B * M * count + 1 : count].clone()
    kernels.place_pairs_kernel[(B * count,)](
        similarities, indices, places, pairs, keys, *sizes, **options
    )
    return pairs, keys, offsets


def _grad(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else 0)


def _select_backward(
    grad_similarities: Tensor,
    query: Tensor,
    key: Tensor,
    similarities: Tensor,
    indices: Tensor,
    metric: str,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    configs = kernels.configs
    (N, k), (M, D) = indices.shape[-2:], key.shape[-2:]
    grad_query, grad_key = _grad(query, need_query), _grad(key, need_key)
    g, s, I = grad_similarities.contiguous(), similarities.contiguous(), indices.contiguous()
    if grad_query.numel() == grad_key.numel() == 0:
        return grad_query, grad_key
    if I.numel() == 0:
        return grad_query, grad_key.zero_()
    Q, K = _fold(query), _fold(key)
    B2, B = Q.shape[1], Q.shape[0] * Q.shape[1]
    arch = _arch(Q)
    norms = (Q, Q, Q, Q)
    if metric == "cosine":
        norms = (*_norms(Q)[:2], *_norms(K)[:2])
    strides, align = (*_strides(Q), *_strides(K)), _alignment(Q, K)
    if need_query:
        tile = configs.query_grad(arch, D, k)
        grid = (B * _cdiv(N, tile["BLOCK_N"]) * _cdiv(D, tile["BLOCK_D"]),)
        kernels.query_grad_kernel[grid](
            g,
            s,
            I,
            Q,
            K,
            *norms,
            grad_query,
            N,
            M,
            D,
            k,
            B2,
            *strides,
            METRIC=METRICS[metric],
            ALIGN=align,
            **tile,
        )
    if need_key:
        pairs, keys, offsets = _inverse_list(s, I, M, by_slot=False)
        tile = configs.inverse_list(arch, D)
        tile["BLOCK_D"] = tile.pop("columns")
        chunks = pairs.numel() // tile["CHUNK"]
        part = torch.empty((chunks, D), dtype=torch.float32, device=Q.device)
        along = torch.empty(chunks, dtype=torch.float32, device=Q.device)
        for of_chunks, count in ((True, chunks), (False, B * M)):
            grid = (_cdiv(count, tile["ROWS"]) * _cdiv(D, tile["BLOCK_D"]),)
            if count:
                kernels.key_grad_kernel[grid](
                    g,
                    s,
                    Q,
                    K,
                    *norms,
                    pairs,
                    keys,
                    offsets,
                    part,
                    along,
                    grad_key,
                    B * M,
                    N,
                    M,
                    D,
                    k,
                    pairs.numel(),
                    B2,
                    *strides,
                    METRIC=METRICS[metric],
                    ALIGN=align,
                    OF_CHUNKS=of_chunks,
                    **tile,
                )
    return grad_query, grad_key


def _value_grad(
    G: Tensor,
    V: Tensor,
    s: Tensor,
    I: Tensor,
    rho: Tensor,
    W: Tensor | None,
    dense: bool,
    grad: Tensor,
) -> None:
    """Writes the gradient of V to `grad`. W is [k, C, O] if `dense`, else [C, 1, k] or none."""
    kernels = _kernels()
    configs = kernels.configs
    k, B, (M, C), O = I.shape[-1], V.shape[0] * V.shape[1], V.shape[-2:], G.shape[-1]
    arch = _arch(V)
    pairs, keys, offsets = _inverse_list(s, I, M, by_slot=dense)
    tile = configs.inverse_list(arch, O)
    tile["BLOCK_C"] = tile.pop("columns")
    chunks = pairs.numel() // tile["CHUNK"]
    part = torch.empty((chunks, O), dtype=torch.float32, device=V.device)

    def sum_pairs(count: int, of_chunks: bool) -> None:
        weighted = W is not None and not dense
        keys_each = M * k if dense else M
        kernels.value_grad_depthwise_kernel[
            (_cdiv(count, tile["ROWS"]) * _cdiv(O, tile["BLOCK_C"]),)
        ](
            G,
            rho,
            W if weighted else G,
            pairs,
            keys,
            offsets,
            part,
            grad,
            B * keys_each,
            O,
            k,
            pairs.numel(),
            HAS_WEIGHT=weighted,
            OF_CHUNKS=of_chunks,
            **tile,
        )

    if chunks:
        sum_pairs(chunks, True)
    if not dense:
        sum_pairs(B * M, False)
        return
    dense_tile = configs.value_grad_dense(arch, _bits(V), C, O)
    grid = (B * _cdiv(M, dense_tile["BLOCK_M"]) * _cdiv(C, dense_tile["BLOCK_C"]),)
    kernels.value_grad_dense_kernel[grid](
        G,
        rho,
        W,
        pairs,
        keys,
        offsets,
        part,
        grad,
        M,
        C,
        O,
        k,
        pairs.numel(),
        PRECISION=_product_precision(V),
        CHUNK=tile["CHUNK"],
        **dense_tile,
    )


def _aggregate_backward(
    grad_output: Tensor,
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    rho: str,
    scale: float,
    need_value: bool,
    need_similarities: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = _kernels()
    configs = kernels.configs
    (N, k), (M, C) = indices.shape[-2:], value.shape[-2:]
    O = grad_output.shape[-1]
    dense = _is_dense(weight, C)
    grad_value = _grad(value, need_value)
    grad_s = _grad(similarities, need_similarities)
    grad_weight = value.new_empty(0)
    grad_bias = value.new_empty(0)
    if need_bias and has_bias:
        batch = tuple(range(grad_output.dim() - 1))
        grad_bias = grad_output.sum(dim=batch, dtype=torch.float32).to(value.dtype)
    need_weight = need_weight and weight is not None
    if grad_output.numel() == 0 or C == 0:
        if need_weight and weight is not None:
            grad_weight = torch.zeros_like(weight)
        return grad_value.zero_(), grad_s.zero_(), grad_weight, grad_bias
    if not (need_value or need_similarities or need_weight):
        return grad_value, grad_s, grad_weight, grad_bias

    s, I = similarities.contiguous(), indices.contiguous()
    # Rows of G are gathered; and what is compiled does not depend on how a caller's loss made it.
    V, G = _fold(value), grad_output.contiguous()
    B2, B = V.shape[1], V.shape[0] * V.shape[1]
    arch, bits = _arch(V), _bits(V)
    precision = _product_precision(V)
    # [k, C, O] in a dense convolution.
    W = V if weight is None else (weight.permute(2, 1, 0) if dense else weight).contiguous()
    row_tile = configs.modulate(arch, k)
    row_grid = (_cdiv(B * N, row_tile["ROWS"]),)
    weights = torch.empty_like(s)
    kernels.modulate_kernel[row_grid](s, I, weights, B * N, M, k, scale, RHO=RHOS[rho], **row_tile)
    if need_similarities and rho == "ones":
        grad_s.zero_()
    elif need_similarities:
        if dense:
            tile = configs.rho_grad_dense(arch, bits, C, O)
            kernels.rho_grad_dense_kernel[(B * _cdiv(N, tile["BLOCK_N"]) * k,)](
                G,
                V,
                s,
                I,
                W,
                grad_s,
                N,
                M,
                C,
                O,
                k,
                B2,
                *_strides(V),
                ALIGN=_alignment(V),
                PRECISION=precision,
                **tile,
            )
        else:
            tile = configs.rho_grad_depthwise(arch, C)
            kernels.rho_grad_depthwise_kernel[(B * _cdiv(N, tile["BLOCK_N"]) * k,)](
                G,
                V,
                s,
                I,
                W,
                grad_s,
                N,
                M,
                C,
                k,
                B2,
                *_strides(V),
                ALIGN=_alignment(V),
                HAS_WEIGHT=weight is not None,
                **tile,
            )
        if rho == "softmax":
            kernels.softmax_backward_kernel[row_grid](weights, grad_s, B * N, k, scale, **row_tile)

    if need_weight and weight is not None:
        parts, rows_each = configs.parts(B * N, weight.numel(), B * N * min(M, k * C))
        if dense:
            tile = configs.weight_grad_dense(arch, bits, C, O)
            part = torch.empty((parts, k, C, O), dtype=torch.float32, device=V.device)
            grid = (parts * k * _cdiv(C, tile["BLOCK_C"]) * _cdiv(O, tile["BLOCK_O"]),)
            kernels.weight_grad_dense_kernel[grid](
                G,
                V,
                weights,
                s,
                I,
                part,
                B * N,
                N,
                M,
                C,
                O,
                k,
                B2,
                rows_each,
                *_strides(V),
                ALIGN=_alignment(V),
                PRECISION=precision,
                **tile,
            )
            grad_weight = part.sum(dim=0).permute(2, 1, 0).to(weight.dtype).contiguous()
        else:
            tile = configs.weight_grad_depthwise(arch, C)
            part = torch.empty((parts, k, C), dtype=torch.float32, device=V.device)
            kernels.weight_grad_depthwise_kernel[(parts * k * _cdiv(C, tile["BLOCK_C"]),)](
                G,
                V,
                weights,
                s,
                I,
                part,
                B * N,
                N,
                M,
                C,
                k,
                B2,
                rows_each,
                *_strides(V),
                ALIGN=_alignment(V),
                **tile,
            )
            grad_weight = part.sum(dim=0).mT.unsqueeze(1).to(weight.dtype).contiguous()
        del part
    # Last, because the inverse list takes most memory.
    if need_value:
        _value_grad(G, V, s, I, weights, None if weight is None else W, dense, grad_value)
    return grad_value, grad_s, grad_weight, grad_bias


_OPERATORS: dict[str, Callable[..., Any]] = {
    "convnn::forward": _forward,
    "convnn::select": _select,
    "convnn::aggregate": _aggregate,
    "convnn::select_backward": _select_backward,
    "convnn::aggregate_backward": _aggregate_backward,
}
