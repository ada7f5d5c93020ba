# SPDX-License-Identifier: MIT
"""The hybrid branching layer (section 4.2.3)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convnn_kernels.functional import Metric, Order, Rho
from convnn_kernels.nn import settings
from convnn_kernels.nn.candidates import Candidates, require_candidates
from convnn_kernels.nn.convnn import ConvNN2d, Projections, require_settings, value_width
from convnn_kernels.nn.symbolic import is_symbolic, symbolic_call


class HybridBranch2d(nn.Module):
    """Conv2d and ConvNN2d over the same input, fused by a 1×1 convolution (section 4.2.3).

    [B, C, H, W] → [B, C', H, W], or with a stride [B, C', ⌈H / stride⌉, ⌈W / stride⌉], with dtype
    and memory format as for Conv2d.

    ConvNN produces ⌊branch_ratio · C'⌋ of the channels to be fused, Conv2d the rest. A branch
    without channels is omitted. The fusion always remains, so the number of parameters does not
    depend on branch_ratio (with the default settings).

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: kernel size of Conv2d, which pads to keep the size of the map; odd with a
            stride.
        branch_ratio: the paper's λ, from 0 (Conv2d alone) to 1 (ConvNN alone).
        k: number of neighbors of the ConvNN branch; kernel_size² if None, as in the paper.
        padding: number of zero tokens on every side of the keys of the ConvNN branch;
            kernel_size // 2 if None.
        stride: stride of both branches.
        bias: whether both branches and the fusion have a bias.
        projections, rho, metric, scale, order, aggregation, positional_encoding, coordinates,
            coordinate_order, standardize, candidates: settings of the ConvNN branch, as in
            :class:`ConvNN2d`. The defaults of projections and rho are those of the paper's VGG: no
            projections and rho="ones".
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if an argument is wrong, or the input's shape, or its dtype is not a
            floating-point one; the message names it, what was expected and what was passed.
        RuntimeError: in forward, if the input has not the dtype and device of the parameters.

    Examples:
        >>> layer = HybridBranch2d(16, 32, branch_ratio=0.25)
        >>> layer.conv.out_channels, layer.convnn.out_channels
        (24, 8)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    conv: nn.Conv2d | None
    convnn: ConvNN2d | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        branch_ratio: float = 0.5,
        *,
        k: int | None = None,
        padding: int | None = None,
        stride: int = 1,
        bias: bool = True,
        projections: Projections = "identity",
        rho: Rho = "ones",
        metric: Metric = "cosine",
        scale: float = 1.0,
        order: Order = "similarity",
        aggregation: settings.Aggregation = "dense",
        positional_encoding: settings.PositionalEncoding = None,
        coordinates: settings.Coordinates = "unit",
        coordinate_order: settings.CoordinateOrder = "yx",
        standardize: bool = False,
        candidates: Candidates | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        out_channels = settings.require_count(owner, "out_channels", out_channels)
        kernel_size = settings.require_count(owner, "kernel_size", kernel_size)
        stride = settings.require_count(owner, "stride", stride)
        fits = stride == 1 or kernel_size % 2 == 1
        settings.require(fits, owner, "kernel_size", "odd with a stride", kernel_size)
        chosen: dict[str, Any] = {
            "in_channels": in_channels,
            "k": kernel_size**2 if k is None else k,
            "padding": kernel_size // 2 if padding is None else padding,
            "projections": projections,
            "rho": rho,
            "metric": metric,
            "scale": scale,
            "order": order,
            "aggregation": aggregation,
            "positional_encoding": positional_encoding,
            "coordinates": coordinates,
            "coordinate_order": coordinate_order,
            "standardize": standardize,
        }
        # Checked here, so that errors name this layer, also where branch_ratio=0 has no ConvNN.
        self.in_channels, _, _ = require_settings(owner, **chosen)
        chosen["candidates"] = require_candidates(owner, candidates)
        self.branch_ratio = settings.require_between(owner, "branch_ratio", branch_ratio, 0, 1)
        settings.require_flag(owner, "bias", bias)
        options = {"stride": stride, "bias": bias}
        options |= settings.require_options(owner, device, dtype)
        self._create_branches(out_channels, kernel_size, chosen, options)
        self.fuse = nn.Conv2d(out_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def _create_branches(
        self, out_channels: int, kernel_size: int, chosen: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """`chosen` is for the ConvNN branch, `options` for both."""
        # 0.29 * 100 is slightly below 29 in floating point, also in float32, and 29 is meant.
        convnn_channels = math.floor(self.branch_ratio * out_channels + 1e-5)
        conv_channels = out_channels - convnn_channels
        aggregation = chosen["aggregation"]
        values = value_width(
            self.in_channels, 2, chosen["projections"], chosen["positional_encoding"]
        )
        settings.require(
            aggregation == "dense" or convnn_channels in (0, values),
            type(self).__name__,
            "branch_ratio * out_channels",
            f"the {values} channels of the values with aggregation='{aggregation}'",
            convnn_channels,
        )
        self.conv = self.convnn = None
        if conv_channels:
            # Conv2d does not take "same" with a stride.
            padding = "same" if options["stride"] == 1 else kernel_size // 2
            self.conv = nn.Conv2d(
                self.in_channels, conv_channels, kernel_size, padding=padding, **options
            )
        if convnn_channels:
            self.convnn = ConvNN2d(out_channels=convnn_channels, **chosen, **options)

    def reset_parameters(self) -> None:
        """Reinitializes both branches and the fusion."""
        for module in (self.conv, self.convnn, self.fuse):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if is_symbolic(x):
            return symbolic_call(self, x)
        shape: Sequence[int | str] = ("B", self.in_channels, "H", "W")
        settings.require_input(type(self).__name__, "input", x, shape)
        try:
            # [B, C' - ⌊λC'⌋, H, W] and [B, ⌊λC'⌋, H, W]
            branches = [branch(x) for branch in (self.conv, self.convnn) if branch is not None]
            # [B, C', H, W]
            joined = torch.cat(branches, dim=1) if len(branches) > 1 else branches[0]
            return self.fuse(joined)
        except RuntimeError:
            settings.require_as_parameters(self, input=x)
            raise

    def extra_repr(self) -> str:
        return f"branch_ratio={self.branch_ratio}"
