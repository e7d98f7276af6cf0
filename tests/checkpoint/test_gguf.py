"""GGUF checkpoints: from a model or a checkpoint to a file, and back. The ``gguf`` package is the other reader."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import templates
import tiny
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

import nearplane
from nearplane.checkpoint.verify import verify
from nearplane.cli.main import main
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import dequantize
from nearplane.formats.gguf.file import GGUFFile, scalar, write
from nearplane.formats.gguf.format import GGUF
from nearplane.formats.gguf.grids import grid_of
from nearplane.formats.read import open_checkpoint
from nearplane.run.job import Job
from nearplane.runtime.linear import quantized_linears

IDS = tiny.tokens(2, 20, seed=3)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
QUICK: dict[str, Any] = {"method": "rtn", "progress": False}


def llama(folder: Path, **settings: Any) -> tuple[Path, Path]:
    """A model and its template."""
    path = tiny.save(tiny.build("llama", **{"tie_word_embeddings": False, **settings}), folder / "model")
    return path, templates.of_folder(path, folder / "template.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return llama(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return llama(tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.fixture(scope="module")
def plain(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in compressed-tensors with float16 scales."""
    out = tmp_path_factory.mktemp("plain") / "out"
    nearplane.quantize(small[0], out, bits=4, group_size=32, sym=False, dtype="float16", **QUICK)
    return out


def by_package(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Type and values of every tensor, as the package reads them."""
    (file,) = [folder] if folder.is_file() else folder.glob("*.gguf")
    found = gguf.GGUFReader(file).tensors
    return {
        t.name: (t.tensor_type.name, torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()))
        for t in found
    }


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = nearplane.load(path, packed=False)(input_ids=IDS, use_cache=False).logits
    return found


def listed_as_stored(out: Path, type: str) -> None:
    """The report lists what stayed dense with the bytes that it takes in the file, which are those of the total."""
    report = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["dense"]}
    stored = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(next(out.glob("*.gguf"))).tensors}
    for ours, theirs in (("model.embed_tokens.weight", "token_embd.weight"), ("lm_head.weight", "output.weight")):
        assert rows[ours]["bytes"] == stored[theirs], ours
        assert rows[ours]["reason"] == f"not a linear of a block; the file holds it as {type}"
    assert sum(row["bytes"] for row in rows.values()) <= report["bytes"]["dense"]


def expected(out: Path) -> dict[str, torch.Tensor]:
    """What llama.cpp's converter would write of the model that ``nearplane.load`` gives."""
    return templates.tensors(nearplane.load(out, packed=False))


def same_values(file: Path, out: Path) -> None:
    theirs = by_package(file)
    for name, value in expected(out).items():
        found = theirs[name][1].view(value.shape)
        assert torch.allclose(found, value, rtol=1e-6, atol=1e-6 * float(value.abs().max())), name


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q5_0", "Q4_1", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_model_is_quantized_into_each_type(type: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    out, (model, template) = tmp_path / "out", wide
    report = nearplane.quantize(model, out, format="gguf", gguf_type=type, template=template, **QUICK)
    same_values(out, out)
    packed, found = quantized_linears(nearplane.load(out)), open_checkpoint(out)
    assert set(packed) == set(found.layers)
    assert all(torch.equal(module.dequantized(), found.weight(name)) for name, module in packed.items())
    types = Counter(kind for kind, _ in by_package(out).values())
    assert types == {type: 14, "F32": 5, "F16": 2}
    assert report.events[-1] == f"model-{type}.gguf: 14 {type}, 5 F32, 2 F16"
    checked = verify(out)
    assert checked.ok and not checked.notes and (checked.format, checked.layers, checked.tensors) == ("gguf", 14, 7)
    assert report.bytes["after"] == sum(t.n_bytes for t in gguf.GGUFReader(out / f"model-{type}.gguf").tensors)
    keys = gguf.GGUFReader(out / f"model-{type}.gguf").fields
    known = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}.get(type, type)
    assert keys["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{known}"]
    assert keys["general.quantization_version"].contents() == 2
    assert keys["general.quantized_by"].contents() == f"nearplane {nearplane.__version__}"
    assert keys["tokenizer.ggml.tokens"].contents() == [f"w{i}" for i in range(tiny.VOCABULARY)]


