"""Colours by what they stand for, on light and on dark paper.

Tiers differ in lightness as well as in hue, and by hues that colour-blind eyes tell apart. Every light colour is another one:
`svg` finds out by it what a part of a drawing stands for.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1b1f24",
    "paper": "#fffffe",
    "frame": "#6b7178",
    "grid": "#d9dde2",
    "device": "#3a2a86",
    "host": "#2a67a0",
    "local": "#178a72",
    "shared": "#c67c00",
    "computed": "#dfe2e6",
    "hatch": "#8b9198",
    "line": "#a3195b",
    "heat-0": "#f3f5f7",
    "heat-1": "#dceaf7",
    "heat-2": "#b0d2ee",
    "heat-3": "#2c73b2",
    "heat-4": "#0c4379",
}
DARK = {
    "ink": "#e7eaee",
    "paper": "#15181c",
    "frame": "#8b929b",
    "grid": "#2f353c",
    "device": "#9284f2",
    "host": "#5cabe8",
    "local": "#45d0ae",
    "shared": "#ffc873",
    "computed": "#3a4149",
    "hatch": "#868e98",
    "line": "#ff7fb5",
    "heat-0": "#1d2126",
    "heat-1": "#1c3247",
    "heat-2": "#245078",
    "heat-3": "#7dbaf0",
    "heat-4": "#cfe6fb",
}
HEAT = ("heat-0", "heat-1", "heat-2", "heat-3", "heat-4")
HEAT_INK = ("ink", "ink", "ink", "paper", "paper")
"""Of the number in a cell of that heat."""
