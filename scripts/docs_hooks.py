"""What `mkdocs build` does to a page before it is rendered.

Pages link to source files beside them, which the site does not hold: there such a link becomes its text. A file that
is not there fails the build.
"""

import logging
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")
_log = logging.getLogger("mkdocs.hooks.docs")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text."""
    root = Path(config.docs_dir).resolve()

    def inside(link: re.Match[str]) -> str:
        target = (root / page.file.src_uri).parent.joinpath(link[2]).resolve()
        if target.is_relative_to(root):
            return link[0]
        if not target.exists():
            _log.warning("%s links to %s, which is not there", page.file.src_uri, link[2])
        return link[1]

    return _LINK.sub(inside, markdown)
