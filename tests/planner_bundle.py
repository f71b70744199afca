"""A bundle's manifest with figures like those measured of EfficientNet-Lite0, for plans; it has no files."""

from __future__ import annotations

from pathlib import Path

from runtime.manifest import (
    Bundle,
    CodecSpec,
    CutSpec,
    ExitSpec,
    Manifest,
    Measured,
    OperatingPoint,
    PreprocessSpec,
    Provenance,
    RateSpec,
    SegmentSpec,
    TierSpec,
    VariantSpec,
)

RATES = (60, 80, 90, 95, 98, 99)
CUT_1 = ((550, 0.72), (937, 0.78), (1380, 0.84), (2037, 0.90), (2923, 0.94), (3280, 0.94))
CUT_2 = ((160, 0.58), (347, 0.80), (643, 0.93), (1100, 0.96), (1833, 0.97), (2132, 0.96))
JPEG = ((50, 11_291, 0.90), (75, 16_407, 0.92), (90, 26_681, 0.96))


def planned(*, exits: bool = True) -> Bundle:
    """Three segments, two cuts, JPEG, a variant of the first segment, and exits at both cuts."""
    raw = CodecSpec(name="raw", rates=(RateSpec(parameter=0, bytes_p50=12_406, bytes_p95=12_810),))
    cuts = [
        CutSpec(
            after="the camera",
            tensor="in",
            shape=(224, 224, 3),
            dtype="uint8",
            codecs=(CodecSpec(name="jpeg", rates=tuple(_rate(q, size, like) for q, size, like in JPEG)),),
        ),
        CutSpec(
            after="block 5",
            tensor="a",
            shape=(14, 14, 80),
            dtype="uint8",
            codecs=(raw, CodecSpec(name="transform", rates=tuple(map(_rate, RATES, *zip(*CUT_1, strict=True))))),
        ),
        CutSpec(
            after="block 11",
            tensor="b",
            shape=(7, 7, 192),
            dtype="uint8",
            codecs=(raw, CodecSpec(name="transform", rates=tuple(map(_rate, RATES, *zip(*CUT_2, strict=True))))),
        ),
        CutSpec(after="the last layer", tensor="c", shape=(1000,), dtype="float32"),
    ]
    table = tuple(_exit(cut, coverage if exits else 0.0) for cut, coverage in ((1, 0.1), (2, 0.3)))
    last = ExitSpec(cut=3, file=None, temperature=1, threshold=0, agreement=1, measured=_measured(1.0, 0.98))
    variant = VariantSpec(
        file="segments/0.v1.onnx",
        macs=60,
        max_batch_size=1,
        cosine=0.98,
        agreement=0.94,
        agreement_low=0.9,
        agreement_high=0.97,
        n=250,
        exits=(*table, last),
    )
    manifest = Manifest(
        format=3,
        name="planned",
        task="classify",
        labels="labels.txt",
        preprocess=PreprocessSpec(height=224, width=224),
        segments=tuple(
            SegmentSpec(file=f"segments/{k}.onnx", macs=100, variants=(variant,) if k == 0 else ()) for k in range(3)
        ),
        cuts=tuple(cuts),
        exits=(*table, last),
        tiers=tuple(TierSpec(name=name, last_segment=k) for k, name in enumerate(("device", "edge", "cloud"))),
        golden="golden.npz",
        proof={"whole_agreement": 0.98},
        provenance=Provenance(
            source="", tools={}, target="", quantization="", opset=17, seed=0, frames={}, frames_sha256=""
        ),
        files=(),
    )
    return Bundle(path=Path(), manifest=manifest, id="0" * 64, labels=())


def _rate(parameter: float, size: int, agreement: float) -> RateSpec:
    return RateSpec(parameter=parameter, bytes_p50=round(size * 0.8), bytes_p95=size, agreement=agreement, n=250)


def _measured(coverage: float, agreement: float) -> Measured:
    return Measured(coverage=coverage, agreement=agreement, agreement_low=None, agreement_high=None, answered=0, n=250)


def _exit(cut: int, coverage: float) -> ExitSpec:
    points = tuple(
        OperatingPoint(agreement=row, threshold=0.5 + row / 2.1, measured=_measured(coverage * (1.9 - row), row))
        for row in (0.9, 0.95, 0.98)
    )
    return ExitSpec(
        cut=cut, file=f"exits/{cut}.onnx", temperature=1, threshold=points[-1].threshold, agreement=0.98, points=points
    )
