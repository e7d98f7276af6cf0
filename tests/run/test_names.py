"""Settings from files and dictionaries: of other toolkits, and of a finished run, which they repeat."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AwqConfig, GPTQConfig

from nearplane import GPTQ, Calibration, Grid, Job, SettingError, quantize
from nearplane.cli.main import main, verb
from nearplane.cli.options import parse
from nearplane.models.discover import Block, Site
from nearplane.run.mix import assign, leave_out
from nearplane.run.names import config_of, read_config, settings_of

AUTOGPTQ = {
    "bits": 3, "group_size": 64, "damp_percent": 0.02, "desc_act": True, "static_groups": False, "sym": False,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None, "quant_method": "gptq",
    "checkpoint_format": "gptq_v2",
}  # fmt: skip


def test_a_quantize_config_of_autogptq() -> None:
    job = Job.read(AUTOGPTQ)
    assert (job.grid.bits, job.grid.group_size, job.grid.sym) == (3, 64, False)
    assert (job.method.damp_percent, job.method.order) == (0.02, "activation")  # type: ignore[attr-defined]
    assert job.checkpoint_format.name == "gptq_v2"


def test_configurations_of_transformers() -> None:
    job = Job.read(GPTQConfig(bits=4, dataset="c4", group_size=32, sym=False, desc_act=True))
    assert (job.grid.bits, job.grid.group_size, job.grid.sym) == (4, 32, False)
    assert job.checkpoint_format.name == "gptq" and job.calibration.dataset == "c4"
    assert Job.read(AwqConfig(bits=4, group_size=64)).grid.sym is False  # its sym says True, its zero_point decides
    assert (
        Job.read({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}).checkpoint_format.name
        == "awq"
    )


def test_rules_by_name_of_gptqmodel() -> None:
    rules: dict[str, Any] = {
        "+:.*down_proj": {"bits": 8, "group_size": 32},
        "-:.*o_proj": {},
        r"model\.layers\.0\.": {"bits": 4},
    }
    job = Job.read({"bits": 3, "dynamic": rules, "lm_head": True, "method": "gptq", "format": "gptq"})
    assert [str(each) for each in job.override] == [
        "'+:.*down_proj' bits=8 group_size=32",
        r"'+:(?!.*down_proj(?#or)|.*o_proj)(?#then)model\\.layers\\.0\\.' bits=4",
    ]  # fmt: skip
    assert job.ignore == ("-:(?!.*down_proj)(?#then).*o_proj",) and job.head_bits == 3 and isinstance(job.method, GPTQ)


def first_rule(rules: dict[str, Any], name: str) -> Any:
    """GPTQModel's order, restated: the first rule that matches from the name's start counts alone; None: left dense."""
    for pattern, rule in rules.items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") else rule
    return {}


DOWN, FIRST = r".*layers\.0.*down.*", r".*layers\.0\..*"


@pytest.mark.parametrize(
    "rules",
    [
        {f"+:{FIRST}": {"bits": 8}, "+:.*": {"bits": 3}},
        {"+:.*": {"bits": 3}, f"+:{FIRST}": {"bits": 8}},  # the second never counts
        {FIRST: {"group_size": 16}, ".*": {"bits": 3, "group_size": 64}},  # alone: layer 0 keeps its 4 bits
        {DOWN: {"bits": 8}, f"-:{FIRST}": {}},
        {f"-:{FIRST}": {}, DOWN: {"bits": 8}, "+:.*": {"bits": 3}},
        {FIRST: {}, "-:.*(gate|up)_proj|.*down_proj": {}, ".*": {"bits": 8}},  # an empty rule keeps layer 0 as it is
        {r"+:(?i).*LAYERS\.0\.|.*layers\.2": {"bits": 8}, "(?i).*Q_PROJ|.*[kv]_proj": {"bits": 3}},
        {"layers": {"bits": 8}, "model": {"bits": 3}},  # from the name's start: the first matches nothing
    ],
    ids=str,
)
def test_the_first_rule_of_gptqmodel_that_matches_counts_alone(rules: dict[str, Any]) -> None:
    """In the settings, and again in what a run keeps."""
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    names = {f"model.layers.{k}.{leaf}": f"inner.layers.{k}.{leaf}" for k in range(3) for leaf in leaves}
    job = Job.read({"bits": 4, "group_size": 32, "dynamic": rules})
    if "layers" in rules:
        with pytest.raises(SettingError, match="matches no linear"):
            given(job, names)
        return
    for each in (job, Job.read({"config": json.loads(json.dumps(config_of(job, "demo"))), "linears": []})):
        assert each.override == job.override and each.ignore == job.ignore
        found = given(each, names)
        for name in names:
            rule = first_rule(rules, name)
            assert found[name] == (None if rule is None else {"bits": 4, "group_size": 32, **rule}), name


def given(job: Job, names: dict[str, str]) -> dict[str, Any]:
    """What each linear gets of a job, by name on disk; None where it stays dense."""
    disk = {inner: name for name, inner in names.items()}
    sites = [Site(inner, (32, 32)) for inner in disk]
    blocks, ignored = leave_out([Block("", [sites])], job, disk.__getitem__, ())
    grids, _ = assign({disk[site.name]: site.name for block in blocks for site in block.sites}, job.grid, job, ignored)
    found = {name: {"bits": grid.bits, "group_size": grid.group_size} for name, grid in grids.items()}
    return found | dict.fromkeys(ignored)


def test_rules_may_be_written_in_names_of_the_model() -> None:
    """Whose names on disk are others: each rule is looked for in both, so that one before another excludes it."""
    rules = {r"inner\.layers\.0\.": {"bits": 8}, "-:.*o_proj": {}, ".*": {"bits": 3}}
    names = {f"disk.{k}.{leaf}": f"inner.layers.{k}.{leaf}" for k in (0, 1) for leaf in ("q_proj", "o_proj")}
    found = given(Job.read({"dynamic": rules, "group_size": 32}), names)
    assert {name: grid and grid["bits"] for name, grid in found.items()} == {
        "disk.0.q_proj": 8, "disk.0.o_proj": 8, "disk.1.q_proj": 3, "disk.1.o_proj": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dynamic": {"(a)b": {"bits": 3}, r"(q)\1": {"bits": 3}}}, "refers to a group of its own"),
        ({"bits": 3, "wbits": 4}, "bits is said twice"),
        ({"bits": 3, "grupsize": 64}, "did you mean group_size"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"lm_head": True}, "lm_head of True has no meaning"),
        ({"dynamic": ["down_proj"]}, "dynamic of"),
        ([3], "must hold settings by name; got list"),
        ({"config_groups": {}, "quant_method": "compressed-tensors"}, "give its report.json"),
        ({"bits": 3, "block_name_to_quantize": "model.layers"}, "unknown setting 'block_name_to_quantize'"),
        ({"linears": [], "settings": {}}, "earlier version"),
        ({"nearplane": "0", "not_kept": ["dataset"]}, "was given dataset as a Python object"),
        ({"grid": {"bits": 3}}, "grid"),
        ({"method": {"name": "gptq"}}, "method"),
        ({"calibration": 3}, "calibration"),
    ],
)
def test_what_has_no_meaning_is_one_sentence(given: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Job.read(given)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# mine\nwbits: 3\ngroupsize: 64\nsym: false\ndataset: [[a.txt, 2], [self, 1]]\n")
    assert read_config(tmp_path / "a.yaml") == {
        "bits": 3,
        "group_size": 64,
        "sym": False,
        "dataset": [("a.txt", 2), ("self", 1)],
    }
    (tmp_path / "quantize_config.json").write_text(json.dumps(AUTOGPTQ))
    assert Job.read(tmp_path / "quantize_config.json") == Job.read(AUTOGPTQ)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": AUTOGPTQ}))
    assert Job.read(str(tmp_path / "config.json")) == Job.read(AUTOGPTQ)
    for name, text, words in [
        ("b.json", "{bits: 3", "neither"),
        ("b.yaml", "a: [", "neither"),
        ("c.yaml", "3", "got int"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(SettingError, match=words):
            read_config(tmp_path / name)
    (tmp_path / "d.json").write_bytes(b"\xff\xfe")
    for name in ("d.json", "none.json", ""):
        with pytest.raises(SettingError, match="cannot be read"):
            read_config(tmp_path / name)


def test_a_setting_that_is_not_known_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model is opened; in Python, too."""
    (tmp_path / "model").mkdir()
    path = tmp_path / "bad.json"
    for content, words in (
        ({"bits": 3, "grup_size": 64}, "unknown setting 'grup_size'; did you mean group_size?"),
        ({"bits": 3, "xyzzy": 64}, "unknown setting 'xyzzy'; docs/cli.md lists"),
        ({"method": "gptq", "alpha": 0.5}, "alpha is a setting of method gptaq, not of gptq"),
    ):
        path.write_text(json.dumps(content))
        for words_of in (
            ["quantize", str(tmp_path / "model"), str(tmp_path / "out")],
            ["plan", str(tmp_path / "model")],
        ):
            assert main([*words_of, "--config", str(path)]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"nearplane: --config {path}: {words}") and said.count("\n") == 1
    path.write_text(json.dumps({"grup_size": 64}))
    with pytest.raises(SettingError, match=r"bad.json: unknown setting 'grup_size'"):
        Job.read(path)


