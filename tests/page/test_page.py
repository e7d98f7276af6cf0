"""The page of one run: whole, alone, true to its report, and made of whatever a report holds."""

import random
import re
import shlex
from copy import deepcopy
from typing import Any

import pytest
from reports import LLAMA, linear, report, sound

from nearplane.core.errors import NearplaneError
from nearplane.page import charts, course, quality
from nearplane.page.facts import facts, split
from nearplane.page.html import page
from nearplane.page.words import percent

SECTIONS = ("good", "where", "cost", "happened", "engines", "repeat")
NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"


def test_every_section_and_every_linear_is_there() -> None:
    content = report(4)
    made = page(content)
    found = sound(made)
    assert set(SECTIONS) <= set(found.ids)
    body = found.text
    for row in content["linears"]:
        assert row["name"] in body  # in the table
        assert sum(label.startswith(f"{row['name']}: error ") for label in found.labels) == 2  # in both maps
    for words in (
        "KL to the original 0.25", "75.0%", "perplexity 25 from 20 (+25.0%)", "8.0 MB from 20.0 MB",
        "by 0.25 nats", "At 25.0% of positions another token is now the likeliest", "moved by 5% of its energy",
        "moved it by 20%, 4.0 times as much", "510 held-out tokens of text.txt",
        "1.5 GB of main memory were held", "2.0 GB were counted on beforehand, of 8.0 GB",
        "solving the weights 3.0 s", "Time: 4.0 s",
        "model.embed_tokens.weight 5.0 MB", "Nothing out of the ordinary", "vllm serve runs/small-3bit", "run here with vllm 1",
        "nearplane quantize someone/Small-1B NEW --bits 3", "seed of the windows 7", "c0ffeec0ffee", "torch 2.9.0",
    ):  # fmt: skip
        assert words in body, words
    assert found.tags["h1"] == 1 and "<title>Small-1B: report</title>" in made and '<html lang="en">' in made


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.001, "less than usual for 3 bits"), (0.01, "usual for 3 bits"), (0.05, "more than usual for 3 bits")],
)
def test_usual_in_words(error: float, words: str) -> None:
    content = report(1, linears=[linear("model.layers.0.up_proj", error, 0.2)])
    said = " ".join(quality.verdict(facts(content)))
    assert f"That is {words}: " in said and "0.0023 to 0.017" in said
    content["settings"]["override"] = [{"pattern": "x", "bits": 8}]  # of mixed bits nothing is usual
    assert "usual" not in " ".join(quality.verdict(facts(content)))


def test_rounding_is_not_compared_with_itself() -> None:
    """It is, where scales of channels came before it."""
    content = report(1)
    content["settings"]["method"] = {"name": "RTN"}
    assert "Rounding every weight" not in page(content) and "moved by 5% of its energy" in page(content)
    content["check"].pop("kl")
    assert "rounding: " not in page(content)
    content["settings"]["scale"] = {"search": "awq"}
    assert "Rounding every weight" in page(content) and "rounding: " in page(content)


def test_the_worst_come_first_with_what_helps_them() -> None:
    run = facts(report(3))
    bad = quality.worst(run)
    errors = [one.linear.error for one in bad]
    assert len(bad) == 10 and errors == sorted(errors, reverse=True) and errors[0] == pytest.approx(0.027)
    assert [one.linear.name for one in bad[:2]] == ["model.layers.2.mlp.down_proj", "model.layers.2.mlp.up_proj"]
    assert bad[0].option == r"--override '^model\.layers\.2\.mlp\.down_proj$=bits=4'" and bad[0].reach == 1
    assert bad[1].option == r"--override '^model\.layers\.2\.mlp\.(gate_proj|up_proj)$=bits=4'" and bad[1].reach == 2


