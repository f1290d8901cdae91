# SPDX-License-Identifier: BSD-3-Clause
"""Our models: torchvision's ResNets to the last key and number, CIFAR ResNets, pre-activation."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import shims
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import assert_same, image, randomise, reasons, step

from resnet_fast import models

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
# Drawing 100 million initial values twice takes 10 s; the code that does it is that of the others.
LARGE = {"resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"}
CIFAR = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


@pytest.fixture(scope="module")
def tv() -> Any:
    return shims.torchvision_or_skip().models


def on_meta(builder: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return builder()


def cheap_values(model: Any) -> Any:
    """Memory and quick random values, of kaiming's size, for a model built on meta; float64."""
    model = model.double().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                bound = (6 / (parameter[0].numel() + 1)) ** 0.5
                parameter.uniform_(-bound, bound)
            else:
                parameter.uniform_(-0.5, 0.5).add_(name.endswith("weight"))
        for buffer in model.buffers():
            buffer.fill_(1)
    return model


# ---- torchvision's -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in TORCHVISION],
)
def test_initial_values_are_torchvisions_bit_by_bit(tv: Any, name: str) -> None:
    torch.manual_seed(3)
    theirs = getattr(tv, name)().state_dict()
    torch.manual_seed(3)
    ours = getattr(models, name)().state_dict()
    assert list(ours) == list(theirs)
    for key, t in theirs.items():
        assert torch.equal(ours[key], t), key


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in TORCHVISION],
)
def test_same_keys_outputs_and_gradients_as_torchvision(tv: Any, name: str) -> None:
    theirs = cheap_values(on_meta(getattr(tv, name)))
    ours = on_meta(getattr(models, name)).double()
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    # Parameters are shared, to keep memory small; buffers move, so each has its own.
    ours.load_state_dict(state, strict=True, assign=True)
    for module in ours.modules():
        module._buffers.update({k: b.clone() for k, b in module._buffers.items()})

    x = image(2, 3, 64, 64)
    want = step(theirs, x)
    fell_back = reasons(lambda: assert_same(step(ours, x), want, rtol=1e-6))
    assert not [why for op, why in fell_back if op != "batch_norm_act"]

    back = on_meta(getattr(tv, name)).double().eval()
    back.load_state_dict(ours.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), back(x), rtol=1e-6, atol=1e-6)


def test_module_tree_and_attributes_are_torchvisions(tv: Any) -> None:
    for name in ("resnet18", "resnext50_32x4d"):
        theirs, ours = on_meta(getattr(tv, name)), on_meta(getattr(models, name))
        assert repr(ours) == repr(theirs)
        for attribute in ("inplanes", "dilation", "groups", "base_width", "_norm_layer"):
            assert getattr(ours, attribute) == getattr(theirs, attribute)
        assert ours.layer1[0].expansion == theirs.layer1[0].expansion
        assert ours.layer2[0].stride == theirs.layer2[0].stride


def test_signatures_are_torchvisions(tv: Any) -> None:
    def names(f: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(f).parameters)

    assert names(models.ResNet)[: len(names(tv.ResNet))] == names(tv.ResNet)
    assert names(models.ResNet)[len(names(tv.ResNet)) :] == ["in_channels"]
    for ours, theirs in (
        (models.BasicBlock, tv.resnet.BasicBlock),
        (models.Bottleneck, tv.resnet.Bottleneck),
    ):
        assert names(ours) == names(theirs)
    for name in TORCHVISION:
        ours, theirs = inspect.signature(getattr(models, name)), inspect.signature(models.resnet18)
        assert str(ours) == str(theirs)
    assert names(models.resnet18) == ["weights", "progress", "kwargs"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 7},
        {"zero_init_residual": True},
        {"replace_stride_with_dilation": [False, True, True]},
        {"norm_layer": partial(nn.GroupNorm, 8)},
        {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)},
        {"norm_layer": nn.InstanceNorm2d},
        {"groups": 2, "width_per_group": 32},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_constructor_arguments_do_what_torchvisions_do(tv: Any, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], **kwargs).double()
    torch.manual_seed(0)
    ours = models.ResNet(models.Bottleneck, [1, 1, 1, 1], **kwargs).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_same(step(ours, image(2, 3, 64, 48)), step(theirs, image(2, 3, 64, 48)))


