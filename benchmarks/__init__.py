# SPDX-License-Identifier: MIT
"""Time and memory of ConvNN beside eager PyTorch, attention and convolution (`make bench`)."""

import importlib.util

_missing = [name for name in ("numpy", "PIL") if importlib.util.find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"benchmarks needs {' and '.join(_missing)}, which the extra bench installs:  "
        "pip install --no-build-isolation '.[bench]'"
    )
