# SPDX-License-Identifier: MIT
"""Wrong calls of the operators, generated from a table of their arguments, and the rules of errors.

`OPERATORS` says what each argument must be. From it, `wrong_calls` makes the calls that are wrong
in one argument, each with what its error must say: which argument, what was expected, what it got.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# The sizes of a valid call. The last are not measured by other arguments: the length of a range,
# and what a layer was made for, I input channels or an embedding of E.
SIZES = {"B": 2, "N": 6, "M": 11, "D": 4, "C": 5, "O": 7, "R": 9, "k": 3, "L": 10, "H": 12, "W": 13}
FIXED = {"2": 2, "I": 14, "E": 8}
SIZES |= FIXED

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (
    *FLOATING,
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.int4),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.uint4),
    *(torch.bool, torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.bits8),
)


@dataclasses.dataclass(frozen=True)
class Argument:
    name: str
    kind: str
    """"tensor", "whole", "real", "choice" or "flag"."""
    shape: tuple[str, ...] = ()
    """Keys of `SIZES`."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Those allowed in the call of `valid`, which is float32."""
    like: str = ""
    """The argument on whose device it must be."""
    is_optional: bool = False
    has_fixed_dims: bool = False
    """Whether the number of its dimensions does not depend on other arguments."""
    is_shared: bool = False
    """Whether its leading dimension may be missing."""
    rows: str = ""
    """The size of which its values are rows, where the operator reads them."""
    choices: tuple[str, ...] = ()

    @property
    def is_tensor(self) -> bool:
        return self.kind == "tensor"


Arguments = tuple[Argument, ...]


def _tensor(name: str, shape: str, *dtypes: torch.dtype, **options: Any) -> Argument:
    return Argument(name, "tensor", tuple(shape), dtypes, **options)


def _choice(name: str, *choices: str) -> Argument:
    return Argument(name, "choice", choices=choices)


_OPTION = {"is_optional": True}
_SAME = (torch.float32,)  # as another argument is
_ROWS = (torch.int64,)

_QUERY = _tensor("query", "BND", *FLOATING)
_KEY = _tensor("key", "BMD", *_SAME, like="query")
_RESTRICTIONS = (
    _tensor("candidates", "BR", *_ROWS, like="query", is_shared=True, rows="M", **_OPTION),
    _tensor("self_indices", "BN", *_ROWS, like="query", is_shared=True, rows="M", **_OPTION),
    _tensor("key_mask", "BM", torch.bool, like="query", **_OPTION),
    _tensor("key_range", "BN2", *_ROWS, like="query", is_shared=True, **_OPTION),
    Argument("exclude_self", "flag"),
)
_VALUE_TO_FIND = _tensor("value", "BMC", *FLOATING, like="query")
_VALUE = _tensor("value", "BMC", *FLOATING)
_K = Argument("k", "whole", ("k",))
_METRIC = _choice("metric", "cosine", "dot", "euclidean")
_ORDER = _choice("order", "similarity", "index")
_CONVOLUTION = (
    _tensor("weight", "OCk", *_SAME, like="value", **_OPTION),
    _tensor("bias", "O", *_SAME, like="value", **_OPTION),
    _choice("rho", "softmax", "ones", "similarity"),
    Argument("scale", "real"),
)
_WEIGHT, _, *_MODULATION = _CONVOLUTION
_INDICES = _tensor("indices", "BNk", *_ROWS, like="value", rows="M")
_SIMILARITIES = _tensor("similarities", "BNk", torch.float32, torch.float64, like="value")
_SIMILARITIES_FOUND = _tensor("similarities", "BNk", *_SAME, like="query")
_GRAD_OUTPUT = _tensor("grad_output", "BNO", *_SAME, like="value")
_GRAD_SIMILARITIES = _tensor("grad_similarities", "BNk", *_SAME, like="query", **_OPTION)


def _flags(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "flag") for name in names)


