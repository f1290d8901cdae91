# SPDX-License-Identifier: BSD-3-Clause
"""accelerate and restore: other libraries' models onto the fused blocks, and back, in place."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from resnet_fast import adapters, graphs

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Make every known residual block in a model run fused; returns the same model.

    Known are BasicBlock, Bottleneck and ResNet of torchvision and timm, timm's BatchNormAct2d,
    every nn.Sequential in which a ReLU follows a batch norm, subclasses of all these that leave the
    forward alone, and what register_adapter() made known, anywhere in the tree of modules. Only the
    class of each changes, to a subclass of the one it had: modules, parameters, buffers, hooks and
    state_dict stay the very same objects. What is not known stays as it is, and explain() says why;
    our own models need nothing. Of a graph that torch.fx traced (create_feature_extractor) only the
    code made from its nodes changes. A second call changes nothing more. restore() undoes it.

    Raises TypeError if model is not an nn.Module.
    """
    _check_module(model)
    adapters.load()
    for module in model.modules():
        if not adapters.why_not(module):
            _change_class(module, adapters.accelerated_class(type(module)))
    for module in model.modules():
        graphs.fuse_code(module)
    return model


def restore(model: Model) -> Model:
    """Give every accelerated module in a model the class it had; returns the same model.

    A graph of torch.fx, traced from an accelerated model or accelerated itself, gets PyTorch's code
    back.

    Raises TypeError if model is not an nn.Module, and RuntimeError, before anything changes, if a
    module was put into yet another class after accelerate() (as FSDP's fully_shard does).
    """
    _check_module(model)
    accelerated = []
    for name, module in model.named_modules():
        original = adapters.original_class(module)
        if original is not None:
            accelerated.append((module, original))
        elif adapters.is_accelerated(module):
            raise RuntimeError(
                f"{name or 'the model'} was changed to class {type(module).__name__} after "
                "accelerate(): undo that first"
            )
    for module, original in accelerated:
        _change_class(module, original)
    for module in model.modules():
        graphs.restore_code(module)
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # NOTE: not by assignment, which a module's own __setattr__ may take for a new attribute.
    object.__setattr__(module, "__class__", cls)
