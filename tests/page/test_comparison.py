"""Several runs on one page: figures, size against quality, and each linear's error over the first run's."""

from copy import deepcopy
from typing import Any

import pytest
from reports import LLAMA, linear, report, sound

from nearplane.page import compare
from nearplane.page.charts import Plot, scatter
from nearplane.page.facts import facts
from nearplane.page.html import comparison


def two() -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = report(3), report(3, out="runs/small-4bit")
    second["bytes"]["after"] = 11_000_000
    second["check"] |= {"kl": 0.05, "perplexity": 21.0}
    for row in second["linears"]:
        row["error"], row["bits"] = row["error"] / 4, 4
    second["linears"][-1]["error"] *= 12
    return first, second


def test_differences_are_of_each_linear_over_the_first_run() -> None:
    first, second = two()
    second["linears"].pop(0)  # left dense there
    found = sound(comparison([first, second], ["a", "b"]))
    name = first["linears"][1]["name"]
    assert f"{name}: error 0.00050, was 0.0020: 0.25 of it" in found.labels
    worse = first["linears"][-1]["name"]
    assert f"{worse}: error 0.0810, was 0.0270: 3.00 of it" in found.labels
    assert not any(label.startswith(first["linears"][0]["name"]) for label in found.labels)  # only a row of the table
    assert f"{first['linears'][0]['name']} 0.0010, 3 bits dense" in found.text
    for row in first["linears"]:
        assert row["name"] in found.text
    assert "small-3bit small-4bit" in found.text and "KL to the original 0.25 0.05" in found.text
    assert "small-4bit: 11.0 MB, KL to the original, nats a token 0.0500" in found.labels


def test_points_lie_where_their_figures_are() -> None:
    plot: Plot = scatter([(8e6, 0.25, "a"), (12e6, 0.05, "b"), (10e6, 0.15, "c")], "KL")
    (a,), (b,), (c,) = plot.lines
    assert a.x < c.x < b.x and a.y < c.y < b.y  # down is better
    assert c.x == pytest.approx((a.x + b.x) / 2, abs=0.2) and c.y == pytest.approx((a.y + b.y) / 2, abs=0.2)
    ticks = {tick.text: tick.at for tick in plot.up}
    assert ticks["0"] == plot.bottom and ticks["0"] > b.y
    (alone,) = scatter([(8e6, 0.0, "a")], "KL").lines[0:1]
    assert plot.left <= alone[0].x <= plot.right and plot.top <= alone[0].y <= plot.bottom


def test_quality_is_the_first_figure_that_two_runs_have() -> None:
    first, second = two()
    assert compare.compared([facts(first), facts(second)]).quality.startswith("KL")
    del second["check"]["kl"]
    assert compare.compared([facts(first), facts(second)]).quality == "perplexity"
    del second["check"]
    found = compare.compared([facts(first), facts(second)])
    assert found.quality == "mean error of linears"
    assert dict(found.table)["KL to the original"] == ["0.25", "not recorded"]
    assert found.plot is not None and len(found.plot.lines) == 2


def test_what_is_no_comparison_is_said() -> None:
    first, second = two()
    second["model"] = "other/Model"
    second["check"]["tokens"] = 99
    third = report(1, linears=[linear("x.0.y", None, None)], out="runs/rtn", check=None)
    said = sound(comparison([first, second, third], ["a", "b", "c"])).text
    for words in (
        "are of several models (someone/Small-1B, other/Model)",
        "not checked on the same tokens",
        "Some runs read no data",
    ):
        assert words in said
    assert "rank no methods" not in said
    first["settings"]["method"] = {"name": "NearPlane", "target": True}
    said = sound(comparison([first, two()[1]], ["a", "b"])).text
    assert "Errors of linears rank no methods" in said
    assert "are of several models" not in sound(comparison([first, two()[1]], ["a", "b"])).text


def test_runs_have_names_of_their_own() -> None:
    runs = [facts(report(1, out=out)) for out in ("a/out", "b/out", "c")]
    assert compare.labels_of(runs) == ["a/out", "b/out", "c"]
    same = compare.labels_of([facts(report(1))] * 2)
    assert len(set(same)) == 2


def test_old_and_damaged_reports_are_compared_as_far_as_they_go() -> None:
    first, second = two()
    bare: dict[str, Any] = {"linears": deepcopy(second["linears"])}
    for row in bare["linears"][:3]:
        row["error"] = float("nan")
    found = sound(comparison([first, bare, {"linears": []}], ["a", "b", "c"]))
    assert "not recorded" in found.text and LLAMA[3] in found.text
    nasty = report(1, ("<b>x</b>",), out="<i>y</i>")
    assert "i" not in sound(comparison([nasty, nasty], ["a", "b"])).tags


def test_the_original_is_a_point_at_no_loss() -> None:
    first, second = two()
    original = {
        "name": "m",
        "bytes": 20_000_000,
        "size": "20 MB",
        "tensors": "3",
        "dtypes": "20 MB float16",
        "says": "",
        "rows": [],
    }
    labels = sound(comparison([first, second], ["a", "b"], original)).labels
    assert "original: 20.0 MB, KL to the original, nats a token 0.0000" in labels
