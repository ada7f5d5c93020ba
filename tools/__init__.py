# SPDX-License-Identifier: MIT
"""What developers run, and what is not part of the package or its benchmark."""
