"""The page in a real browser and as a process: what is drawn, that it fetches nothing, that it disturbs nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from runtime.config import BrokerConfig, CameraConfig
from runtime.counters import Counters
from runtime.datatypes import Result
from runtime.link import Link, open_link
from runtime.manifest import load
from runtime.simulation import Simulation, spread
from runtime.topics import Subtree
from tests.broker import Mosquitto
from tests.patience import PATIENCE_S

BOARD, BOX = Subtree("home", "d", "board"), Subtree("home", "n", "box")
NASTY = "<img src=x onerror=\"document.title='taken'\">"


def kinflow(*arguments: str | int | Path) -> list[str]:
    return [sys.executable, "-m", "runtime.cli", *map(str, arguments)]


def fetch(address: str, host: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def await_page(address: str, process: subprocess.Popen[Any]) -> bytes:
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s and process.poll() is None:
        try:
            return fetch(address)[1]
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the page did not come; exit code {process.poll()}")


@pytest.fixture(scope="module")
def site(mosquitto_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """The broker that the page looks at. Only one test tells it anything."""
    broker = Mosquitto(mosquitto_binary, tmp_path_factory.mktemp("site"))
    broker.restart()
    yield broker
    broker.kill()


@pytest.fixture(scope="module")
def page(site: Mosquitto, free_port: Callable[[], int]) -> Iterator[tuple[str, psutil.Process]]:
    """The page of site home on a real broker: its address and its process."""
    port = free_port()
    command = kinflow("ui", "--broker", f"{site.host}:{site.port}", "--port", port)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            await_page(f"http://127.0.0.1:{port}/", process)
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.terminate()
            _, said = process.communicate(timeout=PATIENCE_S)
    assert f"the page is at http://127.0.0.1:{port}" in said
    assert "Traceback" not in said
    assert process.returncode == 0


@pytest.fixture
def link(site: Mosquitto) -> Iterator[Link]:
    """What devices and nodes would publish by."""
    link = open_link(BrokerConfig(host=site.host, port=site.port), client_id="tells", counters=Counters())
    connected = threading.Event()
    link.on_connect(connected.set)
    link.start()
    assert connected.wait(PATIENCE_S)
    yield link
    link.close()


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium that can resolve no name, and writes down all that it asks for."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.fail("Chromium or its driver is not installed; run scripts/test, or apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900", *sandbox):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


class Seen:
    """What a reader sees and does, with patience."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self._browser = browser

    def until(self, truth: Callable[[], Any], what: str) -> Any:
        """Wait until `truth` holds; elements that are being drawn anew are looked for again."""
        return WebDriverWait(self._browser, PATIENCE_S, 0.2, [Exception]).until(
            lambda _: truth(), f"never seen: {what}"
        )

    def all(self, selector: str) -> list[WebElement]:
        return [found for found in self._browser.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]

    def words(self, selector: str, wanted: str) -> None:
        self.until(lambda: wanted in " ".join(found.text for found in self.all(selector)), f"{wanted!r} in {selector}")

    def click(self, selector: str, words: str = "") -> None:

        def clicked() -> bool:
            next(found for found in self.all(selector) if words in found.text).click()
            return True

        self.until(clicked, selector)

    def log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._browser.get_log(kind)  # type: ignore[no-untyped-call]
        return found

    def run(self, script: str) -> Any:
        return self._browser.execute_script(script)


def result(**changes: Any) -> bytes:
    box = {"label": "person", "score": 0.9, "box": [100, 100, 180, 300]}
    told = {"camera": "porch", "frame": 7, "task": "detect", "label": "2 person", "confidence": 0.9}
    told |= {"answer": {"boxes": [box, box], "presence": 0.9, "size": [640, 360]}, "tier": "edge", "exit": 2}
    return json.dumps({**told, "bytes_up": 1200, "age_ms": 31.0, "timings": {"segment0": 4.5}, **changes}).encode()


def tell_of_a_site(link: Link) -> None:
    for who, bundle in ((BOARD, "a" * 64), (Subtree("home", "n", "far"), "a" * 64), (BOX, "b" * 64)):
        link.publish(who.availability, b"online", qos=1, retain=True)
        link.publish(who.birth, json.dumps({"bundle": bundle, "kinflow": "0.1.0", "tier": "edge"}).encode(), qos=1)
    link.publish(BOARD.camera_status("porch"), b"online", qos=1, retain=True)
    counters = {'frames_dropped_total{camera="porch",reason="stale"}': 5, "jpeg_equivalent_frames_total": 1}
    link.publish(BOARD.stats, json.dumps({**counters, "jpeg_equivalent_bytes_total": 9000}).encode(), qos=1)
    link.publish(BOARD.plan, plan("transform:99 at cut 1", "start"), qos=1, retain=True)


