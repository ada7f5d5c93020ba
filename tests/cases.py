# SPDX-License-Identifier: MIT
"""Random cases: each is made from a seed, and its id describes it."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from python_ref import assert_certified_selection, assert_forward

METRICS = ("cosine", "dot", "euclidean")
RHOS = ("softmax", "ones", "similarity")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# The smallest sizes, multiples of tile and vector sizes, and one more and one less than those.
TILE_EDGES = (8, 16, 32, 48, 64, 128, 256)
SIZES = sorted({1, 2, 3, *(edge + step for edge in TILE_EDGES for step in (-1, 0, 1))})
LEADS = ((), (1,), (2,), (3,), (2, 2), (1, 3), (2, 1, 2), (0,))
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
CONTENTS = ("normal", "integers", "duplicates", "zero_rows", "constant", "near_ties", "scales")
# Of `make_special_case` alone: make_case draws from the others.
SPECIAL = ("not_finite", "tiny", "huge")
RANGES = ("causal", "window", "segments", "random", "some_empty")

# Limits that keep a case at a few milliseconds: products of similarities, and gathered elements.
MAX_PRODUCTS = 2**19
MAX_GATHERED = 2**17

SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True)
class Case:
    """A random call of `forward`, with `arguments` that depend on nothing but the seed."""

    seed: int
    lead: tuple[int, ...]
    N: int
    M: int
    D: int
    C: int
    O: int
    k: int
    query_dtype: torch.dtype
    value_dtype: torch.dtype
    metric: str
    rho: str
    scale: float
    order: str
    weight: str
    bias: bool
    candidates: int | None
    has_self: bool
    key_mask: str
    layout: str
    content: str
    key_range: str = "none"
    exclude_self: bool = False
    # Whether candidates, self_indices and key_range are others for each batch element.
    for_each: bool = False

    @property
    def id(self) -> str:
        shape = f"N{self.N}-M{self.M}-D{self.D}-C{self.C}-k{self.k}"
        lead = "x".join(map(str, self.lead))
        parts = [f"s{self.seed}", f"B{lead}" if lead else "", shape]
        parts += [f"{SHORT[self.query_dtype]}_{SHORT[self.value_dtype]}", self.metric, self.rho]
        parts += [f"scale{self.scale:g}" if self.scale != 1.0 else ""]
        parts += [self.weight + (f"{self.O}" if self.weight == "dense" else "")]
        parts += ["bias" if self.bias else "", "self" if self.has_self else ""]
        parts += [f"R{self.candidates}" if self.candidates is not None else ""]
        parts += [f"mask_{self.key_mask}" if self.key_mask != "none" else ""]
        parts += [f"range_{self.key_range}" if self.key_range != "none" else ""]
        parts += ["excluded" if self.exclude_self else "", "for_each" if self.for_each else ""]
        parts += ["by_index" if self.order == "index" else "", self.layout, self.content]
        return "-".join(part for part in parts if part)

    @property
    def exact(self) -> bool:
        """Whether every similarity is exactly representable."""
        return self.content == "integers" and self.metric != "cosine"

    @property
    def only_selects(self) -> bool:
        """Whether of the results only the selection can be compared.

        Where sums may overflow, their order decides whether they are infinite or NaN. Errors of
        float64 are estimated by float32, which has no such numbers.
        """
        if self.content != "huge" or self.query_dtype == torch.float64:
            return self.content == "huge"
        multiplied = self.rho == "similarity" or self.scale > 1
        return self.metric == "dot" or (self.metric == "euclidean" and multiplied)

    def tensors(self) -> dict[str, Tensor | None]:
        """The arguments of `forward` that are tensors, or None."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def randint(high: int, shape: tuple[int, ...]) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        def rows(*shape: int) -> Tensor:
            if self.content in SPECIAL:
                return _special_rows(self.content, self.query_dtype, randn, randint, shape)
            return _rows(self.content, randn, randint, shape)

        def strided(X: Tensor, dtype: torch.dtype) -> Tensor:
            return with_layout(X.to(dtype), self.layout)

        values = rows if self.content == "not_finite" else randn
        weight = bias = None
        if self.weight == "dense":
            weight = strided(randn(self.O, self.C, self.k), self.value_dtype)
        elif self.weight == "depthwise":
            weight = strided(randn(self.C, 1, self.k), self.value_dtype)
        if self.bias:
            outputs = self.O if self.weight == "dense" else self.C
            bias = strided(randn(outputs), self.value_dtype)
        candidates = self_indices = None
        lead = self.lead if self.for_each else ()
        if self.candidates is not None:
            if self.for_each:
                permuted = torch.rand(*lead, self.M, generator=generator).argsort(dim=-1)
            else:
                permuted = torch.randperm(self.M, generator=generator)
            candidates = with_layout(permuted[..., : self.candidates], self.layout)
        if self.has_self:
            self_indices = with_layout(randint(self.M, (*lead, self.N)), self.layout)
        return {
            "query": strided(rows(*self.lead, self.N, self.D), self.query_dtype),
            "key": strided(rows(*self.lead, self.M, self.D), self.query_dtype),
            "value": strided(values(*self.lead, self.M, self.C), self.value_dtype),
            "weight": weight,
            "bias": bias,
            "candidates": candidates,
            "self_indices": self_indices,
            "key_mask": self._mask(generator),
            "key_range": self._range(lead, randint),
        }

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        keep = {"half": 0.5, "most": 0.1, "all": 0.0}
        if self.key_mask not in keep:
            return None
        mask = torch.rand(*self.lead, self.M, generator=generator) < keep[self.key_mask]
        return with_layout(mask, self.layout)

    def _range(
        self, lead: tuple[int, ...], randint: Callable[[int, tuple[int, ...]], Tensor]
    ) -> Tensor | None:
        """[N, 2] or [*lead, N, 2] rows of key, begin and end for each query."""
        if self.key_range == "none":
            return None
        N, M = self.N, self.M
        # Where the queries are among the keys, the last at the last key.
        at = torch.arange(N) + M - N
        width = randint(M, (*lead, 1)) + 1
        if self.key_range == "causal":
            begin, end = torch.zeros(*lead, N), (at + 1).expand(*lead, N)
        elif self.key_range == "window":
            begin, end = at - width, at + width
        elif self.key_range == "segments":
            begin = at // width * width
            end = begin + width
        else:
            ends = randint(M + 1, (*lead, N, 2)).sort(dim=-1).values
            begin, end = ends.unbind(-1)
            if self.key_range == "some_empty":
                begin = torch.where(randint(3, (*lead, N)) == 0, end, begin)
        ranges = torch.stack([begin, end], dim=-1).clamp(0, M).long()
        return with_layout(ranges, self.layout)

    def arguments(self) -> dict[str, object]:
        """All arguments of `forward`."""
        return {
            **self.tensors(),
            "k": self.k,
            "metric": self.metric,
            "rho": self.rho,
            "scale": self.scale,
            "order": self.order,
            "exclude_self": self.exclude_self,
        }


