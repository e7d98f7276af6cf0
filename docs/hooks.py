"""What mkdocs does besides its plugins: pages from outside docs/, formulas as MathML.

README.md becomes the start page. A file outside docs/ that a page links to is copied into the site under its own path, so
that every link works without a repository on the web. Formulas become MathML while the site is built: no script is loaded.
"""

import re
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def moved(folder: str, match: re.Match[str]) -> str:
    """Return a link of a file in ``folder`` as it is in the site, whose root is docs/."""
    path = (ROOT / folder / match[2]).resolve().relative_to(ROOT).as_posix()
    return f"{match[1]}{'index.md' if path == 'README.md' else path.removeprefix('docs/')}{match[3] or ''})"


def linked(text: str, folder: str) -> set[str]:
    """Return the paths of the files outside docs/ that a page links to."""
    paths = {(ROOT / folder / match[2]).resolve().relative_to(ROOT).as_posix() for match in LINK.finditer(text)}
    return {path for path in paths if not path.startswith("docs/") and path != "README.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the start page, and what pages link to outside docs/."""
    todo = {"README.md"} | {p for f in files.documentation_pages() for p in linked(f.content_string, "docs")}
    done: set[str] = set()
    while todo - done:
        path = min(todo - done)
        done.add(path)
        text = (ROOT / path).read_text()
        if path.endswith(".md"):
            folder = Path(path).parent.as_posix()
            todo |= linked(text, folder)
            text = LINK.sub(partial(moved, folder), text)
            depth = len(Path(path).parts) - 1
            text = LINK.sub(lambda m, up="../" * depth: f"{m[1]}{up}{m[2]}{m[3] or ''})", text)
        name = "index.md" if path == "README.md" else path
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page of docs/ to where ``on_files`` has put their files."""
    return markdown if page.file.generated_by else LINK.sub(partial(moved, "docs"), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML."""

    def formula(match: re.Match[str]) -> str:
        return convert(unescape(match[2]), display="inline" if match[1] == "span" else "block")

    return FORMULA.sub(formula, html)
