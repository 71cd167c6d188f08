"""Lets mkdocs follow links that leave docs/: pictures, scripts and tests become files of the site, at their own paths."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\(|src=\")((?:\.\./)+[^)#\s\"]+)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Docs/ is the root of the site: a link that leaves it has one step up too many."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        if path.startswith("docs/") or not (ROOT / path).is_file():
            return link[0]  # mkdocs warns of a file that is not there
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return link[1] + link[2].removeprefix("../")

    return LINK.sub(inside, markdown)
