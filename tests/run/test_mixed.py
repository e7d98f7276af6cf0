"""Linears that differ: overrides, linears left dense, and bits chosen for a budget, from the flags to the loaded model."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from close import near
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, NearPlane, Override
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.core.grid import dequantize
from nearplane.formats import FORMATS
from nearplane.formats.gptq import OF_A_MODULE
from nearplane.formats.read import open_checkpoint
from nearplane.run.plan import make_plan

GRID = Grid(bits=4, group_size=32)
OVERRIDE = {"down_proj": {"bits": 8, "group_size": 96}, r"layers\.1\..*(q|k|v)_proj": {"bits": 3, "group_size": 16}}
DENSE = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("mixed"))


def run(model: Path, out: Path, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    settings = {"method": GPTQ(), "grid": GRID, "calibration": calibration, "progress": False, **options}
    return nearplane.quantize(model, out, **settings)


def refused(words: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> str:
    assert main(["quantize", *words]) == 2
    message = capsys.readouterr().err
    *before, last = message.splitlines()
    assert last.startswith("nearplane: ") and before in ([], [f"opening {words[0]}"]) and not out.exists()
    return message


def wanted(name: str) -> tuple[int, int]:
    """Bits and group size by OVERRIDE, written out."""
    if "down_proj" in name:
        return 8, 96
    return (3, 16) if "layers.1" in name and name.endswith(("q_proj", "k_proj", "v_proj")) else (4, 32)


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What every linear was replaced by."""
    from nearplane.run.stream import OpenBlock

    solved: dict[str, torch.Tensor] = {}
    before = OpenBlock.replace

    def replace(self: Any, site: Any, quantized: Any, grid: Grid) -> None:
        solved[site.name] = dequantize(quantized, grid)
        before(self, site, quantized, grid)

    monkeypatch.setattr(OpenBlock, "replace", replace)
    return solved


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq_v2"])
@pytest.mark.parametrize("method", [RTN(), NearPlane()], ids=["rtn", "nearplane"])
def test_what_is_read_back_is_what_was_solved(
    format: Any, method: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved, out = watch(monkeypatch), tmp_path / "out"
    override = OVERRIDE | ({"gate|up": {"sym": False}} if format != "gptq" else {})
    report = run(model, out, method=method, override=override, ignore=[DENSE], format=format)
    assert len(solved) == 13 and DENSE not in solved
    assert {row.name: (row.bits, row.group_size) for row in report.linears} == {name: wanted(name) for name in solved}
    checkpoint = open_checkpoint(out)
    for name, layer in checkpoint.layers.items():
        assert (layer.grid.bits, layer.grid.group_width(layer.shape[1])) == wanted(name)
        assert layer.grid.sym is (format == "gptq" or ("gate" not in name and "up" not in name))
    loaded, original = nearplane.load(out, packed=False), tiny.build("llama")
    packed = nearplane.load(out, arithmetic="exact")
    for name, weight in solved.items():
        assert torch.equal(loaded.get_submodule(name).weight, weight), name
    assert torch.equal(loaded.get_submodule(DENSE).weight, original.get_submodule(DENSE).weight)
    with torch.no_grad():
        found, expected = (some(input_ids=tiny.tokens(2, 20)).logits for some in (packed, loaded))
    near(found, expected, sums=96)
    assert nearplane.verify(out).ok
    (row,) = [row for row in report.dense if row["name"] == DENSE + ".weight"]
    assert row["reason"] == f"left out by ignore {DENSE!r}"


def test_the_package_and_transformers_read_the_mixed_checkpoint(model: Path, tmp_path: Path) -> None:
    """Bit for bit, every group's layers; the dense one is not looked for."""
    run(model, tmp_path / "out", override=OVERRIDE, ignore=[DENSE])
    ours = nearplane.load(tmp_path / "out", packed=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tiny.tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(input_ids=ids).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 3 and DENSE in config["ignore"]
    assert not any("Linear" in group["targets"] for group in config["config_groups"].values())


def test_gptq_names_the_fused_modules_too(model: Path, tmp_path: Path) -> None:
    """An engine that fuses q, k and v asks the rules for qkv_proj."""
    run(model, tmp_path / "out", method=RTN(), override=OVERRIDE, ignore=["0.*(gate|up)_proj"], format="gptq")
    rules = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    three = {"bits": 3, "group_size": 16, "sym": True}
    assert rules[r"+:^model\.layers\.1\.self_attn\.qkv_proj" + OF_A_MODULE] == three
    assert rules[r"+:^model\.layers\.1\.self_attn\.q_proj" + OF_A_MODULE] == three
    assert rules[r"-:^model\.layers\.0\.mlp\.gate_up_proj" + OF_A_MODULE] == {}
    assert not any("layers.0.self_attn" in rule.replace("\\", "") for rule in rules)


def test_the_later_override_wins_field_by_field(model: Path, tmp_path: Path) -> None:
    override = (Override("_proj", bits=3, group_size=16), Override("down_proj", bits=8))
    report = run(model, tmp_path / "out", method=RTN(), override=override)
    assert {(row.bits, row.group_size) for row in report.linears if "down" in row.name} == {(8, 16)}
    assert {(row.bits, row.group_size) for row in report.linears if "down" not in row.name} == {(3, 16)}


def test_an_override_of_all_is_the_grid(model: Path, tmp_path: Path) -> None:
    """The same codes, and a configuration of one group."""
    run(model, tmp_path / "a", override={".": {"bits": 3, "group_size": 16}})
    run(model, tmp_path / "b", grid=Grid(bits=3, group_size=16))
    a, b = (open_checkpoint(tmp_path / name) for name in "ab")
    assert a.quantization == b.quantization
    for name in b.layers:
        assert all(torch.equal(x, y) for x, y in zip(a.quantized(name)[:3], b.quantized(name)[:3], strict=True))


def test_a_stage_in_parts_solves_each_as_if_alone(model: Path, tmp_path: Path) -> None:
    """fit may differ between siblings, because no engine sees it; rows are independent, so each part is as it was."""
    run(model, tmp_path / "mse", grid=Grid(group_size=32, fit="mse"))
    run(model, tmp_path / "both", grid=Grid(group_size=32, fit="mse"), override={"1.*up_proj": {"fit": "minmax"}})
    a, b = open_checkpoint(tmp_path / "mse"), open_checkpoint(tmp_path / "both")
    differ = [name for name in a.layers if not torch.equal(a.quantized(name).codes, b.quantized(name).codes)]
    assert differ == ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]


def test_siblings_must_be_alike(model: Path, tmp_path: Path) -> None:
    for options, culprit in (
        ({"override": {"q_proj": {"bits": 8}}}, "override 'q_proj'"),
        ({"override": {"gate": {"group_size": 16}}}, "override 'gate'"),
        ({"ignore": ["k_proj"]}, "ignore 'k_proj'"),
        ({"override": {"v_proj": {"sym": False}}}, "override 'v_proj'"),
    ):
        with pytest.raises(SettingError, match="engines fuse .* must be alike; widen " + culprit):
            run(model, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_patterns_of_other_tools(model: Path, tmp_path: Path) -> None:
    """``re:`` of compressed-tensors, ``-:`` and ``+:`` of GPTQModel match from a name's start; ours are searched for."""
    names = [f"model.layers.{k}.mlp.{leaf}" for k in (0, 1) for leaf in ("gate_proj", "up_proj", "down_proj")]
    for ignore in ("re:.*mlp.*", "-:.*\\.mlp\\.", "mlp", r"re:model\.layers\.\d+\.mlp", "re:(?i).*MLP"):
        assert sorted(make_plan(model, sketch=True, method=RTN(), grid=GRID, ignore=ignore).ignored) == sorted(names)
    for form in ("re:mlp", "-:mlp", "re:layers"):
        with pytest.raises(SettingError, match="matches no linear"):
            make_plan(model, sketch=True, method=RTN(), grid=GRID, ignore=form)
    for pattern in ("re:.*down_proj", "+:.*down_proj$", r"re:model\..*\.down_proj"):
        plan = make_plan(model, sketch=True, method=RTN(), grid=GRID, override={pattern: {"bits": 8}})
        assert [n for n, grid in plan.grids.items() if grid.bits == 8] == [
            n for n in plan.grids if n.endswith("down_proj")
        ]
    words = ["plan", str(model), "--method", "rtn", "--group-size", "32"]
    assert main([*words, "--ignore", "-:.*mlp.*", "--override", "+:.*self_attn.*=bits=8"]) == 0
    run(model, tmp_path / "out", method=RTN(), ignore=["re:.*mlp.*", "lm_head"])
    assert set(names) < set(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"])


def test_patterns_may_name_what_stays_dense_anyway_and_names_in_the_model(tmp_path: Path) -> None:
    """Routers and embeddings, as recipes of other tools list them; vision models have other names in files."""
    mixture = tiny.save(tiny.build_mixture("qwen3_moe"), tmp_path / "mixture")
    for ignore in ("re:.*mlp.gate$", "re:.*embed_tokens$", "lm_head", "re:.*lm_head"):
        plan = make_plan(mixture, sketch=True, method=RTN(), group_size=16, ignore=ignore)
        assert plan.ignored == {} and len(plan.sites) == 32
    gpt = tiny.save(tiny.build("gpt_neox"), tmp_path / "gpt")
    (gpt / "model.safetensors").unlink()
    state = {name.removeprefix("gpt_neox."): value for name, value in tiny.build("gpt_neox").state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, gpt / "model.safetensors", {"format": "pt"})
    for pattern in (r"^layers\.0\.", r"^gpt_neox\.layers\.0\."):
        plan = make_plan(gpt, sketch=True, method=RTN(), group_size=16, ignore=pattern)
        assert len(plan.ignored) == 4 and all(name.startswith("layers.0.") for name in plan.ignored)


def test_what_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [str(model), str(out), "--method", "rtn", "--group-size", "32"]
    for more, sentence in (
        (["--override", "down_proj"], "not of the form"), (["--override", "bits=8"], "not of the form"),
        (["--override", "down=bits=8,,"], "not of the form"), (["--override", "down=wbits=8"], "not 'wbits'"),
        (["--override", "nowhere=bits=8"], "override 'nowhere' matches no linear"),
        (["--ignore", "nowhere"], "ignore 'nowhere' matches no linear"), (["--ignore", "("], "no regular expression"),
        (["--override", "(=bits=8"], "no regular expression"), (["--override", "down=bits=9"], "override 'down': bits must be"),
        (["--override", "down=bits=x"], "bits must be"), (["--override", "down=group_size=x"], "group_size must be a whole"),
        (["--override", "down=sym=maybe"], "sym must be true or"), (["--override", "down=fit=best"], "fit must be one of"),
        (["--override", "down=bits=ternary,sym=false"], "ternary grid"), (["--ignore", "."], "nothing to quantize"),
        (["--override", "down=bits=5", "--format", "gptq"], "stores 2, 3, 4 or 8 bits, not 5"),
        (["--override", "q_proj=bits=8"], "widen override 'q_proj'"),
        (["--ignore", "down", "--override", "down=bits=8"], "no linear"),
        (["--ignore", "+:down"], "give it to override"), (["--override", "-:down=bits=8"], "give it to ignore"),
        (["--ignore", "re:"], "no regular expression behind 're:'"), (["--ignore", "re:("], "no regular expression"),
    ):  # fmt: skip
        assert sentence in refused([*words, *more], capsys, out), more
    for override in ({"down": {"wbits": 8}}, {"down": {}}, {"down": 8}, {"down": {"bits": "8"}}, {"": {"bits": 8}}):
        with pytest.raises(SettingError, match="override"):
            run(model, out, override=override)


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--method", "rtn", "--group-size", "32", "--ignore", "lm_head", "--ignore=layers.0.mlp.down"]
    more = ["--override", "(?=.*down).=bits=8,group_size=96,sym=False", "--override=o_proj=fit=minmax"]
    assert main(["plan", str(model), *words, *more]) == 0
    assert main(["quantize", str(model), str(out), "--verbose", *words, *more]) == 0
    printed = capsys.readouterr().err
    assert "override 'o_proj' fit=minmax" in printed and "bits/group 8/96" in printed and "left dense" in printed
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["override"][0] == {"pattern": "(?=.*down).", "bits": 8, "group_size": 96, "sym": False}
    assert main(["inspect", str(out)]) == 0
    assert "8 bits, group 96, asymmetric" in capsys.readouterr().out
    assert main(["verify", str(out), "--engine", "vllm"]) == 0


def test_resume_keeps_the_grids(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"override": OVERRIDE, "ignore": [DENSE]}
    run(model, tmp_path / "whole", **options)
    out = stopped(model, tmp_path / "out", monkeypatch, **options)
    with pytest.raises(SettingError, match="override was"):
        run(model, out, resume=True, ignore=[DENSE])
    with pytest.raises(SettingError, match="ignore was"):
        run(model, out, resume=True, override=OVERRIDE)
    assert run(model, out, resume=True, **options).resumed == 1
    same_weights(out, tmp_path / "whole")


def stopped(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """A run that ended after its first block."""
    from nearplane.run.events import BlockDone
    from nearplane.run.resume import Saver

    with monkeypatch.context() as patch:
        take = Saver.take

        def once(saver: Saver, event: Any) -> None:
            take(saver, event)
            if isinstance(event, BlockDone):
                raise KeyboardInterrupt

        patch.setattr(Saver, "take", once)
        with pytest.raises(KeyboardInterrupt):
            run(model, out, **options)
    return out


def same_weights(one: Path, other: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json", *(path.name for path in one.glob("*.safetensors"))):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("format", "method"), [("compressed-tensors", GPTQ()), ("gptq", NearPlane()), ("gptq_v2", RTN())]
)
def test_a_budget_is_met_by_the_best_choice(format: Any, method: Any, model: Path, tmp_path: Path) -> None:
    """The average of what is stored, siblings alike, and no other choice with a smaller sum of the measured errors."""
    report = run(model, tmp_path / "out", method=method, budget=4.6, format=format)
    assert 4.2 < report.totals["bits_per_weight"] <= 4.6
    choices, bits = report.settings["choices"], {row.name: row.bits for row in report.linears}
    assert len(choices) == 8 and len(set(bits.values())) > 1
    assert {name: row["bits"] for row in choices for name in row["linears"]} == bits
    assert sum(row["bytes"] for row in choices) == report.bytes["quantized"]
    shapes = {row.name: row.shape for row in report.linears}
    packing, stored = FORMATS[format], "float16" if "gptq" in format else "float32"
    listed = []
    for row in choices:
        assert [int(width) for width in row["errors"]] == [2, 3, 4, 8]
        assert sorted(row["errors"].values(), reverse=True) == list(row["errors"].values())
        grids = [Grid(width, 32, scale_dtype=stored) for width in (2, 3, 4, 8)]
        costs = [sum(packing.nbytes(shapes[name], grid) for name in row["linears"]) for grid in grids]
        listed.append(list(zip(costs, row["errors"].values(), strict=True)))
    allowed = 4.6 / 8 * sum(a * b for a, b in shapes.values())
    best = min(
        sum(error for _, error in some)
        for some in itertools.product(*listed)
        if sum(cost for cost, _ in some) <= allowed
    )
    assert sum(row["errors"][str(row["bits"])] for row in choices) == pytest.approx(best, rel=1e-12)
    assert nearplane.verify(tmp_path / "out").ok
    nearplane.load(tmp_path / "out")


@pytest.mark.parametrize(("unit", "others"), [(0, "[^qkv]_proj"), (3, "[^n]_proj|1.*down")])
def test_a_width_costs_what_the_block_loses(unit: int, others: str, model: Path, tmp_path: Path) -> None:
    """Of one unit of the first block at every width, beside a run that rounds nothing else before it."""
    row = run(model, tmp_path / "out", budget=5).settings["choices"][unit]
    original = tiny.build("llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24).load(tokenizer, 64).ids
    outputs: list[torch.Tensor] = []
    original.model.layers[0].register_forward_hook(lambda *args: outputs.append(args[2]))
    with torch.no_grad():
        original(ids)
        for bits in (2, 3, 4, 8):
            run(model, tmp_path / f"{bits}", grid=Grid(bits=bits, group_size=32), ignore=[others])
            rounded = open_checkpoint(tmp_path / f"{bits}")
            kept = {name: original.get_submodule(name).weight.clone() for name in row["linears"]}
            for name in row["linears"]:
                original.get_submodule(name).weight.copy_(rounded.weight(name))
            original(ids)
            for name, weight in kept.items():
                original.get_submodule(name).weight.copy_(weight)
            lost = (outputs[-1] - outputs[0]).square().sum(-1) / outputs[0].square().sum(-1)
            assert row["errors"][str(bits)] == pytest.approx(float(lost.mean()), rel=1e-3)


def test_a_budget_beside_overrides(model: Path, tmp_path: Path) -> None:
    """Given bits stay as given and count; given group sizes stay; widths are those asked for."""
    override = {"o_proj": {"bits": 6}, "down_proj": {"group_size": 96}}
    report = run(model, tmp_path / "out", budget=5.4, widths=(3, 4, 5), override=override, ignore=["1.*(gate|up)"])
    assert report.totals["bits_per_weight"] <= 5.4
    grids = {row.name: (row.bits, row.group_size) for row in report.linears}
    assert {some for name, some in grids.items() if "o_proj" in name} == {(6, 32)}
    assert {size for name, (_, size) in grids.items() if "down" in name} == {96}
    assert {bits for name, (bits, _) in grids.items() if "o_proj" not in name} <= {3, 4, 5}
    assert not any("o_proj" in name for row in report.settings["choices"] for name in row["linears"])
    everything = run(model, tmp_path / "all", method=RTN(), budget=5.4, override={".": {"bits": 4}})
    assert {row.bits for row in everything.linears} == {4} and everything.settings["choices"] == []


def test_a_resumed_budget_is_not_measured_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, tmp_path / "whole", budget=4.4)
    out = stopped(model, tmp_path / "out", monkeypatch, budget=4.4)
    for options, name in (({"budget": 5}, "budget"), ({}, "budget"), ({"budget": 4.4, "widths": (2, 4)}, "widths")):
        with pytest.raises(SettingError, match=f"^{name} was"):
            run(model, out, resume=True, **options)

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("nearplane.run.budget._measure", never)
        run(model, out, resume=True, budget=4.4, progress=True)
    assert "budget 4.4 bits per weight" in capsys.readouterr().err
    same_weights(out, tmp_path / "whole")
    one, other = (json.loads((folder / "report.json").read_text())["settings"] for folder in (out, tmp_path / "whole"))
    assert one == other
    plain = stopped(model, tmp_path / "plain", monkeypatch)
    with pytest.raises(SettingError, match="budget was None"):
        run(model, plain, resume=True, budget=4.4)


def test_the_budget_of_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [str(model), str(out), "--method", "rtn", "--group-size", "32"]
    for more, sentence in (
        (["--budget", "0"], "positive"), (["--budget", "nan"], "positive"), (["--budget", "x"], "a number; got 'x'."),
        (["--budget", "2"], "budget 2 is less than the 3"), (["--budget", "4", "--widths", "9"], "widths must be"),
        (["--budget", "6", "--widths", "5", "--format", "gptq"], "stores 2, 3, 4 or 8 bits, not 5"),
        (["--budget", "5", "--override", "q_proj=bits=4"], "k_proj gets bits by the budget"),
    ):  # fmt: skip
        assert sentence in refused([*words, *more], capsys, out), more
    assert main(["plan", str(model), *words[2:], "--budget", "4.5", "--widths", "3", "4"]) == 0
    printed = capsys.readouterr().out
    assert "on average 4.5 bits" in printed and "compressed-tensors of 4 or 8 bits, not 3" in printed
    assert main(["quantize", *words, "--budget", "4.5", "--verbose"]) == 0
    printed = capsys.readouterr()
    assert "model.layers.1.mlp.gate_proj+up_proj" in printed.err and "error at each width" in printed.err
    assert "at 4." in printed.out


@pytest.mark.parametrize(
    ("given", "size", "told"),
    [
        ({}, 32, "group_size 32: it divides the inputs of every linear, and 128 does not divide 64, 96"),
        ({"bits": 3}, 32, "--group-size 128 takes 128 all the same"),
        ({"group_size": 128}, 128, None),  # tails, as asked for
        ({"groupsize": 128}, 128, None),
        ({"grid": Grid()}, 128, None),
        ({"override": {"down_proj": {"group_size": 48}}}, 64, "128 does not divide 64, 96"),  # has groups of its own
        ({"ignore": "down_proj"}, 64, "128 does not divide 64;"),
    ],
)
def test_where_no_group_size_is_given(given: dict[str, Any], size: int, told: str | None, tmp_path: Path) -> None:
    """128, or what divides the inputs of every linear: a tail group loads nowhere else. Here they are 64 and 96."""
    model = tiny.save(tiny.build("llama"), tmp_path / "model")
    plan = make_plan(model, method=RTN(), sketch=True, **given)
    assert plan.grid.group_size == size == plan.settings["grid"]["group_size"]
    said = [note for note in plan.warnings() if note.startswith("group_size ") and "all the same" in note]
    assert len(said) == (told is not None) and all(told in note for note in said if told)


def test_where_no_usual_group_size_divides(tmp_path: Path) -> None:
    """The default stays, and the tail groups are named."""
    model = tiny.save(tiny.build("llama", intermediate_size=100), tmp_path / "model")
    plan = make_plan(model, method=RTN(), sketch=True)
    assert plan.grid.group_size == 128 and any("does not divide the 100 input columns" in n for n in plan.warnings())
