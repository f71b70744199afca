"""The command `kinflow export`: options in, a table of cuts or a bundle out."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click
import msgspec

from export.cuts import Cut
from export.detector_layout import BoxFormat
from export.frames import FrameSource
from export.options import detector_of, input_of, takes_detector, takes_input
from export.pipeline import Exported, export
from export.quantize import TARGETS
from export.recipe import DEFAULT_TIERS, Recipe, choose_cuts, open_model, time_cuts
from export.report import Report
from export.source import Fit
from export.timing import Timed
from runtime.errors import CameraError
from runtime.manifest import Bundle

MOST_VARIANTS = 8
TARGET_HELP = "; ".join(f"{name}: {target.why}" for name, target in TARGETS.items())


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model")
@click.option(
    "--frames",
    "frames",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder of images or a clip from your camera, without labels; 200 or more do well. May be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The bundle's directory, to be made.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--list-cuts", is_flag=True, help="Show every place where the model can be cut, and stop.")
@click.option("--cuts", help="Where to cut: numbers, tensors or layers as --list-cuts shows them, with commas.")
@click.option("--tiers", default=",".join(DEFAULT_TIERS), show_default=True, help="Names of the tiers, device first.")
@click.option(
    "--agreement",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.98,
    show_default=True,
    help="Share of an exit's answers that must equal the whole float model's.",
)
@click.option(
    "--variants",
    default="2",
    show_default=True,
    help="Make at most so many smaller stand-ins for the first segment, each faster and less exact; or none.",
)
@click.option(
    "--sensitivity",
    type=click.Choice(["gradients", "probes"]),
    default="gradients",
    show_default=True,
    help="How to find what the answer depends on: by gradients where torch can run the model, else by probes, or "
    "always by probes.",
)
@click.option(
    "--heads",
    type=click.Choice(["auto", "linear", "branch"]),
    default="auto",
    show_default=True,
    help="Exit heads: one linear layer on mean features; behind the trunk's next layers; auto: what saves most.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="A file of lines NAME,CLASS for the pictures of --frames: states accuracies as well. Nothing is fitted to it.",
)
@click.option(
    "--refine",
    "refine_minutes",
    type=click.FloatRange(0),
    default=0.0,
    metavar="MINUTES",
    help="Refine the codec of each cut by distillation for so long; kept only where it wins on held-back frames. "
    "The bundle then depends on the machine's speed.",
)
@click.option("--target", type=click.Choice(list(TARGETS)), default="x86-vnni", show_default=True, help=TARGET_HELP)
@click.option("--float", "as_float", is_flag=True, help="Do not quantize.")
@click.option(
    "--min-likeness",
    type=click.FloatRange(-1, 1),
    help="Below it no bundle is written: of a classifier the mean cosine between the logits of the int8 and the float "
    "model (default .98), of a detector the F1 of their boxes (.8).",
)
@click.option(
    "--assume-independent",
    is_flag=True,
    help="Test the exits' promises as if frames of clips were drawn independently. Neighbours in time are alike, so "
    "without this they count for less; with it promises hold only as far as your frames are as varied as what comes.",
)
@click.option("--max-frames", type=click.IntRange(20), default=2000, show_default=True, help="Use at most so many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffle that parts photos.")
@click.option("--name", help="The bundle's name; default: the model's.")
@takes_input
@takes_detector
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="For running the whole model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def export_command(
    model: str,
    frames: tuple[Path, ...],
    out: Path | None,
    force: bool,
    list_cuts: bool,
    cuts: str | None,
    tiers: str,
    agreement: float,
    variants: str,
    refine_minutes: float,
    sensitivity: Literal["gradients", "probes"],
    heads: Literal["auto", "linear", "branch"],
    labels: Path | None,
    target: str,
    as_float: bool,
    min_likeness: float | None,
    assume_independent: bool,
    max_frames: int,
    seed: int,
    name: str | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    scale: float | None,
    bgr: bool,
    task: str,
    classes: Path | None,
    score: float,
    iou: float,
    boxes: BoxFormat | None,
    fit: Fit | None,
    threads: int,
    as_json: bool,
) -> None:
    """Turn a model and unlabelled frames into a bundle that devices and nodes run.

    \b
    MODEL is one of
      lite0                    EfficientNet-Lite0 with its ImageNet weights
      DIRECTORY or ID          a Hugging Face image classifier (ViT, ResNet, MobileNetV2, Swin, …)
      FILE.onnx                any ONNX classifier with one image input
      FILE.py:FACTORY          your own torch module; the file is run. Its own exits are kept
    With --task detect, an ONNX detector: SSD style with suppression inside, or a YOLO head with or without.

    Where to cut, unless --cuts says: with T tiers, the t-th cut is the smallest tensor among the cuts that have a
    share of the multiply-accumulates before them within 1/(2T) of t/T. A model with exits of its own is cut there.

    Frames are parted 60:20:20, beyond the first 500 40:40:20: exits are fitted on the first part, thresholds tested on
    the second, and everything is measured on the third. An exit answers only where the threshold frames show, with 95 %
    confidence, that --agreement is kept; at .98 that takes 149 answers or more without one that differs. A bundle whose
    segments do not give the whole model's answer is not written.

    \b
    kinflow export lite0 --list-cuts
    kinflow export lite0 --frames my_frames/ --out lite0.kinflow
    kinflow export ./my_vit --frames clip.mp4 --target arm64 --cuts "layer 3,layer 7" --out vit.kinflow
    kinflow export yolov8n.onnx --task detect --frames clip.mp4 --out yolo.kinflow
    """
    report = Report()
    recipe = Recipe(
        model=model,
        frames=tuple(FrameSource(path) for path in frames),
        input=replace(input_of(size, mean, std, scale, bgr=bgr), detector=detector_of(task, classes, iou, boxes, fit)),
        task=task,
        settings={"score_threshold": score} if task == "detect" else {},
        tiers=_tiers(tiers),
        cuts=tuple(filter(None, (part.strip() for part in (cuts or "").split(",")))),
        agreement=agreement,
        variants=_variants(variants),
        refine_minutes=refine_minutes,
        sensitivity=sensitivity,
        heads=heads,
        labels=labels,
        target=None if as_float else target,
        min_likeness=min_likeness,
        assume_independent=assume_independent,
        max_frames=max_frames,
        seed=seed,
        name=name,
        threads=threads,
    )
    if list_cuts:
        opened = open_model(recipe.model, recipe.input, report)
        chosen = choose_cuts(opened, recipe)
        timed = time_cuts(opened, recipe, report)
        (_print_cuts_json if as_json else _print_cuts)(opened.cuts, chosen, timed)
        return
    if not frames:
        raise click.UsageError("Missing option '--frames': a folder of images or a clip from your camera.")
    if out is None:
        raise click.UsageError("Missing option '--out': the bundle's directory, to be made.")
    for path in frames:
        if not path.exists():
            raise CameraError(f"--frames {path} does not exist; give a folder of images or a clip")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing half-written stays
    exported = export(recipe, out, report, force=force)
    (_print_json if as_json else _print_summary)(exported)


def _print_cuts(cuts: tuple[Cut, ...], chosen: list[Cut], timed: dict[str, list[Timed]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("cut", "", "after"):
        table.add_column(title, no_wrap=True)
    kinds = list(timed)
    for title in ("shape", "elements", "MACs before", *(f"{kind} ms before + after" for kind in kinds), "raw bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for place, cut in enumerate(cuts):
        times = [f"{timed[kind][place].before_ms:.2f} + {timed[kind][place].after_ms:.2f}" for kind in kinds]
        raw_bytes = cut.elements * (1 if "int8" in timed else 4)
        table.add_row(
            str(cut.index),
            "*" if cut in chosen else "",
            cut.after,
            "x".join(map(str, cut.shape)),
            f"{cut.elements:,}",
            f"{cut.macs_ratio:.1%}",
            *times,
            f"{raw_bytes:,}",
        )
    console = Console()
    # A table in a file or a pipe must not be folded to a width that nobody has.
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)
    console.print("* would be cut here", highlight=False)


def _print_cuts_json(cuts: tuple[Cut, ...], chosen: list[Cut], timed: dict[str, list[Timed]]) -> None:
    rows = [
        {
            "cut": cut.index,
            "chosen": cut in chosen,
            "after": cut.after,
            "tensor": cut.tensor,
            "shape": cut.shape,
            "elements": cut.elements,
            "macs": cut.macs,
            "macs_ratio": round(cut.macs_ratio, 6),
            "raw_bytes": cut.elements * (1 if "int8" in timed else 4),
            **{f"{kind}_before_ms": times[place].before_ms for kind, times in timed.items()},
            **{f"{kind}_after_ms": times[place].after_ms for kind, times in timed.items()},
        }
        for place, cut in enumerate(cuts)
    ]
    click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=1).decode())


def _print_summary(exported: Exported) -> None:
    from runtime.bundle_tool import describe

    click.echo(describe(exported.bundle))
    times = " + ".join(f"{value:.2f}" for value in exported.segment_ms)
    click.echo(f"\nsegments here: {times} ms on one thread; the whole model {exported.whole_ms:.2f} ms")
    click.echo(
        f"wrote {exported.bundle.path}: {_total_bytes(exported.bundle) / 1e6:.1f} MB, id {exported.bundle.id[:16]}"
    )
    click.echo(f"what it costs and gives, measured: {exported.bundle.path / 'atlas.html'}")


def _print_json(exported: Exported) -> None:
    result = {
        "path": str(exported.bundle.path),
        "id": exported.bundle.id,
        "size_bytes": _total_bytes(exported.bundle),
        "segment_ms": exported.segment_ms,
        "whole_ms": exported.whole_ms,
        "manifest": exported.bundle.manifest,
    }
    click.echo(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())


def _total_bytes(bundle: Bundle) -> int:
    return sum(spec.size_bytes for spec in bundle.manifest.files)


def _variants(text: str) -> int:
    if text == "none":
        return 0
    if not text.isdecimal() or int(text) > MOST_VARIANTS:
        raise click.BadParameter(
            f"{text!r} is neither none nor a number up to {MOST_VARIANTS}", param_hint="--variants"
        )
    return int(text)


def _tiers(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if len(set(names)) != len(names) or not all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names):
        raise click.BadParameter(
            "give different names of letters, digits, '_' and '-', with commas", param_hint="--tiers"
        )
    return names