@pytest.mark.parametrize(
    ("bits", "format", "option"),
    [
        (2, "gptq", "bits=4"), (4, "compressed-tensors", "bits=8"), ("ternary", "compressed-tensors", "bits=4"),
        (8, "compressed-tensors", "--ignore"), (4, "awq", "--ignore"), (4, "gguf", "gguf_type=Q8_0"),
    ],
)  # fmt: skip
def test_what_helps_depends_on_bits_and_format(bits: Any, format: str, option: str) -> None:
    content = report(1, linears=[linear("model.layers.0.mlp.down_proj", bits=bits)])
    content["settings"]["format"] = format
    assert option in quality.worst(facts(content))[0].option


def test_shades_rise_with_the_error_and_marks_are_the_worst() -> None:
    run = facts(report(3))
    scale = charts.error_scale([row.error or 0 for row in run.linears])
    (heat,) = charts.heat_maps(
        run, run.value, scale, lambda row: row.name, {one.linear.name for one in quality.worst(run)}
    )
    shade = {cell.label: cell.shade for cell in heat.cells}
    ranked = sorted(run.linears, key=lambda row: row.error or 0)
    assert [shade[row.name] for row in ranked] == sorted(shade.values())
    assert shade[ranked[0].name] == 0 and shade[ranked[-1].name] == charts.SHADES - 1
    assert {cell.label for cell in heat.cells if cell.marked} == {row.name for row in ranked[-10:]}
    at = {cell.label: (cell.x, cell.y) for cell in heat.cells}
    for part in LLAMA:  # a row for each part, a column for each block
        assert len({at[f"model.layers.{i}.{part}"][1] for i in range(3)}) == 1
    assert len({x for x, _ in at.values()}) == 3 and len(set(at.values())) == 21


def test_the_ratio_is_over_rounding_to_nearest() -> None:
    content = report(1, linears=[linear("b.0.x", 0.3, 0.2), linear("b.0.y", 0.01, 0.2), linear("b.0.z", 0.0, 0.0)])
    found = sound(page(content))
    assert "b.0.x: error 0.3000, 1.50 of rounding to nearest, 3 bits" in found.labels
    assert "b.0.y: error 0.0100, 0.05 of rounding to nearest, 3 bits" in found.labels
    assert "b.0.z: error 0.0000, 3 bits" in found.labels  # nothing to divide by


def test_commands_are_ready_for_a_shell() -> None:
    """Also where a folder has a space, a quote or worse in its name."""
    out, model = "my runs/it's $HOME", "a b"
    found = sound(page(report(1, out=out, model=model))).text
    for start, words in (
        ("nearplane eval ", [out, "--reference", model, "compares"]), ("nearplane generate ", [out, "--prompt", "Hello"]),
        ("vllm serve ", [out]),
    ):  # fmt: skip
        assert shlex.split(found.partition(start)[2])[: len(words)] == words
    python = course.command_of("transformers", facts(report(1, out=out)))
    assert repr(out) in shlex.split(python)[2] and compile(shlex.split(python)[2], "", "exec")
    assert shlex.split(course.command_of("transformers", facts(report(1))))[2].endswith(
        "from_pretrained('runs/small-3bit'))"
    )


def test_names_with_html_in_them_stay_text() -> None:
    content = report(2, (NASTY, "mlp.up_proj"), model=NASTY, out=NASTY, events=[NASTY, f"{NASTY}: damping raised"])
    content["versions"] = {NASTY: NASTY}
    content["engines"] = {NASTY: {"refusals": [NASTY], "caveats": [], "basis": NASTY}}
    content["settings"]["method"]["name"] = content["data"]["origin"] = content["config"]["method"] = NASTY
    content["dense"] = [{"name": NASTY, "bytes": 1, "reason": NASTY}]
    content["seconds"] = {NASTY: 2.0}
    found = sound(page(content))
    assert found.tags["script"] == 1 and "img" not in found.tags
    assert found.text.count("<script>alert(1)</script>") >= 10 and "{{ 7*7 }}" in found.text


