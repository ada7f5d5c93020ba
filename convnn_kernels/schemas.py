# SPDX-License-Identifier: MIT
"""The operators ``torch.ops.convnn.*``, and their arguments by name.

Importing the module loads the C++ libraries, which define the operators: their schemas are in
csrc/schemas.h. Names, order and defaults of the arguments are read from there.
"""

import collections
from typing import Any

import torch

from convnn_kernels import native, torch_internals

native.load()

# What Python adds to the operators: fake kernels, derivatives, transforms, the CUDA key.
LIBRARY = torch_internals.only_library("convnn")

# What C++ on the CUDA key hands over to (csrc/cuda/way_in.h).
PYTHON_LIBRARY = torch_internals.only_library("convnn_python")

# The operators by name, "convnn::forward" and so on.
OPERATORS: dict[str, torch._ops.OpOverload] = {
    op.name(): op
    for op in (
        torch.ops.convnn.forward.default,
        torch.ops.convnn.select.default,
        torch.ops.convnn.aggregate.default,
        torch.ops.convnn.forward_backward.default,
        torch.ops.convnn.select_backward.default,
        torch.ops.convnn.aggregate_backward.default,
    )
}


def _arguments_class(op: torch._ops.OpOverload) -> Any:
    arguments = op._schema.arguments  # private; PyTorch has no public way to read a schema
    # Arguments without a default come first, as `define` requires.
    defaults = [each.default_value for each in arguments if each.has_default_value()]
    name = op._schema.name.removeprefix("convnn::").title().replace("_", "")
    return collections.namedtuple(
        f"{name}Arguments", [each.name for each in arguments], defaults=defaults
    )


_ARGUMENTS = {name: _arguments_class(op) for name, op in OPERATORS.items()}


def arguments(op: torch._ops.OpOverload | str) -> Any:
    """The namedtuple class of the arguments of ``op``, an operator or its name.

    Its fields are the names in the schema and its defaults are those of the schema, so
    ``arguments(op)(*args)`` adds the trailing arguments that the dispatcher leaves out because
    they have their default value.
    """
    return _ARGUMENTS[op if isinstance(op, str) else op.name()]