# The arguments of every operator. A size is what the first argument that has it says, and later
# ones that differ are wrong.
OPERATORS: dict[str, Arguments] = {
    "forward": (_QUERY, _KEY, _K, _METRIC, _ORDER, *_RESTRICTIONS, _VALUE_TO_FIND, *_CONVOLUTION),
    "select": (_QUERY, _KEY, _K, _METRIC, _ORDER, *_RESTRICTIONS),
    "aggregate": (_VALUE, _SIMILARITIES, _INDICES, *_CONVOLUTION),
    "forward_backward": (
        *(_QUERY, _KEY, _METRIC, dataclasses.replace(_RESTRICTIONS[0], rows=""), _VALUE_TO_FIND),
        *(_SIMILARITIES_FOUND, _INDICES),
        *(_WEIGHT, *_MODULATION, _GRAD_OUTPUT, _GRAD_SIMILARITIES),
        *_flags("has_bias", "need_query", "need_key", "need_value", "need_weight", "need_bias"),
    ),
    "select_backward": (
        *(_QUERY, _KEY, _METRIC, _SIMILARITIES_FOUND),
        dataclasses.replace(_INDICES, like="query"),
        dataclasses.replace(_GRAD_SIMILARITIES, is_optional=False),
        *_flags("need_query", "need_key"),
    ),
    "aggregate_backward": (
        *(_VALUE, _SIMILARITIES, _INDICES, _WEIGHT, *_MODULATION, _GRAD_OUTPUT),
        *_flags("has_bias", "need_value", "need_similarities", "need_weight", "need_bias"),
    ),
}


def valid(arguments: Arguments) -> dict[str, Any]:
    """The arguments of a valid call, all of them given."""
    values: dict[str, Any] = {"k": SIZES["k"], "scale": 0.5, "key_range": _ranges()}
    return {each.name: values.get(each.name, _valid(each)) for each in arguments}


def _ranges() -> Tensor:
    N, M = SIZES["N"], SIZES["M"]
    return torch.tensor([[i, M - i] for i in range(N)])


def _valid(argument: Argument) -> Any:
    if argument.kind == "choice":
        return argument.choices[0]
    if argument.kind == "flag":
        return True
    shape = [SIZES[size] for size in argument.shape[argument.is_shared :]]
    if argument.dtypes == _ROWS:
        return torch.arange(math.prod(shape)).view(shape) % SIZES["R"]
    return torch.ones(shape, dtype=torch.bool if torch.bool in argument.dtypes else torch.float32)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A tensor on another device than the others."""

    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A call that is wrong in one argument, and what its error must say."""

    argument: str
    way: str
    changes: dict[str, Any]
    expected: str
    """A regular expression somewhere in what was expected; {device} is that of the others."""
    got: str
    """What the argument got; {other} is another device. The word "shape" is that of `others`."""
    others: tuple[str, ...] = ()
    """If others are measured by the wrong one: these, of which the message is about one."""
    reads_values: bool = False
    error: type[Exception] = RuntimeError
    """TypeError where the dispatcher refuses it before the operator does."""

    def __str__(self) -> str:
        new = next(iter(self.changes.values()), "elsewhere")
        if isinstance(new, Elsewhere):
            new = "elsewhere"
        elif self.way == "layout" or isinstance(new, int):
            new = self.got
        elif isinstance(new, Tensor) and not self.reads_values:
            new = f"{new.dtype} {list(new.shape)}"
        return f"{self.argument}, {self.way}: {new}"


def wrong_calls(arguments: Arguments, way: str) -> list[Wrong]:
    """All calls with these arguments that are wrong in this way."""
    make = {
        "none": _none,
        "type": _types,
        "layout": _layouts,
        "dtype": _dtypes,
        "dims": _dims,
        "size": _sizes,
        "device": _devices,
        "value": _values,
    }[way]
    return [wrong for argument in arguments for wrong in make(arguments, argument)]


