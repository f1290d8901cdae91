# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks of resnet_fast: ops, whole training steps and activation memory.

On the CPU: ``python -m resnet_fast bench`` from a source checkout. On a GPU:
``python -m bench.gpu``, which ``tools/gpu_check.sh`` calls. One file per concern:

- ``timing``      rivals measured in turn (A B A B ...), quantiles and ratios
- ``layers``      ResNet-50's batch-norm layers and the bytes each scheme must move
- ``job``         what one process measures; the check that rivals are equal
- ``kernels``     the op benchmark
- ``models``      the training-step benchmark and the activation-memory count
- ``inference``   latency against every rival installed
- ``overhead``    the cost of the calls: networks on 32 px
- ``uses``        a small real step of each way of use
- ``rows``        result rows: fields, storage as JSON lines, newest per key
- ``worker``      one process per allocator setting
- ``run``         starts the workers, stores the rows, prints the tables
- ``comparison``  the printed tables, and the comparison between allocator settings
- ``plot``        ``results/cpu.png``
- ``gpu``         the command for a GPU: its rows, its table
- ``gpu_timing``  CUDA events, cold L2 by rotating buffers, CUDA graphs
- ``gpu_kernels`` the op benchmark there, and its copy bandwidth
- ``gpu_models``  the training-step benchmark there
- ``gpu_plot``    bytes a second against bytes, ``results/<card>.png``
"""
