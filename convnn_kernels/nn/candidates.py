# SPDX-License-Identifier: MIT
"""Which tokens may be neighbors: all, a random sample or an even grid (section 4.2.2)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from convnn_kernels.nn import positional
from convnn_kernels.nn.settings import (
    require,
    require_choice,
    require_count,
    require_flag,
    require_number,
)

Spacing: TypeAlias = Literal["even", "ends"]
SPACINGS = get_args(Spacing)


class Candidates(nn.Module):
    """The tokens among which a layer searches for neighbors; base class of the three below.

    Attributes:
        include_self: whether the token itself is always a neighbor, even if it is not a candidate.
        self_similarity: the similarity, before ``scale``, that a token has to itself in place of
            its own, without a gradient; None for its own. It needs include_self, and it does not
            change which others are neighbors: only how the token itself is weighted.
        exclude_self: whether the token itself is never a neighbor. It needs include_self=False,
            which alone leaves it to the similarities whether the token is one.

    Raises:
        ValueError: if include_self or exclude_self is not a bool, if both are True, or if
            self_similarity is not a finite number or given without include_self.

    Examples:
        >>> class FirstCandidates(Candidates):
        ...     def forward(self, shape, padding, device):
        ...         return torch.arange(16, device=device)
        >>> FirstCandidates(include_self=True)((100,), 0, torch.device("cpu")).shape
        torch.Size([16])
    """

    # For modules that were pickled before there were these settings.
    self_similarity: float | None = None
    exclude_self: bool = False

    def __init__(
        self,
        include_self: bool,
        self_similarity: float | None = None,
        exclude_self: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.include_self = include_self = require_flag(owner, "include_self", include_self)
        self.exclude_self = require_flag(owner, "exclude_self", exclude_self)
        both = include_self and self.exclude_self
        require(not both, owner, "include_self", "False with exclude_self=True", include_self)
        if self_similarity is not None:
            self_similarity = require_number(owner, "self_similarity", self_similarity)
            expected = "None with include_self=False"
            require(include_self, owner, "self_similarity", expected, self_similarity)
        self.self_similarity = self_similarity

    def forward(self, shape: Sequence[int], padding: int, device: torch.device) -> Tensor | None:
        """Picks the candidates among the tokens of a map.

        Args:
            shape: the size of the unpadded map: (L,) or (H, W).
            padding: the number of zero tokens on every side of the map.
            device: device of the result.

        Returns:
            [R] int64, rows of the M key tokens of the padded map; None if all are candidates.
        """
        raise NotImplementedError

    def _self_repr(self) -> str:
        given = self.self_similarity
        own = "" if given is None else f", self_similarity={given}"
        own += ", exclude_self=True" if self.exclude_self else ""
        return f"include_self={self.include_self}{own}"


class AllCandidates(Candidates):
    """Every key token is a candidate.

    Args:
        include_self: whether the token itself is always a neighbor, and the first one, even where k
            other tokens are nearer. Without, it is not certain to be one, not even with the cosine
            metric and no projections: tokens of the same direction are as near, and order or
            rounding can put others first. In the first layer of the paper's VGG, 1 to 3% of the
            pixels of CIFAR-10 are not among their own 9 neighbors, mostly since nine others have
            the same color.
        self_similarity: the similarity of a token to itself, as in :class:`Candidates`.
        exclude_self: whether the token itself is never a neighbor, as in :class:`Candidates`.

    Examples:
        >>> AllCandidates(include_self=True)
        AllCandidates(include_self=True)
    """

    def __init__(
        self,
        include_self: bool = False,
        *,
        self_similarity: float | None = None,
        exclude_self: bool = False,
    ) -> None:
        super().__init__(include_self, self_similarity, exclude_self)

    def forward(self, shape: Sequence[int], padding: int, device: torch.device) -> Tensor | None:
        return None

    def extra_repr(self) -> str:
        return self._self_repr()


class RandomCandidates(Candidates):
    """r tokens drawn uniformly without replacement, shared by the batch and by all heads.

    Every forward draws new ones from PyTorch's generator for the input's device, so
    ``torch.manual_seed`` makes them repeatable. They are tokens of the unpadded map or, if that has
    fewer than r, of the padded map. If r is at least the number of key tokens, all are candidates.

    Args:
        r: the number of candidates, at least 1.
        include_self: whether the token itself is always a neighbor.
        fixed_in_eval: whether to use the same candidates for all maps of one size in eval mode.
            They are determined by the buffer ``seed``, which is saved with the model, survives
            averages and casts, and is the first rank's under DistributedDataParallel.
        self_similarity: the similarity of a token to itself, as in :class:`Candidates`.
        exclude_self: whether the token itself is never a neighbor, as in :class:`Candidates`.

    Examples:
        >>> candidates = RandomCandidates(32, fixed_in_eval=True).eval()
        >>> shape, device = (14, 14), torch.device("cpu")
        >>> torch.equal(candidates(shape, 0, device), candidates(shape, 0, device))
        True
    """

    seed: Tensor | None

    def __init__(
        self,
        r: int,
        include_self: bool = True,
        fixed_in_eval: bool = False,
        *,
        self_similarity: float | None = None,
        exclude_self: bool = False,
    ) -> None:
        super().__init__(include_self, self_similarity, exclude_self)
        self.r = require_count("RandomCandidates", "r", r)
        self.fixed_in_eval = require_flag("RandomCandidates", "fixed_in_eval", fixed_in_eval)
        # The bits of two words as signs, which survive what is done to buffers: averages of equal
        # buffers, which may be rounded, and casts to any floating-point dtype.
        self.register_buffer("seed", torch.ones(2, 32) if fixed_in_eval else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a new seed for the candidates of eval mode."""
        if self.seed is not None:
            self.seed.random_(0, 2).mul_(2).sub_(1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(prefix + "seed")
        if isinstance(saved, Tensor) and saved.dtype == torch.int64 and saved.dim() == 0:
            # Older state dicts have the seed as one number.
            bits = saved >> torch.arange(64, device=saved.device) & 1  # [64]
            state_dict[prefix + "seed"] = (2.0 * bits - 1).view(2, 32)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, shape: Sequence[int], padding: int, device: torch.device) -> Tensor | None:
        if self.r >= positional.count(shape, padding):
            return None
        inner = math.prod(shape)
        rows = inner if self.r <= inner else positional.count(shape, padding)
        if self.seed is not None and not self.training:
            # Ranking by a hash needs no generator: equal on all devices, and traceable.
            ranks = _hash(torch.arange(rows, device=device), self.seed.to(device))
            drawn = ranks.argsort(stable=True)
        else:
            drawn = torch.randperm(rows, device=device)
        drawn = drawn[: self.r]  # [R]
        return drawn if rows != inner else positional.interior(shape, padding, device)[drawn]

    def extra_repr(self) -> str:
        return f"{self.r}, {self._self_repr()}, fixed_in_eval={self.fixed_in_eval}"