@pytest.mark.parametrize(
    ("kind", "tied", "stored", "dense"),
    [("llama", False, "F16", None), ("llama", False, "Q4_0", None), ("llama", True, "Q8_0", None), ("llama", True, "F32", "F16"),
     ("llama", False, "F16", "Q8_0"), ("mixtral", False, "Q8_0", None)],
)  # fmt: skip
def test_a_plan_counts_the_bytes_of_the_file(kind: str, tied: bool, stored: str, dense: Any, tmp_path: Path) -> None:
    """Dense tensors take the template's types, or those of --gguf-dense, and not the model's dtype."""
    settings: dict[str, Any] = {"tie_word_embeddings": tied, "vocab_size": 3000}
    built = tiny.build_mixture(kind, **settings) if kind == "mixtral" else tiny.build(kind, **settings)
    model = tiny.save(built, tmp_path / "model")
    template = templates.of_folder(model, tmp_path / "template.gguf", stored)
    asked = {"format": "gguf", "gguf_type": "Q4_1", "template": template, "gguf_dense": dense, "method": "rtn"}
    planned = nearplane.plan(model, **asked).estimate.disk
    report = nearplane.quantize(model, tmp_path / "out", progress=False, **asked)
    file = next((tmp_path / "out").glob("*.gguf"))
    tensors = sum(t.n_bytes for t in gguf.GGUFReader(file).tensors)
    beside = sum(v.nbytes for path in (tmp_path / "out").glob("*.safetensors") for v in load_file(path).values())
    assert planned["quantized"] == report.bytes["quantized"]
    assert planned["quantized"] + planned["dense"] == tensors + beside
    others = sum(
        path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix == ".json" and "tok" in path.name
    )
    assert abs(planned["other files"] - others - (file.stat().st_size - tensors)) < 2000


def test_what_was_solved_is_what_is_read(wide: tuple[Path, Path], tmp_path: Path) -> None:
    model, template = wide
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(2000))
    settings: dict[str, Any] = {"format": "gguf", "gguf_type": "Q4_K", "template": template, "dataset": str(text)}
    settings |= {"nsamples": 4, "seqlen": 32, "method": "gptq", "progress": False}
    solved: dict[str, Any] = {}
    plan = nearplane.run.plan.make_plan(model, **{k: v for k, v in settings.items() if k != "progress"})
    for event in nearplane.run.walk.walk(plan):
        if hasattr(event, "quantized"):
            solved[plan.disk_name(event.site.name)] = event.quantized
    nearplane.quantize(model, tmp_path / "out", **settings)
    found = open_checkpoint(tmp_path / "out")
    assert found.layers.keys() == solved.keys()
    for name, wanted in solved.items():
        got = found.quantized(name)
        assert torch.equal(got.codes, wanted.codes) and torch.equal(got.zero, wanted.zero)
        assert torch.equal(got.scale.float(), wanted.scale.float()) and found.layers[name].grid == grid_of("Q4_K")
        assert torch.equal(found.weight(name), dequantize(wanted, grid_of("Q4_K")).float())


def test_a_mixture_of_experts_is_stacked(tmp_path: Path) -> None:
    model = tiny.save(tiny.build_mixture("mixtral", tie_word_embeddings=False), tmp_path / "model")
    template = templates.of_folder(model, tmp_path / "t.gguf")
    report = nearplane.quantize(model, tmp_path / "out", format="gguf", template=template, **QUICK)
    types = {name: kind for name, (kind, _) in by_package(tmp_path / "out").items()}
    assert types["blk.1.ffn_down_exps.weight"] == "Q4_0" and types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert "copied without a partner" not in report.events[-1]
    gate = by_package(tmp_path / "out")["blk.0.ffn_gate_exps.weight"][1].view(4, 96, 64)
    found = open_checkpoint(tmp_path / "out")
    for expert in range(4):
        name = next(
            n
            for n in found.layers
            if f"layers.0.mlp.experts.{expert}.gate_proj" in n or f"layers.0.block_sparse_moe.experts.{expert}.w1" in n
        )
        assert torch.equal(found.weight(name), gate[expert])
    assert verify(tmp_path / "out").ok and logits(tmp_path / "out").isfinite().all()
    nearplane.quantize(model, tmp_path / "q4_1", format="gguf", gguf_type="Q4_1", template=template, **QUICK)
    packed, found = nearplane.load(tmp_path / "q4_1", arithmetic="exact"), open_checkpoint(tmp_path / "q4_1")
    assert len(quantized_linears(packed)) == len(found.layers) == 2 * (4 + 4 * 3)
    with torch.no_grad():
        assert torch.allclose(packed(input_ids=IDS, use_cache=False).logits, logits(tmp_path / "q4_1"), atol=1e-5)


