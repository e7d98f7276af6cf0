"""``nearplane report``: the page of a run, or of several compared."""

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.machine.progress import printed

SETTINGS: dict[str, None] = {}
# OUT is a folder, and never a hub id to be fetched.
LOCAL = True
# Where a comparison is written.
COMPARED = Path("report.html")
# What the head of a page holds.
MADE = b'content="nearplane report"'


@dataclass(frozen=True)
class Options:
    """Write report.html beside a checkpoint, from its report.json alone: is it good, where is it bad, who loads it?

    A run of quantize has written that page already; this verb writes it again, and for checkpoints of earlier versions. Of
    several OUT it writes one page that compares them: figures, size against quality, and the error of each linear. The page
    is one file that loads nothing, and can be read without JavaScript.
    """

    out: tuple[Path, ...]
    """Folders that quantize has written, or their report.json."""
    original: str | None = None
    """The original model, a folder, demo, or a hub id in the local cache: the page tells its size, and what stayed dense, part by
    part. Nothing is downloaded."""
    output: Path | None = None
    """The file to write; else OUT/report.html, and of several OUT ./report.html."""
    open: bool = False
    """Open the page in the browser."""


def run(options: Options, _: dict[str, Any]) -> int:
    """Write the page, and print its path."""
    for out in options.out:
        if not out.exists():  # before torch is imported
            raise SettingError(f"{out}: no such folder; give the OUT of nearplane quantize.")
    from nearplane.page.html import comparison, page
    from nearplane.page.read import read_report

    if len({out.resolve() for out in options.out}) < len(options.out):
        raise SettingError("an OUT is given twice; a comparison is of different runs.")
    found = [read_report(out) for out in options.out]
    several = len(found) > 1
    target = options.output or (COMPARED if several else found[0].folder / COMPARED)
    if target.is_dir() or target.suffix.lower() not in (".html", ".htm"):
        raise SettingError(f"--output {target} must be a file that ends in .html.")
    if not target.absolute().parent.is_dir():
        raise SettingError(f"--output {target}: there is no folder {target.parent}.")
    _refuse_foreign(target)
    original = None
    if options.original is not None:
        from nearplane.checkpoint.original import original_facts

        original = original_facts(options.original, [each.content for each in found])
    if several:
        text = comparison([each.content for each in found], [str(each.path) for each in found], original)
    else:
        text = page(found[0].content, original=original, where=str(found[0].path))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NearplaneError(f"{target} cannot be written: {error}; --output FILE writes elsewhere.") from error
    printed(target)
    if options.open and not webbrowser.open(target.resolve().as_uri()):
        raise NearplaneError(f"no browser could be started; open {target} in one.")
    return 0


def _refuse_foreign(target: Path) -> None:
    """Refuse to write over a file that is no page of ours."""
    if target.exists() and MADE not in target.read_bytes()[:4096]:
        raise SettingError(f"{target} exists, and is no page that nearplane wrote; --output FILE writes elsewhere.")
