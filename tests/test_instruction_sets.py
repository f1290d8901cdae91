# SPDX-License-Identifier: BSD-3-Clause
"""The CPU kernels of every instruction set that this processor runs give the plain ops' results."""

import pytest
import torch

from resnet_fast import _plain

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(4, 5, 3, 3), (2, 64, 9, 7), (3, 1000, 1, 1), (2, 3, 7, 7)]


def _close(ours, plain, dtype, relative):
    for a, b in zip(ours, plain, strict=True):
        assert a.stride() == b.stride()
        if a.dtype == torch.uint8:
            assert torch.equal(a, b)
        elif b.numel():
            scale = b.double().abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=4 * relative * max(scale, 1e-3))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(instruction_set, dtype, shape, order):
    def image():
        return torch.randn(shape).to(dtype).contiguous(memory_format=order)

    ops, c = torch.ops.resnet_fast, shape[1]
    param = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, grad = image(), image(), image()
    weight, bias = torch.randn(c, dtype=param), torch.randn(c, dtype=param)
    forward = (x, weight, bias, residual, None, None, True, 0.1, 1e-5, True, False)
    ours = ops.batch_norm_act_forward(*forward)
    _close(ours, _plain.batch_norm_act_forward(*forward), dtype, DTYPES[dtype])
    y, mask = ops.add_relu_forward(x, residual, True)
    _close((y, mask), _plain.add_relu_forward(x, residual, True), dtype, 0.0)
    for bits in (mask, None):
        args = (grad, x, ours[1], ours[2], weight, bias, bits, True, True, [True] * 4)
        plain = _plain.batch_norm_act_backward(*args)
        if bits is not None:  # a recomputed mask may differ where y rounds to either side of 0
            _close(ops.batch_norm_act_backward(*args), plain, dtype, DTYPES[dtype])
        again = ops.batch_norm_act_backward(*args)
        assert torch.equal(again[0], ops.batch_norm_act_backward(*args)[0])
