"""The live page of the fleet."""

import base64
import hashlib
from functools import cache
from importlib.resources import files


@cache
def fleet_page() -> str:
    """The live page: one self-contained HTML text that asks its own server for `fleet.json` every second and nothing else.

    Its Content-Security-Policy lets only its own script and style run, by their hashes.
    """
    folder = files("libra_ray.serving.page")
    page, style, script = (folder.joinpath(f"fleet.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return page.replace("%POLICY%", policy).replace("%STYLE%", style).replace("%SCRIPT%", script)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
