# SPDX-License-Identifier: BSD-3-Clause
"""What the build makes of nvcc and of the environment: which cards, and when it must fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import resnet_fast as rf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_build  # noqa: E402

KNOWN = ["sm_75", "sm_80", "sm_90", "sm_100"]


def test_cuda_is_built_wherever_nvcc_is() -> None:
    """Not a skip: an unnoticed failure to build or load would hide every other CUDA test."""
    try:
        found = cuda_build.find()
    except cuda_build.NoCuda as reason:
        pytest.skip(f"nothing to build with: {reason}")
    if found is None:
        pytest.skip("RESNET_FAST_BUILD_CUDA=0")
    assert rf.is_available("cuda"), rf.why_unavailable("cuda")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", ("8.0", "9.0a", "10.0+PTX")),
        ("9.0", ("9.0",)),
        ("8.6;9.0a+PTX", ("8.6", "9.0a+PTX")),
        ("5.2 7.5,8.0 12.0", ("8.0", "12.0")),
    ],
)
def test_architectures(
    asked: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert cuda_build.architectures(KNOWN) == expected


def test_the_default_is_what_nvcc_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert cuda_build.architectures(["sm_80", "sm_90"]) == ("8.0", "9.0a")
    with pytest.raises(cuda_build.NoCuda, match="none of the cards"):
        cuda_build.architectures(["sm_75"])


@pytest.mark.parametrize("asked", ["Hopper", "90", "9.0+SASS", "nine"])
def test_what_is_no_architecture_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match=r"is not like 8\.0, 9\.0a or 10\.0\+PTX"):
        cuda_build.architectures(KNOWN)


def test_only_old_cards_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.0 7.5")
    with pytest.raises(cuda_build.NoCuda, match=r"names no card of 8\.0 or newer"):
        cuda_build.architectures(KNOWN)


def test_switches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESNET_FAST_BUILD_CUDA", "0")
    assert cuda_build.find() is None
    monkeypatch.setenv("RESNET_FAST_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1; got 'yes'"):
        cuda_build.find()
    monkeypatch.setenv("RESNET_FAST_BUILD_CUDA", "1")
    monkeypatch.setattr(cuda_build, "_find_nvcc", lambda: None)
    assert cuda_build.required()
    with pytest.raises(cuda_build.NoCuda, match="no nvcc"):
        cuda_build.find()


def test_code_flags() -> None:
    cuda = cuda_build.Cuda(Path("nvcc"), "13.0", ("8.0", "10.0+PTX"))
    assert cuda.code_flags() == (
        "-gencode arch=compute_80,code=sm_80"
        " -gencode arch=compute_100,code=sm_100 -gencode arch=compute_100,code=compute_100"
    )
