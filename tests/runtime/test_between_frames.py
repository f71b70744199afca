"""Frames coded against earlier ones by an encoder and a decoder: exact, whatever gets lost between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import manifest
from runtime.codec import CODECS
from runtime.coding import Decoder, Encoder, ReferenceMissingError
from runtime.errors import BundleError, PacketError
from runtime.manifest import Bundle
from runtime.packet import KEEP, Kind, Packet
from runtime.plan_rates import Way
from tests.transform_bundle import CODEC, add_transform, transform_files, walk


@pytest.fixture
def bundle(transform_bundle: Bundle) -> Bundle:
    return transform_bundle


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fates=st.lists(
        st.sampled_from(["well", "well", "well", "request lost", "reply lost", "node restarted", "device restarted"]),
        min_size=10,
        max_size=40,
    )
)
def test_whatever_happens_a_decoder_makes_of_a_frame_what_one_makes_that_missed_nothing(
    bundle: Bundle, fates: list[str]
) -> None:
    frames = walk(bundle, len(fates))
    encoder, decoder, witness, session = Encoder(bundle, codec=CODEC, cut=1), Decoder(bundle), Decoder(bundle), 0
    for features, fate in zip(frames, fates, strict=True):
        if fate == "node restarted":
            decoder = Decoder(bundle)
        if fate == "device restarted":
            encoder, session = Encoder(bundle, codec=CODEC, cut=1), session + 1
        for again in (False, True):
            coded = encoder.encode(features.tensor, camera=0, alone=again)
            message = Packet(
                Kind.FEATURES,
                bundle.key,
                session,
                coded.sequence,
                coded.payload,
                codec=CODECS[CODEC],
                cut=1,
                rate=encoder.way.rate,
                flags=coded.flags,
                reference=coded.reference,
            )
            expected = witness.decode("cam", message)
            if fate == "request lost":
                break
            try:
                tensor = decoder.decode("cam", message)
            except ReferenceMissingError:
                assert "node restarted" in fates
                assert not again, "a frame that stands alone lacks nothing"
                encoder.miss(coded.sequence)
                continue
            np.testing.assert_array_equal(tensor, expected)
            if fate != "reply lost":
                encoder.acknowledge(coded.sequence)
            break


def test_another_scene_stands_alone(bundle: Bundle) -> None:
    encoder = Encoder(bundle, codec=CODEC, cut=1)
    here, there = walk(bundle, 5, seed=1), walk(bundle, 3, seed=2)
    coded = []
    for features in (*here[:4], *there, here[4]):
        coded.append(encoder.encode(features.tensor, camera=0))
        encoder.acknowledge(coded[-1].sequence)
    assert [one.reference for one in coded] == [None, 0, 1, 2, None, 4, 5, None]
    assert all(one.flags == KEEP for one in coded)


def test_a_damaged_payload_is_no_reference(bundle: Bundle) -> None:
    encoder, decoder = Encoder(bundle, codec=CODEC, cut=1), Decoder(bundle)
    frames = walk(bundle, 3)

    def request(number: int, **changes: Any) -> Packet:
        coded = encoder.encode(frames[number].tensor, camera=0)
        fields = {"codec": CODECS[CODEC], "cut": 1, "rate": encoder.way.rate, "flags": coded.flags}
        made = Packet(Kind.FEATURES, bundle.key, 1, coded.sequence, coded.payload, reference=coded.reference, **fields)
        return dataclasses.replace(made, **changes)

    decoder.decode("cam", request(0))
    encoder.acknowledge(0)
    with pytest.raises(PacketError):
        decoder.decode("cam", request(1, payload=b"damaged"))
    assert len(decoder.references) == 1
    good = request(2)
    assert good.reference == 0
    strange = [
        dataclasses.replace(good, session=2),
        dataclasses.replace(good, camera=1),
        dataclasses.replace(good, reference=1),
    ]
    for other in strange:
        with pytest.raises(ReferenceMissingError):
            decoder.decode("cam", other)
    with pytest.raises(ReferenceMissingError):
        decoder.decode("another", good)
    assert decoder.decode("cam", good).shape == frames[2].tensor.shape


def test_an_encoder_that_does_not_fit_is_told_at_the_start(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny")
    first, second = (transform_files(cut) for cut in manifest.load(path).manifest.cuts[1:3])
    bundle = add_transform(path, {1: {**first, "encoder.onnx": second["encoder.onnx"]}})
    with pytest.raises(BundleError):
        Encoder(bundle, codec=CODEC, cut=1)


def test_another_way_begins_anew_and_one_frame_aside_changes_nothing(bundle: Bundle) -> None:
    """The decoder tells all of it, and references never cross from one rate to another."""
    encoder, decoder = Encoder(bundle, codec=CODEC, cut=1), Decoder(bundle)
    usual, raw = encoder.way, Way(1, "raw", 0)
    encoder.prepare(raw)
    frames = walk(bundle, 6)

    def through(number: int, **how: Any) -> int | None:
        coded = encoder.encode(frames[number].tensor, camera=0, **how)
        message = Packet(
            Kind.FEATURES, bundle.key, 7, coded.sequence, coded.payload, codec=CODECS[coded.way.codec],
            cut=coded.way.cut, rate=coded.way.rate, flags=coded.flags, reference=coded.reference,
        )  # fmt: skip
        decoded = decoder.decode("client", message)
        if coded.way == raw:
            np.testing.assert_array_equal(decoded, frames[number].tensor)
        encoder.acknowledge(coded.sequence)
        return coded.reference

    assert through(0) is None
    assert through(1) == 0
    assert through(2, way=raw, alone=True) is None
    assert through(3, way=usual) == 1  # what went aside took nothing from the stream
    assert through(4, way=raw) is None
    assert through(5, way=usual) is None  # the stream begins anew