def test_many_blocks_stay_small_and_many_experts_are_folded() -> None:
    made = page(report(200))
    assert len(made) < 2_500_000
    found = sound(made)
    assert "model.layers.199.mlp.down_proj" in found.text
    experts = tuple(f"mlp.experts.{i}.{part}" for i in range(64) for part in ("gate_proj", "up_proj", "down_proj"))
    content = report(4, (*LLAMA[:4], *experts))
    content["linears"][-1]["error"] = 0.9
    found = sound(page(content))
    assert all(row["name"] in found.text for row in content["linears"])
    worst = content["linears"][-1]["name"]
    assert (
        f"{worst}: error 0.9000, {0.9 / content['linears'][-1]['rtn_error']:.2f} of rounding to nearest, 3 bits (the most of 64)"
        in (found.labels)
    )
    assert sum("the most of 64" in label for label in found.labels) == 2 * 4 * 3
    option = re.search(r"--override '(\S+)=bits=4'", found.text)
    assert option is not None and option[1] == r"^model\.layers\.3\.mlp\.experts\."  # engines fuse all of a layer


def test_models_of_several_towers_have_a_map_each() -> None:
    rows = [linear(f"model.{tower}.layers.{i}.fc1") for tower in ("encoder", "decoder") for i in range(3)]
    content = report(1, linears=[*rows, linear("lm_head")], blocks=[])
    found = sound(page(content))
    for name in ("model.encoder.layers", "model.decoder.layers", "outside the blocks"):
        assert sum(f", {name}: a row" in label for label in found.labels) == 2


def test_how_names_are_split() -> None:
    assert split("model.layers.3.mlp.up_proj", []) == ("model.layers.3", "mlp.up_proj")
    assert split("encoder.layers.1.blocks.0.fc", ["encoder.layers.1.blocks.0"]) == ("encoder.layers.1.blocks.0", "fc")
    assert split("h.10.attn.c_attn", []) == ("h.10", "attn.c_attn")
    assert split("lm_head", []) == ("", "lm_head") and split("0.x", []) == ("0", "x")
    assert split("model.layer1.fc2", []) == ("", "model.layer1.fc2")


def test_methods_that_read_no_data_and_encoders() -> None:
    rows = [linear(f"layers.{i}.fc", None, None, weight_error=0.1 * (i + 1), tokens=0) for i in range(2)]
    content = report(
        1, linears=rows, check=None, blocks=[], data={"origin": "none: this method reads no calibration data"}
    )
    content["settings"] |= {"method": {"name": "RTN"}, "calibration": None}
    found = sound(page(content))
    assert "RTN read no data" in found.text and "layers.1.fc: weight error 0.2000, 3 bits" in found.labels
    assert "error / rounding to nearest" not in found.text and "was not measured in this run" in found.text
    encoder = report(1)
    encoder["check"] = {
        "tokens": 0, "windows": 6, "held_out": True, "origin": "x", "error": 0.1, "rtn_error": 0.05, "block": "b",
        "unanswered": "BertModel predicts no tokens",
    }  # fmt: skip
    found = sound(page(encoder))
    assert "There is no KL to the original: BertModel predicts no tokens." in found.text
    assert "Measured on 6 held-out windows of x" in found.text
    assert "5%, which is less" in found.text and "error behind the last block 0.1000" in found.text


