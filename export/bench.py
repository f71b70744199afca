"""The command `kinflow bench`: what a bundle's cuts, codecs, exits and variants cost and give, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from export import atlas as atlases
from export.atlas import Atlas
from export.bench_measure import Wanted, measure
from export.options import input_of, takes_input
from export.report import Report
from export.source import InputOptions
from runtime.errors import BundleError, CameraError
from runtime.manifest import load

# They are imported only where they are needed, but who lacks them should hear so before anything is measured.
for _package in ("matplotlib", "av", "rich"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class _Given:
    """What every subcommand is told."""

    bundle: Path
    frames: tuple[Path, ...]
    model: str | None
    input: InputOptions
    max_frames: int
    threads: int
    seed: int


def _takes_frames(command: Command) -> Command:
    options = (
        click.argument("bundle", type=click.Path(path_type=Path)),
        click.option(
            "--frames",
            multiple=True,
            required=True,
            type=click.Path(path_type=Path),
            help="A folder of images or a clip, without labels. Frames that had a say in the bundle are left out.",
        ),
        click.option(
            "--model",
            help="What the bundle was made from, as for `kinflow export`; needless for lite0, which is known.",
        ),
        takes_input,
        click.option("--max-frames", type=click.IntRange(20), default=250, show_default=True, help="At most so many."),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="For every model."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap behind intervals."),
        click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _takes_rivals(command: Command) -> Command:
    options = (
        click.option(
            "--clip",
            type=click.Path(path_type=Path),
            help="A clip whose frames are all sent, in order: between frames, beside H.264 and H.265.",
        ),
        click.option(
            "--clip-frames", type=click.IntRange(20), default=120, show_default=True, help="At most so many of it."
        ),
        click.option(
            "--rivals/--no-rivals",
            default=True,
            show_default=True,
            help="Also send the pixels as JPEG, WebP and AVIF through the float model; this takes most of the time.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def bench_group() -> None:
    """Measure what a bundle's codecs, exits and variants cost and give, on frames of your own.

    Quality is agreement: the share of frames on which the answer is that of the whole, unsplit float model. No labels
    are needed. Every share comes with n and its 95 % interval.

    \b
    kinflow bench codec my-bundle --frames photos/
    kinflow bench atlas my-bundle --frames photos/ --clip street.mp4    # writes my-bundle/atlas.html
    """


@bench_group.command()
@_takes_frames
@_takes_rivals
def codec(clip: Path | None, clip_frames: int, rivals: bool, as_json: bool, **given: Any) -> None:
    """Bytes and agreement of every cut, codec and rate, beside JPEG, WebP and AVIF of the same pixels.

    Bytes are those of a whole MQTT message: framing, a device's topic, the packet's header, the payload. Pictures are
    not charged for the packet's header. They go through the whole float model, at the model's input size and shrunk
    before. The second table reads the curves off at equal agreement.

    With --clip every frame of a clip is sent in order: features against those of the frame before, beside H.264 and
    H.265 without delay, compared at equal KL divergence from the whole model, in nats.
    """
    wanted = Wanted(codecs=True, rivals=rivals, clip=clip, clip_frames=clip_frames)
    _print(_measure(_given(**given), wanted), as_json=as_json)


@bench_group.command()
@_takes_frames
def exits(as_json: bool, **given: Any) -> None:
    """Coverage and agreement of every exit, and the share of the model's work that the cascade saves."""
    _print(_measure(_given(**given), Wanted(exits=True)), as_json=as_json)


@bench_group.command(name="atlas")
@_takes_frames
@_takes_rivals
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Where to write; default: into the bundle."
)
def atlas_command(
    clip: Path | None, clip_frames: int, rivals: bool, out: Path | None, as_json: bool, **given: Any
) -> None:
    """All of it, as atlas.json and as atlas.html: one page, for any browser, that needs no network.

    It begins with one sentence on whether splitting pays, which may be "do not split". Both files are notes beside the
    bundle's contract: they change no digest and no bundle id.
    """
    from export.atlas_stage import write

    told = _given(**given)
    if out is not None and not out.is_dir():
        raise BundleError(f"--out {out} is no directory; make it first")
    wanted = Wanted(codecs=True, exits=True, variants=True, rivals=rivals, clip=clip, clip_frames=clip_frames)
    made = _measure(told, wanted)
    target = out or told.bundle
    write(target, made)
    _print(made, as_json=as_json)
    click.echo(f"wrote {target / 'atlas.json'} and {target / 'atlas.html'}", err=True)


def _given(
    bundle: Path,
    frames: tuple[Path, ...],
    model: str | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    scale: float | None,
    bgr: bool,
    max_frames: int,
    threads: int,
    seed: int,
) -> _Given:
    pixels = input_of(size, mean, std, scale, bgr=bgr)
    return _Given(bundle, frames, model, pixels, max_frames, threads, seed)


def _measure(given: _Given, wanted: Wanted) -> Atlas:
    for option, path in (*(("--frames", path) for path in given.frames), ("--clip", wanted.clip)):
        if path is not None and not path.exists():
            raise CameraError(f"{option} {path} does not exist; give a folder of images or a clip")
    bundle = load(given.bundle)
    return measure(
        bundle,
        given.frames,
        wanted,
        model=given.model,
        options=given.input,
        max_frames=given.max_frames,
        threads=given.threads,
        seed=given.seed,
        report=Report(),
    )


def _print(made: Atlas, *, as_json: bool) -> None:
    if as_json:
        click.echo(atlases.to_json(made).decode())
    else:
        from export.bench_tables import show

        show(made)
