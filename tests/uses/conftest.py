# SPDX-License-Identifier: BSD-3-Clause
"""Every row compares with torchvision: it is imported here, before the rows import parts of it."""

import shims

shims.import_torchvision()