def test_a_resumed_run_writes_the_same_bytes(small: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    settings: dict[str, Any] = {"format": "gguf", "gguf_type": "Q5_0", "template": small[1], **QUICK}
    nearplane.quantize(small[0], tmp_path / "whole", **settings)
    real = nearplane.checkpoint.export.Writer.finish

    def full(*_: Any) -> None:
        raise NearplaneError("the disk is full.")

    monkeypatch.setattr(nearplane.checkpoint.export.Writer, "json", full)  # the .gguf file is there by then
    with pytest.raises(NearplaneError, match="disk is full"):
        nearplane.quantize(small[0], tmp_path / "out", **settings)
    monkeypatch.undo()
    assert real is nearplane.checkpoint.export.Writer.finish
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".unfinished")
    assert not list((tmp_path / "out").glob("*.gguf"))
    nearplane.quantize(small[0], tmp_path / "out", resume=True, **settings)
    name = "model-Q5_0.gguf"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(nearplane.checkpoint.export.Writer, "json", full)
    with pytest.raises(NearplaneError, match="disk is full"):
        nearplane.quantize(small[0], tmp_path / "out", **settings)
    monkeypatch.undo()
    other = templates.of_folder(small[0], tmp_path / "other.gguf", "Q8_0")
    with pytest.raises(SettingError, match=r"gguf\.template\.file was 'template\.gguf' when"):
        nearplane.quantize(small[0], tmp_path / "out", resume=True, **{**settings, "template": other})


@pytest.mark.parametrize("type", [None, "Q8_0", "Q4_1"])
@pytest.mark.parametrize("coarse", ["F16", "Q4_0"])
def test_a_checkpoint_becomes_a_file(
    type: str | None, coarse: str, small: tuple[Path, Path], plain: Path, tmp_path: Path, capsys: Any
) -> None:
    template = templates.of_folder(small[0], tmp_path / "t.gguf", coarse)
    new = tmp_path / "deep" / "new.gguf"
    words = ["convert", str(plain), str(new), "--template", str(template), *(["--gguf-type", type] if type else [])]
    assert main(words) == 0
    kind = type or "Q5_0"  # asymmetric 4 bits
    kept = "offsets of 14 layers rounded to float16" if type == "Q4_1" else "every weight as it was"
    assert capsys.readouterr().out == (
        f"{new}: 14 layers from compressed-tensors to gguf; 14 {kind}, 5 F32, 2 {coarse}; {kept}\n"
    )
    found, wanted = by_package(new), expected(plain)
    for name in (name for name in wanted if "ffn" in name or "attn" in name):
        if type == "Q4_1":
            assert torch.allclose(found[name][1].view(wanted[name].shape), wanted[name], atol=2e-3)
        else:
            assert torch.equal(found[name][1].view(wanted[name].shape), wanted[name]), name
    assert [path.name for path in new.parent.iterdir()] == ["new.gguf"]


def test_a_checkpoint_becomes_a_folder_and_comes_back(small: tuple[Path, Path], plain: Path, tmp_path: Path) -> None:
    done = nearplane.convert(plain, tmp_path / "new", "gguf", template=small[1])
    assert done.after == "gguf" and verify(tmp_path / "new").ok
    listed_as_stored(tmp_path / "new", by_package(tmp_path / "new")["token_embd.weight"][0])
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())["weight_map"]
    assert Counter(index.values())["out-Q5_0.gguf"] == 14
    held = [name for path in (tmp_path / "new").glob("*.safetensors") for name in load_file(path)]
    assert sorted(held) == sorted(n for n in index if "norm" in n)  # no weight is stored twice
    assert torch.equal(logits(tmp_path / "new"), logits(plain))
    with pytest.raises(NearplaneError, match="is gguf already"):
        nearplane.convert(tmp_path / "new", tmp_path / "x.gguf")
    text = str(nearplane.inspect(tmp_path / "new"))
    assert "quantized, gguf, 14 linears, 7 dense tensors" in text and "5 bits, group 32, symmetric" in text


