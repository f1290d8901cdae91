# SPDX-License-Identifier: BSD-3-Clause
"""Int8 on the CPU: PyTorch's PT2E quantisation (torchao) of the folded model, through Inductor."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.inference.export import program
from resnet_fast.inference.module import OptimizedModule
from resnet_fast.inference.table import Row


class Agreement(NamedTuple):
    """Int8 against float32 on the calibration images.

    top1: share of images with the same largest output. error: of the outputs, relative, in norm.
    """

    top1: float
    error: float
    images: int


class QuantizedModule(OptimizedModule):
    """An optimized module in int8; ``agreement`` says how near to float32 it is.

    Made by ``optimize_for_inference(model, example, dtype="int8", calibration=batches)``. The first
    call of a shape compiles, which takes minutes. Calls of several threads run one after the other.
    """

    agreement: Agreement

    def __init__(self, model: nn.Module, example: Tensor, calibration: Iterable[Any]) -> None:
        self.__dict__["_calibration"] = calibration
        super().__init__(model, example, torch.float32)

    def _build(self, model: nn.Module) -> None:
        from resnet_fast.inference.watch import Watch

        watch = Watch(model)
        exported = program(model, self._example_as(torch.float32)).module()
        converted = _quantized(exported, self._batches())
        agreement = _agreement(exported, converted, self._batches())
        steps = _steps(converted)
        self._run, self._rows = _Compiled(converted), steps
        self._watch, self.agreement = watch, agreement

    def _batches(self) -> Iterator[Tensor]:
        for item in self.__dict__["_calibration"]:
            images = item[0] if isinstance(item, list | tuple) else item
            if not isinstance(images, Tensor):
                raise TypeError(
                    "calibration must give tensors or (tensor, ...) pairs; got "
                    f"{type(images).__name__}"
                )
            yield images.to(torch.float32)


def _quantized(exported: Any, batches: Iterator[Tensor]) -> Any:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    # prepare_pt2e changes what it is given, and exported is the float32 side of the comparison.
    with torch.no_grad():
        prepared = prepare_pt2e(_with_sources(copy.deepcopy(exported)), quantizer)
        count = 0
        for images in batches:
            prepared(images)
            count += len(images)
        if count == 0:
            raise ValueError("calibration gave no images")
        return move_exported_model_to_eval(convert_pt2e(prepared))


def _with_sources(exported: Any) -> Any:
    """The graph with every node's source written down, by which the quantizer finds patterns.

    Export would have noted it of a model's modules; these nodes come from folding.
    """
    aten = torch.ops.aten
    sources: dict[Any, Any] = {
        aten.conv2d.default: nn.Conv2d,
        aten.linear.default: nn.Linear,
        aten.relu.default: nn.ReLU,
        aten.add.Tensor: operator.add,
    }
    for node in exported.graph.nodes:
        if node.target in sources:
            node.meta["source_fn_stack"] = [(node.name, sources[node.target])]
    return exported


def _agreement(exported: Any, converted: Any, batches: Iterator[Tensor]) -> Agreement:
    same, images, error, size = 0, 0, 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            right, ours = exported(batch).flatten(1), converted(batch).flatten(1)
            same += int((right.argmax(1) == ours.argmax(1)).sum())
            images += len(batch)
            error += float((ours - right).double().square().sum())
            size += float(right.double().square().sum())
    return Agreement(same / images, (error / max(size, 1e-300)) ** 0.5, images)


def _steps(converted: Any) -> list[Row]:
    """Convs and linears whose inputs are dequantised int8, and those left in float32."""
    rows = []
    for node in converted.graph.nodes:
        name = str(node.target)
        if node.op != "call_function" or not name.startswith(("aten.conv2d", "aten.linear")):
            continue
        quantised = all("dequantize" in str(n.target) for n in node.all_input_nodes[:2])
        why = "" if quantised else "its input is not quantised"
        rows.append(Row(node.name, name, "oneDNN int8" if quantised else "float32", why))
    return rows


class _Compiled:
    """The quantised graph through torch.compile with freezing; one call at a time.

    NOTE: freezing must be set for Dynamo, too, which would make inputs of the weights; Inductor's
    own option comes too late for that. And nothing is frozen while gradients are on. Unfrozen,
    oneDNN's int8 convolutions do not compile.
    """

    def __init__(self, converted: Any) -> None:
        from torch._inductor import config

        self._lock, self._config = threading.Lock(), config
        self._call: Callable[[Tensor], Any] = torch.compile(converted)

    def __call__(self, x: Tensor) -> Any:
        with self._lock, torch.no_grad(), self._config.patch(freezing=True):
            return self._call(x.to(torch.float32).contiguous(memory_format=torch.channels_last))
