# SPDX-License-Identifier: BSD-3-Clause
"""A thousand random things done to a model between steps: always equal to the untouched twin.

A hypothesis state machine holds a torchvision ResNet and an accelerated copy, does the same to
both in any order (modules swapped, hooks put on and taken off, parts frozen, pruned, parametrized,
moved, copied, saved and loaded, restored and accelerated again), and after every change runs a step
through both: outputs, gradients, buffers and what the hooks saw are equal.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import shims
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from twins import Log, assert_same, image, randomise, reasons, step, twin

import resnet_fast as rf

shims.torchvision_or_skip()

from torchvision.models import resnet as tv  # noqa: E402

X = image(2, 8, 6, 5)
BLOCKS = ("0", "1", "2")
PARTS = ("conv1", "bn1", "relu", "conv2", "bn2", "")
NORMS = ("bn1", "bn2")

block_names, part_names = st.sampled_from(BLOCKS), st.sampled_from(PARTS)


def small(kind: str) -> Any:
    """Three blocks with 8 channels in between; the middle one has a shortcut with a norm."""
    torch.manual_seed(1)
    down = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    if kind == "basic":
        blocks = [tv.BasicBlock(8, 8), tv.BasicBlock(8, 8, 1, down), tv.BasicBlock(8, 8)]
    else:
        blocks = [tv.Bottleneck(8, 2), tv.Bottleneck(8, 2, 1, down), tv.Bottleneck(8, 2)]
    return randomise(nn.Sequential(*blocks))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Mutations(RuleBasedStateMachine):
    """Rules do the same to both models; `both` then runs them and compares."""

    @initialize(kind=st.sampled_from(["basic", "bottleneck"]))
    def start(self, kind: str) -> None:
        plain = small(kind)
        self.models = [plain, rf.accelerate(twin(plain))]
        self.logs = [Log(), Log()]
        self.handles: list[list[Any]] = [[], []]
        assert not reasons(lambda: step(twin(self.models[1]), X))

    def both(self, change: Any) -> None:
        """change(model, i) on each, then a step through each."""
        results = []
        for i, model in enumerate(self.models):
            self.logs[i].clear()
            change(model, i)
            results.append(step(model, X))
        # A bias before a batch norm has a gradient of zero: rounding on the scale of the others.
        largest = max(float(t.detach().abs().max()) for t in results[0].values())
        assert_same(results[1], results[0], rtol=1e-6, floor=1e-10 * largest)
        assert [what for what, _ in self.logs[1]] == [what for what, _ in self.logs[0]]
        for (_, ours), (_, theirs) in zip(*self.logs[::-1], strict=True):
            pairs = (dict(enumerate(map(torch.as_tensor, side))) for side in (ours, theirs))
            assert_same(*pairs, rtol=1e-6, floor=1e-10 * largest)

    def part(self, model: Any, block: str, part: str) -> Any:
        return model.get_submodule(f"{block}.{part}" if part else block)

    # ---- hooks -----------------------------------------------------------------------------------
    @rule(block=block_names, part=part_names, kind=st.sampled_from(["forward", "pre", "backward"]))
    def add_hook(self, block: str, part: str, kind: str) -> None:
        def change(model: Any, i: int) -> None:
            m, log = self.part(model, block, part), self.logs[i]
            if kind == "forward":
                handle = m.register_forward_hook(lambda _, __, out: log.add("out", out))
            elif kind == "pre":
                handle = m.register_forward_pre_hook(lambda _, args: log.add("in", args[0]))
            else:
                for relu in (m for m in model.modules() if isinstance(m, nn.ReLU)):
                    relu.inplace = False  # PyTorch refuses in-place changes behind such a hook
                handle = m.register_full_backward_pre_hook(lambda _, out: log.add("grad", out[0]))
            self.handles[i].append(handle)

        if kind != "backward" or part not in ("bn2", ""):
            self.both(change)  # the block adds in place to what bn2 gives: PyTorch refuses that

    @precondition(lambda self: self.handles[0])
    @rule()
    def remove_hook(self) -> None:
        self.both(lambda _, i: self.handles[i].pop(0).remove())

    # ---- modules ---------------------------------------------------------------------------------
    @rule(block=block_names, norm=st.sampled_from(NORMS), kind=st.sampled_from(["group", "batch"]))
    def swap_norm(self, block: str, norm: str, kind: str) -> None:
        def change(model: Any, i: int) -> None:
            owner = model.get_submodule(block)
            width = getattr(owner, f"conv{norm[-1]}").out_channels
            other = nn.GroupNorm(1, width) if kind == "group" else nn.BatchNorm2d(width)
            setattr(owner, norm, other.to(X.dtype).train(owner.training))

        self.both(change)

    @rule(block=block_names, act=st.sampled_from(["relu", "silu"]))
    def swap_activation(self, block: str, act: str) -> None:
        def change(model: Any, i: int) -> None:
            model.get_submodule(block).relu = nn.ReLU() if act == "relu" else nn.SiLU()

        self.both(change)

    @rule(block=block_names)
    def swap_convolution(self, block: str) -> None:
        def change(model: Any, i: int) -> None:
            owner = model.get_submodule(block)
            old = owner.conv2
            torch.manual_seed(2)
            owner.conv2 = nn.Conv2d(
                old.in_channels, old.out_channels, 3, padding=1, bias=False, dtype=X.dtype
            )

        self.both(change)

    # ---- parameters ------------------------------------------------------------------------------
    @rule(block=block_names, part=st.sampled_from([*NORMS, "conv1", ""]), wanted=st.booleans())
    def freeze(self, block: str, part: str, wanted: bool) -> None:
        self.both(lambda m, _: self.part(m, block, part).requires_grad_(wanted))

    @rule(block=block_names, part=st.sampled_from([*NORMS, ""]), mode=st.booleans())
    def train_or_eval(self, block: str, part: str, mode: bool) -> None:
        self.both(lambda m, _: self.part(m, block, part).train(mode))

    @rule(block=block_names, part=st.sampled_from(["conv1", *NORMS]))
    def prune_weight(self, block: str, part: str) -> None:
        def change(model: Any, i: int) -> None:
            m = self.part(model, block, part)
            if isinstance(m, nn.Conv2d | nn.BatchNorm2d) and not parametrize.is_parametrized(m):
                prune.l1_unstructured(m, "weight", amount=0.25)
                prune.remove(m, "weight")

        self.both(change)

    @rule(block=block_names, part=st.sampled_from(["conv1", *NORMS]))
    def parametrize_weight(self, block: str, part: str) -> None:
        def change(model: Any, i: int) -> None:
            m = self.part(model, block, part)
            if parametrize.is_parametrized(m):
                parametrize.remove_parametrizations(m, "weight")
            else:
                parametrize.register_parametrization(m, "weight", Halved())

        self.both(change)

    @rule(block=block_names, norm=st.sampled_from(NORMS), scale=st.sampled_from([0.5, 2.0]))
    def write_in_place(self, block: str, norm: str, scale: float) -> None:
        def change(model: Any, i: int) -> None:
            with torch.no_grad():
                for p in self.part(model, block, norm).parameters():
                    p.mul_(scale).clamp_(-4, 4)

        self.both(change)

    @rule(block=block_names, norm=st.sampled_from(NORMS), momentum=st.sampled_from([None, 0.3]))
    def change_momentum(self, block: str, norm: str, momentum: float | None) -> None:
        self.both(lambda m, _: setattr(self.part(m, block, norm), "momentum", momentum))

    # ---- the whole model -------------------------------------------------------------------------
    @rule(way=st.sampled_from(["deepcopy", "pickle", "save", "state_dict"]))
    @precondition(lambda self: not self.handles[0])
    def copy_it(self, way: str) -> None:
        if any(parametrize.is_parametrized(m) for m in self.models[0].modules()):
            way = "deepcopy"  # PyTorch refuses to pickle a parametrized module
        for i, model in enumerate(self.models):
            if way == "deepcopy":
                self.models[i] = copy.deepcopy(model)
            elif way == "pickle":
                self.models[i] = pickle.loads(pickle.dumps(model))
            elif way == "save":
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                self.models[i] = torch.load(file, weights_only=False)
            else:
                model.load_state_dict({k: t * 1 for k, t in model.state_dict().items()})
        self.both(lambda *_: None)

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def change_dtype_and_back(self, dtype: torch.dtype) -> None:
        self.both(lambda m, _: m.to(dtype).to(X.dtype))

    @rule(last=st.booleans())
    def change_layout(self, last: bool) -> None:
        layout = torch.channels_last if last else torch.contiguous_format
        self.both(lambda m, _: m.to(memory_format=layout))

    @rule()
    def restore_and_accelerate(self) -> None:
        rf.restore(self.models[1])
        self.both(lambda *_: None)
        rf.accelerate(self.models[1])
        self.both(lambda *_: None)


def runs(count: int) -> Any:
    """A test case of so many runs of 25 steps; a step is at most one change."""

    class Case(Mutations.TestCase):  # type: ignore[name-defined, misc]
        # Shrinking runs models for minutes; a failure prints its whole sequence as it is.
        settings = settings(
            max_examples=count, stateful_step_count=25, phases=[Phase.explicit, Phase.generate]
        )

    return Case


TestMutations = runs(10)
# 40 runs are the thousand.
TestAThousandMutations = pytest.mark.slow(runs(40))
