# SPDX-License-Identifier: MIT
"""Mutation testing: small deliberate faults, one at a time, and whether the tests notice them.

`python -m tools.slips` runs the campaign. Each slip changes one place of a copy of the checkout;
what depends on it is compiled, and the relevant tests run, most likely killers first.

- Slips are made by rule (`rules.py`, places chosen by a fixed seed) and by hand (`by_hand/`);
  `campaign.py` has the list.
- A kill is a test that passes without the slip and fails with it. The process of the tests reports
  the digest of the library, program or module that it has loaded (`witness.py`): if that is not
  the one with the slip, nothing is counted.
- A slip that does not compile is invalid, one with the same machine code or bytecode as before is
  equivalent; neither counts.
- Outcomes are kept in a file of JSON lines and found again by the slip and the file that it
  changes, so that an interrupted campaign goes on where it was.
"""
