# SPDX-License-Identifier: MIT
"""A fuzzer of the operators and functions: right and wrong calls, drawn by Hypothesis.

``python -m tools.fuzz --minutes 10`` draws calls (strategies.py) and makes each in a child process
(child.py), which judges it (verdict.py, lists.py): the result must be that of the reference, or an
error must name an argument. A crash, a call that does not end and a wrong outcome are minimized and
written as JSON (calls.py), one file each. ``--replay FILE...`` makes such calls again; those of
tests/fuzz_corpus run with the quick tests.

Hypothesis rather than libFuzzer or atheris: arguments are Python objects with structure, of which
random bytes hardly ever make a valid call, and it needs no instrumented PyTorch.
"""
