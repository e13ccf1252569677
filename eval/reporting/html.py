"""HTML pages that load nothing: one file each, with its style, its script and its pictures inside.

Everything on a page is untrusted: systems wrote it. The templates escape it, JSON is embedded so that it cannot end its
own element, and a Content-Security-Policy allows nothing but the page's own style and script, by their hashes, and no
connections.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eval.reporting.report_tables import number_text

PAGE = Path(__file__).with_name("report_page")
_UNSAFE_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
"Control character -> its visible picture; HTML allows no NUL."


def html_page(template: str, values: Mapping[str, Any], script: str | None = None) -> str:
    """Fill a template of `report_page`, with the style of all pages and a script of that folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number_text
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    code = None if script is None else (PAGE / script).read_text(encoding="utf-8")
    return environment.get_template(template).render(
        **values,
        style=Markup(style),
        script=Markup(code or ""),
        policy=_security_policy(style, code),
    )


def write_pages(pages: Mapping[str, str], folder: Path) -> None:
    """Write texts by file name into `folder`; a control character in them becomes its picture (\u2400 for NUL)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        # Lone surrogates cannot be encoded: they become question marks.
        (folder / name).write_bytes(text.translate(_CONTROLS).encode("utf-8", errors="replace"))


def embedded_png(content: bytes) -> str:
    """Return the picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def script_json(value: Any) -> str:
    """Write JSON for a script element: no character of it can end the element or open a comment.

    >>> script_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, default=vars, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE_IN_SCRIPT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _security_policy(style: str, script: str | None) -> str:
    """Forbid all loading and connections; the page's own style and script are allowed by their hashes."""
    scripts = "'none'" if script is None else _source(script)
    return (
        f"default-src 'none'; style-src {_source(style)}; script-src {scripts}; "
        "img-src data:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