@pytest.mark.parametrize("type", ["Q8_0", "F16", "Q6_K"])
def test_embedding_and_head_are_encoded_from_the_originals_values(
    type: str, wide: tuple[Path, Path], tmp_path: Path
) -> None:
    model, _ = wide
    template = templates.of_folder(model, tmp_path / "t.gguf", "Q4_0")
    nearplane.quantize(model, tmp_path / "out", format="gguf", template=template, gguf_dense=type, **QUICK)
    found = by_package(tmp_path / "out")
    wanted = expected(model)
    for name in ("token_embd.weight", "output.weight"):
        kind, value = found[name]
        error = float((value - wanted[name]).norm() / wanted[name].norm())
        assert kind == type and error < {"Q8_0": 0.008, "F16": 3e-4, "Q6_K": 0.025}[type]
    assert found["blk.0.attn_norm.weight"][0] == "F32"
    listed_as_stored(tmp_path / "out", type)
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "out"))  # it loads
    same_values(tmp_path / "out", tmp_path / "out")  # what eval measures is what the file holds


def test_types_of_some_linears_by_override(wide: tuple[Path, Path], tmp_path: Path) -> None:
    override = ["down_proj=gguf_type=q6_k", "layers.0.mlp.up=gguf_type=Q8_0", "v_proj=gguf_type=Q5_1", r"o_proj=bits=8"]
    made: dict[str, Any] = {"format": "gguf", "gguf_type": "Q4_0", "template": wide[1], "override": override}
    nearplane.quantize(wide[0], tmp_path / "out", **made, **QUICK)
    types = {name: kind for name, (kind, _) in by_package(tmp_path / "out").items()}
    assert [types[f"blk.{i}.ffn_down.weight"] for i in (0, 1)] == ["Q6_K", "Q6_K"]
    assert [types[f"blk.{i}.ffn_up.weight"] for i in (0, 1)] == ["Q8_0", "Q4_0"]
    assert [types[f"blk.{i}.attn_output.weight"] for i in (0, 1)] == ["Q8_0", "Q8_0"]
    assert (types["blk.0.attn_v.weight"], types["blk.0.attn_q.weight"]) == ("Q5_1", "Q4_0")  # llama.cpp fuses nothing
    assert verify(tmp_path / "out").ok
    same_values(tmp_path / "out", tmp_path / "out")
    nearplane.quantize(wide[0], tmp_path / "left", ignore=["layers.0."], **{**made, "override": override[2:]}, **QUICK)
    types = {name: kind for name, (kind, _) in by_package(tmp_path / "left").items()}
    assert (types["blk.0.ffn_down.weight"], types["blk.1.ffn_down.weight"]) == ("F16", "Q4_0")
    same_values(tmp_path / "left", tmp_path / "left")


