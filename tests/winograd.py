# SPDX-License-Identifier: BSD-3-Clause
"""Winograd's minimal filtering F(m, 3) in float64 from its points alone, for the tests.

Lavin & Gray 2016, by the Cook-Toom construction: the inputs and the filter are polynomials whose
product is evaluated at m + 1 points and at infinity.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}


def _times(a: list[Fraction], root: Fraction) -> list[Fraction]:
    """The polynomial a times (x - root), lowest power first."""
    shifted = [Fraction(0), *a]
    return [s - root * c for s, c in zip(shifted, [*a, Fraction(0)], strict=True)]


def matrices(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A^T of (m, m + 2), G of (m + 2, 3), B^T of (m + 2, m + 2)), float64."""
    points = POINTS[m]
    a = [[p**i for p in points] + [Fraction(int(i == m - 1))] for i in range(m)]
    g, b = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale, product = Fraction(1), [Fraction(1)]
        for q in others:
            scale *= p - q
            product = _times(product, q)
        g.append([p**i / scale for i in range(3)])
        b.append([*product, Fraction(0)])
    whole = [Fraction(1)]
    for q in points:
        whole = _times(whole, q)
    g.append([Fraction(0), Fraction(0), Fraction(1)])
    b.append(whole)
    at, gm, bt = (
        torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64)
        for rows in (a, g, b)
    )
    return at, gm, bt


def convolve(
    x: Tensor, weight: Tensor, m: int, padding: int | tuple[int, int], *, magnitude: bool = False
) -> Tensor:
    """conv2d of x (N, C, H, W) and weight (K, C, 3, 3), stride 1, by tiles of m outputs.

    magnitude: every term in its absolute value, transforms included: what the errors of rounding
    are proportional to.
    """
    at, g, bt = matrices(m)
    x, weight = x.double(), weight.double()
    if magnitude:
        at, g, bt, x, weight = (t.abs() for t in (at, g, bt, x, weight))
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else padding
    height, width = x.size(2) + 2 * vertical - 2, x.size(3) + 2 * horizontal - 2
    down, across = -(-height // m), -(-width // m)
    right, below = m * across - width, m * down - height
    x = F.pad(x, (horizontal, horizontal + right, vertical, vertical + below))
    tiles = x.unfold(2, m + 2, m).unfold(3, m + 2, m)
    inputs = torch.einsum("ai,nchwij,bj->nchwab", bt, tiles, bt)
    filters = torch.einsum("ai,kcij,bj->kcab", g, weight, g)
    products = torch.einsum("nchwab,kcab->nkhwab", inputs, filters)
    y = torch.einsum("ia,nkhwab,jb->nkhiwj", at, products, at)
    return y.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def weight_gradient(
    grad: Tensor, x: Tensor, m: int, padding: tuple[int, int], *, magnitude: bool = False
) -> Tensor:
    """The gradient (K, C, 3, 3) of that convolution's filter, for grad (N, K, H_out, W_out)."""
    at, g, bt = matrices(m)
    x, grad = x.double(), grad.double()
    if magnitude:
        at, g, bt, x, grad = (t.abs() for t in (at, g, bt, x, grad))
    height, width = grad.shape[2:]
    right, below = -width % m, -height % m
    vertical, horizontal = padding
    x = F.pad(x, (horizontal, horizontal + right, vertical, vertical + below))
    outputs = F.pad(grad, (0, right, 0, below)).unfold(2, m, m).unfold(3, m, m)
    tiles = x.unfold(2, m + 2, m).unfold(3, m + 2, m)
    inputs = torch.einsum("ai,nchwij,bj->nchwab", bt, tiles, bt)
    outputs = torch.einsum("ia,nkhwij,jb->nkhwab", at, outputs, at)
    sums = torch.einsum("nkhwab,nchwab->kcab", outputs, inputs)
    return torch.einsum("ai,kcab,bj->kcij", g, sums, g)
