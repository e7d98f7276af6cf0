"""The page in a real browser: pointing at a cell and reaching it by keyboard name its linear, with JavaScript and without."""

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from browser import Browser
from reports import report

from nearplane.page.html import comparison, page

pytestmark = pytest.mark.skipif(
    browser.program() is None, reason="no Chromium here (CONTRIBUTING.md says how to get one)"
)
# What is shown above a map: of all texts in it, those that are displayed.
DISPLAYED = ".filter(t => getComputedStyle(t).display != 'none').map(t => t.textContent)"
SHOWN = f"[...document.querySelectorAll('.error .cell text')]{DISPLAYED}"
HINT = "getComputedStyle(document.querySelector('.error .hint')).display"
LAST = ".error .cell:last-of-type"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "report.html"
    path.write_text(page(report(30)), "utf-8")
    return path


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with Browser() as found:
        yield found


def test_pointing_at_a_cell_names_its_linear(opened: Browser, made: Path) -> None:
    opened.open(made, script=False)
    assert opened.ask(SHOWN) == [] and opened.ask(HINT) != "none"
    opened.point_at(LAST)
    assert opened.ask(SHOWN) == ["model.layers.29.mlp.down_proj: error 0.2970, 0.20 of rounding to nearest, 3 bits"]
    assert opened.ask(HINT) == "none"
    opened.point_at("h1")
    assert opened.ask(SHOWN) == []


def test_tab_reaches_every_cell_without_javascript(opened: Browser, made: Path) -> None:
    opened.open(made, script=False)
    opened.ask("document.querySelector('.skip a').focus()")
    for number, name in enumerate(("self_attn.q_proj", "self_attn.k_proj"), 1):
        opened.press("Tab")
        assert opened.ask(SHOWN) == [
            f"model.layers.0.{name}: error {number / 1000:.4f}, 0.20 of rounding to nearest, 3 bits"
        ]
    stroke = opened.ask("getComputedStyle(document.querySelector('.cell:focus rect')).strokeWidth")
    assert stroke == "2px"


def test_arrows_move_within_a_map(opened: Browser, made: Path) -> None:
    opened.open(made)
    stops = "[...document.querySelectorAll('.error .cell')].filter(c => c.tabIndex == 0).length"
    assert opened.ask(stops) == 1  # of the Tab key
    opened.ask("document.querySelector('.skip a').focus()")
    names = []
    for key in ("Tab", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        opened.press(key)
        names.append(opened.ask(SHOWN)[0].partition(":")[0].removeprefix("model.layers."))
    q, k = "self_attn.q_proj", "self_attn.k_proj"
    assert names == [f"0.{q}", f"1.{q}", f"2.{q}", f"2.{k}", f"1.{k}", f"1.{q}"]
    assert opened.ask(stops) == 1


def test_the_other_map_is_chosen_without_javascript(opened: Browser, made: Path) -> None:
    shown = "['error', 'ratio'].filter(c => getComputedStyle(document.querySelector(`div.${c}`)).display != 'none')"
    opened.open(made, script=False)
    assert opened.ask(shown) == ["error"]
    opened.point_at("label[for=see-ratio]")
    opened.click("label[for=see-ratio]")
    assert opened.ask(shown) == ["ratio"]
    opened.open(made, media="print")
    assert opened.ask(shown) == ["error", "ratio"]


def test_dark_and_light_are_readable(opened: Browser, made: Path) -> None:
    """Texts have a contrast of 4.5 at least against what is behind them, as WCAG AA asks."""
    code = Path(__file__).with_name("contrast.js").read_text()
    for dark in (False, True):
        opened.open(made, dark=dark)
        least, words = opened.ask(code)
        assert least >= 4.5, (dark, least, words)
    opened.open(made, dark=True)
    assert opened.ask("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 26)"


def test_a_phone_shows_it_without_scrolling_sideways(made: Path) -> None:
    with Browser(390, 800) as phone:
        phone.open(made)
        assert phone.ask("document.documentElement.scrollWidth") <= 390
        assert phone.requests == [made.resolve().as_uri()]  # and nothing else is asked for


def test_a_comparison_names_linears_and_runs(opened: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(comparison([report(3), report(3, out="other")], ["a", "b"]), "utf-8")
    opened.open(path, script=False)
    shown = f"[...document.querySelectorAll('.cell text, .spot text')]{DISPLAYED}"
    assert opened.ask(shown) == []
    opened.point_at(".cell")
    assert opened.ask(shown) == ["model.layers.0.self_attn.q_proj: error 0.0010, was 0.0010: 1.00 of it"]
    opened.point_at(".spot circle")
    assert opened.ask(shown)[0].startswith("other: 8.0 MB, KL to the original")  # the later of two at one place
