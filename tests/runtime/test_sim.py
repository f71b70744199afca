"""The whole system as processes with a real broker between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime import cli, manifest
from runtime.config import CameraConfig
from runtime.datatypes import Dropped, ExitOutput, Result
from runtime.sim import run
from runtime.simulation import Simulation
from runtime.task_classify import Classification

FIELDS = {"frame", "label", "confidence", "tier", "exit", "codec", "bytes_up", "age_ms", "timings", "degraded"}


SCENARIO = """
[link]
delay = "5ms"
[[phase]]
name = "good"
rate = "8mbit"
duration = "1500ms"
[[phase]]
outage = "refused"
duration = "500ms"
[[phase]]
name = "kills"
loss = "1%"
duration = "{kills}"
[[kill]]
what = "broker"
at = "2500ms"
down = "200ms"
mid_packet = 1.0
[[stall]]
at = "500ms"
lasts = "300ms"
"""
KILL_OF_THE_EDGE = """
[[kill]]
what = "edge"
at = "4s"
down = "200ms"
"""


def kinflow(*arguments: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)


def test_three_tiers_over_mosquitto_agree_with_the_whole_chain_bit_for_bit(
    shared_bundle: Path,
    photos: Path,
    mosquitto: Any,
    whole_answers: Callable[[Path, Path], list[ExitOutput]],
) -> None:
    broker = f"{mosquitto.host}:{mosquitto.port}"
    done = kinflow("sim", shared_bundle, "--source", photos, "--broker", broker, "--no-exits", "--fast", "--json")
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 40
    assert all(set(line) >= FIELDS for line in lines)
    whole = whole_answers(shared_bundle, photos)
    for line in lines:
        assert (line["tier"], line["exit"], line["degraded"]) == ("cloud", 3, None)
        answer = whole[line["frame"]].answer
        assert isinstance(answer, Classification)
        assert line["answer"]["label_index"] == answer.label_index
        assert [score for _, score in line["answer"]["topk"]] == [score for _, score in answer.topk]
    summary = last["summary"]
    assert summary["frames"] == summary["answered"] == summary["tiers"]["cloud"]["frames"] == 40
    assert summary["bytes_up_per_frame"] == sum(line["bytes_up"] for line in lines) / 40
    assert set(summary["jpeg_bytes_per_frame"]) == {"75", "90"}


@pytest.mark.parametrize("tiers", ["device", "device,edge"])
def test_fewer_tiers_and_the_embedded_broker(shared_bundle: Path, photos: Path, tiers: str) -> None:
    done = kinflow("sim", shared_bundle, "--source", photos, "--tiers", tiers, "--no-exits", "--fast", "--frames", "9")
    assert done.returncode == 0, done.stderr
    last = tiers.rpartition(",")[2]
    assert done.stdout.count(f" {last} ") >= 9
    assert "9 frames, 9 answered" in done.stdout
    assert "JPEG q75" in done.stdout


def test_the_broker_dies_and_comes_back_and_every_frame_is_accounted_for(
    shared_bundle: Path, photos: Path, mosquitto: Any
) -> None:
    bundle = manifest.load(shared_bundle)
    camera = CameraConfig(kind="replay", source=str(photos), max_fps=50, loop=True, frames=400)
    simulation = Simulation(bundle, camera, broker=(mosquitto.host, mosquitto.port), early_exits=False, budget_ms=2000)
    seen: list[Result | Dropped] = []

    def watch(line: Result | Dropped) -> None:
        seen.append(line)
        if len(seen) == 50:
            mosquitto.kill()
        elif len(seen) == 80:
            mosquitto.restart()

    summary = run(simulation, bundle, camera, watch)
    results = [line for line in seen if isinstance(line, Result)]
    # A busy machine answers some frames by itself, and says so; none of them because the broker were away.
    assert {"cloud"} <= {result.tier for result in results[:45]}
    assert "offline" not in {result.degraded for result in results[:45]}
    assert "offline" in summary.degraded
    back = [result for result in results[80:] if result.tier == "cloud" and result.degraded is None]
    assert len(back) > 100, summary
    assert "offline" not in {result.degraded for result in results[-50:]}
    captured = simulation.counters["device"]['frames_captured_total{camera="cam0"}']
    assert summary.frames == captured == 400
    assert summary.answered + sum(summary.dropped.values()) == 400
    # The nodes came back by themselves as well: nothing else could have answered.
    assert simulation.counters["edge"]["link_connects_total"] >= 2
    assert simulation.counters["cloud"]["link_connects_total"] >= 2


def test_sigterm_drains_and_leaves_with_zero(shared_bundle: Path, photos: Path, tmp_path: Path, mosquitto: Any) -> None:
    common = f'bundle = "{shared_bundle}"\n'
    broker = f'[broker]\nhost = "{mosquitto.host}"\nport = {mosquitto.port}\n'
    (tmp_path / "node.toml").write_text(common + 'id = "box"\n' + broker)
    (tmp_path / "device.toml").write_text(
        common + f'id = "cam"\n{broker}[camera.front]\nkind = "replay"\nsource = "{photos}"\nloop = true\n'
    )
    processes = {}
    for tier in ("node", "device"):
        command = [sys.executable, "-m", "runtime.cli", tier, "--config", str(tmp_path / f"{tier}.toml"), "--json"]
        processes[tier] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    device, node = processes["device"], processes["node"]
    assert device.stdout is not None
    assert node.stdout is not None
    for _ in range(5):
        assert json.loads(device.stdout.readline())["label"]
    for process in (device, node):
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - start < 5
    last = json.loads(device.stdout.read().splitlines()[-1])
    assert last["event"] == "stopped"
    assert last["counters"]['frames_captured_total{camera="front"}'] >= 5
    assert json.loads(node.stdout.read())["tier"] == "cloud"
    device.stdout.close()
    node.stdout.close()


def test_wrong_things_end_with_one_sentence_and_their_exit_code(
    tmp_path: Path, tiny_bundle: Path, shared_bundle: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tiny_bundle / "exits/1.onnx").unlink()
    typo = tmp_path / "typo.toml"
    typo.write_text('bundel = "x"\n[broker]\nhost = "h"\n')
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('bundle = "x"\n[broker]\nhost = "h"\nport = "1883"\n')
    cases: list[tuple[list[str | Path], int, str]] = [
        (["sim", tiny_bundle, "--source", photos], os.EX_DATAERR, "exits/1.onnx is missing from the bundle"),
        (["sim", tmp_path, "--source", photos], os.EX_DATAERR, "is not a bundle"),
        (["sim", shared_bundle, "--source", tmp_path / "no.mp4", "--tiers", "device"], os.EX_NOINPUT, "no.mp4"),
        (["sim", shared_bundle, "--source", photos, "--tiers", "cloud"], os.EX_CONFIG, "choose device"),
        (["sim", shared_bundle, "--source", photos, "--codec", "gif", "--tiers", "device,edge"], os.EX_CONFIG, "gif"),
        (["sim", shared_bundle, "--source", photos, "--broker", "here"], os.EX_CONFIG, "HOST:PORT"),
        (["sim", shared_bundle, "--source", photos, "--variant", "1"], os.EX_CONFIG, "variant: 1 is not in the bundle"),
        (["device", "--config", typo], os.EX_CONFIG, "bundel: unknown key; did you mean bundle?"),
        (["device", "--config", wrong], os.EX_CONFIG, "broker.port: expected `int`"),
        (["device", "--config", tmp_path / "none.toml"], os.EX_CONFIG, "cannot be read"),
        (["device"], os.EX_USAGE, "--config"),
        (["divice"], os.EX_USAGE, "divice"),
    ]
    for arguments, code, words in cases:
        assert cli.run([str(argument) for argument in arguments]) == code, arguments
        said = capfd.readouterr().err
        assert words in said, (arguments, said)
        assert "Traceback" not in said
        assert said.count("rror: ") <= 2
    # The program itself leaves with what `run` returns.
    for arguments, code, words in cases[0], cases[-1]:
        done = kinflow(*arguments)
        assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rate", "fast"], "rate: 'fast' is no rate"),
        (["--rate", "1mbit", "--fast"], "leave out --fast"),
        (["--scenario", "typo.toml"], "phaze: unknown key; did you mean phase?"),
        (["--scenario", "none.toml"], "none.toml cannot be read"),
        (["--scenario", "kills.toml", "--tiers", "device"], "kills the edge node, which does not run"),
        (["--scenario", "kills.toml", "--loss", "1%"], "leave them or --scenario out"),
        (["--scenario", "kills.toml", "--broker", "127.0.0.1:1"], "the scenario kills the broker"),
        (["--broker", "no/such/mosquitto"], "or give the path of a Mosquitto"),
        (["--objective", "optimize"], "write it as key=value pairs"),
        (["--objective", "optimise=bytes"], "objective.optimise: unknown key; did you mean optimize?"),
        (["--objective", "latency_p95_ms=soon"], "objective.latency_p95_ms: expected `float"),
        (["--objective", "optimize=latency,latency_p95_ms=9"], "latency has a limit already"),
    ],
)
def test_wrong_scenarios_are_told_before_anything_starts(
    shared_bundle: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    (tmp_path / "kills.toml").write_text(SCENARIO.format(kills="9s") + KILL_OF_THE_EDGE)
    (tmp_path / "typo.toml").write_text('[[phaze]]\nduration = "1s"\n')
    monkeypatch.chdir(tmp_path)
    code = cli.run(["sim", str(shared_bundle), "--source", str(photos), *options])
    assert code == os.EX_CONFIG
    assert words in capsys.readouterr().err


def test_help_is_quick_and_names_every_command() -> None:
    done = kinflow("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("export", "bundle", "device", "node", "sim", "demo"))


def test_a_reader_that_has_enough_ends_the_run(shared_bundle: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "runtime.cli", "sim", str(shared_bundle), "--source", str(photos)]
    options = ["--loop", "--fast", "--json", "--tiers", "device"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        assert json.loads(done.stdout.readline())["label"]
        done.stdout.close()
        assert done.wait(20) == 0
        assert "Traceback" not in done.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_sim(shared_bundle: Path, photos: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "runtime.cli", "sim", str(shared_bundle), "--source", str(photos), "--loop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert done.stdout.readline()
        children = psutil.Process(done.pid).children()
        assert len(children) == 4
        done.send_signal(number)
        rest = done.stdout.read()
        code = done.wait(20)
    if number != signal.SIGKILL:
        assert code == 0
        assert "frames, " in rest, "what came so far is summed up"
    assert not psutil.wait_procs(children, 15)[1]


@pytest.mark.parametrize("own", ["embedded", "mosquitto"])
def test_a_scenario_runs_to_its_end_and_every_frame_is_accounted_for(
    shared_bundle: Path, photos: Path, tmp_path: Path, mosquitto_binary: str, own: str
) -> None:
    """Kills a broker of either kind; the node above, which a broker is nothing to, once."""
    path = tmp_path / "scenario.toml"
    options: list[str | Path] = ["--scenario", path, "--max-fps", "20", "--no-exits", "--budget-ms", "700", "--json"]
    if own == "mosquitto":
        path.write_text(SCENARIO.format(kills="9s") + KILL_OF_THE_EDGE)
        options += ["--broker", mosquitto_binary]
        back_at = 20 * 4.2
    else:
        path.write_text(SCENARIO.format(kills="6s"))
        back_at = 20 * 2.7
    done = kinflow("sim", shared_bundle, "--source", photos, *options)
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    summary = last["summary"]
    good, refused, kills = summary["phases"]
    assert [phase["name"] for phase in summary["phases"]] == ["good", "refused", "kills"]
    assert sum(phase["frames"] for phase in summary["phases"]) == len(lines)
    assert summary["frames"] == len(lines) + sum(
        count for reason, count in summary["dropped"].items() if reason in ("stale", "stopping")
    ) - sum(line.get("dropped") in ("stale", "stopping") for line in lines)
    assert good["in_time"] > 0
    assert good["bytes_up"] > 0
    assert refused["bytes_up"] == refused["in_time"] == 0
    # "link": it was reset while a frame was handed to it.
    assert refused["degraded"].keys() <= {"offline", "deadline", "link"}
    assert kills["degraded"]["offline"] > 0
    assert any(line.get("tier") == "cloud" and line["frame"] > back_at for line in lines), "the killed ones came back"
    indices = [line["frame"] for line in lines]
    assert not any(11 <= index <= 15 for index in indices), "the camera stalled"
    assert "Traceback" not in done.stderr


def test_a_device_that_plans_tells_every_plan(shared_bundle: Path, photos: Path) -> None:
    options = ["--objective", "optimize=agreement, latency_p95_ms=900", "--rate", "2mbit", "--frames", "12"]
    plain = kinflow("sim", shared_bundle, "--source", photos, *options, "--tiers", "device,edge")
    assert plain.returncode == 0, plain.stderr
    assert "   0.0 s  full: " in plain.stdout
    assert "plans, and for how long" in plain.stdout
    done = kinflow("sim", shared_bundle, "--source", photos, *options, "--tiers", "device,edge", "--json")
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    plans = [line for line in lines if line.get("event") == "plan"]
    assert plans[0]["at_s"] == 0
    assert "ms of 900 allowed" in plans[0]["why"]
    assert last["summary"]["plans"].keys() == {plan["plan"] for plan in plans}
    assert len(lines) == 12 + len(plans)


def test_a_fixed_link_delays_every_answer_from_above(shared_bundle: Path, photos: Path) -> None:
    options = ["--delay", "60ms", "--rate", "2mbit", "--frames", "12", "--no-exits", "--tiers", "device,edge", "--json"]
    done = kinflow("sim", shared_bundle, "--source", photos, *options)
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    above = [line for line in lines if line["tier"] == "edge"]
    assert above
    assert all(line["age_ms"] >= 120 for line in above)
    (phase,) = last["summary"]["phases"]
    assert phase["name"] == "rate 2mbit, delay 60ms"
    assert phase["frames"] == len(lines) == 12
