# SPDX-License-Identifier: BSD-3-Clause
"""Importing the package never fails, and needs nothing but torch: with the extension, without it,
with one that is broken, and with one built for another Python.

Each case is a copy of the package in a folder of its own, imported by a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import resnet_fast as rf

PACKAGE = Path(rf.__file__).parent

PROGRAM = """
import json, sys, torch
before = set(sys.modules)
import resnet_fast as rf
from resnet_fast import dispatch
others = {"torchvision", "timm", "matplotlib", "rich", "sklearn", "skimage", "PIL", "pytest"}
out = {"available": rf.is_available(), "why": rf.why_unavailable(), "file": rf.__file__}
out["imported"] = sorted(others & {m.split(".")[0] for m in set(sys.modules) - before})

x = torch.randn(2, 3, 4, 5, requires_grad=True)
mean, var = torch.zeros(3), torch.ones(3)
y = rf.functional.batch_norm_act(x, None, None, mean, var, residual=x, training=True)
y.sum().backward()
out["impl"] = sorted({e.impl for e in dispatch.counters()})
out["finite"] = bool(x.grad.isfinite().all() and mean.any())

raw = torch.ops.resnet_fast.add_relu_forward  # schemas, fakes and plain kernels are always there
torch.library.opcheck(raw.default, (torch.randn(2, 3), torch.randn(2, 3), True))
out["mask"] = raw(torch.ones(3), torch.ones(3), True)[1].tolist()
print(json.dumps(out))
"""


def run(folder: Path) -> dict[str, Any]:
    # An editable installation would help out with the files that the copy lacks.
    alone = f"""
import sys
sys.path.insert(0, {str(folder)!r})
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", alone + PROGRAM],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    assert Path(out["file"]).is_relative_to(folder)
    assert out["imported"] == []
    assert out["finite"]
    assert out["mask"] == [7, 0]
    return out


def copy(folder: Path, *without: str) -> Path:
    """The package in `folder`, without the files that match the patterns."""
    shutil.copytree(
        PACKAGE, folder / "resnet_fast", ignore=shutil.ignore_patterns("__pycache__", *without)
    )
    return folder


def test_without_the_extension(tmp_path: Path) -> None:
    out = run(copy(tmp_path, "*.so", "*.pyd"))
    assert not out["available"]
    assert "not built" in out["why"]
    assert out["impl"] == ["reference"]


def test_with_a_broken_extension(tmp_path: Path) -> None:
    folder = copy(tmp_path, "*.so", "*.pyd")
    (folder / "resnet_fast" / "_kernels.so").write_bytes(b"not a library")
    out = run(folder)
    assert not out["available"]
    assert "did not load with torch" in out["why"]
    assert out["impl"] == ["reference"]


@pytest.mark.slow
@pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))
def test_with_the_extension_but_no_build_information(tmp_path: Path) -> None:
    """The kernels are of no Python version, the information is: another Python lacks it."""
    out = run(copy(tmp_path, "_build_info*"))
    assert out["impl"] == ["cpu" if out["available"] else "reference"]
    assert out["available"] == (out["why"] is None)


@pytest.mark.skipif(not rf.is_available(), reason=str(rf.why_unavailable()))
def test_with_the_extension(tmp_path: Path) -> None:
    out = run(copy(tmp_path))
    assert out["available"]
    assert out["impl"] == ["cpu"]
