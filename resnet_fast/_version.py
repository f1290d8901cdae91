# SPDX-License-Identifier: BSD-3-Clause
"""The one place of the version, readable without importing torch."""

__version__ = "0.1.0"
