# SPDX-License-Identifier: MIT
"""Run outside the checkout: the installed package computes, differentiates and describes itself."""

import json
import subprocess
import sys
from pathlib import Path

import torch

import convnn_kernels
from convnn_kernels import functional, introspect

package = Path(convnn_kernels.__file__).parent
checkout = Path(__file__).resolve().parent.parent
assert checkout / "convnn_kernels" != package, "the checkout was imported, not the installation"

torch.manual_seed(0)
tokens = torch.randn(2, 50, 8, dtype=torch.float64, requires_grad=True)
output = functional.convnn(tokens, tokens, tokens, 5, metric="dot", rho="similarity")
similarities, indices = (tokens @ tokens.mT).topk(5)
neighbors = tokens.unsqueeze(1).take_along_dim(indices.unsqueeze(-1), dim=2)
expected = (similarities.unsqueeze(-1) * neighbors).sum(dim=2)
torch.testing.assert_close(output, expected)
(gradient,) = torch.autograd.grad(output.sum(), tokens)
(expected_gradient,) = torch.autograd.grad(expected.sum(), tokens)
torch.testing.assert_close(gradient, expected_gradient)

command = [sys.executable, "-m", "convnn_kernels.info", "--json"]
report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
assert report["backends"]["cpu"] is None
assert report["versions"]["convnn_kernels"] == introspect.version()
assert report["machine"]["cpu_instruction_set"] in introspect.cpu_instruction_sets()
print(f"convnn_kernels {introspect.version()} works in {package}, PyTorch {torch.__version__}")
