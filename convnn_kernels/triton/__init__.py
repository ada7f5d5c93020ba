# SPDX-License-Identifier: MIT
"""Device code of the Triton backend and its tile choices. The host side is triton/backend.py."""