def test_constructor_refuses_what_torchvision_refuses(tv: Any) -> None:
    for library in (models, tv.resnet):
        net, block = library.ResNet, library.BasicBlock
        with pytest.raises(ValueError, match="replace_stride_with_dilation"):
            net(block, [1, 1, 1, 1], replace_stride_with_dilation=[True])
        with pytest.raises(ValueError, match="BasicBlock only supports"):
            net(block, [1, 1, 1, 1], groups=2)
        with pytest.raises(NotImplementedError, match="Dilation"):
            net(block, [1, 2, 2, 2], replace_stride_with_dilation=[True, True, True])
        with pytest.raises(ValueError, match="groups"):
            library.resnext50_32x4d(groups=8)


def test_norms_without_affine_are_built() -> None:
    norm = partial(nn.BatchNorm2d, affine=False)
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], 3, True, norm_layer=norm)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_in_channels_and_any_size() -> None:
    model = models.resnet18(in_channels=4, num_classes=5).eval()
    assert model(torch.randn(1, 4, 33, 47)).shape == (1, 5)


# ---- weights -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return models.resnet20(num_classes=3).state_dict()


def test_weights_from_a_mapping_and_from_a_file(state: dict[str, Tensor], tmp_path: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    for weights in (state, path, str(path)):
        model = models.resnet20(weights=weights)  # num_classes comes from the weights
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert models.resnet20(weights=state, num_classes=3).fc.out_features == 3


def test_torchvisions_state_dict_is_loaded_by_the_builder(tv: Any, tmp_path: Any) -> None:
    theirs = tv.resnet18(num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = models.create_model("resnet18", weights=tmp_path / "theirs.pth")
    x = image(2, 3, 32, 32)
    assert_same(step(ours.double(), x), step(theirs.double(), x))


def test_weights_that_would_need_a_download_are_refused(tv: Any) -> None:
    for weights in ("DEFAULT", "IMAGENET1K_V1", tv.ResNet18_Weights.DEFAULT, True, 3):
        with pytest.raises(ValueError, match="resnet_fast downloads nothing"):
            models.resnet18(weights=weights)
    with pytest.raises(ValueError, match=r"pretrained=True.*downloads nothing"):
        models.resnet18(pretrained=True)
    assert isinstance(models.resnet20(pretrained=False), models.CifarResNet)


def test_weights_that_are_no_state_dict_are_refused(
    state: dict[str, Tensor], tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="num_classes must be that of the weights, 3; got 10"):
        models.resnet20(weights=state, num_classes=10)
    with pytest.raises(ValueError, match="'epoch' is a int, not a tensor"):
        models.resnet20(weights={"epoch": 3, "model": state})
    with pytest.raises(RuntimeError, match=r"Missing key.*bn1.weight"):
        models.resnet20(weights={k: t for k, t in state.items() if k != "bn1.weight"})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        models.resnet20(weights=tmp_path / "list.pth")
    torch.save(models.resnet20(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="cannot be read as a state_dict"):
        models.resnet20(weights=tmp_path / "model.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as a state_dict"):
        models.resnet20(weights=tmp_path / "text.pth")


# ---- CIFAR ---------------------------------------------------------------------------------------
PAPER = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_depth_and_parameters_are_the_papers(name: str) -> None:
    model = on_meta(getattr(models, name))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 6 * CIFAR[name] + 2 == int(name.removeprefix("resnet"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(PAPER[name], abs=0.035)


def plain_cifar(model: Any, x: Tensor, training: bool) -> Tensor:
    """The network of section 4.2, from its parameters alone."""
    state = dict(model.state_dict(keep_vars=True))

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], None, stride, 1)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone()
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training)

    x = F.relu(norm("bn1", conv("conv1", x)))
    for stage in range(3):
        for i in range(3):
            at, stride = f"layer{stage + 1}.{i}", 2 if stage and not i else 1
            out = F.relu(norm(f"{at}.bn1", conv(f"{at}.conv1", x, stride)))
            out = norm(f"{at}.bn2", conv(f"{at}.conv2", out))
            if stride == 2:
                zeros = torch.zeros_like(out[:, : x.size(1) // 2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = F.relu(out + x)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("training", [True, False])
def test_cifar_resnet_is_the_networks_formula(training: bool) -> None:
    model = randomise(models.resnet20()).train(training)
    x = image(3, 3, 18, 13)
    want = plain_cifar(model, x, training)
    torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
    want.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for p, want_grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, want_grad, rtol=1e-7, atol=1e-7 * want_grad.abs().max())


def test_cifar_options() -> None:
    model = models.resnet20(shortcut="B", in_channels=1, num_classes=4, zero_init_residual=True)
    assert model.layer2[0].downsample[0].weight.shape == (32, 16, 1, 1)
    assert model.layer1[0].downsample is None
    assert not model.layer3[1].bn2.weight.any()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    with pytest.raises(ValueError, match='shortcut must be "A" or "B"; got \'C\''):
        models.resnet20(shortcut="C")


# ---- pre-activation ------------------------------------------------------------------------------
def test_preact_parameters_are_the_residual_networks(tv: Any) -> None:
    # The same convolutions as the ResNet of the same name; norms sit on other channels.
    for depth in (18, 34, 50, 101):
        ours = on_meta(getattr(models, f"preact_resnet{depth}"))
        theirs = on_meta(getattr(tv, f"resnet{depth}"))

        def weights(model: Any) -> list[tuple[int, ...]]:
            return sorted(tuple(p.shape) for p in model.parameters() if p.dim() > 1)

        assert weights(ours) == weights(theirs)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_preact_block_is_the_papers_formula(bottleneck: bool, training: bool) -> None:
    block = models.preact.PreActBottleneck if bottleneck else models.preact.PreActBasicBlock
    down = nn.Conv2d(8, 4 * block.expansion, 1, 2, bias=False)
    m = randomise(block(8, 4, 2, down)).train(training)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = copy.deepcopy(m)

        def forward(self, x: Tensor) -> Tensor:
            b = self.block
            first = F.relu(b.bn1(x))
            out = b.conv2(F.relu(b.bn2(b.conv1(first))))
            if bottleneck:
                out = b.conv3(F.relu(b.bn3(out)))
            return out + b.downsample(first)

    theirs = {k.removeprefix("block."): t for k, t in step(Plain(), image(2, 8, 7, 6)).items()}
    assert_same(step(m, image(2, 8, 7, 6)), theirs)


def test_preact_model_fused_and_plain_agree() -> None:
    model = randomise(models.preact_resnet18(num_classes=3, in_channels=2))
    plain = copy.deepcopy(model)
    for m in plain.modules():
        if isinstance(m, nn.ReLU):
            m.register_forward_hook(lambda *_: None)
    x = image(2, 2, 64, 48)
    want = step(plain, x)
    assert ("PreActBasicBlock", "relu has a forward hook") in reasons(lambda: plain(x))
    fell_back = reasons(lambda: assert_same(step(model, x), want))
    assert not [op for op, _ in fell_back if op != "batch_norm_act"]


# ---- by name, and as objects ---------------------------------------------------------------------
def test_models_by_name() -> None:
    names = models.list_models()
    assert set(names) >= {*TORCHVISION, *CIFAR, "preact_resnet18", "preact_resnet152"}
    assert names == sorted(names)
    assert models.list_models("resnext*") == [n for n in names if n.startswith("resnext")]
    model = models.create_model("resnet32", num_classes=4)
    assert model.fc.out_features == 4
    with pytest.raises(ValueError, match=r"name must be one of .*resnet50.*got 'resnet51'"):
        models.create_model("resnet51")


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "preact_resnet18"])
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    model = randomise(getattr(models, name)(num_classes=3)).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = image(1, 3, 32, 32)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(model)
        assert torch.equal(other(x), model(x))


def test_graph_nodes_are_torchvisions(tv: Any) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    for block in ("BasicBlock", "Bottleneck"):
        ours, theirs = (
            library.ResNet(getattr(library.resnet, block), [2, 1, 2, 1]) for library in (models, tv)
        )
        assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    ours.load_state_dict(theirs.state_dict())
    nodes = ["relu", "layer1.1.relu_2", "layer3.0.add", "flatten"]
    x = torch.randn(1, 3, 64, 64)
    ours, theirs = (create_feature_extractor(m.eval(), nodes) for m in (ours, theirs))
    for node, want in theirs(x).items():
        assert torch.equal(ours(x)[node], want), node


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", ["ResNet", "PreActResNet"])
def test_tracing_exporting_and_compiling(kind: str) -> None:
    block = {"ResNet": models.Bottleneck, "PreActResNet": models.preact.PreActBasicBlock}[kind]
    model = getattr(models, kind)(block, [1, 1, 0, 0], 3).double().eval()
    model.layer3 = model.layer4 = nn.Identity()
    model.bn, model.fc = nn.BatchNorm2d(128).double().eval(), nn.Identity()
    x = image(2, 3, 32, 32)
    want = model(x)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
        assert "resnet_fast::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), want)
        exported = torch.export.export(model, (x,))
        assert "resnet_fast." not in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), want)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
