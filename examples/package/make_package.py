# SPDX-License-Identifier: MIT
"""Compiles a small model ahead of time into a package that run_package.cpp runs without Python:

python examples/package/make_package.py model.pt2

The process that loads a package needs the operators: the file convnn_kernels/lib/libconvnn_cpu.so
of the installed package, or in Python ``import convnn_kernels``. Layers with random candidates need
``fixed_in_eval=True`` to give the same result each time.
"""

import sys

import torch
from torch import nn

from convnn_kernels import nn as cnn


class Model(nn.Module):
    """[B, 3, 8, 8] -> [B, 8]"""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = cnn.ConvNN2d(3, 8, k=9, padding=1)
        self.attention = cnn.ConvNNAttention(8, num_heads=2, k=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.convolution(images).flatten(2).transpose(1, 2)
        return self.attention(tokens).mean(1)


def main(package: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    # As in run_package.cpp.
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        # What run_package.cpp should print.
        for row in model(images).tolist():
            print(*(f"{number:.6f}" for number in row))


if __name__ == "__main__":
    main(sys.argv[1])
