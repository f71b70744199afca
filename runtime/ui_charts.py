"""The page's charts as options of Apache ECharts, made of what `ui_state` has counted. Pure."""

from __future__ import annotations

from typing import Any

from runtime.ui_state import SERIES_S, Series, TierFigures
from runtime.ui_view import GREY, colour

LINE = "rgba(128, 138, 150, .22)"
SENT = "#5b6ee1"


def _axes(y: dict[str, Any]) -> dict[str, Any]:
    return {
        "animation": False,
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 8, "right": 14, "top": 34, "bottom": 4, "containLabel": True},
        "legend": {
            "top": 0,
            "left": 0,
            "itemWidth": 9,
            "itemHeight": 9,
            "icon": "circle",
            "textStyle": {"color": GREY},
        },
        "yAxis": {
            "type": "value",
            "axisLabel": {"color": GREY},
            "axisLine": {"show": False},
            "axisTick": {"show": False},
            "splitLine": {"lineStyle": {"color": LINE}},
            **y,
        },
    }


def _seconds() -> dict[str, Any]:
    return {
        "type": "value",
        "min": -SERIES_S,
        "max": 0,
        "interval": SERIES_S / 4,
        "axisLabel": {"color": GREY, "formatter": "{value} s"},
        "axisLine": {"lineStyle": {"color": LINE}},
        "axisTick": {"show": False},
        "splitLine": {"show": False},
    }


def _points(values: list[float | None], digits: int) -> list[list[float | None]]:
    first = 1 - len(values)
    return [[first + index, None if value is None else round(value, digits)] for index, value in enumerate(values)]


def shares(series: Series) -> dict[str, Any]:
    """The share of the answers that each tier gave, as it moved: areas that add up to 100 %."""
    tiers = list(series.shares)
    return {
        **_axes({"min": 0, "max": 100, "axisLabel": {"color": GREY, "formatter": "{value} %"}}),
        "xAxis": _seconds(),
        "series": [
            {
                "name": tier,
                "type": "line",
                "stack": "all",
                "showSymbol": False,
                "silent": True,
                "lineStyle": {"width": 0},
                "areaStyle": {"opacity": 0.75},
                "color": colour(tier, tiers),
                "data": _points([None if value is None else 100 * value for value in values], 1),
            }
            for tier, values in series.shares.items()
        ],
    }


def traffic(series: Series) -> dict[str, Any]:
    """Kilobytes a second that devices sent up, beside what the same frames would have cost as JPEGs."""
    lines = {
        "sent up": (series.bytes_up, SENT, "solid"),
        "the same frames as JPEG": (series.jpeg_bytes, GREY, "dashed"),
    }
    return {
        **_axes({"min": 0, "axisLabel": {"color": GREY, "formatter": "{value} kB/s"}}),
        "xAxis": _seconds(),
        "series": [
            {
                "name": name,
                "type": "line",
                "showSymbol": False,
                "silent": True,
                "lineStyle": {"width": 2, "type": kind},
                "areaStyle": {"opacity": 0.12 if kind == "solid" else 0},
                "color": shade,
                "data": _points([None if value is None else value / 1000 for value in values], 2),
            }
            for name, (values, shade, kind) in lines.items()
        ],
    }


def confidences(figures: list[TierFigures], tiers: list[str]) -> dict[str, Any]:
    """How many answers were how sure, by tier, in steps of a tenth."""
    return {
        **_axes({"minInterval": 1}),
        "xAxis": {
            "type": "category",
            "data": [f"{index / 10:.1f}–{(index + 1) / 10:.1f}" for index in range(10)],
            "axisLabel": {"color": GREY, "hideOverlap": True},
            "axisLine": {"lineStyle": {"color": LINE}},
            "axisTick": {"show": False},
        },
        "series": [
            {
                "name": part.tier,
                "type": "bar",
                "stack": "all",
                "silent": True,
                "barCategoryGap": "18%",
                "color": colour(part.tier, tiers),
                "data": list(part.confidences),
            }
            for part in figures
        ],
    }
