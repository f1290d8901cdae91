# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks of resnet_fast on the CPU: ops, whole training steps and activation memory.

Run with ``python -m resnet_fast bench`` from a source checkout. One file per concern:

- ``timing``      rivals measured in turn (A B A B ...), quantiles and ratios
- ``layers``      ResNet-50's batch-norm layers and the bytes each scheme must move
- ``job``         what one process measures; the check that rivals are equal
- ``kernels``     the op benchmark
- ``models``      the training-step benchmark and the activation-memory count
- ``rows``        result rows: fields, storage as JSON lines, newest per key
- ``worker``      one process per allocator setting
- ``run``         starts the workers, stores the rows, prints the tables
- ``comparison``  the printed tables, and the comparison between allocator settings
- ``plot``        ``results/cpu.png``
"""
