"""The page itself, drawn by NiceGUI, which only this module imports: what `ui_state` knows, as `ui_view` says it.

Messages wait in a queue that the link's thread fills and the page's loop empties, so that neither waits for the other.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from html import escape
from importlib.resources import files
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request, Response
from nicegui import app as nicegui_app
from nicegui import ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from runtime import ui_charts, ui_plan_view, ui_view
from runtime.link import Link
from runtime.ui_state import Camera, Site

TICK_S = 0.15
SLOW_S = 1.0  # what adds up over seconds is drawn anew so often
MOST_WAITING = 20_000  # messages; of more the oldest go
LOOPBACK = ("127.0.0.1", "localhost")
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#4355c9"/>'
    '<path d="M10 7v18M22 7L11 16l11 9" stroke="#fff" stroke-width="3.4" fill="none" stroke-linecap="round"/></svg>'
)
# Nothing may come from outside or go there, whatever a message or a library asks for.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss:; frame-ancestors 'none'"
)
TABS = LIVE, FIGURES, MACHINES = ("Live", "Figures", "Machines")
THEMES: dict[str, tuple[bool | None, str]] = {
    "auto": (None, "brightness_auto"),
    "light": (False, "light_mode"),
    "dark": (True, "dark_mode"),
}


class Board:
    """What all open pages show: the site, and the messages that it has not heard yet."""

    def __init__(self, site: str, link: Link, broker: str) -> None:
        self.site = Site(site)
        self.link = link
        self.broker = broker
        self._waiting: deque[tuple[str, bytes, float]] = deque(maxlen=MOST_WAITING)

    def put(self, topic: str, payload: bytes) -> None:
        """Take a message in, on the link's thread."""
        self._waiting.append((topic, payload, time.monotonic()))

    def drain(self) -> None:
        """Let the site hear what waits."""
        while self._waiting:
            self.site.hear(*self._waiting.popleft())


class _CameraCard:
    """A camera on the page: picture, boxes, answer."""

    def __init__(self, camera: Camera, on_open: Callable[[Camera], None] | None) -> None:
        self._camera = camera
        self._previews = 0
        self._shape = ""
        self._title = _html("kf-title")
        with ui.element("div").classes("kf-picture") as self._picture:
            self._image = ui.element("img").props('alt=""')
            self._image.set_visibility(False)
            self._drawing = _html("kf-drawing")
            self._off = _html("kf-off")
            self._flags = _html("kf-flags")
        self._said = _html("kf-said")
        if on_open is not None:
            self._off.content = "preview off"

    def show(self, board: Board, now_s: float) -> None:
        """Draw what is new."""
        camera, site = self._camera, board.site
        self._title.content = ui_view.title(camera, site.machines.get(("d", camera.device)))
        if camera.size is not None:
            width, height = camera.size
            shape = f"aspect-ratio: {min(2.4, max(0.6, width / height)):.4f}"
            if shape != self._shape:
                self._shape = shape
                self._picture.style(shape)
        if camera.previews != self._previews:
            self._previews = camera.previews
            self._image.props["src"] = f"/preview/{camera.device}/{camera.name}?n={camera.previews}"
            self._image.set_visibility(True)
            self._off.set_visibility(False)
        self._drawing.content = ui_view.drawing(camera, site.tiers)
        self._said.content = ui_view.caption(camera, site.tiers)
        self._flags.content = ui_view.flags(camera, now_s)


