"""The page ``GET /dashboard`` answers with: one file, and headers that let it do what it needs and nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "dashboard.html")


@functools.cache
def dashboard_page() -> tuple[bytes, dict[str, str]]:
    """Body and headers. Only the style and the script that stand in the file may be used: their hashes are told."""
    with open(PAGE, "rb") as file:
        page = file.read()

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)

    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "style-src": hashes(b"style"),
        "script-src": hashes(b"script"),
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
