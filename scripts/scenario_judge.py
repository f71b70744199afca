"""What answers are worth: each is held against the whole model's on the same frame, as applications see both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from runtime import cascade
from runtime.camera_replay import ReplayCamera
from runtime.config import CameraConfig
from runtime.datatypes import Answer, Features, Result
from runtime.manifest import Bundle
from runtime.policy import ExitPolicy
from runtime.preprocess import prepare
from runtime.segment import load_segments
from runtime.task import open_task
from runtime.task_classify import Classification
from runtime.task_detect import Box, Detections


class WholeModel:
    """The answers of a bundle's whole model, not split, to all frames of a source.

    The bundle's own, quantized as it is: the float model that it was made of is not in it.
    """

    def __init__(self, bundle: Bundle, camera: CameraConfig) -> None:
        self._bundle = bundle
        self._task = open_task(bundle)
        tier = cascade.Tier(bundle, *load_segments(bundle, 0, len(bundle.manifest.segments) - 1, threads=1))
        policy = ExitPolicy.of(bundle, early=False)
        once = msgspec.structs.replace(camera, realtime=False, loop=False, max_fps=None)
        self._said: list[Answer] = []
        for frame in ReplayCamera("cam0", once).frames():
            features = Features(0, prepare(frame.pixels, bundle.manifest.preprocess))
            answer = cascade.run([features], tier, policy)[0].answer
            assert answer is not None, "the last exit always answers"
            # By the way that an application's answer takes, so that both are rounded and cut off alike.
            self._said.append(self.read(self._task.told(answer.answer, *frame.pixels.shape[:2])))

    def __len__(self) -> int:
        return len(self._said)

    def read(self, told: Mapping[str, Any]) -> Answer:
        """The answer of a Result; boxes stay in pixels of the camera's frame, where they overlap as anywhere else."""
        if "topk" in told:
            return Classification(topk=((told["label_index"], 1.0),))
        if told["boxes"] is None:
            return Detections(boxes=None, presence=told["presence"])
        labels = self._bundle.labels
        boxes = tuple(Box(labels.index(box["label"]), box["score"], *box["box"]) for box in told["boxes"])
        return Detections(boxes=boxes, presence=told["presence"])

    def judge(self, result: Result) -> tuple[int, int]:
        """What a Result has in common with the whole model's answer, and all there is (`Task.compare`)."""
        return self._task.compare(self.read(result.answer), self._said[result.frame % len(self._said)])
