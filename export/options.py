"""Options that several commands share: how pixels become a model's input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from export.source import Channels, InputOptions

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--size", help="ONNX, torch: input size where the model leaves it open: 224 or HEIGHTxWIDTH."),
    click.option(
        "--mean", help="ONNX, torch: one number or three, of pixels from 0 to 1; the input is (pixel - mean) / std."
    ),
    click.option("--std", help="ONNX, torch: one number or three, of pixels from 0 to 1."),
    click.option(
        "--scale", type=float, help="ONNX, torch: multiply pixels 0 to 255 by this instead of --std; 1 for raw."
    ),
    click.option("--bgr", is_flag=True, help="The model takes blue first."),
)


def takes_input(command: Command) -> Command:
    """Give a command --size, --mean, --std, --scale and --bgr; `input_of` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def input_of(size: str | None, mean: str | None, std: str | None, scale: float | None, *, bgr: bool) -> InputOptions:
    """What the options say.

    Raises:
        click.UsageError: they cannot be read, or contradict each other.
    """
    return InputOptions(size=_size(size), mean=_channels(mean, "--mean"), std=_std(std, scale), bgr=bgr)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{text!r} is no size; give 224 or 240x320 (height x width)", param_hint="--size")
    return int(match[1]), int(match[2] or match[1])


def _channels(text: str | None, option: str) -> Channels | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise click.BadParameter(f"{text!r} is not one number or three with commas", param_hint=option)
    first, second, third = values if len(values) == 3 else values * 3
    return first, second, third


def _std(text: str | None, scale: float | None) -> Channels | None:
    if text is not None and scale is not None:
        raise click.UsageError("--std and --scale say the same; give one of them.")
    if scale is not None:
        if scale == 0:
            raise click.BadParameter("must not be 0", param_hint="--scale")
        return (1 / (255 * scale),) * 3
    values = _channels(text, "--std")
    if values is not None and 0 in values:
        raise click.BadParameter("must not be 0", param_hint="--std")
    return values
