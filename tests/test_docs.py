"""The documentation: links, pages, sentences, and the site that is built of it. Nothing here needs a network."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import prose
import pytest
import torch

import nearplane

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
OLD = ("LOG.md", "CHANGELOG.md")  # entries stay as they were written
LONGEST_README = 150  # lines


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def links(page: Path) -> Iterator[str]:
    """The targets of links and pictures that are no addresses on the web."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if not re.match(r"https?://|mailto:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """What its headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One thing, `two`\n[a](no.md) [b](#one-thing-two) [c](https://x.y) `[d](z.md)`\n```\n[e](q.md)\n```\n"
    )
    assert list(links(page)) == ["no.md", "#one-thing-two"]
    assert anchors(page) == {"one-thing-two"}


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\n\n")[0]
    listed = re.findall(r": (\S+\.md)$", nav, flags=re.M)
    made = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}  # docs/hooks.py makes them of files outside docs/
    assert sorted(listed) == sorted({*made, *(page.name for page in DOCS)})


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= LONGEST_README
    assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OLD], ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    text = re.sub(r"<!-- engines -->.*<!-- engines -->", "", page.read_text(), flags=re.S)  # what verdicts say
    assert prose.too_long(text) == []


def test_long_sentences_are_seen() -> None:
    words = "Word" + " word" * 25
    assert [line[:3] for line in prose.too_long(f"Short one. {words}. `code` is one word.")] == ["26:"]
    assert prose.too_long(f"```\n{words}\n```\n| {words} |\n# {words}\n<!-- {words} -->") == []
    assert len(prose.too_long(f"- {words}\n- {words}\n")) == 2


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^::: nearplane\.(\w+)$", (ROOT / "docs/api.md").read_text(), flags=re.M)
    assert sorted(named) == sorted(nearplane.__all__)


def test_every_folder_of_the_package_is_in_the_file_tree() -> None:
    for page in ("README.md", "docs/architecture.md"):
        tree = (ROOT / page).read_text()
        for folder in sorted(path.parent.name for path in (ROOT / "nearplane").glob("*/__init__.py")):
            assert f"{folder}/" in tree, f"{page} does not mention {folder}/"


def test_files_that_the_documentation_names_exist() -> None:
    named = r"`((?:nearplane|tests|runs|benchmarks|examples|docs)/[\w/]+\.(?:py|md|cpp|h|json|jsonl))(?::\w+)?`"
    for page in PAGES:
        if page.name in OLD:
            continue
        for path in re.findall(named, page.read_text()):
            assert "NAME" in path or (ROOT / path).is_file(), f"{page.name} names {path}"


def test_every_example_is_tested_and_named() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text() + "".join(page.read_text() for page in DOCS)
    tests = (ROOT / "tests/test_examples.py").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert example.stem in tests, example
        assert f"examples/{example.name}" in text or example.stem == "demo", example  # which is `make demo`


def test_the_method_in_contributing_solves() -> None:
    block = re.search(r"```python\n(from dataclasses.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    assert block is not None
    names: dict[str, object] = {"__name__": __name__}
    exec(compile(block[1], "CONTRIBUTING.md", "exec"), names)
    method = names["WeightedRTN"](power=0.5)  # type: ignore[operator]
    assert isinstance(method, nearplane.Method)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    moments = nearplane.Moments(H=x.T @ x / 64, tokens=64)
    weight = torch.randn(8, 32, generator=generator, dtype=torch.float64)
    solved = method.solve(weight, method.prepare(moments), nearplane.Grid(bits=3, group_size=16))
    error = (solved.scale.repeat_interleave(16, 1) * (solved.codes - 4.0) - weight).norm() / weight.norm()
    assert 0 < error < 0.3


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra docs is not installed")
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning, which in strict mode is an error: broken links and anchors, names that are not there."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in DOCS:
        assert (tmp_path / "site" / f"{page.stem}.html").is_file()
    start, method = ((tmp_path / "site" / name).read_text() for name in ("index.html", "method.html"))
    assert "nearplane quantize demo out" in start and 'src="images/walk.svg"' in start
    assert "<math" in method and "arithmatex" not in method
    reference = (tmp_path / "site" / "api.html").read_text()
    for name in nearplane.__all__:
        assert f'id="nearplane.{name}"' in reference, name
