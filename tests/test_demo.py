# SPDX-License-Identifier: BSD-3-Clause
"""The demo: its parts, a quick run end to end, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import resnet_fast as rf
from resnet_fast import cli, dispatch
from resnet_fast.demo import digits, images, photos
from resnet_fast.demo.plain import plain_resnet20
from resnet_fast.demo.turns import FAST, PLAIN, Turns
from resnet_fast.demo.vision import import_torchvision

for library in ("rich", "sklearn", "skimage", "matplotlib"):
    pytest.importorskip(library)
Image = pytest.importorskip("PIL.Image")


def write_photo(path: Path, size: tuple[int, int] = (90, 70)) -> None:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def demo(*arguments: object) -> int:
    return cli.main(["demo", "--quick", *map(str, arguments)])


# ---- end to end ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    out = tmp_path_factory.mktemp("demo") / "deep" / "out"
    return out, demo("--out", out)


def test_quick_run_passes_its_checks(quick_run: tuple[Path, int]) -> None:
    out, code = quick_run
    found: dict[str, Any] = json.loads((out / "demo.json").read_text())
    assert code == 0, found["checks"]
    assert [check["passed"] for check in found["checks"]] == [True] * 3


def test_quick_run_writes_what_it_promises(quick_run: tuple[Path, int]) -> None:
    out, _ = quick_run
    found: dict[str, Any] = json.loads((out / "demo.json").read_text())
    assert set(found) == {
        "version", "quick", "seed", "environment", "digits", "photos", "explain", "checks",
    }  # fmt: skip
    losses = found["digits"]["loss"]
    assert len(losses[PLAIN]) == len(losses[FAST]) == 6
    assert found["digits"]["train_count"] + found["digits"]["test_count"] == 1797
    for part in ("digits", "photos"):
        step = found[part]["step"]
        assert step["ratio"] > 0
        assert len(step["seconds"][PLAIN]) == len(step["seconds"][FAST]) >= 3
    assert found["photos"]["top1_agreement"] == 1.0
    assert found["explain"]
    with Image.open(out / "demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000


def test_own_weights_and_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_photo(folder / "b[1].png")
    write_photo(folder / "a.jpg", (40, 200))
    (folder / "notes.txt").write_text("not a picture")
    torch.manual_seed(1)
    state = rf.models.resnet18(num_classes=5).state_dict()
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{key}": t for key, t in state.items()}}, file)
    out = tmp_path / "out"
    code = demo("--out", out, "--weights", file, "--images", folder, "--model", "resnet18")
    found: dict[str, Any] = json.loads((out / "demo.json").read_text())
    assert code == 0, found["checks"]
    assert found["photos"]["names"] == ["a.jpg", "b[1].png"]
    assert found["photos"]["weights"] == str(file)
    assert found["photos"]["model"].endswith(":resnet18")
    assert "b[1].png" in capsys.readouterr().out


# ---- wrong input ---------------------------------------------------------------------------------
def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert demo(*arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("resnet_fast demo: ")
    assert err.count("\n") == 1
    return err


def test_wrong_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    assert "no such folder" in complaint(capsys, *out, "--images", tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no pictures" in complaint(capsys, *out, "--images", empty)
    (empty / "torn.jpg").write_bytes(b"not a jpeg")
    assert "torn.jpg cannot be read" in complaint(capsys, *out, "--images", empty)


def test_wrong_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    assert "no such file" in complaint(capsys, *out, "--weights", tmp_path / "missing.pt")
    text = tmp_path / "text.pt"
    text.write_text("not weights")
    assert "cannot be read" in complaint(capsys, *out, "--weights", text)
    torch.save([1, 2], text)
    assert "holds a list" in complaint(capsys, *out, "--weights", text)
    torch.save(rf.models.resnet18().state_dict(), text)
    message = complaint(capsys, *out, "--weights", text)
    assert "does not fit resnet50: missing layer1.0.conv3.weight" in message


def test_wrong_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "resnet51" in complaint(capsys, "--out", tmp_path, "--model", "resnet51")


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in complaint(capsys, "--out", tmp_path / "file")


def test_weights_that_do_not_fit_are_named() -> None:
    model = rf.models.resnet20()
    state = dict(model.state_dict())
    del state["layer1.0.conv1.weight"]
    state["extra"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(10, 3)
    with pytest.raises(cli.UserError) as caught:
        photos.fit(model, state, Path("file.pt"), "resnet20")
    message = str(caught.value)
    for part in ("missing layer1.0.conv1.weight", "unknown extra", "fc.weight is (10, 3)"):
        assert part in message


def test_weights_without_batch_counters_fit() -> None:
    model = rf.models.resnet20()
    state = {k: t + 1 for k, t in model.state_dict().items() if "num_batches" not in k}
    photos.fit(model, state, Path("file.pt"), "resnet20")
    assert torch.equal(model.state_dict()["bn1.bias"], state["bn1.bias"])


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_our_own_model_where_there_is_no_torchvision(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "import_torchvision", lambda: None)
    shipped = images.shipped_photos()[:2]
    prepared = photos.prepare(shipped, name, None, seed=0, size=64)
    found = photos.compare(prepared, 0.1, lambda share: None)
    assert prepared.source == "resnet_fast"
    assert found.relative_difference < 1e-4
    assert found.top1(PLAIN) == found.top1(FAST)
    assert found.turns.ratio() > 0
    with pytest.raises(cli.UserError, match="resnet51"):
        photos.prepare(shipped, "resnet51", None, seed=0, size=64)


def test_the_plain_side_is_plain() -> None:
    """Nothing of ours may run on the side that the demo calls plain PyTorch."""
    prepared = photos.prepare(images.shipped_photos()[:1], "resnet18", None, seed=0, size=64)
    sides = photos._sides(prepared.model, prepared.source)
    for side, implementations in ((PLAIN, {"reference"}), (FAST, {"cpu", "reference"})):
        with dispatch.recording() as events, torch.no_grad():
            sides[side](prepared.images)
        assert {event.impl for event in events} <= implementations
        assert events or side == PLAIN


# ---- parts ---------------------------------------------------------------------------------------
def test_ratio_is_the_median_of_the_rounds() -> None:
    turns = Turns({PLAIN: [2.0, 3.0, 100.0], FAST: [1.0, 2.0, 1.0]})
    assert turns.ratio() == 2.0  # of 2, 1.5 and 100
    assert turns.median(PLAIN) == 3.0


def test_digits_are_split_by_class_and_standardised() -> None:
    data = digits.load_digits(16, seed=0)
    assert data.train_images.shape == (1437, 3, 16, 16)
    assert data.test_images.shape == (360, 3, 16, 16)
    assert data.test_labels.bincount().min() >= 34
    assert abs(float(data.train_images.mean())) < 0.05
    again = digits.load_digits(16, seed=0)
    assert torch.equal(data.test_images, again.test_images)


def test_plain_resnet20_is_the_same_network() -> None:
    torch.manual_seed(0)
    ours = rf.models.resnet20(num_classes=10).double()
    plain = plain_resnet20(10).double()
    plain.load_state_dict(ours.state_dict())
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 9, 3])
    gradients = []
    for model in (plain, ours):
        loss = F.cross_entropy(model(x), y)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (224, 224), (100, 700), (257, 256)])
def test_preprocessing_is_torchvisions(size: tuple[int, int]) -> None:
    if import_torchvision() is None:
        pytest.skip("torchvision is not installed")
    from torchvision import transforms

    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
    photo = Image.fromarray(pixels.numpy())
    published = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(images.MEAN, images.STD),
        ]
    )
    assert torch.equal(images.preprocess(photo, 224), published(photo))


def test_shipped_photos_are_photos() -> None:
    shipped = images.shipped_photos()
    assert len(shipped) >= 7
    tensors = [images.preprocess(photo, 64) for _, photo in shipped]
    assert all(t.shape == (3, 64, 64) and t.std() > 0.1 for t in tensors)
