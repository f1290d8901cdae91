# SPDX-License-Identifier: BSD-3-Clause
"""The main job on real data (``python -m resnet_fast demo``).

- ``digits``  trains a ResNet-20 twice in turn, plain and accelerated, on scikit-learn's digits
- ``plain``   the plain PyTorch ResNet-20 it is compared with
- ``photos``  runs a ResNet over photographs both ways and compares
- ``images``  the photographs, and ImageNet's preprocessing
- ``turns``   times of two rivals in turn
- ``figure``  the picture of both
- ``vision``  imports torchvision where it is installed
- ``run``     puts it together, prints, writes demo.json
"""