def test_the_type_decides_the_grid() -> None:
    own = Job.of(format="gguf", gguf_type="q4_k", bits=4, sym=False)
    assert own.grid == grid_of("Q4_K") and own.gguf_type == "Q4_K"
    assert (
        Job.of(format="gguf").grid
        == grid_of("Q4_0")
        == Job.of(format="gguf", gguf_type="Q4_0", bits=4, group_size=32).grid
    )
    assert (Job.of(format="gguf", bits=3, group_size=64).grid.bits, Job.of(own, nsamples=3).grid) == (3, own.grid)
    assert Job.of(own, gguf_type="Q6_K").grid == grid_of("Q6_K")
    for given in ({"bits": 3}, {"group_size": 128}, {"sym": True}, {"bits": 4, "group_size": 32, "sym": True}):
        with pytest.raises(SettingError, match="contradicts gguf_type Q4_K, whose"):
            Job.of(format="gguf", gguf_type="Q4_K", **given)
    with pytest.raises(SettingError, match="bits=3 contradicts gguf_type Q4_K, whose bits is 4"):
        Job.of(own, bits=3)
    for given, sentence in (
        ({"gguf_type": "Q4_0"}, "--gguf-type is for --format gguf, and the format is compressed-tensors"),
        ({"template": "x.gguf"}, "--template is for --format gguf"), ({"gguf_dense": "F16"}, "--gguf-dense is for --format gguf"),
        ({"format": "gguf", "gguf_type": "Q9_K"}, "gguf_type must be one of Q4_0, .*got 'Q9_K'"),
        ({"format": "gguf", "gguf_dense": "Q4_0"}, "gguf_dense must be one of Q8_0, Q6_K, F16; got 'Q4_0'"),
        ({"format": "gguf", "override": ["a=gguf_type=Q4_0,bits=3"]}, "gguf_type decides bits; give one of them"),
        ({"format": "gguf", "override": ["a=gguf_type=X"]}, "gguf_type must be one of"),
        ({"format": "gguf", "act_bits": 8}, "gguf cannot say that activations are rounded"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=sentence):
            job = Job.of(**given)
            job.checkpoint_format.running(job.activations, False)


def test_what_cannot_work_is_refused_before_the_run(
    small: tuple[Path, Path], wide: tuple[Path, Path], tmp_path: Path
) -> None:
    model, template = small
    other = templates.of_folder(
        tiny.save(tiny.build("llama", seed=5, tie_word_embeddings=False), tmp_path / "o"), tmp_path / "o.gguf"
    )
    tokens = templates.of_folder(tiny.save(tiny.build("llama", vocab_size=100), tmp_path / "v"), tmp_path / "v.gguf")
    build = tiny.build("llama", tie_word_embeddings=False)
    tensors = templates.tensors(nearplane.load(model))
    order = {**tensors, "token_embd.weight": tensors["token_embd.weight"].flip(0)}
    mixed = templates.write(tmp_path / "m.gguf", build.config, order)
    twice = templates.write(
        tmp_path / "2.gguf", build.config, {**tensors, "blk.1.ffn_up.weight": tensors["blk.0.ffn_up.weight"]}
    )
    merged = {name: value for name, value in tensors.items() if "ffn_gate" not in name}
    merged |= {
        f"blk.{i}.ffn_up.weight": torch.cat([tensors[f"blk.{i}.ffn_{n}.weight"] for n in ("gate", "up")])
        for i in (0, 1)
    }
    fused = templates.write(tmp_path / "f.gguf", build.config, merged)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(template.read_bytes()[:-500])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"template": None}, "give it as --template ORIGINAL.gguf"),
        ({"template": other}, "is of another model: it holds no rows"),
        ({"template": wide[1]}, "is of another model: it holds"), ({"template": tokens}, "has another vocabulary: 100 tokens"),
        ({"template": mixed}, "another vocabulary: its tokens are in another order"), ({"template": cut}, "is truncated"),
        ({"template": twice}, "tensors blk.0.ffn_up.weight and blk.1.ffn_up.weight of .* are both nearest"),
        ({"template": model / "config.json"}, "is not a GGUF file"), ({"template": tmp_path / "none"}, "does not exist"),
        ({"gguf_type": "Q4_K"}, r"q_proj: Q4_K has blocks of 256 inputs, which do not divide 64 as those of Q4_0, .* do; "
         r"this would do: --override '\(q_proj\|.*\|down_proj\)=gguf_type=Q5_0'"),
        ({"gguf_type": "Q2_0"}, "Q2_0 has blocks of 64 inputs, which do not divide 96.*--override 'down_proj=gguf_type=Q4_0'"),
        ({"rotate": "r1"}, "rotations and other transforms change embeddings and norms"),
        ({"rotate": "r1,r2,r4"}, "rotations and other transforms change embeddings and norms"),
        ({"gguf_dense": "Q6_K"}, "gguf_dense Q6_K has blocks of 256 inputs, which do not divide the 64 of token_embd.weight; "
         "give Q8_0 or F16"),
        ({"bits": 8, "group_size": 32, "sym": False}, "no GGUF type holds asymmetric 8 bits in groups of 32 exactly"),
        ({"template": fused, "override": ["up_proj=gguf_type=Q5_0"]}, r"tensor blk.0.ffn_up.weight of .* holds "
         r"model.layers.0.mlp.(gate|up)_proj.* in one type, and .*is Q4_0.*; make them alike"),
    ]  # fmt: skip
    for given, sentence in cases:
        settings = {"format": "gguf", "template": template, **given}
        with pytest.raises(NearplaneError, match=sentence) as caught:
            nearplane.quantize(model, tmp_path / "out", **settings, **QUICK)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    nearplane.quantize(model, tmp_path / "fused", format="gguf", template=fused, **QUICK)
    assert by_package(tmp_path / "fused")["blk.1.ffn_up.weight"][1].numel() == 192 * 64
    assert verify(tmp_path / "fused").ok


