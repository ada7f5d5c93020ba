# SPDX-License-Identifier: MIT
"""The paper's tables and figures: `python -m benchmarks.paper --table 1 --data FOLDER`."""