class _Page:
    """One open page."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._slow_s = 0.0
        self._cards: dict[tuple[str, str], _CameraCard] = {}
        self._opened: tuple[Camera, _CameraCard, ui.html] | None = None
        self._theme = ui.dark_mode(None)
        with ui.element("main").classes("kf-page"):
            self._top()
            with ui.tabs(on_change=self._turned).classes("kf-tabs").props("align=left no-caps dense") as self._tabs:
                for name in TABS:
                    ui.tab(name)
            with ui.tab_panels(self._tabs, value=LIVE, animated=False).classes("kf-panels"):
                with ui.tab_panel(LIVE):
                    self._live()
                with ui.tab_panel(FIGURES):
                    self._figures()
                with ui.tab_panel(MACHINES):
                    self._machines = _html("kf-machines")
        with ui.dialog() as self._dialog, ui.element("div").classes("kf-dialog") as self._inside:
            pass
        self._dialog.on("hide", self._closed)
        ui.timer(TICK_S, self._tick)

    def _top(self) -> None:
        with ui.element("header").classes("kf-top"):
            _html("kf-mark").content = "Kinflow"
            _html("kf-dim kf-site").content = escape(self._board.site.name)
            ui.element("span").classes("kf-space")
            self._link = _html("kf-link")
            button = ui.button(icon=THEMES["auto"][1], color=None).props('flat round dense aria-label="colours: auto"')
            button.classes("kf-theme").on_click(partial(self._next_theme, button))

    def _next_theme(self, button: ui.button) -> None:
        names = list(THEMES)
        now = next(name for name, (value, _) in THEMES.items() if value is self._theme.value)
        name = names[(names.index(now) + 1) % len(names)]
        self._theme.value, icon = THEMES[name]
        button.props(f'icon={icon} aria-label="colours: {name}"')

    def _live(self) -> None:
        self._tiles = _html("kf-tiles")
        self._nothing = _html("kf-card kf-nothing")
        self._nothing.content = (
            '<h2>No camera yet</h2><p class="kf-empty">Cameras appear here by themselves as soon as a device of this '
            "site has reached the broker. Start one with <code>kinflow device --config device.toml</code>.</p>"
        )
        self._grid = ui.element("div").classes("kf-grid")

    def _figures(self) -> None:
        with ui.element("div").classes("kf-figures"):
            self._shares = _chart("Who answers", "share of the answers, each point over 5 seconds")
            self._traffic = _chart(
                "What goes up", "bytes a second, every byte of MQTT counted, each point over 5 seconds"
            )
            self._confidences = _chart("How sure the answers are", "answers of the last minute by confidence")
            with _card("How old the answers are", "from the grab of a frame to its answer, last minute"):
                self._ages = _html("kf-table")
            with _card("What devices plan", "each device with an objective, by its own words").classes("kf-across"):
                self._plans = _html("kf-table")
            with _card("What was lost", "since each device or node started").classes("kf-across"):
                self._losses = _html("kf-table")

    def _open(self, camera: Camera) -> None:
        self._inside.clear()
        with self._inside:
            close = ui.button(icon="close", color=None, on_click=self._dialog.close)
            close.props('flat round dense aria-label="close"').classes("kf-close")
            card = _CameraCard(camera, None)
            more = _html("kf-details")
        self._opened = (camera, card, more)
        self._dialog.open()
        self._tick()

    def _closed(self) -> None:
        self._opened = None
        self._inside.clear()

    def _turned(self) -> None:
        self._slow_s = 0.0

    def _tick(self) -> None:
        board, now_s = self._board, time.monotonic()
        board.drain()
        slow = now_s >= self._slow_s
        if slow:
            self._slow_s = now_s + SLOW_S
            where = f"broker {board.broker}"
            self._link.content = ui_view.state(where if board.link.connected else f"no {where}", board.link.connected)
        turned = self._tabs.value
        if turned == LIVE:
            self._show_live(now_s, slow)
        elif slow and turned == FIGURES:
            self._show_figures(now_s)
        elif slow:
            self._machines.content = ui_view.machines(board.site, now_s)
        if self._opened is not None:
            camera, card, more = self._opened
            card.show(board, now_s)
            if slow:
                more.content = ui_view.details(camera)

    def _show_live(self, now_s: float, slow: bool) -> None:
        site = self._board.site
        for key, camera in site.cameras.items():
            if key not in self._cards:
                with self._grid, ui.element("section").classes("kf-card kf-camera") as card:
                    self._cards[key] = _CameraCard(camera, self._open)
                card.props("role=button tabindex=0").mark(f"camera-{camera.name}")
                card.on("click", partial(self._open, camera)).on("keydown.enter", partial(self._open, camera))
                self._nothing.set_visibility(False)
            self._cards[key].show(self._board, now_s)
        if slow:
            self._tiles.content = ui_view.summary(site, site.figures(now_s), now_s)

    def _show_figures(self, now_s: float) -> None:
        site = self._board.site
        figures, series = site.figures(now_s), site.series(now_s)
        self._shares.props["options"] = ui_charts.shares(series)
        self._traffic.props["options"] = ui_charts.traffic(series)
        self._confidences.props["options"] = ui_charts.confidences(figures, site.tiers)
        self._ages.content = ui_view.ages(figures, site.tiers)
        self._plans.content = ui_plan_view.plans(site, now_s)
        self._losses.content = ui_view.losses(site.losses(), site.machines.values())


def _html(classes: str) -> ui.html:
    return ui.html("", sanitize=True).classes(f"kf-html {classes}")


def _card(heading: str, below: str) -> ui.element:
    card = ui.element("section").classes("kf-card")
    with card:
        ui.html(escape(heading), tag="h2")
        ui.html(escape(below), tag="p").classes("kf-sub")
    return card


def _chart(heading: str, below: str) -> ui.echart:
    with _card(heading, below):
        return ui.echart({"series": []}).classes("kf-chart")


def _application(board: Board, host: str) -> FastAPI:
    """The web application of a board; one for each process, as NiceGUI keeps its pages by process."""
    outer = FastAPI(openapi_url=None)
    if host in LOOPBACK:
        # A page from outside could give its own name our address, and read what is here in a visitor's browser.
        outer.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    @outer.middleware("http")
    async def guarded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @outer.get("/preview/{device}/{camera}")
    async def preview(device: str, camera: str) -> Response:
        found = board.site.cameras.get((device, camera))
        if found is None or found.preview is None:
            return Response("no preview of this camera has come", 404, media_type="text/plain")
        return Response(found.preview, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    @ui.page("/")
    def page() -> None:
        _Page(board)

    ui.add_css(files("runtime").joinpath("ui.css").read_text("utf-8"), shared=True)
    ui.run_with(
        outer,
        title="Kinflow",
        favicon=ICON,
        dark=None,
        tailwind=False,
        show_welcome_message=False,
        binding_refresh_interval=None,
        message_history_length=50,
    )
    nicegui_app.timer(SLOW_S, board.drain)
    return outer


def serve(board: Board, listener: socket.socket, host: str, stop: threading.Event) -> None:
    """Serve the page on `listener` until `stop` is set or a signal comes."""
    config = uvicorn.Config(
        _application(board, host),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        lifespan="on",
        ws_per_message_deflate=False,  # time that nobody gains from on a loopback
    )
    server = uvicorn.Server(config)

    def end() -> None:
        stop.wait()
        server.should_exit = True

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        stop.set()

    # uvicorn takes these over while it serves, and raises them once more when it has ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    threading.Thread(target=end, name="kinflow-ui-stop", daemon=True).start()
    asyncio.run(server.serve(sockets=[listener]))
