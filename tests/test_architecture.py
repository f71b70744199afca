"""What keeps the tree as it is meant to be: imports go one way, the device is light, modules are small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 350

# A module may import from its own layer and from those above it in this table, never from one below.
UI = ("ui", "ui_state", "ui_messages", "ui_plan", "ui_plan_view", "ui_view", "ui_charts", "ui_page")
LAYERS = (
    {"datatypes", "errors", "counters"},
    {"bundle_files", "gate_spec", "manifest", "objective", "config", "packet", "topics", "variant"},
    {
        "preprocess",
        "boxes",
        "events",
        "inbox",
        "outbox",
        "gate",
        "drift",
        *("estimates", "goodput", "workload"),
        "planner",
        "pilot",
        "plan_rates",
        "plan_tables",
        "ladder",
        "thermals",
        "in_order",
        "levels",
        "codec",
        "policy",
        "task",
        "camera",
        "capture",
        "freshness",
        "news",
        "shared_frames",
        "segment",
        "link",
        *("credentials", "memory"),
        *("send_queue", "heartbeat", "reconnect", "mqtt_client", "mqtt_limits", "mqtt_outgoing", "metered"),
        *("dialing", "self_pipe"),
    },
    {
        "cascade",
        "batcher",
        "reply",
        "references",
        *("coding", "fitting"),
        "uplink",
        *("steering", "course"),
        "broker",
        "presence",
        "preview",
        "spool",
        "subscriber",
        "forwarding",
        "watch",
        "watchdog",
    },  # and every variant of a seam
    {"device", "node", "taken", "requests"},
    {
        *("sim", "simulation", "scenario", "lane", "shaper", "strikes", "processes", "phases", "summary", "live"),
        *("demo", "demo_clips", "bench", "bundle_tool", "doctor", "cli", "listen", *UI),
    },
)
SEAMS = ("camera", "codec", "segment", "link", "task", "events")
VARIANTS = 3  # the layer of `<seam>_<variant>`
TIERS = 4
FORBIDDEN_ON_A_DEVICE = (
    *("torch", "onnx", "optimum", "transformers", "matplotlib", "rich", "amqtt"),
    *("fastapi", "flask", "aiohttp", "pydantic", "nicegui", "uvicorn"),
)

SOURCES = sorted(path for package in ("runtime", "export") for path in (ROOT / package).rglob("*.py"))
RUNTIME = [path for path in SOURCES if path.parent.name == "runtime" and path.stem != "__init__"]


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Dotted names of what the nodes import; `from a import b` gives a and a.b, as b may be a module."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def own_imports(path: Path, *, lazy: bool = True) -> set[str]:
    """The project's modules that `path` imports; without `lazy` only what is imported with it."""
    known = {name(source).removesuffix(".__init__") for source in SOURCES}
    found = imports(ast.walk(tree(path)) if lazy else _at_import(tree(path).body))
    return found & known - {"runtime", "export"}


def _at_import(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    """What runs when a module is imported: not functions, and not `if TYPE_CHECKING`."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for body in ("body", "orelse", "finalbody"):
            yield from _at_import(getattr(statement, body, []))
        for handler in getattr(statement, "handlers", []):
            yield from _at_import(handler.body)


def layer(module: str) -> int:
    if is_variant(module):
        return VARIANTS
    found = [number for number, modules in enumerate(LAYERS) if module in modules]
    assert found, f"runtime/{module}.py is in no layer; add it to LAYERS in tests/test_architecture.py"
    return found[0]


def is_variant(module: str) -> bool:
    return module.startswith(tuple(f"{seam}_" for seam in SEAMS))


@pytest.mark.parametrize("path", RUNTIME, ids=name)
def test_imports_go_one_way(path: Path) -> None:
    for imported in own_imports(path):
        package, _, module = imported.partition(".")
        assert package != "export", f"{name(path)} imports {imported}: a device has no export"
        assert layer(module) <= layer(path.stem), f"{name(path)} imports {imported} from a layer below its own"


@pytest.mark.parametrize("path", [path for path in RUNTIME if is_variant(path.stem)], ids=name)
def test_variants_know_neither_each_other_nor_a_tier(path: Path) -> None:
    for imported in own_imports(path):
        module = imported.partition(".")[2]
        assert not is_variant(module), f"{name(path)} imports its sibling {imported}"
        assert layer(module) < TIERS, f"{name(path)} imports the tier {imported}"


@pytest.mark.parametrize("path", [path for path in RUNTIME if path.stem not in LAYERS[-1]], ids=name)
def test_only_tables_name_variants(path: Path) -> None:
    named = {imported for imported in own_imports(path) - {name(path)} if is_variant(imported.partition(".")[2])}
    assert not named, f"{name(path)} imports {named}; choose variants through the seam's table"


def test_no_cycles() -> None:
    graph = {name(path): own_imports(path, lazy=False) - {name(path)} for path in SOURCES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' → '.join(error.args[1])}")


def test_a_device_is_light() -> None:
    modules = ["device", "capture", "camera_opencv", "camera_apart", "camera_pipe", "camera_replay", "camera_worker"]
    modules += ["segment_onnx", "link_mqtt", "task_classify", "task_detect", "steering", "cli"]
    code = f"import sys, {', '.join(f'runtime.{module}' for module in modules)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert not loaded & set(FORBIDDEN_ON_A_DEVICE)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_is_small_and_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{name(path)} needs a docstring"
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name(path)} has {lines} lines, over {MAX_LINES}; split it"
