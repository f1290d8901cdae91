# SPDX-License-Identifier: BSD-3-Clause
"""The rivals of the inference benchmark, each built once for a model, a dtype and some images.

float32: eager (NCHW, channels_last), torch.jit.optimize_for_inference of the trace, torch.compile
with freezing, ONNX Runtime and OpenVINO on the ONNX file of the folded model. bfloat16: the same on
a bfloat16 model, and eager under autocast. int8: ONNX Runtime's own static quantisation of that
file, OpenVINO's (nncf) where it is installed, else OpenVINO on ONNX Runtime's file; eager in
float32 stands beside them. All are calibrated on the images they are timed on.

What cannot run has a reason in ``left_out``.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast as rf

from .job import Job

Run = Callable[[Tensor], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


class Unavailable(Exception):
    """Why a rival cannot run."""


class Rivals:
    """``runs`` gives name -> call on ``input(name, images)``; ``notes`` what is special of some."""

    def __init__(self, model: nn.Module, dtype: str, job: Job, images: Tensor) -> None:
        self._name, self._dtype, self._job = dtype, DTYPES[dtype], job
        self._plain = model
        self._last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        self._example = images
        self.runs: dict[str, Run] = {}
        self.left_out: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        builders: dict[str, Callable[[], Run]] = {
            "eager nchw": lambda: copy.deepcopy(self._plain).to(self._dtype),
            "eager channels_last": lambda: copy.deepcopy(self._last).to(self._dtype),
        }
        if dtype == "bfloat16":
            builders["autocast channels_last"] = lambda: self._autocast
        builders |= {
            "jit channels_last": self._jit,
            "compile channels_last": self._compiled,
            "onnxruntime nchw": self._onnxruntime,
            "openvino nchw": self._openvino,
            "ours channels_last": self._ours,
        }
        with tempfile.TemporaryDirectory() as folder:
            self._folder = Path(folder)
            for name, build in builders.items():
                try:
                    self.runs[name] = build()
                except Exception as error:
                    if name.startswith("ours") and not isinstance(error, Unavailable | ImportError):
                        raise
                    self.left_out[name] = reason(error)

    def input(self, name: str, images: Tensor) -> Tensor:
        """The images as the rival wants them: conversions are not timed for anybody."""
        if name.endswith("channels_last"):
            images = images.contiguous(memory_format=torch.channels_last)
        own = name.partition(" ")[0] in ("eager", "jit", "compile", "ours")
        return images.to(self._dtype) if own else images

    # ---- PyTorch's -------------------------------------------------------------------------------
    def _autocast(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self._last(x)

    def _jit(self) -> Run:
        if self._name == "int8":
            raise Unavailable("torch.jit.optimize_for_inference does not quantise")
        model = copy.deepcopy(self._last).to(self._dtype)
        traced = torch.jit.trace(model, self.input("jit channels_last", self._example))
        frozen: Run = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        return frozen

    def _compiled(self) -> Run:
        if self._name == "int8":
            raise Unavailable("int8 through torch.compile is what ours is")
        self._need_compile()
        import torch._inductor.config as inductor

        torch._dynamo.reset()
        inductor.freezing = True
        model: Run = torch.compile(copy.deepcopy(self._last).to(self._dtype), dynamic=False)
        return model

    def _need_compile(self) -> None:
        if not self._job.compile:
            raise Unavailable("torch.compile was left out (--no-compile)")

    def _ours(self) -> Run:
        if self._name != "int8":
            fast = rf.optimize_for_inference(self._plain, self._example, dtype=self._dtype)
            if fast.why_compute:
                self.notes["ours channels_last"] = fast.why_compute
            return fast
        self._need_compile()
        return rf.optimize_for_inference(
            self._plain, self._example, dtype="int8", calibration=[self._example]
        )

    # ---- the others' -----------------------------------------------------------------------------
    def _onnx(self) -> Path:
        from resnet_fast.inference.export import to_onnx

        path = self._folder / "model.onnx"
        return path if path.exists() else to_onnx(self._plain, self._example, path)

    def _quantised_onnx(self) -> Path:
        """The ONNX file quantised by ONNX Runtime: QDQ, weights by channel."""
        path = self._folder / "int8.onnx"
        if path.exists():
            return path
        quantization: Any = _need("onnxruntime.quantization")
        pictures = iter(self._calibration())

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                return next(pictures, None)

        quantization.quantize_static(
            str(self._onnx()),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return path

    def _calibration(self) -> Iterator[dict[str, Any]]:
        for picture in self._example.split(1):
            yield {"images": picture.numpy()}

    def _onnxruntime(self) -> Run:
        ort = _need("onnxruntime")
        if self._name == "bfloat16":
            raise Unavailable("ONNX Runtime's CPU convolutions have no bfloat16")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._job.threads, 1
        path = self._quantised_onnx() if self._name == "int8" else self._onnx()
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    def _openvino(self) -> Run:
        ov = _need("openvino")
        core = ov.Core()
        network = self._openvino_network(core)
        network.reshape(list(self._example.shape))
        precision = "f32"
        if self._name == "bfloat16":
            if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                precision = "bf16"
            else:
                self.notes["openvino nchw"] = "f32: this CPU has no bfloat16 instructions"
        settings = {
            "INFERENCE_NUM_THREADS": self._job.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])

    def _openvino_network(self, core: Any) -> Any:
        if self._name != "int8":
            return core.read_model(str(self._onnx()))
        try:
            nncf = _need("nncf")
        except Unavailable:
            self.notes["openvino nchw"] = "nncf is not installed: ONNX Runtime's quantised file"
            return core.read_model(str(self._quantised_onnx()))
        network = core.read_model(str(self._onnx()))
        pictures = [feed["images"] for feed in self._calibration()]
        return nncf.quantize(network, nncf.Dataset(pictures))


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.partition('.')[0]} is not installed ({error})") from None


def reason(error: Exception) -> str:
    """One line for a row."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, Unavailable) else f"{type(error).__name__}: {lines[0]}"
