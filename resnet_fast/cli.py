# SPDX-License-Identifier: BSD-3-Clause
"""The command line: ``python -m resnet_fast {demo,bench,explain,export,env}``.

Exit codes: 0 done; 1 something the user can mend, said in one sentence, or a failed check of the
demo; 2 wrong usage (argparse); 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class UserError(Exception):
    """Something the user can mend: printed as one sentence, without a traceback."""


def need(module: str, package: str, purpose: str) -> ModuleType:
    """Import an optional library; UserError says what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{purpose} needs {package}: pip install {package}, or all of them with "
            "pip install 'resnet_fast[bench]'"
        ) from None


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load_bench(name: str) -> ModuleType:
    """A module of bench/, which lives beside the package in a source checkout only."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "run.py").is_file():
        raise UserError(
            "the benchmarks are part of the source checkout, not of the installed package: "
            "run `python -m resnet_fast bench` in a clone of the repository"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module(f"bench.{name}")
    if not str(module.__file__).startswith(str(root)):
        raise UserError(f"another package named 'bench' is in the way: {module.__file__}")
    return module


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m resnet_fast", description="Faster ResNets for PyTorch."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="the main job on real data, about three minutes"))
    _add_bench(commands.add_parser("bench", help="measure against eager PyTorch and torch.compile"))
    _add_explain(commands.add_parser("explain", help="which block runs which implementation"))
    _add_export(commands.add_parser("export", help="a folded model as ONNX or for C++"))
    env = commands.add_parser("env", help="versions, build and hardware, for bug reports")
    env.description = "Print versions, whether the extension is loaded, and the hardware."
    env.set_defaults(run=_env)
    return top


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.description = (
        "Train a ResNet-20 on real handwritten digits, plain and accelerated, step by step in "
        "turn; run a ResNet-50 over real photographs both ways and compare; print what ran where; "
        "write demo.png and demo.json. Nothing is downloaded."
    )
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    weights = "a state_dict (torch.save) for --model; default: seeded initialisation"
    demo.add_argument("--weights", type=Path, metavar="FILE", help=weights)
    images = "your pictures; default: photographs shipped with scikit-image and scikit-learn"
    demo.add_argument("--images", type=Path, metavar="DIR", help=images)
    model = "torchvision's name of the ResNet for the photographs (default: resnet50)"
    demo.add_argument("--model", default="resnet50", metavar="NAME", help=model)
    demo.add_argument("--epochs", type=positive, default=6, help="of the digits (default: 6)")
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    demo.add_argument("--threads", type=positive, help="default: as PyTorch chooses")
    demo.add_argument("--quick", action="store_true", help="a few tiny steps, to see that it runs")
    demo.set_defaults(run=_demo)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.description = (
        "Measure ours against eager PyTorch and torch.compile, rivals in turn, with the default "
        "allocator and with rf.tune_cpu_memory(), each in a process of its own. Rows are appended "
        "to bench/results/cpu.jsonl. Everything takes about 20 minutes on two cores."
    )
    what = bench.add_argument_group("what to measure (default: all)")
    what.add_argument("--ops", action="store_true", help="each op over ResNet-50's layer shapes")
    what.add_argument("--models", action="store_true", help="ResNet-50 training steps")
    what.add_argument("--memory", action="store_true", help="activation memory of a training step")
    what.add_argument("--all", action="store_true", help="the three above")
    latency = "latency of ResNet-18, 50 and 101 against every inference rival installed"
    what.add_argument("--inference", action="store_true", help=latency)
    calls = "the cost of the calls: ResNet-18 and 50 on 32 px; accelerate() of a ResNet-152"
    what.add_argument("--overhead", action="store_true", help=calls)
    ways = "a small step of each way of use in docs/uses.md that has a speed"
    what.add_argument("--uses", action="store_true", help=ways)
    apart = "a training step as a user has it, against ours tuned: each in a process of its own"
    what.add_argument("--apart", action="store_true", help=apart)
    nets, sizes = ["resnet18", "resnet50", "resnet101"], [1, 16, 64]
    which = "of --inference (default: all)"
    what.add_argument("--networks", nargs="+", choices=nets, default=nets, help=which)
    what.add_argument("--batches", nargs="+", type=positive, default=sizes, help="of --inference")
    how = bench.add_argument_group("how")
    quick = "tiny shapes, two rounds: only to see that it runs"
    how.add_argument("--quick", action="store_true", help=quick)
    how.add_argument("--batch", type=positive, default=16, help="images (default: 16)")
    how.add_argument("--threads", type=positive, default=2, help="default: 2")
    dtypes = ("float32", "bfloat16", "int8", "all")
    how.add_argument("--dtype", choices=dtypes, default="all", help="int8: of --inference only")
    how.add_argument("--allocator", choices=("default", "tuned", "both"), default="both")
    without = "leave torch.compile out (it takes minutes to compile)"
    how.add_argument("--no-compile", dest="compile", action="store_false", help=without)
    out = bench.add_argument_group("results")
    out.add_argument("--results", type=Path, metavar="FILE", help="JSON lines to append to or show")
    out.add_argument("--show", action="store_true", help="print the stored rows, measure nothing")
    out.add_argument("--layers", action="store_true", help="print every layer, not only the sums")
    bench.set_defaults(run=_bench)


def _add_explain(explain: argparse.ArgumentParser) -> None:
    explain.description = "Run a model once and print, block by block, what ran and why."
    explain.add_argument("model", metavar="MODEL", help="resnet50, or torchvision:resnet50")
    explain.add_argument("--size", type=positive, default=224, help="pixels (default: 224)")
    explain.add_argument("--batch", type=positive, default=1, help="images (default: 1)")
    explain.add_argument("--train", action="store_true", help="in training mode")
    explain.set_defaults(run=_explain)


def _add_export(export: argparse.ArgumentParser) -> None:
    export.description = (
        "Fold a model's batch norms and write it with standard operators only: FILE.onnx, or "
        "FILE.pt2, an AOTInductor package that examples/aot_classify loads in C++."
    )
    export.add_argument("model", metavar="MODEL", help="resnet50, or torchvision:resnet50")
    export.add_argument("file", type=Path, metavar="FILE", help="ends in .onnx or .pt2")
    weights = "a state_dict (torch.save) for MODEL; default: fresh initialisation"
    export.add_argument("--weights", type=Path, metavar="FILE", help=weights)
    export.add_argument("--size", type=positive, default=224, help="pixels (default: 224)")
    export.set_defaults(run=_export)


def _demo(options: argparse.Namespace) -> int:
    need("rich", "rich", "the demo")
    run = importlib.import_module("resnet_fast.demo.run")
    return int(run.main(options))


def _bench(options: argparse.Namespace) -> int:
    need("rich", "rich", "the benchmark")
    return int(load_bench("run").main(options))


def _env(options: argparse.Namespace) -> int:
    from resnet_fast import env

    report = env.report()
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:<{width}}  {value}")
    return 0


def build_model(name: str) -> torch.nn.Module:
    """``resnet50`` is ours, ``torchvision:resnet50`` torchvision's accelerated.

    UserError for any other name.
    """
    import resnet_fast as rf

    source, _, inner = name.rpartition(":")
    if source == "torchvision":
        return rf.accelerate(torchvision_model(inner))
    if source:
        raise UserError(f"MODEL is {name!r}; before the colon only 'torchvision' is known")
    try:
        return rf.models.create_model(inner)
    except (ValueError, KeyError) as error:
        raise UserError(str(error.args[0] if error.args else error)) from None


def torchvision_model(name: str, **options: Any) -> torch.nn.Module:
    """A plain torchvision ResNet by name; UserError where there is none."""
    from resnet_fast.demo.vision import import_torchvision

    torchvision = import_torchvision()
    if torchvision is None:
        raise UserError(f"torchvision:{name} needs torchvision, which does not import here")
    models = torchvision.models
    builders = {n: models.get_model_builder(n) for n in models.list_models()}
    known = [n for n, builder in builders.items() if builder.__module__ == models.resnet.__name__]
    if name not in known:
        raise UserError(f"torchvision has no ResNet {name!r}; it has {', '.join(known)}")
    model: torch.nn.Module = builders[name](**options)
    return model


def _explain(options: argparse.Namespace) -> int:
    import resnet_fast as rf

    model = build_model(options.model).train(options.train)
    image = torch.zeros(options.batch, 3, options.size, options.size)
    try:
        with torch.set_grad_enabled(options.train):
            print(rf.explain(model, image))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{options.model} does not run on input {tuple(image.shape)}: {error}"
        ) from None
    return 0


def _export(options: argparse.Namespace) -> int:
    from resnet_fast.inference import export

    writers = {".onnx": export.to_onnx, ".pt2": export.to_package}
    if options.file.suffix not in writers:
        raise UserError(f"FILE is {str(options.file)!r}; it must end in .onnx or .pt2")
    model = build_model(options.model)
    if options.weights is not None:
        try:
            model.load_state_dict(torch.load(options.weights, weights_only=True))
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--weights {options.weights} does not load: {error}") from None
    if options.file.suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            need(package, package, "export to ONNX")
    example = torch.zeros(1, 3, options.size, options.size)
    print(f"written: {writers[options.file.suffix](model, example, options.file)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse itself exits with 2 on wrong usage)."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"resnet_fast {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"resnet_fast {options.command}: interrupted", file=sys.stderr)
        return 130
