"""Options that several commands share: how pixels become a model's input."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from export.detector_layout import BoxFormat
from export.source import Channels, DetectorOptions, Fit, InputOptions

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


_DETECTOR_OPTIONS = (
    click.option(
        "--task",
        type=click.Choice(["classify", "detect"]),
        default="classify",
        show_default=True,
        help="What the model does; detectors are ONNX files.",
    ),
    click.option(
        "--classes",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Detectors: a file with the name of one class a line; default: the names inside the model.",
    ),
    click.option(
        "--score",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.5,
        show_default=True,
        help="Detectors: the least score of a box that is told.",
    ),
    click.option(
        "--iou",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.6,
        show_default=True,
        help="Detectors: boxes of one class that overlap more are one object, where the model does not see to it.",
    ),
    click.option(
        "--boxes",
        type=click.Choice(get_args(BoxFormat)),
        help="Detectors: the order of a box's sides, in shares of the input or in pixels, where names do not tell it.",
    ),
    click.option(
        "--fit",
        type=click.Choice(["crop", "stretch", "letterbox"]),
        help="Detectors: how a frame becomes the input. [default: letterbox for YOLO, else stretch]",
    ),
)


def takes_detector(command: Command) -> Command:
    """Give a command the options of detectors; `detector_of` reads them."""
    for option in reversed(_DETECTOR_OPTIONS):
        command = option(command)
    return command


def detector_of(
    task: str, classes: Path | None, iou: float, boxes: BoxFormat | None, fit: Fit | None
) -> DetectorOptions | None:
    """What the options say; None: the model is a classifier.

    Raises:
        click.UsageError: an option for detectors was given for a classifier.
    """
    if task == "classify":
        given = [name for name, value in (("--classes", classes), ("--boxes", boxes), ("--fit", fit)) if value]
        if given:
            raise click.UsageError(f"{given[0]} is for detectors; add --task detect.")
        return None
    names = None
    if classes is not None:
        try:
            names = tuple(filter(None, map(str.strip, classes.read_text("utf-8").splitlines())))
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--classes {classes} cannot be read as text; give one name a line.") from error
    return DetectorOptions(boxes=boxes, names=names or None, iou_threshold=iou, fit=fit)


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
