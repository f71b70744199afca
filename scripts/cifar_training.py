"""Trains the network of scripts/cifar_network.py: all exits at once, each early one also towards the last one's answer.

SGD with Nesterov momentum under a learning rate that rises and falls twice, label smoothing, mirrored and shifted
images with a square cut out, smaller crops in the first epochs, and a running mean of the weights, which is what is
kept; at the end a few steps on whole pictures, which is how they are judged ("Fixing the train-test resolution
discrepancy", Touvron et al. 2019). The early exits learn half from the labels, half from the last exit's probabilities
(self-distillation, as in "Be Your Own Teacher", Zhang et al. 2019), since what they are judged by later is agreement
with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar_network
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

BATCH = 128
# The learning rate at shares of all steps, linear between: two cycles.
SHARES = (0.0, 1 / 6, 1 / 3, 8 / 15, 8.5 / 15, 1.0)
RATES = (0.0, 0.12, 0.0655, 0.0164, 0.05, 0.0)
MOMENTUM, DECAY = 0.9, 5e-4
SMOOTHING = 0.1
EXIT_WEIGHTS = (0.4, 0.4)  # beside the last exit's 1
SMALL_EPOCHS, SMALL = 5, 24  # the first epochs see crops of 24 pixels: the same scale at 56 % of the time
SHIFT, HOLE = 4, 8  # pixels
KEPT = 0.995  # of the running mean of the weights, a step
WHOLE_STEPS, WHOLE_RATE = 155, 0.01  # the last steps, on whole pictures, only mirrored; the rate falls to 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides a training."""

    epochs: int = 17
    seed: int = 0
    checkpoint: Path = Path("training.pt")


def train(images: NDArray[np.uint8], labels: NDArray[np.int64], plan: Plan, weights: Path) -> float:
    """Train, or go on after the last whole epoch of the checkpoint; write the weights; return the CPU seconds used."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    network = cifar_network.CifarNetwork().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean = cifar_network.CifarNetwork()
    optimizer = _optimizer(network)
    first, before = 0, 0.0
    if plan.checkpoint.is_file():
        saved: dict[str, Any] = torch.load(plan.checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        mean.load_state_dict(saved["mean"])
        optimizer.load_state_dict(saved["optimizer"])
        first, before = int(saved["epoch"]), float(saved["cpu_seconds"])
    else:
        mean.load_state_dict(network.state_dict())
    started = time.process_time()
    batches = len(images) // BATCH
    for epoch in range(first, plan.epochs):
        generator = np.random.default_rng((plan.seed, epoch))
        order = generator.permutation(len(images))[: batches * BATCH].reshape(batches, BATCH)
        network.train()
        total = 0.0
        for number, rows in enumerate(order):
            rate = _rate((epoch * batches + number + 1) / (plan.epochs * batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels = augment(images[rows], generator, SMALL if epoch < SMALL_EPOCHS else 32)
            loss = _loss(network(_normalised(pixels)), torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            _follow(mean, network, min(KEPT, 1 - 1 / (epoch * batches + number + 1)))
        used = before + time.process_time() - started
        state = {"network": network.state_dict(), "mean": mean.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": epoch + 1, "cpu_seconds": used}, plan.checkpoint.with_suffix(".new"))
        plan.checkpoint.with_suffix(".new").replace(plan.checkpoint)
        right = ", ".join(f"{share:.4f}" for share in accuracy(mean, images[:2000], labels[:2000]))
        print(
            f"epoch {epoch + 1} of {plan.epochs}: loss {total / batches:.4f}, right on 2,000 images it learnt from "
            f"{right}, {used / 60:.1f} CPU-minutes",
            flush=True,
        )
    _finish(mean, images, labels, plan.seed)
    torch.save(mean.state_dict(), weights)
    return before + time.process_time() - started


def _finish(network: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int) -> None:
    """The last steps, on whole pictures, from the running mean of the weights on."""
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = _optimizer(network)
    generator = np.random.default_rng((seed, WHOLE_STEPS))
    order = generator.permutation(len(images))[: WHOLE_STEPS * BATCH]
    for step, rows in enumerate(np.array_split(order, WHOLE_STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = WHOLE_RATE * (1 - step / WHOLE_STEPS)
        mirrored = generator.random((len(rows), 1, 1, 1)) < 0.5
        pixels = np.where(mirrored, images[rows][:, :, ::-1], images[rows])
        loss = _loss(network(_normalised(pixels)), torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def augment(pixels: NDArray[np.uint8], generator: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Mirror, shift (or crop to `side`) and cut a square out of uint8 (batch, 32, 32, 3)."""
    reach = SHIFT if side == 32 else 0
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    made = np.empty((len(pixels), side, side, 3), np.uint8)
    offsets = generator.integers(0, padded.shape[1] - side + 1, (len(pixels), 2))
    mirrored = generator.random(len(pixels)) < 0.5
    holes = generator.integers(0, side - HOLE + 1, (len(pixels), 2))
    middle = np.array([round(255 * value) for value in cifar_network.CifarNetwork.mean], np.uint8)
    for row, ((top, left), (upper, inner)) in enumerate(zip(offsets, holes, strict=True)):
        shifted = padded[row, top : top + side, left : left + side]
        made[row] = shifted[:, ::-1] if mirrored[row] else shifted
        made[row, upper : upper + HOLE, inner : inner + HOLE] = middle
    return made


def accuracy(network: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[float, ...]:
    """The share of right answers of every exit, the last one last."""
    network.eval()
    right: list[NDArray[np.int64]] = []
    with torch.inference_mode():
        for start in range(0, len(images), 500):
            said = network(_normalised(images[start : start + 500]))
            wanted = torch.from_numpy(labels[start : start + 500])
            right.append(np.array([int((logits.argmax(1) == wanted).sum()) for logits in said]))
    return tuple(float(share) for share in np.sum(right, axis=0) / len(images))


def _optimizer(network: nn.Module) -> torch.optim.SGD:
    matrices = [weight for weight in network.parameters() if weight.ndim > 1]
    others = [weight for weight in network.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)


def _rate(progress: float) -> float:
    return float(np.interp(progress, SHARES, RATES))


def _loss(said: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    *early, last = said
    loss = functional.cross_entropy(last, labels, label_smoothing=SMOOTHING)
    teacher = last.detach().softmax(1)
    for weight, logits in zip(EXIT_WEIGHTS, early, strict=True):
        own = functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        loss = loss + weight * (own + functional.cross_entropy(logits, teacher)) / 2
    return loss


def _normalised(pixels: NDArray[np.uint8]) -> Tensor:
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    shape = (1, 3, 1, 1)
    mean = torch.tensor(cifar_network.CifarNetwork.mean).reshape(shape)
    std = torch.tensor(cifar_network.CifarNetwork.std).reshape(shape)
    return ((values - mean) / std).contiguous(memory_format=torch.channels_last)


def _follow(mean: nn.Module, network: nn.Module, kept: float) -> None:
    with torch.no_grad():
        for slow, fast in zip(mean.state_dict().values(), network.state_dict().values(), strict=True):
            if slow.is_floating_point():
                slow.lerp_(fast, 1 - kept)
            else:
                slow.copy_(fast)
