# SPDX-License-Identifier: MIT
"""The fuzzer: what it once found stays right, a short run finds nothing, and it finds faults.

It runs in a process of its own, which forks: calls that crash must not end the tests.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.fuzz import verdict

pytest.importorskip("hypothesis")

CORPUS = sorted((Path(__file__).parent / "fuzz_corpus").glob("*.json"))

SHORT = """
    import json
    from pathlib import Path
    from tools.fuzz.__main__ import Fuzzer

    fuzzer = Fuzzer(limit=60.0)
    paths = sorted(Path({folder!r}).glob("*.json"))
    corpus = {{path.name: fuzzer.child.judge(json.loads(path.read_text())) for path in paths}}
    fuzzer.round(seed=0, examples={examples})
    fuzzer.child.close()
    found = {{kind: call for kind, (call, _) in fuzzer.found.items()}}
    printed = {{"corpus": corpus, "found": found, "counts": fuzzer.counts}}
    print(json.dumps(printed | {{"compared": fuzzer.compared.total()}}))
"""


def test_corpus_and_a_short_run(run_python: Callable[..., str]) -> None:
    code = SHORT.format(folder=str(CORPUS[0].parent), examples=100)
    result = json.loads(run_python(code, OMP_NUM_THREADS="1").splitlines()[-1])
    assert len(result["corpus"]) == 26
    wrong = {name: verdict for name, verdict in result["corpus"].items() if verdict[1]}
    assert not wrong, "a fault of the corpus is back"
    assert "skipped" not in {verdict[0] for verdict in result["corpus"].values()}
    assert not result["found"]
    # The calls are not refused at the first check: many have a result, and of these many are small
    # enough for the reference.
    counts = result["counts"]
    assert counts["result"] > 20
    assert counts["error"] > 20
    assert result["compared"] > 10


def test_a_right_call_must_not_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(query: Any, key: Any, k: int) -> Any:
        raise RuntimeError("convnn::select: k must be at most 2, got 3")

    monkeypatch.setitem(verdict.OPERATORS, "select", refuses)
    rows = {"tensor": {"shape": [5, 4]}}
    call = {"call": "select", "arguments": {"query": rows, "key": rows, "k": 3}}
    assert verdict.judge(call) == ("error", "", False)
    right = verdict.judge(call | {"valid": True})
    assert right.complaint == "refuses a right call: convnn::select: k must be at most 2, got 3"


@pytest.mark.parametrize(
    ("message", "is_named"),
    [
        ("convnn::select: k must be at least 1, got 0", True),
        ("select_neighbors: k must be a whole number, got None", True),
        ("select_neighbors() missing 1 required positional argument: 'k'", True),
        ("convnn::select() Expected a value of type 'int' for argument 'k' but", True),
        ("convnn::select: cannot allocate 80 bytes for a copy of candidates of shape [10]", True),
        ("convnn::select: sizes do not match in key", False),
        ("convnn::forward: k must be at least 1, got 0", False),
        ("k must be at least 1, got 0", False),
        ("index out of range in query", False),
    ],
)
def test_an_error_must_name_an_argument(
    message: str, is_named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.wraps(verdict.FUNCTIONS["functional.select_neighbors"])
    def refuses(**args: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setitem(verdict.FUNCTIONS, "functional.select_neighbors", refuses)
    call = {"call": "functional.select_neighbors", "arguments": {"query": ROWS, "key": ROWS}}
    assert (not verdict.judge(call).complaint) == is_named


ROWS = {"tensor": {"shape": [5, 4]}}
NEIGHBORS = {
    "indices": {"tensor": {"shape": [2, 5, 3], "dtype": "int64", "fill": "rows", "rows": 5}},
    "similarities": {"tensor": {"shape": [2, 5, 3], "fill": "-inf"}},
}
LENGTHS = {"tensor": {"shape": [4], "dtype": "int64", "fill": "rows", "rows": 5}}
KEY_LENGTHS = {"tensor": LENGTHS["tensor"] | {"seed": 1}}
COMPARED: list[tuple[str, dict[str, Any]]] = [
    ("edge_index", NEIGHBORS),
    ("edge_index", NEIGHBORS | {"num_keys": 7}),
    ("window_ranges", {"N": 6, "M": 4}),
    ("window_ranges", {"N": 6, "M": 4, "window": 2, "causal": False}),
    ("window_ranges", {"N": 3, "window": 3, "causal": True}),
    ("segment_ranges", {"lengths": LENGTHS}),
    ("segment_ranges", {"lengths": LENGTHS, "key_lengths": KEY_LENGTHS, "window": 2}),
    ("segment_ranges", {"lengths": {"object": "list"}, "key_lengths": None, "causal": True}),
    ("select_neighbors", {"query": ROWS, "key": ROWS, "k": 3, "metric": "euclidean", "within": 2}),
]


def off_by_one(result: Tensor, place: int) -> Tensor:
    wrong = result.clone()
    wrong.view(-1)[place] += 1
    return wrong


@pytest.mark.parametrize(("name", "args"), COMPARED)
def test_a_wrong_result_of_a_function_is_found(
    name: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = f"functional.{name}"
    call = {"call": function, "arguments": args}
    assert verdict.judge(call) == ("result", "", True)
    right = verdict.FUNCTIONS[function]

    def edited(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def wrong(**args: Any) -> Any:
            results = right(**args)
            return tuple(map(change, results)) if isinstance(results, tuple) else change(results)

        return wrong

    for change in (
        lambda result: off_by_one(result, 0),
        lambda result: off_by_one(result, -1),
        lambda result: result.flip(-1),
        lambda result: result[:, 1:],
        lambda result: result.int() if result.dtype is torch.int64 else result,
    ):
        monkeypatch.setitem(verdict.FUNCTIONS, function, edited(change))
        assert verdict.judge(call).complaint.startswith("result: ")


# Each plants a fault in the operator `select`; the fuzzer finds it and reduces the call.
PLANTED = """
    import json, os, time, torch
    from tools.fuzz import verdict
    from tools.fuzz.__main__ import Fuzzer

    right = verdict.OPERATORS["select"]

    def crash(query, key, k, *args, **options):
        if isinstance(k, int) and k > 2:
            os.abort()
        return right(query, key, k, *args, **options)

    def hang(query, *args, **options):
        if isinstance(query, torch.Tensor) and query.dim() > 2:
            time.sleep(60)
        return right(query, *args, **options)

    def wrong_type(query, key, k, *args, **options):
        if not isinstance(k, int):
            raise KeyError("k")
        return right(query, key, k, *args, **options)

    def no_name(*args, **options):
        try:
            return right(*args, **options)
        except RuntimeError:
            raise RuntimeError("wrong") from None

    def wrong_result(*args, **options):
        s, I = right(*args, **options)
        return s, torch.where(I == 1, 0, I)

    def no_check_of_meta(query, *args, **options):
        if getattr(query, "is_meta", False):
            return right(query, query, 1)
        return right(query, *args, **options)

    found = {{}}
    for fault in (crash, hang, wrong_type, no_name, wrong_result, no_check_of_meta):
        verdict.OPERATORS = {{"select": fault}}
        fuzzer = Fuzzer(limit=1.0 if fault is hang else 20.0, only=("select",))
        for seed in range(4):
            if fuzzer.round(seed, examples=100):
                break
        fuzzer.child.close()
        found[fault.__name__] = [(kind, call) for kind, (call, _) in fuzzer.found.items()]
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_planted_faults_are_found(run_python: Callable[..., str]) -> None:
    result = json.loads(run_python(PLANTED.format(), OMP_NUM_THREADS="1").splitlines()[-1])
    kinds = {name: found[0][0] for name, found in result.items()}
    assert kinds["crash"] == "select: crash: SIGABRT"
    assert kinds["hang"].startswith("select: hang: no end")
    assert "raises KeyError" in kinds["wrong_type"]
    assert "names no argument: RuntimeError: wrong" in kinds["no_name"]
    assert "result: " in kinds["wrong_result"]
    assert "with meta tensors" in kinds["no_check_of_meta"] or "shape" in kinds["no_check_of_meta"]
    # The smallest call: three neighbors of one query.
    arguments = result["crash"][0][1]["arguments"]
    assert arguments["k"] == 3
    assert arguments["query"]["tensor"]["shape"] == [1, 1]