class SpatialCandidates(Candidates):
    """Evenly spaced tokens: r of them, or every s-th.

    With r: in 1-D, the tokens floor(i * L / r) for i < r or, with spacing="ends",
    floor(i * (L - 1) / (r - 1)), from the first token to the last; in 2-D, a √r×√r grid spaced in
    the same way along both axes, so r must be a square number. The tokens are those of the unpadded
    map or, if that is too small, of the padded map. If r is at least the number of key tokens, all
    are candidates.

    With a stride s, as section 4.2.2 defines them: every s-th token of the unpadded map along each
    axis, starting with the first. s is then the paper's r in 1-D and its r' in 2-D. In the paper's
    experiments, r is a count.

    Args:
        r: the number of candidates, at least 1.
        stride: the step along each axis, at least 1. Exactly one of r and stride must be given.
        include_self: whether the token itself is always a neighbor.
        spacing: "even": r steps of equal length, the last of which ends behind the last token;
            "ends": both ends of each axis are candidates. Not with a stride.
        self_similarity: the similarity of a token to itself, as in :class:`Candidates`.
        exclude_self: whether the token itself is never a neighbor, as in :class:`Candidates`.

    Examples:
        >>> SpatialCandidates(4)((8, 8), 0, torch.device("cpu"))
        tensor([ 0,  4, 32, 36])
        >>> SpatialCandidates(4, spacing="ends")((8, 8), 0, torch.device("cpu"))
        tensor([ 0,  7, 56, 63])
        >>> SpatialCandidates(stride=4)((8, 8), 0, torch.device("cpu"))
        tensor([ 0,  4, 32, 36])
    """

    # For modules that were pickled before there was this setting.
    spacing: Spacing = "even"

    def __init__(
        self,
        r: int | None = None,
        *,
        stride: int | None = None,
        include_self: bool = True,
        spacing: Spacing = "even",
        self_similarity: float | None = None,
        exclude_self: bool = False,
    ) -> None:
        super().__init__(include_self, self_similarity, exclude_self)
        owner = "SpatialCandidates"
        require(r is not None or stride is not None, owner, "r", "given without a stride", r)
        require(r is None or stride is None, owner, "stride", "None where r is given", stride)
        self.r = None if r is None else require_count(owner, "r", r)
        self.stride = None if stride is None else require_count(owner, "stride", stride)
        require_choice(owner, "spacing", spacing, SPACINGS)
        fits = stride is None or spacing == "even"
        require(fits, owner, "spacing", "'even' with a stride", spacing)
        self.spacing = spacing

    def forward(self, shape: Sequence[int], padding: int, device: torch.device) -> Tensor | None:
        if self.stride is not None:
            counts = [-(-size // self.stride) for size in shape]
            axes = [torch.arange(n, device=device) * self.stride + padding for n in counts]  # [n]
            return _rows(axes, shape, padding)
        assert self.r is not None
        if self.r >= positional.count(shape, padding):
            return None
        side = self.r
        if len(shape) == 2:
            side = math.isqrt(self.r)
            require(side**2 == self.r, "SpatialCandidates", "r", "a square number in 2-D", self.r)
        sizes, start = list(shape), padding
        if side > min(sizes):
            sizes, start = [size + 2 * padding for size in shape], 0
        require(
            side <= min(sizes),
            "SpatialCandidates",
            "r",
            f"such that its {side} tokens along an axis fit into a map of {sizes}",
            self.r,
        )
        steps = torch.arange(side, device=device)
        if self.spacing == "ends":
            # In whole numbers, so that it is the same on all devices and in compiled code.
            axes = [steps * (size - 1) // max(side - 1, 1) + start for size in sizes]
        else:
            axes = [steps * size // side + start for size in sizes]
        return _rows(axes, shape, padding)

    def extra_repr(self) -> str:
        size = f"stride={self.stride}" if self.r is None else str(self.r)
        spacing = f", spacing={self.spacing!r}" if self.spacing != "even" else ""
        return f"{size}, {self._self_repr()}{spacing}"


def require_candidates(owner: str, candidates: Any) -> Candidates:
    """Checks the candidates of a layer; None stands for all tokens."""
    candidates = AllCandidates() if candidates is None else candidates
    expected = "AllCandidates, RandomCandidates or SpatialCandidates"
    require(isinstance(candidates, Candidates), owner, "candidates", expected, candidates)
    return candidates


def require_maker(owner: str, make: Any) -> None:
    """Checks that `make` is a function, since layers must not share one Candidates module."""
    require(
        make is None or (callable(make) and not isinstance(make, nn.Module)),
        owner,
        "candidates",
        "a function that creates the candidates of one layer, such as lambda: RandomCandidates(32)",
        make,
    )


def _rows(axes: list[Tensor], shape: Sequence[int], padding: int) -> Tensor:
    """[R]: rows of the padded map on the grid spanned by the positions along its axes, [n] each."""
    rows = axes[0]
    for axis, size in zip(axes[1:], shape[1:], strict=True):
        # [R so far, 1] + [n] → [R so far * n]
        rows = (rows.unsqueeze(1) * (size + 2 * padding) + axis).flatten()
    return rows


def _hash(x: Tensor, seed: Tensor) -> Tensor:
    """A bijection of the numbers below 2³² with random-looking values.

    No product reaches 2⁶³ and no constant 2³¹, as compilers may keep either in fewer bits.

    Args:
        x: [N] int64.
        seed: [2, 32], the signs of the bits of two words.
    """
    words = ((seed > 0).long() << torch.arange(32, device=seed.device)).sum(1)  # [2]
    for word in words.unbind():
        x = x ^ word
        x = ((x ^ (x >> 16)) * 0x61C88647) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x46A5B2C7) & 0xFFFFFFFF
        x = x ^ (x >> 16)
    return x