def test_what_happened_is_told_in_plain_words() -> None:
    rows = [
        linear("l.0.mlp.experts.0.up", rounded=True, tokens=0),
        linear("l.0.mlp.experts.1.up", tokens=90, damp_raised=2, damp_percent=1.0),
        linear("l.0.fc", dropped=12),
    ]  # fmt: skip
    events = [f"l.{i}.fc: damping raised to 0.1" for i in range(5)] + [
        "seqlen cut to 64, the model's limit of positions"
    ]
    content = report(1, linears=rows, events=events, resumed=2, rounds={"kept": 9, "rejected": 1})
    content["memory"] = {"planned": 9e9, "close": False, "available": 10e9, "peak": 1e9}
    said = sound(page(content)).text
    for words in (
        "1 linear fell back to rounding to nearest, because no token reached it: l.0.mlp.experts.0.up",
        "1 linear needed more damping than was set", "1 linear left out tokens with NaN or Inf: l.0.fc",
        "Experts were shown 0 to 90 tokens each", "9 refinement rounds helped on held-out tokens and stayed; 1 did not",
        "went on 2 times", "5 linears needed more damping than was set (l.0.fc, ...)", "seqlen cut to 64", "Every note by itself",
        "damping 1", "12 tokens dropped", "a generous guess, 9.0 GB, of 10.0 GB that were free, fitted",
    ):  # fmt: skip
        assert words in said, words


def test_a_converted_folder_speaks_of_itself() -> None:
    """Its own format, place and engines; the commands are the run's, and the conversion's behind them."""
    content = report() | {"converted": {"format": "mlx", "out": "elsewhere/new"}}
    said = sound(page(content)).text
    assert "converted from the compressed-tensors checkpoint" in said and "elsewhere/new" in said
    assert "nearplane convert NEW NEWER --format mlx" in said and "converted from" not in sound(page(report())).text


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.3, "130%"), (0.385, "38%"), (0.088, "8.8%"), (4.1e-4, "0.041%"), (0.0, "0%"), (1e-9, "1e-07%")],
)
def test_shares_in_percent(share: float, words: str) -> None:
    assert percent(share) == words


@pytest.mark.parametrize("key", [*report(), "totals"])
def test_what_an_earlier_version_did_not_write_is_not_recorded(key: str) -> None:
    content = report()
    content.pop(key, None)
    if key == "linears":
        with pytest.raises(NearplaneError, match="the report is not the report of a quantization"):
            page(content)
        return
    said = sound(page(content)).text
    sentences = {
        "check": "answers lost is not recorded",
        "config": "command is not recorded",
        "engines": "engines are not recorded",
    }
    assert sentences.get(key, "not recorded" if key in ("memory", "seconds") else "") in said
    assert "not recorded" not in sound(page(report())).text


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key in keys for place in places(value[key], (*path, key))]


def test_any_damage_is_a_sentence_or_a_page() -> None:
    """Each value of a report in turn, and two at a time, replaced by what does not belong there."""
    junk: list[Any] = [
        None,
        "x",
        "",
        [],
        {},
        float("nan"),
        float("inf"),
        -1,
        0,
        10**400,
        True,
        [None],
        {"a": []},
        "\ud800",
        NASTY,
    ]
    content = report(1, LLAMA[:2], tuning={"before": {"text": 1.0}, "after": {"text": 0.5}, "kept": 3, "steps": 5})
    content["settings"] |= {
        "rotate": {"kinds": ["r1"], "seed": 3},
        "override": [],
        "choices": [{"bits": 3, "linears": ["a"]}],
    }
    where, draw, refused = places(content), random.Random(0), 0
    for turn in range(max(600, len(where) * 5)):
        broken = deepcopy(content)
        for place in draw.sample(where, 1 + turn % 2):
            inner: Any = broken
            try:
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = draw.choice(junk)
            except (TypeError, LookupError):  # the other one has taken its place
                continue
        try:
            made = page(broken)
        except NearplaneError as error:
            refused += 1
            assert str(error).startswith("the report is not the report of a quantization: "), error
        else:
            sound(made)
            made.encode()
    assert refused < 250


def test_what_is_no_report_is_refused() -> None:
    for content in (None, [], {}, "x", {"linears": None}, {"linears": [1]}, {"linears": [{"name": ""}]}):
        with pytest.raises(NearplaneError, match=r"^here is not the report of a quantization: "):
            page(content, where="here")
    assert "No linear was quantized" in sound(page({"linears": []})).text
