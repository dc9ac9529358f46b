"""A drawing as SVG within a page: its colours are the page's, its text is text, its parts say what they are."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from matplotlib.figure import Figure as Canvas

from hpckv.usage.report.draw import Tips
from hpckv.usage.report.palette import LIGHT

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_ROLES = {colour: f"var(--{role})" for role, colour in LIGHT.items()}
_COLOUR = re.compile("|".join(_ROLES), re.IGNORECASE)
_FONT = re.compile(r"(font(?:-family)?:[^;]*?)'[^;]*")


def inline_svg(canvas: Canvas, tips: Tips, *, name: str, title: str, alt: str) -> str:
    """The `<svg>` element, without a fixed size. `name` must be another one for every drawing of a page."""
    file = io.BytesIO()
    canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        _recolour(element)
        _rename(element.attrib, name)
        if text := tips.get(element.get("id", "").removeprefix(f"{name}-")):
            _tell(element, text)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-alt"}
    for place, (tag, text) in enumerate((("title", title), ("desc", alt))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{'title' if tag == 'title' else 'alt'}"})
        element.text = text
        root.insert(place, element)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _recolour(element: ElementTree.Element) -> None:
    for attribute in ("fill", "stroke"):  # variables are for styles only
        if (value := element.get(attribute, "")).lower() in _ROLES:
            del element.attrib[attribute]
            element.set("style", f"{attribute}: {value}; {element.get('style', '')}")
    if style := element.get("style"):
        style = _FONT.sub(r"\1inherit" if "font-family" in style else r"\1sans-serif", style)
        element.set("style", _COLOUR.sub(lambda found: _ROLES[found[0].lower()], style))


def _rename(attributes: dict[str, str] | Mapping[str, str], name: str) -> None:
    """Ids are one page's, not one drawing's."""
    assert isinstance(attributes, dict)
    for key, value in attributes.items():
        if key == "id":
            attributes[key] = f"{name}-{value}"
        elif key.endswith("href"):
            attributes[key] = value.replace("#", f"#{name}-", 1)
        elif "url(#" in value:
            attributes[key] = value.replace("url(#", f"url(#{name}-")


def _tell(element: ElementTree.Element, text: str) -> None:
    tip = ElementTree.Element(f"{{{_SVG}}}title")
    tip.text = text
    element.insert(0, tip)
