"""Runs inside the throw-away environment of scripts/build_pedestrian, which has TensorFlow and tf2onnx.

    python pedestrian_heads.py GRAPH.pb FRAMES.npy OUT

Writes OUT/heads.onnx (pixels scaled to -1..1 → encoded boxes and logits) and OUT/reference.npz: the anchors, and what
TensorFlow itself answers for the frames, uint8 (n, 300, 300, 3) RGB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 300
SCALED = "Preprocessor/sub:0"  # behind the loop that resizes; what the network reads
HEADS = ("concat:0", "concat_1:0")  # encoded boxes and logits
ANCHORS = "Concatenate/concat:0"
ANSWERS = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")


def main(graph: Path, frames: Path, out: Path) -> None:
    """Convert the heads, and ask TensorFlow."""
    command = [sys.executable, "-m", "tf2onnx.convert", "--graphdef", str(graph), "--opset", "17"]
    command += ["--inputs", f"{SCALED}[1,{SIZE},{SIZE},3]", "--inputs-as-nchw", SCALED]
    command += ["--outputs", ",".join(HEADS), "--output", str(out / "heads.onnx")]
    subprocess.run(command, check=True)
    np.savez(out / "reference.npz", **ask(graph, np.load(frames)))


def ask(path: Path, frames: Any) -> dict[str, Any]:
    """The frozen graph's anchors, and its answers frame by frame."""
    import tensorflow as tf  # type: ignore[import-untyped]

    tf = tf.compat.v1
    frozen = tf.GraphDef()
    frozen.ParseFromString(path.read_bytes())
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        tf.import_graph_def(frozen, name="")
        wanted = [graph.get_tensor_by_name(f"{name}:0") for name in ANSWERS]
        anchors = session.run(ANCHORS, {"image_tensor:0": frames[:1]})
        answers = [session.run(wanted, {"image_tensor:0": frame[np.newaxis]}) for frame in frames]
    stacked = [np.concatenate(values) for values in zip(*answers, strict=True)]
    return dict(zip(ANSWERS, stacked, strict=True)) | {"anchors": anchors}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
