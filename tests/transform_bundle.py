"""The codec transform in a tiny bundle: real graphs, books and layouts, nothing fitted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from onnx import TensorProto, helper

from runtime import manifest
from runtime.codec_transform import Tables
from runtime.datatypes import Features
from runtime.levels import Books
from runtime.manifest import Bundle, CodecSpec, CutSpec, FileSpec, RateSpec
from tests.tiny_bundle import graph

CODEC = "transform"


def transform_files(cut: CutSpec) -> dict[str, bytes]:
    """A transform whose coefficients are the features themselves: real graphs, books and layouts, nothing fitted."""
    node, count = helper.make_node, int(np.prod(cut.shape))
    features, flat = (TensorProto.UINT8, cut.shape), (TensorProto.FLOAT, (count,))
    encoder = [
        node("Cast", ["in"], ["float"], to=TensorProto.FLOAT),
        node("Reshape", ["float", "shape"], ["out"]),
    ]
    decoder = [
        node("Round", ["in"], ["whole"]),
        node("Clip", ["whole", "least", "most"], ["clipped"]),
        node("Reshape", ["clipped", "shape"], ["shaped"]),
        node("Cast", ["shaped"], ["out"], to=TensorProto.UINT8),
    ]
    single = np.array([0, *range(1, 64), *range(-63, 0)], np.int16)[:, np.newaxis]
    eight = np.concatenate([np.zeros((1, 8), np.int16), np.eye(8, dtype=np.int16), -np.eye(8, dtype=np.int16)])
    tables = Tables(
        count=count,
        steps=np.array([4.0], np.float32),
        centroids=np.zeros((1, 2), np.float32),
        books=Books((single, eight)),
        groups=np.array([[[count, 0], [0, count // 8]]], np.int32),
        expected=np.array([[count, count / 8]], np.float32),
        dictionaries=((b"", b""),),
    )
    bounds: dict[str, Any] = {"least": np.float32(0), "most": np.float32(255)}
    return {
        "encoder.onnx": graph(encoder, {"shape": np.array([-1, count])}, features, flat),
        "decoder.onnx": graph(decoder, {"shape": np.array([-1, *cut.shape]), **bounds}, flat, features),
        "tables.npz": tables.dump(),
    }


def add_transform(path: Path, of_cut: dict[int, dict[str, bytes]]) -> Bundle:
    """The bundle at `path` with the codec transform at some cuts."""
    plain = manifest.load(path).manifest
    cuts, files = list(plain.cuts), list(plain.files)
    for place, contents in of_cut.items():
        names = {}
        for name, data in contents.items():
            names[name] = f"cuts/{place}/{name}"
            (path / names[name]).parent.mkdir(parents=True, exist_ok=True)
            (path / names[name]).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            files.append(FileSpec(path=names[name], size_bytes=len(data), sha256=digest))
        spec = CodecSpec(
            name=CODEC,
            rates=(RateSpec(parameter=95),),
            encoder=names["encoder.onnx"],
            decoder=names["decoder.onnx"],
            tables=names["tables.npz"],
        )
        cuts[place] = msgspec.structs.replace(cuts[place], codecs=(*cuts[place].codecs, spec))
    manifest.save(msgspec.structs.replace(plain, cuts=tuple(cuts), files=tuple(files)), path)
    return manifest.load(path)


def walk(bundle: Bundle, count: int, seed: int = 0) -> list[Features]:
    """Features at cut 1 of a camera before which little moves."""
    spec = bundle.manifest.cuts[1]
    rng = np.random.default_rng(seed)
    tensor = rng.uniform(0, 60, (1, *spec.shape))
    found = []
    for _ in range(count):
        tensor = np.clip(tensor + rng.normal(0, 4, tensor.shape) * (rng.random(tensor.shape) < 0.1), 0, 255)
        found.append(Features(1, tensor.astype(spec.dtype)))
    return found