def plan(words: str, why: str, rung: str = "full") -> bytes:
    told = {"plan": words, "why": f"{words}: {why}", "reason": "latency", "rung": rung, "cut": 1}
    return json.dumps({**told, "latency_p95_ms": 250.4, "bytes_a_frame": 4305, "goodput_kbits": 256.0}).encode()


def test_a_reader_clicks_through_the_page(
    page: tuple[str, psutil.Process], link: Link, browser: webdriver.Chrome
) -> None:
    address, process = page
    seen = Seen(browser)
    browser.get(address)
    seen.words(".kf-nothing", "No camera yet")

    tell_of_a_site(link)
    link.publish(BOARD.result("porch"), result(), qos=1)
    seen.words(".kf-camera", "2 person")
    seen.until(lambda: len(seen.all(".kf-camera svg rect[stroke]")) == 2, "two boxes")
    for words in ("porch", "board", "online", "edge", "exit 2", "31 ms", "1.2 kB up", "preview off"):
        seen.words(".kf-camera", words)
    assert not seen.all(".kf-nothing")
    assert not seen.all(".kf-camera img"), "there is no picture unless a device sends it"

    hostile = {"boxes": [{"label": NASTY, "score": 0.5, "box": [0, 0, 9, 9]}], "size": [640, 360]}
    link.publish(BOARD.result("porch"), result(label=NASTY, answer=hostile, degraded=NASTY, repeats=6), qos=1)
    seen.words(".kf-camera .kf-label", NASTY)
    seen.words(".kf-flags", "repeats frame 6")
    link.publish(BOARD.result("garden"), result(label="1 person", tier="device"), qos=1)
    seen.until(lambda: len(seen.all(".kf-camera")) == 2, "a second camera")

    picture = cv2.imencode(".jpg", np.full((90, 160, 3), 128, np.uint8))[1].tobytes()
    link.publish(BOARD.preview("porch"), picture)
    seen.until(lambda: seen.run("return document.querySelector('.kf-camera img').naturalWidth") == 160, "the preview")

    seen.click(".kf-camera", "porch")
    seen.words(".kf-dialog", "Where the time went")
    seen.words(".kf-dialog", "4.5 ms")
    seen.click(".kf-dialog .kf-close")
    seen.until(lambda: not seen.all(".kf-dialog"), "the dialog closed")

    seen.click(".q-tab", "Figures")
    seen.until(lambda: len(seen.all(".kf-chart canvas")) == 3, "three charts")
    seen.words(".kf-table", "a newer frame came first")
    seen.words(".kf-table", "31 ms")
    seen.words(".kf-plans", "transform:99 at cut 1")
    seen.words(".kf-plans", "250 ms / 31 ms")
    assert not seen.all(".kf-moves")
    why = f"7.4 kB would take 2,073 ms at 28 kbit/s, 2,282 ms in all, 900 ms allowed {NASTY}"
    link.publish(BOARD.plan, plan("transform:60 at cut 1", why, rung="smaller rate"), qos=1, retain=True)
    seen.words(".kf-moves", "2,282 ms in all, 900 ms allowed")
    seen.words(".kf-plans", "smaller rate")
    seen.click(".q-tab", "Machines")
    seen.words(".kf-warning", "box differs from the others")
    seen.words(".kf-machines", "aaaaaaaa")

    for wanted in ("light", "dark"):
        seen.click(f".kf-theme:not([aria-label='colours: {wanted}'])")
        seen.until(partial(seen.all, f".kf-theme[aria-label='colours: {wanted}']"), wanted)
        seen.until(partial(seen.run, IS_DARK if wanted == "dark" else f"{IS_DARK} == false"), f"{wanted} colours")

    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for name in ("Live", "Figures", "Machines"):
        seen.click(".q-tab", name)
        seen.until(lambda: seen.run("return document.documentElement.scrollWidth") == 390, f"{name} fits a phone")

    assert seen.run("return document.title") == "Kinflow", "no word from outside was run"
    assert [entry for entry in seen.log("browser") if entry["level"] == "SEVERE"] == []
    asked = [json.loads(entry["message"])["message"] for entry in seen.log("performance")]
    urls = {
        entry["params"]["request"]["url"] if "request" in entry["params"] else entry["params"]["url"]
        for entry in asked
        if entry["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")
    }
    assert {urlsplit(url).hostname for url in urls if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert len(urls) > 10
    peers = {end.ip for one in process.net_connections() for end in (one.laddr, one.raddr) if end}
    assert peers == {"127.0.0.1"}, "it listens and speaks on the loopback only"


IS_DARK = "return (getComputedStyle(document.body).backgroundColor == 'rgb(15, 19, 23)')"


def test_only_names_of_this_machine_are_answered(page: tuple[str, psutil.Process]) -> None:
    address, _ = page
    assert fetch(address)[0] == 200
    assert fetch(address, "localhost:9000")[0] == 200, "as through a tunnel"
    assert fetch(address, "attacker.example")[0] == 400, "a name from outside that was bent to our address"
    assert fetch(f"{address}/preview/nobody/porch")[0] == 404
    assert fetch(f"{address}/preview/board/porch%2F..")[0] == 404


def test_a_node_serves_the_page_beside_it_and_ends_it(
    shared_bundle: Path, mosquitto: Any, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port = free_port()
    config = tmp_path / "node.toml"
    broker = f'[broker]\nhost = "{mosquitto.host}"\nport = {mosquitto.port}\n'
    config.write_text(f'bundle = "{shared_bundle}"\nid = "box"\n{broker}[ui]\nport = {port}\n', "utf-8")
    with subprocess.Popen(kinflow("node", "--config", config, "--ui"), stderr=subprocess.PIPE, text=True) as node:
        assert b"Kinflow" in await_page(f"http://127.0.0.1:{port}/", node)
        children = psutil.Process(node.pid).children()
        assert len(children) == 1
        node.terminate()
        node.communicate(timeout=PATIENCE_S)
    assert node.returncode == 0
    assert not psutil.wait_procs(children, PATIENCE_S)[1]


def test_the_page_ends_when_who_started_it_is_killed(
    shared_bundle: Path, mosquitto: Any, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port = free_port()
    config = tmp_path / "node.toml"
    broker = f'[broker]\nhost = "{mosquitto.host}"\nport = {mosquitto.port}\n'
    config.write_text(f'bundle = "{shared_bundle}"\n{broker}[ui]\nport = {port}\n', "utf-8")
    with subprocess.Popen(kinflow("node", "--config", config)) as node:
        await_page(f"http://127.0.0.1:{port}/", node)
        children = psutil.Process(node.pid).children()
        node.kill()
    assert not psutil.wait_procs(children, PATIENCE_S)[1]


def test_a_node_whose_page_has_no_place_serves_all_the_same(
    shared_bundle: Path, mosquitto: Any, page: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    taken = urlsplit(page[0]).port
    config = tmp_path / "node.toml"
    broker = f'[broker]\nhost = "{mosquitto.host}"\nport = {mosquitto.port}\n'
    config.write_text(f'bundle = "{shared_bundle}"\nid = "box"\n{broker}[ui]\nport = {taken}\n', "utf-8")
    online = threading.Event()
    link = open_link(BrokerConfig(host=mosquitto.host, port=mosquitto.port), client_id="sees", counters=Counters())
    link.subscribe(BOX.availability, lambda topic, payload: online.set() if payload == b"online" else None)
    link.start()
    with subprocess.Popen(kinflow("node", "--config", config), stderr=subprocess.PIPE, text=True) as node:
        assert online.wait(PATIENCE_S)
        node.terminate()
        _, said = node.communicate(timeout=PATIENCE_S)
    link.close()
    assert "going on without the page" in said
    assert node.returncode == 0


def test_the_page_of_a_sim_is_there_before_its_first_frame(shared_bundle: Path, photos: Path) -> None:
    camera = CameraConfig(kind="replay", source=str(photos), realtime=False, frames=6)
    pages: list[tuple[int, bytes]] = []
    simulation = Simulation(
        load(shared_bundle), camera, tiers=["device", "edge"], cameras=3, on_page=lambda at: pages.append(fetch(at))
    )
    lines = []
    with simulation:
        for line in simulation.lines():
            assert len(pages) == 1
            lines.append(line)
    assert pages[0][0] == 200
    frames = {name: {line.frame for line in lines if line.camera == name} for name in ("cam0", "cam1", "cam2")}
    assert frames == {"cam0": {*range(6)}, "cam1": {*range(13, 19)}, "cam2": {*range(26, 32)}}
    assert all(isinstance(line, Result) for line in lines)


def test_cameras_are_spread_over_the_source(photos: Path) -> None:
    camera = CameraConfig(kind="replay", source=str(photos), first_frame=4)
    assert spread(camera, 1) == {"cam0": camera}
    starts = [one.first_frame for one in spread(camera, 4).values()]
    assert starts == [4, 13, 22, 31]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ui"], "name either"),
        (["ui", "--broker", "here"], "HOST:PORT"),
        (["ui", "--broker", "127.0.0.1:1", "--site", "a/b"], "--site 'a/b'"),
        (["ui", "--broker", "127.0.0.1:1", "--host", "203.0.113.1"], "cannot be served on 203.0.113.1"),
        (["ui", "--config", "/nowhere.toml"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(arguments: list[str], words: str) -> None:
    done = subprocess.run(kinflow(*arguments), capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == os.EX_CONFIG
    assert words in done.stderr
    assert "Traceback" not in done.stderr
