from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from export.cli import export_command
from export.pipeline import Exported
from runtime.bundle_tool import bundle_group
from runtime.errors import KinflowError
from runtime.manifest import load


def run(*arguments: object) -> Result:
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments])


def sentence(*arguments: object) -> tuple[int, str]:
    """The exit code and the one sentence that `kinflow` would leave with."""
    result = run(*arguments)
    assert isinstance(result.exception, (KinflowError, SystemExit)), result.exception
    if isinstance(result.exception, KinflowError):
        assert "\n" not in str(result.exception)
        return result.exception.exit_code, str(result.exception)
    return {2: 64}[result.exit_code], result.stderr.splitlines()[-1]


def test_export_ends_with_what_was_written(net: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = run(f"{net}:plain", "--frames", photos, "--out", out, "--agreement", 0.8)
    assert result.exit_code == 0, result.exception
    assert "cut  after" in result.stdout
    assert "wrote" in result.stdout
    for stage in ("open", "simplify", "quantize", "slice", "fit exit heads", "prove on 12 held-back frames"):
        assert stage in result.stderr
    shown = CliRunner().invoke(bundle_group, ["show", str(out)])
    assert shown.exit_code == 0
    assert "0.8" in shown.stdout


def test_cuts_are_listed_without_frames(net: str) -> None:
    result = run(f"{net}:with_exits", "--list-cuts", "--json")
    rows = json.loads(result.stdout)
    assert [row["cut"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["cut"] for row in rows if row["chosen"]] == [1, 3]
    assert all(row["int8_before_ms"] > 0 and row["float_after_ms"] >= 0 for row in rows)
    table = run(f"{net}:with_exits", "--list-cuts", "--float")
    assert "float ms before + after" in table.stdout
    assert "int8" not in table.stdout


def test_cuts_can_be_given_and_a_bundle_that_is_there_is_replaced(
    net: str, photos: Path, exported: Exported, tmp_path: Path
) -> None:
    out = shutil.copytree(exported.bundle.path, tmp_path / "b")
    options = ["--cuts", "2", "--json", "--tiers", "a,b", "--force"]
    manifest = json.loads(run(f"{net}:plain", "--frames", photos, "--out", out, *options).stdout)["manifest"]
    assert manifest["name"] == "net"
    assert len(manifest["segments"]) == 2
    assert [tier["name"] for tier in manifest["tiers"]] == ["a", "b"]
    assert len(load(out).manifest.segments) == 2
    assert not (out / "segments" / "2.onnx").exists()


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("{dir}/missing.onnx", 65, "does not exist"),
        ("{dir}/text.onnx", 65, "cannot be read as an ONNX model"),
        ("{dir}/two.onnx", 65, "has 2 inputs"),
        ("{dir}/open.onnx", 65, "add --size"),
        ("{dir}/map.onnx", 65, "Kinflow exports classifiers"),
        ("{dir}/missing.py:make", 65, "does not exist"),
        ("{net}", 65, "needs the name of a function"),
        ("{net}:nothing", 65, "has no function 'nothing'"),
        ("{net}:no_module", 65, "returned a int"),
        ("{net}:raises", 65, "by zero (net.py, line"),
        ("{net}:broken", 65, "does not take float input of shape"),
        ("{dir}", 65, "holds no config.json"),
        ("{dir}/notes.txt", 65, "neither an .onnx file nor FILE.py:FACTORY"),
    ],
)
def test_a_model_that_cannot_be_used(model: str, code: int, words: str, net: str, photos: Path, tmp_path: Path) -> None:
    write_broken_models(tmp_path)
    found = sentence(model.format(dir=tmp_path, net=net), "--frames", photos, "--out", tmp_path / "out")
    assert found[0] == code
    assert words in found[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 64, "--frames"),
        (["--frames", "{photos}"], 64, "--out"),
        (["--frames", "{photos}", "--out", "{out}", "--cuts", "block 77"], 78, "no cut 'block 77'"),
        (["--frames", "nowhere", "--out", "{out}"], 66, "does not exist"),
        (["--frames", "{photos}", "--out", "{out}", "--tiers", "a,a"], 64, "different names"),
        (["--frames", "{photos}", "--out", "{out}", "--size", "big"], 64, "is no size"),
        (["--frames", "{photos}", "--out", "{out}", "--variants", "many"], 64, "neither none nor a number"),
        (["--frames", "{photos}", "--out", "{out}", "--mean", "1,2"], 64, "one number or three"),
        (["--frames", "{photos}", "--out", "{out}", "--std", "0"], 64, "must not be 0"),
        (["--frames", "{photos}", "--out", "{out}", "--std", "1", "--scale", "1"], 64, "say the same"),
        (["--frames", "{photos}", "--out", "{out}", "--target", "6502"], 64, "--target"),
    ],
)
def test_arguments_that_cannot_be_used(
    arguments: list[str], code: int, words: str, net: str, photos: Path, tmp_path: Path
) -> None:
    given = [argument.format(photos=photos, out=tmp_path / "out") for argument in arguments]
    found = sentence(f"{net}:plain", *given)
    assert found[0] == code
    assert words in found[1]


def test_an_onnx_file_in_nhwc_with_open_dimensions_and_weights_beside_it(photos: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = {
        "w1": generator.normal(0, 0.2, (8, 3, 3, 3)),
        "w2": generator.normal(0, 0.2, (8, 8, 3, 3)),
        "w3": generator.normal(0, 1, (8, 5)),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w1"], ["a"], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "w3"], ["g"]),
        helper.make_node("Softmax", ["g"], ["y"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "nhwc",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "h", "w", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = tmp_path / "nhwc.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = run(path, "--size", "30x40", "--frames", photos, "--out", tmp_path / "b", "--json", "--scale", "0.0078")
    assert result.exit_code == 0, result.exception
    manifest = json.loads(result.stdout)["manifest"]
    assert (manifest["preprocess"]["height"], manifest["preprocess"]["width"]) == (30, 40)
    assert manifest["proof"]["parity_max_difference"] == 0
    assert CliRunner().invoke(bundle_group, ["verify", str(tmp_path / "b")]).exit_code == 0


def write_broken_models(directory: Path) -> None:
    def model(name: str, inputs: list[list[int | str]], outputs: list[int | str]) -> None:
        names = [f"x{place}" for place in range(len(inputs))]
        node = helper.make_node("Sum", names, ["y"])
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(names, inputs, strict=True)
        ]
        graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(made, directory / name)

    image: list[int | str] = [1, 3, 8, 8]
    model("two.onnx", [image, image], image)
    model("open.onnx", [["n", 3, "h", "w"]], ["n", 3, "h", "w"])
    model("map.onnx", [image], image)
    (directory / "text.onnx").write_text("this is no model")
    (directory / "notes.txt").write_text("nor is this")