def _rows(
    content: str,
    randn: Callable[..., Tensor],
    randint: Callable[[int, tuple[int, ...]], Tensor],
    shape: tuple[int, ...],
) -> Tensor:
    """Rows of queries or keys."""
    X = randn(*shape)
    n = shape[-2]
    if content == "integers":
        return randint(7, shape).double() - 3
    if content == "duplicates":
        # At most five distinct rows, each repeated many times.
        return X[..., randint(min(n, 5), (n,)), :] if n else X
    if content == "zero_rows":
        return X * (randint(3, (*shape[:-1], 1)) > 0)
    if content == "constant":
        return torch.ones_like(X) * 0.3
    if content == "near_ties":
        # Elements differ by tens of float32 ulps.
        return 0.7 + 1e-6 * X
    if content == "scales":
        # Norms from about 1e-3 to 1e3 times the usual one, in the range of float16.
        return X * 10.0 ** (randint(7, (*shape[:-1], 1)) - 3).double()
    return X


def _special_rows(
    content: str,
    dtype: torch.dtype,
    randn: Callable[..., Tensor],
    randint: Callable[[int, tuple[int, ...]], Tensor],
    shape: tuple[int, ...],
) -> Tensor:
    """Rows of which a third have special values: one, several, or nothing else.

    `not_finite`: NaN of both signs, infinities and zeros. `tiny`: subnormal numbers, and norms
    about that which counts as zero. `huge`: up to the largest number, and squares that overflow.
    """
    X = randn(*shape)
    kind = randint(9, (*shape[:-1], 1))
    one = torch.arange(shape[-1]) == randint(shape[-1], (*shape[:-1], 1))
    where = (kind == 0) & one | (kind == 1) & (randint(4, shape) == 0) | (kind == 2)
    info = torch.finfo(dtype)
    if content == "not_finite":
        values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=X.dtype)
        # A row that has nothing else repeats one of them.
        which = torch.where(kind == 2, randint(6, (*shape[:-1], 1)), randint(6, shape))
        return torch.where(where, values[which], X)
    if content == "tiny":
        sizes = (info.tiny / 4, 1e-12 / shape[-1] ** 0.5)
    else:
        sizes = (info.max / 8, info.max**0.5)
    size = torch.tensor(sizes, dtype=torch.float64)[randint(2, (*shape[:-1], 1))]
    return torch.where(where, (X * size).clamp(info.min, info.max), X)


def with_layout(X: Tensor, layout: str) -> Tensor:
    """The same elements with other strides. The memory between them is filled with NaN, or True.

    `expanded` repeats the first batch element, or the first row, with a stride of 0.
    """
    if layout == "transposed" and X.ndim >= 2:
        return X.mT.contiguous().mT
    if layout in ("sliced", "offset", "transposed"):
        # One more element on every side; of the last dimension, only every other one is used.
        step = 1 if layout == "offset" else 2
        larger = [size + 2 for size in X.shape[:-1]] + [step * X.shape[-1] + 2]
        fill = X.new_full(larger, float("nan")) if X.is_floating_point() else X.new_ones(larger)
        inner = [slice(1, 1 + size) for size in X.shape[:-1]]
        inner.append(slice(1, 1 + step * X.shape[-1], step))
        return fill[tuple(inner)].copy_(X)
    if layout == "expanded" and X.ndim >= 2 and X.shape[0] > 1:
        return X[:1].expand(X.shape)
    return X


