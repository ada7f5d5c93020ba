# SPDX-License-Identifier: MIT
"""The implementations of the operators, and the choice among them."""
