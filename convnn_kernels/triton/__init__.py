# SPDX-License-Identifier: MIT
"""The Triton backend: one file for each algorithm, its kernels beside what launches them.

``select.py``, ``aggregate.py``, ``forward.py``, ``select_backward.py`` and
``aggregate_backward.py`` hold the operators of those names; ``configs.py`` the block sizes.
``backend.py`` says when they can run.
"""
