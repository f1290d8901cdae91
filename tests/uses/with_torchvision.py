# SPDX-License-Identifier: BSD-3-Clause
"""Imported for its effect, before anything of torchvision: that works then, or the file is skipped.

(Not in a conftest.py: pytest's module of that name would hide tests/conftest.py.)
"""

import shims

shims.torchvision_or_skip()
