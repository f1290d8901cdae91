# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnet_fast``."""

import sys

from resnet_fast.cli import main

sys.exit(main())
