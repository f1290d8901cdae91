# SPDX-License-Identifier: BSD-3-Clause
"""Train a ResNet with DistributedDataParallel and checkpoints, on digits or your own pictures.

    torchrun --nproc-per-node 2 examples/train_ddp.py --out runs/digits
    torchrun --nproc-per-node 8 examples/train_ddp.py --out runs/mine --images photos

--images: a folder with one folder of pictures for each class. Without it the 1,797 handwritten
digits that scikit-learn ships are used. Start the same command again after a crash: it goes on from
the last checkpoint and comes to the same weights as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, TensorDataset

import resnet_fast as rf
from resnet_fast.demo.digits import load_digits
from resnet_fast.demo.images import SUFFIXES, preprocess


class Pictures(Dataset[tuple[Tensor, int]]):
    """The pictures in the folders of a folder; a folder's place by name is its class."""

    def __init__(self, folder: Path, size: int) -> None:
        self.classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.size = size
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise SystemExit(f"--images {folder}: no pictures in folders of it")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as picture:
            return preprocess(picture, self.size), label


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--images", type=Path, help="folder with a folder of pictures per class")
    parser.add_argument("--model", default="resnet20", help="a name of rf.models.list_models()")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=200, help="steps in all")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step, all processes")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--sync-bn", action="store_true", help="statistics over all processes")
    return parser.parse_args()


def dataset(args: argparse.Namespace) -> tuple[Dataset[tuple[Tensor, int]], int, int]:
    """(data, length, number of classes)."""
    if args.images is not None:
        pictures = Pictures(args.images, args.size)
        return pictures, len(pictures), len(pictures.classes)
    digits = load_digits(args.size, args.seed)
    data = TensorDataset(digits.train_images.contiguous(), digits.train_labels)
    return data, len(data), 10  # type: ignore[return-value]


def batch_of(step: int, length: int, args: argparse.Namespace) -> list[int]:
    """This process's pictures of a step. A function of the step alone, so that a resumed run sees
    what the stopped one would have seen."""
    per_epoch = max(length // args.batch, 1)
    generator = torch.Generator().manual_seed(args.seed + step // per_epoch)
    order = torch.randperm(length, generator=generator)
    begin = step % per_epoch * args.batch
    batch = order[begin : begin + args.batch].tolist()
    mine: list[int] = batch[dist.get_rank() :: dist.get_world_size()]
    return mine


def build(args: argparse.Namespace, classes: int, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    model: nn.Module = rf.models.create_model(args.model, num_classes=classes)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if args.sync_bn:
        # After wrapping: DDP takes no nn.SyncBatchNorm on the CPU, where PyTorch's own cannot run.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


# ---- checkpoints ---------------------------------------------------------------------------------
def save(file: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Rank 0 writes, beside the old file and then in its place: a crash leaves one of the two."""
    if dist.get_rank() == 0:
        partial = file.with_suffix(".partial")
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, partial)
        os.replace(partial, file)
    dist.barrier()


def load(
    file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """The step to go on from; 0 where there is no checkpoint."""
    if not file.exists():
        return 0
    state = torch.load(file, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def rate(step: int, args: argparse.Namespace) -> float:
    """A linear rise over the first tenth of the steps, then a linear fall to 0."""
    rise = max(args.steps // 10, 1)
    falling = (args.steps - step) / max(args.steps - rise, 1)
    return float(args.lr * min((step + 1) / rise, falling))


def train(args: argparse.Namespace, device: torch.device) -> None:
    data, length, classes = dataset(args)
    model = build(args, classes, device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    file = args.out / "checkpoint.pt"
    start = load(file, model, optimizer, device)
    first = dist.get_rank() == 0
    if first:
        print(f"{'resuming at' if start else 'starting at'} step {start}", flush=True)
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        pictures, labels = zip(*(data[i] for i in batch_of(step, length, args)), strict=True)
        x = torch.stack(pictures).to(device, memory_format=torch.channels_last)
        y = torch.tensor([int(label) for label in labels], device=device)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if first:
            print(f"step {step + 1}/{args.steps} loss {loss.item():.4f}", flush=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            save(file, step + 1, model, optimizer)


def main() -> None:
    args = arguments()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