def test_python_takes_the_words_of_the_command_line(small: tuple[Path, Path], plain: Path, tmp_path: Path) -> None:
    words = {"template": str(small[1]), "gguf_type": "q8_0", "gguf_dense": "q8_0"}
    nearplane.convert(plain, tmp_path / "python.gguf", **words)
    flags = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main(["convert", str(plain), str(tmp_path / "shell.gguf"), *flags]) == 0
    assert (tmp_path / "python.gguf").read_bytes() == (tmp_path / "shell.gguf").read_bytes()
    assert Counter(type for type, _ in by_package(tmp_path / "python.gguf").values()) == {"Q8_0": 16, "F32": 5}
    assert nearplane.convert(plain, tmp_path / "folder", template=small[1]).after == "gguf"
    ready = GGUF(template=small[1], type="Q8_0")
    nearplane.convert(plain, tmp_path / "object.gguf", ready, gguf_dense="Q8_0")
    assert (tmp_path / "object.gguf").read_bytes() == (tmp_path / "python.gguf").read_bytes()
    for given, sentence in (
        ({"format": "gptq", "template": small[1]}, "--template is for --format gguf"),
        ({"format": "gguf", "template": small[1], "gguf_type": "Q9"}, "gguf_type must be one of Q4_0"),
        ({"format": "gguf", "template": small[1], "gguf_dense": "Q4_0"}, "gguf_dense must be one of Q8_0"),
        ({"format": "gguf", "template": 5}, "template must be a path; got 5"),
        ({"format": "gguf"}, "give it as --template ORIGINAL"),
    ):
        with pytest.raises(SettingError, match=sentence):
            nearplane.convert(plain, tmp_path / "new", **given)
        with pytest.raises(SettingError, match=sentence):
            nearplane.quantize(small[0], tmp_path / "new", **{"format": "gguf", **given}, **QUICK)
    assert not (tmp_path / "new").exists()


class Steps:
    """A progress display that remembers each task: [name, done, total]."""

    def __init__(self, enabled: bool = True) -> None:
        self.tasks: list[list[Any]] = []

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, name: str, total: int | None) -> int:
        self.tasks.append([name, 0, total])
        return len(self.tasks) - 1

    def update(self, task: int, completed: int, total: int) -> None:
        assert completed == self.tasks[task][1] + 1 and self.tasks[task][2] in (None, total)
        self.tasks[task][1:] = [completed, total]

    def advance(self, task: int) -> None:
        self.tasks[task][1] += 1

    def remove_task(self, task: int) -> None:
        pass