def _none(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    if argument.is_tensor and not argument.is_optional:
        yield Wrong(argument.name, "none", {argument.name: None}, r"be a tensor$", "None")


def _types(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    expected = {
        "tensor": "be a tensor or None$" if argument.is_optional else "be a tensor$",
        "whole": "be a whole number$",
        "real": "be a number$",
        "flag": "be True or False$",
        "choice": _listed(argument.choices) + "$",
    }[argument.kind]
    for got, value in WRONG_TYPES[argument.kind]:
        changes = {argument.name: value}
        yield Wrong(argument.name, "type", changes, expected, got, error=TypeError)


class Odd:
    """Of no type that PyTorch knows, and with a representation that fills the screen."""

    def __repr__(self) -> str:
        return "0x7f" * 1000


_ARRAY = torch.ones(3).numpy()
_NOT_NUMBERS = [("'3'", "3"), ("list", [3]), ("numpy.ndarray", _ARRAY), ("1j", 1j), ("True", True)]
# Values of wrong types, and how each begins in a message.
WRONG_TYPES: dict[str, list[tuple[str, Any]]] = {
    "tensor": [
        *(("'abc'", "abc"), ("str", "abc" * 10), ("3", 3), ("2.5", 2.5), ("True", True)),
        *(("list", [1.0]), ("tuple", (1,)), ("dict", {}), ("range", range(3))),
        *(("numpy.ndarray", _ARRAY), ("torch.dtype", torch.float32), ("wrong_calls.Odd", Odd())),
        *(("the class Tensor", Tensor), ("torch.nn.modules.linear.Linear", torch.nn.Linear(1, 1))),
    ],
    "whole": [
        *(*_NOT_NUMBERS, ("None", None), ("2.5", 2.5), ("3.0", 3.0), ("a tensor", torch.tensor(3))),
        ("numpy.float32", _ARRAY[0]),
    ],
    "real": [*_NOT_NUMBERS, ("None", None), ("a tensor", torch.tensor(0.5))],
    "choice": [("None", None), ("3", 3), ("list", ["dot"]), ("True", True)],
    "flag": [("None", None), ("1", 1), ("'yes'", "yes"), ("a tensor", torch.tensor([True, False]))],
}


def _layouts(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    if not argument.is_tensor:
        return
    tensor = valid(arguments)[argument.name]
    made = {"one of layout sparse_coo": tensor.to_sparse()}
    if tensor.is_floating_point():
        made["a quantized one"] = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
        made["a nested one"] = torch.nested.nested_tensor(list(tensor))
    for got, new in made.items():
        changes = {argument.name: new}
        expected = "be a dense tensor$"
        yield Wrong(argument.name, "layout", changes, expected, got, error=TypeError)


def _dtypes(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    names = [str(dtype).removeprefix("torch.") for dtype in argument.dtypes]
    others = r"(?! or \w*\d)" if len(names) == 1 else ""
    expected = rf"^be {_listed(names, '')}{others}\b"
    for dtype in DTYPES if argument.is_tensor else ():
        if dtype not in argument.dtypes:
            new = torch.empty(valid(arguments)[argument.name].shape, dtype=dtype)
            got = str(dtype).removeprefix("torch.")
            yield Wrong(argument.name, "dtype", {argument.name: new}, expected, got)


def _dims(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    """Too few dimensions, and too many."""
    if not argument.is_tensor:
        return
    tensor = valid(arguments)[argument.name]
    if argument.shape[0] != "B" or argument.is_shared:
        shapes = [tensor.shape[1:], (1, *tensor.shape), (1, 1, *tensor.shape)]
        shapes = [each for each in shapes if argument.name != "candidates" or len(each) != 2]
    else:
        shapes = [(1, *tensor.shape), *(tensor.shape[i:] for i in range(1, tensor.dim() + 1))]
    for shape in shapes:
        others, dims = (), {len(argument.shape), len(argument.shape) - argument.is_shared}
        if _defines(arguments, argument, "B") and len(shape) >= 2 and not argument.has_fixed_dims:
            others, dims = _sharing(arguments, argument, "B"), {len(shape)}
        yield _shaped(arguments, "dims", argument, shape, _says_dims(dims), others)


def _says_dims(dims: set[int]) -> str:
    shapes = "|".join(
        rf"shape \[\w+{', [.]*[a-zA-Z0-9]+' * (n - 1)}\]" for n in sorted(dims) if n > 0
    )
    counts = "|".join(map(str, sorted(dims)))
    leading = r"leading dimensions \[[\d, ]*\] of"
    return rf"at least 2 dimensions \[|dimensions as \w+ \(({counts})\)|{leading}|{shapes}"


def _sizes(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    """Each dimension one too large, one too small, and 0."""
    if not argument.is_tensor:
        return
    for missing in (0, 1) if argument.is_shared else (0,):
        names = argument.shape[missing:]
        for i, name in enumerate(names):
            defines = _defines(arguments, argument, name)
            sharing = _sharing(arguments, argument, name) if defines else ()
            if defines and not sharing:
                continue
            for size in (SIZES[name] - 1, SIZES[name] + 1, 0):
                shape = [SIZES[each] for each in names]
                shape[i] = size
                expected = rf"\b{size if sharing else SIZES[name]}\b"
                if sharing and argument.name == "similarities" and name == "k" and size == 0:
                    expected, sharing = r"at least one column \(k >= 1\)", ()
                yield _shaped(arguments, "size", argument, shape, expected, sharing)


def _shaped(
    arguments: Arguments,
    way: str,
    argument: Argument,
    shape: Any,
    expected: str,
    others: tuple[str, ...],
) -> Wrong:
    new = torch.zeros(tuple(shape), dtype=valid(arguments)[argument.name].dtype)
    return Wrong(argument.name, way, {argument.name: new}, expected, "shape", others)


def _defines(arguments: Arguments, argument: Argument, size: str) -> bool:
    """Whether it is the first argument with this size, by which the others are measured."""
    if size in FIXED:
        return False
    return argument == next(each for each in arguments if size in each.shape)


def _sharing(arguments: Arguments, argument: Argument, size: str) -> tuple[str, ...]:
    """The other arguments with this size."""
    rest = [each for each in arguments if each.is_tensor and each != argument]
    return tuple(each.name for each in rest if size in each.shape)


def _devices(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    if not argument.is_tensor:
        return
    tensor = valid(arguments)[argument.name]
    changes = {argument.name: Elsewhere(tensor)}
    if argument.like:
        expected = rf"^be on {{device}} as {argument.like} is$"
        yield Wrong(argument.name, "device", changes, expected, "{other}")
    else:
        others = tuple(each.name for each in arguments if each.like == argument.name)
        expected = rf"^be on {{other}} as {argument.name} is$"
        yield Wrong(argument.name, "device", changes, expected, "{device}", others)


def _values(arguments: Arguments, argument: Argument) -> Iterator[Wrong]:
    name, kind = argument.name, argument.kind
    if kind == "whole":
        for value in (0, -1, -(2**40), 1 - 2**63):
            yield Wrong(name, "value", {name: value}, r"be at least 1$", str(value))
    elif kind == "real":
        yield from _scales(name)
    elif kind == "choice":
        for value in ("", "l2", "Dot", " dot", "it's", "x" * 100, "ones " * 3):
            yield Wrong(name, "value", {name: value}, _listed(argument.choices) + "$", f"'{value}'")
    elif name == "exclude_self":
        changes = {name: True, "self_indices": None}
        yield Wrong(name, "value", changes, "be False without self_indices$", "True")
    elif name == "key_range":
        yield from _wrong_ranges(argument)
    elif argument.rows:
        yield from _wrong_rows(argument)


def _scales(name: str) -> Iterator[Wrong]:
    for value in (math.nan, math.copysign(math.nan, -1), math.inf, -math.inf):
        got = "nan" if math.isnan(value) else f"{value:g}"
        yield Wrong(name, "value", {name: value}, "be finite$", got)
    for rho in ("ones", "similarity"):
        for value in (0.5, 0.0, -1.0, 1e-5, 1e300, 123456789.0, 1 / 3):
            changes = {name: value, "rho": rho}
            expected = r"be 1\.0 unless rho is 'softmax'$"
            yield Wrong(name, "value", changes, expected, f"{value:g} with rho '{rho}'")


def _wrong_rows(argument: Argument) -> Iterator[Wrong]:
    """Rows of key that are out of range, at the first place and at the last, or not distinct."""
    name, M = argument.name, SIZES[argument.rows]
    for missing in (0, 1) if argument.is_shared else (0,):
        shape = [SIZES[size] for size in argument.shape[missing:]]
        rows = torch.arange(math.prod(shape)).view(shape) % shape[-1]
        for place in (0, math.prod(shape) - 1):
            for row in (-1, M, 2**63 - 1, -(2**63)):
                new = rows.flatten().clone()
                new[place] = row
                changes = {name: new.view(shape)}
                got = f"{row} at position {place}"
                expected = rf"^be in \[0, {M}\)$"
                yield Wrong(name, "value", changes, expected, got, reads_values=True)
        if name == "candidates":
            new = rows.flatten().clone()
            new[-1] = new[-3]
            got = f"{int(new[-1])} more than once"
            changes = {name: new.view(shape)}
            yield Wrong(name, "value", changes, "^be distinct$", got, reads_values=True)


def _wrong_ranges(argument: Argument) -> Iterator[Wrong]:
    N, M = SIZES["N"], SIZES["M"]
    for shape in ((N, 2), (SIZES["B"], N, 2)):
        for place in (0, math.prod(shape) // 2 - 1):
            for begin, end in ((-1, 3), (5, 4), (2, M + 1), (M + 1, M + 1), (-(2**63), 2**63 - 1)):
                new = torch.tensor([[0, M]] * (math.prod(shape) // 2))
                new[place] = torch.tensor([begin, end])
                changes = {argument.name: new.view(shape)}
                expected = rf"^be 0 <= begin <= end <= {M}$"
                got = f"{begin} and {end} at position {place}"
                yield Wrong(argument.name, "value", changes, expected, got, reads_values=True)


def _listed(choices: Any, quote: str = "'") -> str:
    """Choices as messages list them: 'a', 'b' or 'c'."""
    *most, last = [re.escape(f"{quote}{each}{quote}") for each in choices] or [""]
    return f"{', '.join(most)} or {last}" if most else last


MESSAGE = re.compile(
    r"(?P<owner>[\w:]+): (?P<argument>[\w.*\[\] ]+?) must (?P<expected>.+?), got (?P<got>.+)"
)
# What a user cannot know or act on.
INTERNALS = re.compile(
    r"\.(h|hpp|cpp|cu|cuh|py)\b|\b0x[0-9a-f]|\bline \d|\btorch::|\bat::|\bc10\b|\bSymInt\b"
    r"|\bATen\b|dispatch|' backend|schema|pybind|C\+\+|Position: |<class|\n"
)


def error_of(call: Callable[..., Any], *args: Any, **options: Any) -> Exception | None:
    """What a call raises."""
    try:
        call(*args, **options)
    except Exception as error:
        return error
    return None


def fault(
    wrong: Wrong, error: BaseException | None, owners: tuple[str, ...], args: dict[str, Any]
) -> str | None:
    """Which rule the error of a wrong call breaks; None if it keeps all.

    The message is about an argument if that follows the owner. What is expected may name others.

    Args:
        wrong: the call; devices are filled in.
        error: what it raised.
        owners: the names with which the message may begin.
        args: the arguments of the call.
    """
    if error is None:
        return "no error"
    if type(error) is not wrong.error:
        return f"a {type(error).__name__}: {str(error)[:200]!r}"
    message = str(error)
    if found := INTERNALS.search(message):
        return f"it shows {found[0]!r}: {message[:300]!r}"
    said = MESSAGE.fullmatch(message)
    if not said:
        return f"it is not of the form '<owner>: <argument> must ..., got ...': {message[:300]!r}"
    if said["owner"] not in owners:
        return f"it begins with {said['owner']}: {message!r}"
    if said["argument"] not in (wrong.others or (wrong.argument,)):
        return f"it is about {said['argument']}: {message!r}"
    if not re.search(wrong.expected, said["expected"]):
        return f"it does not say what was expected, {wrong.expected!r}: {message!r}"
    got = wrong.got
    if got == "shape":
        got = f"shape {list(args[said['argument']].shape)}"
    # After a wrong type, a hint may follow.
    hint = r"( \(.+\)|, which .+)?" if wrong.error is TypeError else ""
    if re.fullmatch(re.escape(got) + hint, said["got"]):
        return None
    return f"it does not say what it got, {got!r}: {message!r}"


def summary(faults: list[str], calls: int) -> str:
    return "\n".join([f"{len(faults)} of {calls} calls", *faults[:20]])