def test_one_word_beside_a_report_says_which_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"linears": [], "config": {"model": "demo", "bits": 3}}))
    assert main(["quantize", "NEW", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"--help says how. MODEL and OUT are both words by place; {path} names the model demo." in said
    path.write_text(json.dumps({"bits": 3}))
    assert main(["quantize", "NEW", f"--config={path}"]) == 2
    assert capsys.readouterr().err.endswith("--help says how.\n")


JOBS = [
    Job(),
    Job.of(bits=3, group_size=32, sym=False, method="gptaq", alpha=0.5),
    Job.of(
        method=GPTQ(damp_percent=0.3), grid=Grid(bits=2, group_size=32), calibration=Calibration(nsamples=4, seqlen=16)
    ),
    Job(method=GPTQ(damp_percent=0.3), grid=Grid(bits=2, group_size=32), budget=2.5, widths=(2, 3)),
    Job.of(
        bits=4, override={"down_proj": {"bits": 8, "sym": False}, "a=b": {"fit": "mse"}}, ignore=["o_proj"], head_bits=8
    ),
    Job.of(format="gguf", gguf_type="Q4_1"),
    Job.of(format="gguf"),
    Job.of(format="mlx", bits=3, rotate=("r1", "r2"), rotate_seed=3, act_bits=8, act_sym=False, check=False),
    Job.of(dataset=[("mine.txt", 2), ("self", 1)], nsamples=8, damp_percent=0.01, tune=2),
    Job.of(dtype="float16", towers="text,vision", dataset_column="words", beam=2, device="cpu"),
]


@pytest.mark.parametrize("job", JOBS, ids=range(len(JOBS)))
def test_what_a_run_keeps_makes_the_same_job(job: Job, tmp_path: Path) -> None:
    kept = json.loads(json.dumps(config_of(job, "demo")))
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    assert (
        parse(verb("quantize"), ["m", "o", "--config", str(tmp_path / "kept.json")])[1].keys()
        == settings_of(kept).keys()
    )
    again = Job.read({"linears": [], "settings": {}, "config": kept})
    for name in Job.__dataclass_fields__:
        if name != "given":
            assert getattr(again, name) == getattr(job, name), name
    assert kept["model"] == "demo" and kept["nearplane"] and "not_kept" not in kept


def test_what_says_how_a_run_is_started_is_not_kept() -> None:
    kept = config_of(Job.of(bits=3, resume=True, force=True, offload="there"), "demo")
    assert set(kept) == {"nearplane", "model", "bits"}


def test_tensors_and_rows_of_ids_are_not_kept() -> None:
    for dataset in (
        torch.zeros(3, 8, dtype=torch.long),
        [[1, 2, 3], [4, 5, 6]],
        [{"input_ids": [1, 2]}],
        [("some", 1), (["a"], 2)],
    ):
        assert config_of(Job.of(bits=3, dataset=dataset), "demo")["not_kept"] == ["dataset"]


def test_objects_are_named_and_not_kept() -> None:
    kept = config_of(Job.of(bits=3, dataset=["a text", "another"]), "demo")
    assert kept["not_kept"] == ["dataset"]
    with pytest.raises(SettingError, match="dataset as a Python object"):
        settings_of(kept)
    assert settings_of({**kept, "dataset": "mine.txt"})["dataset"] == "mine.txt"


def test_a_report_repeats_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes; options that are given count first, also those of the method that the file names."""
    model = tiny.with_text(tmp_path)
    words = ["--bits", "3", "--no-sym", "--group-size", "32", "--method", "gptaq", "--alpha", "0.5", "--nsamples", "8"]
    words += ["--dataset", str(tmp_path / "text.txt"), "--seqlen", "32"]
    assert main(["quantize", str(model), str(tmp_path / "a"), *words]) == 0
    report = str(tmp_path / "a" / "report.json")
    assert main(["quantize", str(model), str(tmp_path / "b"), "--config", report]) == 0
    assert (
        main(["quantize", str(model), str(tmp_path / "c"), f"--config={report}", "--alpha", "0.4", "--bits", "2"]) == 0
    )
    settings = [json.loads((tmp_path / name / "report.json").read_text())["settings"] for name in "abc"]
    assert settings[0] == settings[1] and settings[0]["method"] == {
        "name": "GPTAQ",
        "damp_percent": 0.01,
        "alpha": 0.5,
        **{
            key: settings[0]["method"][key]
            for key in settings[0]["method"]
            if key not in ("name", "damp_percent", "alpha")
        },
    }
    assert settings[2]["method"]["alpha"] == 0.4 and settings[2]["grid"]["bits"] == 2 and not settings[2]["grid"]["sym"]
    shards = [(tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in "abc"]
    assert shards[0] == shards[1] != shards[2]
    capsys.readouterr()
    assert main(["plan", str(model), "--config", report, "--json"]) == 0
    assert main(["quantize", str(model), str(tmp_path / "d"), "--config", str(tmp_path / "none.json")]) == 2
    assert "--config" in capsys.readouterr().err and not (tmp_path / "d").exists()
    assert quantize(model, tmp_path / "e", Job.read(report), progress=False).config is not None
