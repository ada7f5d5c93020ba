# SPDX-License-Identifier: MIT
"""Time and memory of ConvNN beside eager PyTorch, attention and convolution (`make bench`)."""
