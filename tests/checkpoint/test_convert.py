"""Converting between the formats: the same weights bit for bit, or a refusal that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from transformers import AutoModelForCausalLM

import nearplane
from nearplane import RTN, Grid, NearplaneError
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.formats.gptq import OF_A_MODULE
from nearplane.formats.read import open_checkpoint

IDS = tiny.tokens(2, 20, seed=3)
SHARD = "model-00001-of-00001.safetensors"
CT = "compressed-tensors"
PAIRS = [(CT, "gptq"), (CT, "gptq_v2"), ("gptq", CT), ("gptq", "gptq_v2"), ("gptq_v2", CT), ("gptq_v2", "gptq")]


def written(
    folder: Path, format: str, *, dtype: Any = "float16", kind: str = "llama", mix: Any = None, **grid: Any
) -> Path:
    """Quantized by rounding, in half precision unless told otherwise, so that all formats store the same scales."""
    if not (folder / "model").exists():
        tiny.save(tiny.build(kind), folder / "model")
    settings: Any = {"bits": 4, "group_size": 32} | grid
    out = folder / f"{format}-{dtype}"
    made: dict[str, Any] = {"method": RTN(), "grid": Grid(**settings), "format": format, "dtype": dtype}
    made |= mix or {}
    nearplane.quantize(folder / "model", out, progress=False, **made)
    return tiny.one_shard(out)


def same_weights(a: Path, b: Path) -> None:
    one, other = open_checkpoint(a), open_checkpoint(b)
    assert one.layers.keys() == other.layers.keys() and one.dense == other.dense
    for name in one.layers:
        assert all(torch.equal(x, y) for x, y in zip(one.quantized(name)[:3], other.quantized(name)[:3], strict=True))
        assert torch.equal(one.weight(name), other.weight(name))
    for name in one.dense:
        x, y = one.store.get(name), other.store.get(name)
        assert x.dtype == y.dtype and torch.equal(x, y)


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = nearplane.load(path, packed=False)(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_pair(before: str, after: str, tmp_path: Path) -> None:
    out, new = written(tmp_path, before), tmp_path / "new"
    result = nearplane.convert(out, new, after)
    assert (result.layers, result.dense, result.before, result.after) == (14, 7, before, after)
    assert open_checkpoint(new).format == after
    same_weights(out, new)
    assert torch.equal(logits(out), logits(new))
    checked = nearplane.verify(new)
    assert checked.ok and checked.notes == ()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (new / name).read_bytes() == (out / name).read_bytes()
    assert (new / "quantize_config.json").exists() == (after != CT)
    old, config = (json.loads((folder / "config.json").read_text()) for folder in (out, new))
    del old["quantization_config"], config["quantization_config"]
    assert config == old


@pytest.mark.parametrize("bits", [2, 3, 8, "ternary"])
@pytest.mark.parametrize("size", [-1, 16])
def test_every_width(bits: Any, size: int, tmp_path: Path) -> None:
    out = written(tmp_path, "gptq", bits=bits, group_size=size)
    nearplane.convert(out, tmp_path / "new", CT)
    same_weights(out, tmp_path / "new")
    assert nearplane.verify(tmp_path / "new").ok


@pytest.mark.parametrize("sym", [True, False])
def test_there_and_back_is_byte_for_byte(sym: bool, tmp_path: Path) -> None:
    out = written(tmp_path, CT, sym=sym)
    nearplane.convert(out, tmp_path / "there", "gptq_v2")
    nearplane.convert(tmp_path / "there", tmp_path / "back", CT)
    before, after = (safetensors.torch.load_file(folder / SHARD) for folder in (out, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name
    assert (out / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "mixtral"])
@pytest.mark.parametrize(("before", "after"), [("gptq", CT), (CT, "gptq")])
def test_the_same_linears_stay_dense_as_in_a_run(kind: str, before: str, after: str, tmp_path: Path) -> None:
    """Routers and linears of a bare model are named, as in a run: engines may look for packed weights otherwise."""
    model = tiny.build_mixture(kind) if kind in tiny.MIXTURES else tiny.build(kind)
    tiny.save(model, tmp_path / "model")
    made, wanted = (written(tmp_path, format) for format in (before, after))
    nearplane.convert(made, tmp_path / "new", after)
    found, right = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "new", wanted))
    for part in ("ignore", "dynamic"):
        assert found["quantization_config"].get(part) == right["quantization_config"].get(part)
    named = json.dumps(right["quantization_config"])
    assert all(word in named for word in {"bert": ["pooler"], "mixtral": ["block_sparse_moe"]}.get(kind, []))
    assert found.keys() == right.keys()


def test_a_conv1d_moves_between_the_gptqs_only(tmp_path: Path) -> None:
    out = written(tmp_path, "gptq", kind="gpt2")
    nearplane.convert(out, tmp_path / "new", "gptq_v2")
    same_weights(out, tmp_path / "new")
    assert torch.equal(logits(out), logits(tmp_path / "new"))
    refused(out, tmp_path / "ct", CT, "h.0.attn.c_attn: compressed-tensors knows nn.Linear only")


def refused(path: Path, out: Path, format: str, *words: str, kind: type[NearplaneError] = NearplaneError) -> None:
    """One sentence, and nothing on disk."""
    with pytest.raises(kind) as error:
        nearplane.convert(path, out, format)
    assert all(word in str(error.value) for word in words) and str(error.value).endswith("."), str(error.value)
    assert not out.exists()


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    new, first = tmp_path / "new", "model.layers.0.mlp.down_proj: "
    asymmetric = written(tmp_path / "asymmetric", CT, sym=False)
    refused(asymmetric, new, "gptq", first, "cannot hold every asymmetric zero point; use gptq_v2")
    refused(written(tmp_path / "tail", CT, group_size=64), new, "gptq", first, "does not divide the 96 input columns")
    refused(written(tmp_path / "five", CT, bits=5), new, "gptq", first, "stores 2, 3, 4 or 8 bits, not 5")
    (tmp_path / "odd").mkdir()
    tiny.save(tiny.build("llama", intermediate_size=80), tmp_path / "odd" / "model")
    refused(written(tmp_path / "odd", CT, group_size=16), new, "gptq_v2", first, "multiples of 32", "64 x 80")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_scale_that_float16_would_round(dtype: str, tmp_path: Path) -> None:
    out, name = written(tmp_path, CT, dtype=dtype), "model.layers.1.self_attn.k_proj.weight_scale"
    state = {key: value.clone() for key, value in safetensors.torch.load_file(out / SHARD).items()}
    for key, value in state.items():
        if key.endswith("weight_scale"):
            state[key] = torch.full_like(value, 0.5)
    safetensors.torch.save_file(state, out / SHARD)
    told = str(nearplane.convert(out, tmp_path / "fits", "gptq"))
    assert "to gptq, codes and zeros as they were, scales of the same values, now float16; 7 other tensors" in told
    told = str(nearplane.convert(tmp_path / "fits", tmp_path / "back", CT))
    assert "to compressed-tensors, codes, scales and zeros as they were; 7 other tensors" in told
    for folder in ("fits", "back"):
        assert all(torch.equal(open_checkpoint(out).weight(n), open_checkpoint(tmp_path / folder).weight(n))
                   for n in open_checkpoint(out).layers)  # fmt: skip
    for scale, told in ((2.0**-30, repr(2.0**-30)), (1e6, "")):
        state[name][3, 1] = scale
        safetensors.torch.save_file(state, out / SHARD)
        words = (
            name.removesuffix(".weight_scale"),
            "1 of 64 scales",
            dtype,
            "no exact value in float16",
            "row 3, group 1",
            told,
        )
        refused(out, tmp_path / "new", "gptq", *words)


def test_groups_in_activation_order(tmp_path: Path) -> None:
    out = written(tmp_path, "gptq_v2")
    state = {key: value.clone() for key, value in safetensors.torch.load_file(out / SHARD).items()}
    name = "model.layers.0.self_attn.q_proj"
    state[f"{name}.g_idx"] = state[f"{name}.g_idx"].flip(0).contiguous()
    safetensors.torch.save_file(state, out / SHARD)
    refused(out, tmp_path / "new", CT, name, "activation-ordered groups (desc_act)")


SEVERAL = {"down_proj": {"bits": 8, "group_size": 96}, r"layers\.1\..*(q|k|v)_proj": {"bits": 3, "group_size": 16}}


def grids(path: Path) -> dict[str, Grid]:
    return {name: layer.grid for name, layer in open_checkpoint(path).layers.items()}


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_several_grids_and_dense_linears(before: str, after: str, tmp_path: Path) -> None:
    """There and back; each layer with its own bits, groups and symmetry, and what was left out is left out."""
    override = SEVERAL | ({} if "gptq" in (before, after) else {"gate|up": {"sym": False}})
    out = written(tmp_path, before, mix={"override": override, "ignore": ["layers.0.self_attn.o_proj"]})
    found = grids(out)
    assert len(found) == 13 and len(set(found.values())) == (3 if "gptq" in (before, after) else 4)
    nearplane.convert(out, tmp_path / "there", after)
    nearplane.convert(tmp_path / "there", tmp_path / "back", before)
    for name in ("there", "back"):
        assert grids(tmp_path / name) == found
        same_weights(out, tmp_path / name)
        assert torch.equal(logits(out), logits(tmp_path / name))
        checked = nearplane.verify(tmp_path / name)
        assert checked.ok and checked.notes == ()
    states = [safetensors.torch.load_file(folder / SHARD) for folder in (out, tmp_path / "back")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0].keys() | states[1].keys())


def test_what_is_said_of_several_grids(tmp_path: Path) -> None:
    """As quantize would have written it, but for the order of names; transformers reads the groups that came of rules."""
    mix = {"override": SEVERAL, "ignore": ["layers.0.mlp.(gate|up)"]}
    both = {format: written(tmp_path, format, mix=mix) for format in (CT, "gptq")}
    for format, other in ((CT, "gptq"), ("gptq", CT)):
        nearplane.convert(both[other], tmp_path / f"to-{format}", format)
        made, wanted = (
            json.loads((folder / "config.json").read_text())["quantization_config"]
            for folder in (tmp_path / f"to-{format}", both[format])
        )
        for config in (made, wanted):
            for key in ("meta", "static_groups", "true_sequential"):  # of the run: compressed-tensors keeps none
                config.pop(key, None)
            for group in config.get("config_groups", {}).values():
                group["targets"] = set(group["targets"])
        assert made == wanted
    assert made["dynamic"][r"+:^model\.layers\.1\.self_attn\.qkv_proj" + OF_A_MODULE] == {
        "bits": 3,
        "group_size": 16,
        "sym": True,
    }
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"to-{CT}", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, logits(both["gptq"]))


def test_bits_by_a_budget(tmp_path: Path) -> None:
    out = written(tmp_path, CT, mix={"budget": 4})
    nearplane.convert(out, tmp_path / "new", "gptq")
    assert len(set(grids(out).values())) > 1 and grids(out) == grids(tmp_path / "new")
    same_weights(out, tmp_path / "new")
    assert nearplane.verify(tmp_path / "new").ok


def test_one_of_several_grids_that_does_not_fit(tmp_path: Path) -> None:
    five = written(tmp_path / "five", CT, mix={"override": {"o_proj": {"bits": 5}}})
    refused(five, tmp_path / "new", "gptq", "model.layers.0.self_attn.o_proj: gptq stores 2, 3, 4 or 8 bits, not 5")
    asymmetric = written(tmp_path / "asymmetric", CT, mix={"override": {"1.*down_proj": {"sym": False}}})
    refused(
        asymmetric, tmp_path / "new", "gptq", "model.layers.1.mlp.down_proj: ", "asymmetric zero point; use gptq_v2"
    )
    same_weights(asymmetric, Path(nearplane.convert(asymmetric, tmp_path / "new", "gptq_v2").out))


def test_quantized_activations(tmp_path: Path) -> None:
    out = written(tmp_path, CT)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    (out / "config.json").write_text(json.dumps(config))
    refused(out, tmp_path / "new", "gptq", "nearplane runs integers of a dynamic scale per token")
    given = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = given
    (out / "config.json").write_text(json.dumps(config))
    refused(out, tmp_path / "new", "gptq", "quantizes more than weights (input_activations)")


def test_what_is_no_conversion(tmp_path: Path) -> None:
    out, new = written(tmp_path, "gptq"), tmp_path / "new"
    refused(out, new, "awk", "format must be one of", kind=SettingError)
    refused(out, new, "gptq", "is gptq already; copy the folder", kind=SettingError)
    refused(tmp_path / "model", new, "gptq", "is not quantized; use nearplane quantize", kind=SettingError)
    with pytest.raises(SettingError, match="is not empty"):
        nearplane.convert(out, out, CT)


def test_an_older_tools_checkpoint(tmp_path: Path) -> None:
    """Its settings only in quantize_config.json, no g_idx, an index of its own or none."""
    out = written(tmp_path, "gptq")
    state = safetensors.torch.load_file(out / SHARD)
    (out / SHARD).unlink()
    (out / "model.safetensors.index.json").unlink()
    safetensors.torch.save_file(
        {key: value for key, value in state.items() if not key.endswith("g_idx")}, out / "model.safetensors"
    )
    config = json.loads((out / "config.json").read_text())
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
    (out / "quantize_config.json").write_text(json.dumps(settings))
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    (out / "report.json").unlink()
    assert nearplane.verify(out).ok
    nearplane.convert(out, tmp_path / "v2", "gptq_v2")
    same_weights(out, tmp_path / "v2")
    made = json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]
    assert made["damp_percent"] == 0.01 and made["meta"]["converted_from"] == "gptq"
    assert nearplane.verify(tmp_path / "v2").ok


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, new = written(tmp_path, CT), tmp_path / "new"
    assert main(["convert", str(out), str(new), "--format", "gptq"]) == 0
    said = capsys.readouterr().out
    assert "14 layers from compressed-tensors to gptq, codes, scales and zeros as they were; 7 other tensors" in said
    assert main(["verify", str(new), "--engine", "vllm"]) == 0
    assert main(["convert", str(out), str(tmp_path / "other"), "--format", "awk"]) == 2
    assert main(["convert", str(out), str(tmp_path / "other")]) == 2
    assert main(["convert", str(out), str(new), "--format", "gptq_v2"]) == 2
    assert "is not empty" in capsys.readouterr().err