def make_case(seed: int, restricted: bool = False) -> Case:
    """The case of a seed. Sizes are drawn again until the case is small enough.

    If it is restricted, most cases have ranges, many exclude the token itself, and half of them
    restrict each batch element in its own way.
    """
    draw = random.Random(seed)
    while True:
        lead = draw.choice(LEADS)
        batch = 1
        for size in lead:
            batch *= size
        N, M, D, C = (draw.choice(SIZES) for _ in range(4))
        N = 0 if draw.random() < 0.01 else N
        R = draw.randint(1, M) if draw.random() < 0.3 else None
        most = M if R is None else R
        # Small k is common, and k equal to the number of keys is a special case.
        k = draw.choice((1, min(9, most), draw.randint(1, most), most))
        # A case in ten asks for more neighbors than there are keys.
        k += most if seed % 10 == 7 else 0
        weight = draw.choice(("none", "depthwise", "dense"))
        outputs = draw.choice(SIZES[:12])
        if weight == "dense" and outputs == C == 1:
            weight = "depthwise"
        products = batch * N * M * D
        gathered = batch * N * k * max(C, D) * (outputs if weight == "dense" else 1)
        # A dense product costs less per element than a gather.
        most_gathered = MAX_GATHERED * (4 if weight == "dense" else 1)
        if products <= MAX_PRODUCTS and gathered <= most_gathered:
            break
    rho = draw.choice(RHOS)
    query_dtype = draw.choice(DTYPES)
    case = Case(
        seed=seed,
        lead=lead,
        N=N,
        M=M,
        D=D,
        C=C,
        O=outputs,
        k=k,
        query_dtype=query_dtype,
        value_dtype=query_dtype if draw.random() < 0.6 else draw.choice(DTYPES),
        metric=draw.choice(METRICS),
        rho=rho,
        scale=draw.choice((1.0, 0.125, 3.0, -1.0)) if rho == "softmax" else 1.0,
        order=draw.choice(("similarity", "similarity", "index")),
        weight=weight,
        bias=draw.random() < 0.5,
        candidates=R,
        has_self=draw.random() < 0.3,
        key_mask=draw.choice(("none", "none", "half", "most", "all")),
        layout=draw.choice(LAYOUTS),
        content=draw.choice(CONTENTS),
    )
    if not restricted:
        return case
    has_self = draw.random() < 0.6
    return replace(
        case,
        has_self=has_self,
        exclude_self=has_self and draw.random() < 0.6,
        key_range=draw.choice(("none", *RANGES, *RANGES)),
        for_each=draw.random() < 0.5,
    )


def make_restricted_case(seed: int) -> Case:
    return make_case(seed, restricted=True)


def make_special_case(seed: int) -> Case:
    """The case of a seed, restricted if that is odd, with a content of SPECIAL."""
    case = make_case(seed, restricted=seed % 2 == 1)
    return replace(case, content=random.Random(seed).choice(SPECIAL))


def assert_special(
    case: Case,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    select: Callable[..., tuple[Tensor, Tensor]],
    backward: bool = True,
) -> None:
    """Compares the two operators with the reference, as far as a special case determines results.

    NaN is first, ties by index, and where it must be; so are infinities.
    """
    arguments: dict[str, Any] = case.arguments()
    of_aggregation = ("value", "weight", "bias", "rho", "scale")
    search = {name: X for name, X in arguments.items() if name not in of_aggregation}
    s, I = select(**search)
    assert_certified_selection(similarities=s, indices=I, **search)
    if not case.only_selects:
        assert_forward(forward, **arguments, backward=backward, seed=case.seed)


def whole_numbers(B: int, M: int, D: int, bits: int) -> tuple[Tensor, Tensor]:
    """Query [B, 1, D] and key [B, M, D], float32, whose dot products are 0 to M - 1 in some order.

    A dot product is q * K + r, with q of `bits` bits, K of the other 22 - `bits`, and r such that
    the sum is small. All sums are exact in float32, and one lost bit changes the result.
    """
    generator = torch.Generator().manual_seed(bits)
    query, key = torch.zeros(B, 1, D), torch.zeros(B, M, D)
    for b in range(B):
        q = int(torch.randint(2 ** (bits - 1), 2**bits, (), generator=generator)) | 1
        K = torch.randint(2 ** (22 - bits), (M,), generator=generator) | 1
        query[b, 0, 3], query[b, 0, D - 2] = q, 1
        key[b, :, 3], key[b, :, D - 2] = K, torch.randperm(M, generator=generator) - q * K
    assert float((query.abs() @ key.abs().mT).max()) < 2**24
    return (-query, -key) if bits % 2 else (query, key)
