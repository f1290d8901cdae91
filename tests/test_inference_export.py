# SPDX-License-Identifier: BSD-3-Clause
"""ONNX and AOTInductor packages of the folded model give the numbers of the model."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from inference_cases import eager, image, lively
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.cli import main
from resnet_fast.inference import export

X = image(3, 3, 64, 64)


def judge(ours: Tensor, model: nn.Module, x: Tensor) -> None:
    exact, base = eager(model, x, torch.float64), eager(model, x, torch.float32)
    oracle.check("logits", ours, base, exact)


@pytest.fixture(scope="module")
def model() -> Any:
    return lively(rf.models.resnet18(num_classes=10))


@pytest.fixture(scope="module")
def onnx_file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    return export.to_onnx(model, X[:1], tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_folded_module(model: nn.Module) -> None:
    folded = export.fold(model, X[:1])
    judge(folded(X), model, X)
    assert "batch_norm" not in folded.network.code
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not own & {t.data_ptr() for t in folded.buffers()}


def test_what_is_no_graph_is_refused() -> None:
    model = rf.models.resnet20()
    model.conv1.register_forward_hook(lambda m, a, y: None)
    with pytest.raises(ValueError, match="hooks on conv1"):
        export.fold(model, X)


def test_onnx_has_standard_operators_only(onnx_file: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(onnx_file)
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""}
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime(model: nn.Module, onnx_file: Path, batch: int) -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": X[:batch].numpy()})
    judge(torch.from_numpy(logits), model, X[:batch])


def test_openvino(model: nn.Module, onnx_file: Path) -> None:
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = openvino.Core().compile_model(str(onnx_file), "CPU", settings)
    judge(torch.from_numpy(np.array(network([X.numpy()])[0])), model, X)


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    target, weights = tmp_path / "sub" / "model.onnx", tmp_path / "w.pt"
    torch.save(rf.models.resnet20().state_dict(), weights)
    command = ["export", "resnet20", str(target), "--size", "32", "--weights", str(weights)]
    assert main(command) == 0
    assert target.stat().st_size > 1000
    assert main(["export", "resnet20", str(tmp_path / "model.txt")]) == 1
    assert "must end in .onnx or .pt2" in capsys.readouterr().err
    missing = ["export", "resnet20", str(target), "--weights", str(tmp_path / "none.pt")]
    assert main(missing) == 1
    assert "does not load" in capsys.readouterr().err


@pytest.mark.slow
def test_package_from_python_and_from_cpp(model: Any, tmp_path: Path) -> None:
    package = export.to_package(model, X[:1], tmp_path / "model.pt2")
    loaded = torch._inductor.aoti_load_package(str(package))
    judge(loaded(X), model, X)
    source = Path(__file__).parent.parent / "examples" / "aot_classify"
    prefix = torch.utils.cmake_prefix_path
    for step in (
        ["-S", str(source), "-B", str(tmp_path / "build"), f"-DCMAKE_PREFIX_PATH={prefix}"],
        ["--build", str(tmp_path / "build")],
    ):
        subprocess.run(["cmake", *step], check=True, capture_output=True, timeout=200)
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    picture = tmp_path / "image.ppm"
    picture.write_bytes(b"P6\n64 64\n255\n" + pixels.numpy().tobytes())
    command = [str(tmp_path / "build" / "classify"), str(package), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((pixels / 255 - mean) / deviation).permute(2, 0, 1)[None]
    assert done.stdout == f"class {eager(model, x, torch.float32).argmax().item()}\n", done.stderr
    done = subprocess.run([*command[:2], os.devnull], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "not a binary PPM" in done.stderr
