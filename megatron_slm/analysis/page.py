"""Self-contained HTML pages: a template with its style sheet, script and data, which load nothing from a network."""

from __future__ import annotations

import base64
import html
import json
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.runtime.files import IsOurs, check_output_file, write_text

HTML_FLAG = "--html"
SCRIPTS = {"selection": ("page.js", "search.js", "selection.js"), "report": ("page.js", "report.js")}


def write_page(path: str, name: str, title: str, data: dict[str, Any], *, content: str = "") -> None:
    """Write a page, atomically.

    Args:
        name: name of the template of the body in web/.
        title: plain text.
        data: JSON object for the script of the page.
        content: HTML of its main part.
    """
    write_text(path, build_page(name, title, data, content=content), HTML_FLAG, is_ours=page_test(name))


def build_page(name: str, title: str, data: dict[str, Any], *, content: str = "") -> str:
    """Return the HTML of a page. Arguments as in :func:`write_page`."""
    # in a script element, only "<" could end the data or begin a comment
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "generator": generator(name),
        "css": _resource("page.css") + _resource(f"{name}.css"),
        "js": "".join(map(_resource, SCRIPTS[name])),
        "title": html.escape(title),
        "content": content,
        "data": encoded,
    }
    parts["body"] = _fill(f"{name}.html", parts)
    return _fill("frame.html", parts).encode("utf-8", errors="replace").decode()


def page_test(name: str) -> IsOurs:
    """Return the predicate of files that are empty or pages of this template."""
    return partial(_is_page, name)


def check_page(path: str, name: str) -> None:
    """Raise ConfigError if a page cannot be written to ``path``."""
    check_output_file(path, HTML_FLAG, is_ours=page_test(name))


def generator(name: str) -> str:
    """Return the generator that a page names in its head."""
    return f"megatron_slm {name}"


def encode_array(values: Any, kind: Any) -> str:
    """Return an array as base64 of its little-endian bytes."""
    return base64.b64encode(np.asarray(values).astype(np.dtype(kind).newbyteorder("<")).tobytes()).decode()


def _is_page(name: str, path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(1024)
    return not head or f'content="{generator(name)}"'.encode() in head


def _fill(template: str, parts: dict[str, str]) -> str:
    """Return a template of web/ with its ``{{names}}`` replaced; parts are not searched for names."""
    first, *pieces = _resource(template).split("{{")
    filled = [first]
    for piece in pieces:
        name, _, rest = piece.partition("}}")
        filled += (parts[name], rest)
    return "".join(filled)


def _resource(name: str) -> str:
    return (files("megatron_slm.analysis") / "web" / name).read_text(encoding="utf-8")