@pytest.mark.parametrize("out", ["new.gguf", "new"])
def test_a_bar_knows_its_end(out: str, small: tuple[Path, Path], plain: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shown = Steps()
    monkeypatch.setattr(nearplane.checkpoint.convert, "bar", lambda _: shown)
    nearplane.convert(plain, tmp_path / out, template=small[1], progress=True)
    (find, found, of), (write, written, all_) = shown.tasks
    assert (find, write) == ("find", "convert") and found == of == 16 + 2 * 16  # matrices of ours and of the template
    assert written == all_ == 21 + 5 * (out == "new")  # tensors of the file; norms beside it


def test_a_conversion_that_fails_leaves_nothing(
    small: tuple[Path, Path], plain: Path, tmp_path: Path, capsys: Any
) -> None:
    rough = tmp_path / "float32"
    nearplane.quantize(small[0], rough, bits=4, group_size=32, **QUICK)
    there = tmp_path / "there.gguf"
    there.write_text("mine")
    words = ["--template", str(small[1])]
    for given, sentence in (
        ([rough, "new.gguf", *words], "scales, stored in float32, have no exact value in float16, the dtype of gguf"),
        ([plain, "new.gguf", *words, "--gguf-type", "Q4_0"], "its levels reach from -15 to 15, those of Q4_0 from -8 to 7; "
         "types that hold it: Q5_0, Q8_0, Q4_1, Q5_1"),
        ([plain, "new.gguf", *words, "--gguf-type", "Q4_K"], "Q4_K has blocks of 256 inputs"),
        ([plain, "new.gguf"], "give it as --template ORIGINAL.gguf"),
        ([plain, "new"], "give --format, or a NEW that ends in .gguf"),
        ([plain, there, *words], "there.gguf exists; choose another name"),
        ([small[0], "new.gguf", *words], "is not quantized"),
        ([plain, "new", "--format", "gptq_v2", "--gguf-type", "Q4_0"], "--gguf-type is for --format gguf"),
        ([plain, "new", "--format", "gptq_v2", *words], "--template is for --format gguf"),
    ):  # fmt: skip
        at = [str(given[0]), str(tmp_path / str(given[1])), *map(str, given[2:])]
        assert main(["convert", *at]) == 2
        assert sentence in capsys.readouterr().err.replace("\n", " "), given
    assert there.read_text() == "mine" and not list(tmp_path.glob("new*")) and not list(tmp_path.glob(".*"))


def test_a_rotated_checkpoint_is_refused_before_its_weights_are_read(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Also where scales would be refused later: quantizing again to this format would not do."""
    nearplane.quantize(small[0], tmp_path / "r", bits=4, group_size=32, rotate="r1", **QUICK)
    monkeypatch.setattr(nearplane.formats.read.Checkpoint, "quantized", lambda *_: pytest.fail("a weight was read"))
    for out in ("new.gguf", "new"):
        with pytest.raises(NearplaneError, match="is rotated, and so are its embeddings and norms"):
            nearplane.convert(tmp_path / "r", tmp_path / out, "gguf", template=small[1])
        assert not (tmp_path / out).exists()


def test_a_folder_whose_description_is_wrong(small: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    nearplane.quantize(small[0], out, format="gguf", template=small[1], **QUICK)
    good = (out / "config.json").read_text()
    name, tensor = "model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"
    for change, sentence in (
        (lambda q: q.update(file="../x.gguf"), "names no .gguf file in the folder"),
        (lambda q: q.update(file="x.gguf"), "does not exist"),
        (lambda q: q["tensors"].update(zzz=q["tensors"][tensor]), "names tensor 'zzz', which"),
        (lambda q: q["tensors"][tensor].append([]), "has 1 matrices, and 2 are described"),
        (lambda q: q["tensors"][tensor][0][0].update(n=99), "not described as nearplane does"),
        (lambda q: q["tensors"][tensor][0][0].update(rows=[0, [32, 0]]), "are not described one by one"),
        (lambda q: q["tensors"].pop(tensor), f"calls '{name}' quantized, and says of no tensor"),
    ):
        config = json.loads(good)
        change(config["quantization_config"])
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(NearplaneError, match=sentence):
            nearplane.load(out)
    (out / "config.json").write_text(good)
    data = (out / "model-Q4_0.gguf").read_bytes()
    (out / "model-Q4_0.gguf").write_bytes(data[:-300])
    assert any("is truncated" in problem for problem in verify(out).problems)
    with pytest.raises(NearplaneError, match="is truncated"):
        nearplane.load(out)


def test_demo_has_a_template_of_its_own(small: tuple[Path, Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(nearplane.checkpoint.gguf, "demo_template", lambda: small[1])
    assert nearplane.checkpoint.gguf.open_template(None, "demo").path == small[1]
    with pytest.raises(SettingError, match=r"give it as --template ORIGINAL\.gguf"):
        nearplane.checkpoint.gguf.open_template(None, "other")


def test_one_part_of_several_is_no_template(small: tuple[Path, Path], tmp_path: Path) -> None:
    file = GGUFFile(small[1])
    write(tmp_path / "t-00001-of-00002.gguf", file, {}, {"split.count": scalar("split.count", 4, 2)}, file.pieces)
    with pytest.raises(NearplaneError, match="is one of 2 parts; join them first"):
        nearplane.checkpoint.gguf.open_template(tmp_path / "t-00001-of-00002.gguf", "m")


def test_transformers_does_not_fill_such_a_folder_at_random(small: tuple[Path, Path], tmp_path: Path) -> None:
    """The index places the quantized weights in the .gguf file, which transformers cannot read."""
    made = tmp_path / "out"
    nearplane.quantize(small[0], made, format="gguf", gguf_type="Q4_0", template=small[1], **QUICK)
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    quantized = json.loads((made / "config.json").read_text())["quantization_config"]["quantized"]
    assert {index[f"{name}.weight"] for name in quantized} == {next(made.glob("*.gguf")).name}
    with pytest.raises(SafetensorError, match="header"):
        transformers.AutoModelForCausalLM.from_pretrained(made)


def test_a_name_that_is_a_gguf_file_is_no_folder(plain: Path, tmp_path: Path) -> None:
    for format in ("mlx", "gptq_v2"):
        with pytest.raises(SettingError, match=f"ends in .gguf, and {format} is a folder"):
            nearplane.convert(plain, tmp_path / "new.gguf", format)
    assert not any(tmp_path.iterdir())
