# SPDX-License-Identifier: MIT
"""Long checks of the CPU library: ``python -m tools.nightly --hours 2`` on two cores.

Each part (parts.py, leaks.py, threads.py, reruns.py) makes a number of cases that is in proportion
to the hours, from a seed that each day has of its own: ``--part NAME --case SEED`` makes one of
them again. The report, build/nightly.json, has the seed, the counts, the failures, each with the
command that repeats it, the commit and the processor.
"""
