# SPDX-License-Identifier: BSD-3-Clause
"""U01: weights of another library load unchanged, both ways, and give its numbers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ways import Way, assert_path, photos, tv

import resnet_fast as rf
from resnet_fast import dispatch, models

WAY = Way("U01", "pretrained weights")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_checkpoint_goes_both_ways(name: str, tmp_path: Path) -> None:
    """Save from torchvision, load into the accelerated model and ours, save those, load back."""
    theirs = getattr(tv, name)().eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    checkpoint = torch.load(tmp_path / "theirs.pt", weights_only=True)
    want = theirs(photos().float())
    for fast in (rf.accelerate(getattr(tv, name)()), models.create_model(name)):
        assert list(fast.state_dict()) == list(checkpoint)
        fast.load_state_dict(checkpoint, strict=True)
        with dispatch.recording() as events:
            got = fast.eval()(photos().float())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert_path(events)
        torch.save(fast.state_dict(), tmp_path / "fast.pt")
        back = getattr(tv, name)()
        back.load_state_dict(torch.load(tmp_path / "fast.pt", weights_only=True), strict=True)
        assert torch.equal(back.eval()(photos().float()), want)


def test_loading_into_a_running_model_is_seen_at_once() -> None:
    """Weights that arrive after the first call are those of the second."""
    model = rf.accelerate(tv.resnet18()).eval()
    before = model(photos().float())
    other = tv.resnet18().eval()
    model.load_state_dict(copy.deepcopy(other.state_dict()))
    after = model(photos().float())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, other(photos().float()), rtol=1e-4, atol=1e-4)
