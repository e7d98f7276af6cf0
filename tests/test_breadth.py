"""Encoders, encoder-decoders and vision models from folder to checkpoint and back."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from close import near

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, NearPlane, NearplaneError
from nearplane.cli.main import main
from nearplane.evaluation.features import final_states
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.forecast import forecast
from nearplane.run.stream import Place, stream
from nearplane.runtime.linear import quantized_linears

GRID = Grid(bits=8, group_size=32)
KINDS = ["bert", "roberta", "electra", "t5", "bart", "whisper", "wav2vec2", "vit", "dinov2", "swin", "clip"]


def features(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return final_states(model, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_there_and_back(kind: str, tmp_path: Path) -> None:
    """Packed as we load it and as transformers does, the model does what it did."""
    model = tiny.build(kind)
    folder = tiny.save(model, tmp_path / "model")
    report = nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    batch = tiny.batch(kind, 3)
    packed, wanted = nearplane.load(tmp_path / "out"), features(model, batch)
    assert len(quantized_linears(packed)) == len(report.linears) > 8
    much = (
        0.15 if kind == "t5" else 0.06
    )  # T5 does not scale its products: large ones, of these weights, pick one token of all
    for name, found in features(packed, batch).items():
        assert 0 < float((found - wanted[name]).norm()) < much * float(wanted[name].norm())
    assert nearplane.verify(tmp_path / "out").ok
    refused = kind == "dinov2"  # whose names transformers would convert, were they not packed
    assert any("merges or splits" in event for event in report.events) is refused
    if refused:
        return
    # transformers' T5 initialises the weights of linears that are packed by then, and so cannot load any packed T5.
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if kind == "t5" else {}
    theirs = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, **how).eval()
    dense = features(nearplane.load(tmp_path / "out", packed=False), batch)
    for name, found in features(theirs, batch).items():
        near(found, dense[name], sums=96)


def test_a_bare_encoder_is_loaded_from_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    """As sentence encoders are: names lose the prefix, the list of dense linears must hold both."""
    folder = tiny.save(tiny.build("bert"), tmp_path / "model")
    nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    ids = tiny.tokens(2, 9)
    bare, ours = (
        transformers.AutoModel.from_pretrained(tmp_path / "out"),
        nearplane.load(tmp_path / "out", packed=False),
    )
    with torch.no_grad():
        found, wanted = bare(input_ids=ids).last_hidden_state, ours.base_model(input_ids=ids).last_hidden_state  # type: ignore[operator, union-attr]
    near(found, wanted, sums=96)


def text_file(folder: Path, words: int = 900) -> str:
    path = folder / "text.txt"
    path.write_text(tiny.text(words))
    return str(path)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_calibrated_on_text(kind: str, tmp_path: Path) -> None:
    """Every linear does better than rounding, on the tokens that it is shown."""
    folder = tiny.save(tiny.build(kind), tmp_path / "model")
    report = nearplane.quantize(
        folder,
        tmp_path / "out",
        method=GPTQ(),
        grid=Grid(bits=3, group_size=32, sym=False),
        calibration=Calibration(dataset=text_file(tmp_path), nsamples=12, seqlen=24),
        progress=False,
    )
    assert len(report.linears) == {"bert": 12, "t5": 2 * 6 + 2 * 10}[kind]
    for row in report.linears:
        assert row.error is not None and row.rtn_error is not None and row.error < row.rtn_error
        # A decoder reads half of a window; what its cross-attention asks of the encoder, all of it.
        own = (
            kind == "t5"
            and row.name.startswith("decoder")
            and not row.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        )
        assert row.tokens == 12 * (12 if own else 24)


def test_cross_attention_is_observed_on_the_encoder_as_it_is(tmp_path: Path) -> None:
    """Of the quantized stream X̂ is what the rounded encoder puts out, of the reference X what the original does."""
    folder = tiny.save(tiny.build("t5"), tmp_path / "model")
    source, batch = open_source(folder), tiny.batch("t5", 6)
    cpu, moments, grid = torch.device("cpu"), {}, Grid(bits=3, group_size=32)
    rounded = tiny.build("t5")
    for opened in stream(source, discover(source), batch, place=Place(cpu, torch.float32), reference=True):
        for stage in opened.stages:
            moments[stage[0].name] = opened.observe(stage, frozenset({"H", "D"}))
            for site in stage:
                quantized = RTN().solve(opened.weight(site), None, grid)
                opened.replace(site, quantized, grid)
                if site.name.startswith("encoder"):
                    rounded.get_submodule(site.name).weight.data = opened.weight(site).clone()
    measured = moments["decoder.block.1.layer.1.EncDecAttention.k"]
    with torch.no_grad():
        x, xhat = (m(**batch).encoder_last_hidden_state.flatten(0, 1).double() for m in (tiny.build("t5"), rounded))
    assert measured.tokens == len(x) == 54 and measured.D is not None
    near(measured.H.double(), xhat.T @ xhat / 54, sums=96)
    near(measured.D.double(), (x - xhat).T @ xhat / 54, sums=96)
    assert (x - xhat).norm() > 0.05 * x.norm()


def solved(
    source: Any, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], set[int]]:
    """Codes of NearPlane at 3 bits, and the numbers of tokens it saw."""
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 40)
    method, grid, codes, tokens = NearPlane(), Grid(bits=3, group_size=32, sym=False), {}, set()
    for opened in stream(
        source, discover(source), batch, place=Place(torch.device("cpu"), torch.float64), reference=True
    ):
        for stage in opened.stages:
            moments = opened.observe(stage, method.needs)
            tokens.add(moments.tokens)
            state = method.prepare(moments)
            for site in stage:
                quantized = method.solve(opened.weight(site), state, grid)
                opened.replace(site, quantized, grid)
                codes[site.name] = quantized.codes
    return codes, tokens


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("samples", [8, 3])  # whole sequences are held out, or runs of tokens
def test_padding_enters_no_moment(kind: str, samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens as padding, and more of it, change no code; the tokens that count are the real ones."""
    source = open_source(tiny.save(tiny.build(kind), tmp_path / "m"))
    lengths = torch.tensor([9, 4, 12, 7, 12, 5, 9, 3][:samples])
    batch = tiny.batch(kind, samples, 12)
    mask = torch.arange(12) < lengths[:, None]
    batch["attention_mask"] = mask.long()
    decoded = {samples * 6} if kind == "t5" else set()
    codes, tokens = solved(source, batch, monkeypatch)
    assert tokens == {int(lengths.sum())} | decoded
    other = batch | {"input_ids": torch.where(mask, batch["input_ids"], tiny.tokens(samples, 12, seed=9))}
    longer = {
        **other,
        "input_ids": torch.cat([other["input_ids"], tiny.tokens(samples, 7, seed=3)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(samples, 7, dtype=torch.long)], 1),
    }
    for changed in (other, longer):
        again, counted = solved(source, changed, monkeypatch)
        assert counted == tokens
        assert all(torch.equal(again[name], codes[name]) for name in codes)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padding_on_both_sides_of_cross_attention(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-attention asks with the decoder's real tokens and reads the encoder's; neither's padding counts anywhere."""
    source = open_source(tiny.save(tiny.build(kind), tmp_path / "m"))
    read, written = torch.tensor([9, 4, 11, 7, 11, 5]), torch.tensor([3, 6, 1, 6, 2, 5])
    ids, decoded = tiny.tokens(6, 11), tiny.tokens(6, 6, seed=1)
    seen, spoken = (torch.arange(n) < lengths[:, None] for n, lengths in ((11, read), (6, written)))

    def batch(more: int, seed: int) -> dict[str, torch.Tensor]:
        """Other tokens as padding, and ``more`` of it."""
        found = {}
        for name, kept, real in (("", ids, seen), ("decoder_", decoded, spoken)):
            padding = tiny.tokens(6, real.shape[1] + more, seed)
            padding[:, : real.shape[1]][real] = kept[real]
            found[f"{name}input_ids"] = padding
            found[f"{name}attention_mask"] = torch.nn.functional.pad(real.long(), (0, more))
        return found

    codes, tokens = solved(source, batch(0, 2), monkeypatch)
    assert tokens == {int(read.sum()), int(written.sum())}
    again, counted = solved(source, batch(2, 3), monkeypatch)
    assert counted == tokens and len(codes) > 20
    assert all(torch.equal(again[name], codes[name]) for name in codes)


def test_cross_attention_reads_what_the_encoder_makes_of_each_sample_alone(tmp_path: Path) -> None:
    """H of its keys, from a padded batch, is that of the encoder's states of the samples without any padding."""
    model = tiny.build("t5").double()
    source, lengths = open_source(tiny.save(model, tmp_path / "model")), [9, 4, 12, 7, 12, 5]
    batch = tiny.batch("t5", 6, 12)
    batch["attention_mask"] = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    measured, cpu = {}, torch.device("cpu")
    for opened in stream(source, discover(source), batch, place=Place(cpu, torch.float64), reference=False):
        for stage in opened.stages:
            measured[stage[0].name] = opened.observe(stage, frozenset({"H"}))
    with torch.no_grad():
        alone = [model.encoder(batch["input_ids"][[k], :n]).last_hidden_state[0] for k, n in enumerate(lengths)]
    states = torch.cat(alone)
    for k in (0, 1):
        found = measured[f"decoder.block.{k}.layer.1.EncDecAttention.k"]
        assert found.tokens == len(states) == sum(lengths)
        torch.testing.assert_close(found.H, states.T @ states / len(states), rtol=1e-6, atol=1e-9)


def test_sentences_are_samples_by_themselves(tmp_path: Path) -> None:
    lines = [tiny.text(n, seed=n) for n in (5, 3, 9, 14, 6, 4, 8, 2)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    folder = tiny.save(tiny.build("bert"), tmp_path / "model")
    report = nearplane.quantize(
        folder,
        tmp_path / "out",
        method=GPTQ(),
        grid=GRID,
        calibration=Calibration(dataset=str(tmp_path / "lines.txt"), nsamples=50, seqlen=10, sentences=True),
        progress=False,
    )
    assert report.data["windows"] == 8 and report.data["seqlen"] == 10
    assert {row.tokens for row in report.linears} == {report.data["tokens"]} == {5 + 3 + 9 + 10 + 6 + 4 + 8 + 2}


def test_what_only_language_models_can_do_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("bert"), tmp_path / "model")
    with pytest.raises(NearplaneError, match="BertForMaskedLM is not"):
        nearplane.evaluate(folder)
    with pytest.raises(NearplaneError, match="against its original"):
        nearplane.compare(folder)
    with pytest.raises(NearplaneError, match="rotations are for language models, which BertForMaskedLM is not"):
        nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, rotate="r1", progress=False)
    other = tiny.save(tiny.build("roberta"), tmp_path / "other")
    with pytest.raises(NearplaneError, match=r"BertForMaskedLM, .* a RobertaModel: nothing to compare"):
        nearplane.compare(folder, reference=other)
    assert main(["eval", str(folder), "--reference", str(folder), "--kv-bits", "4"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "tower"), [("clip", "vision"), ("t5", "encoder")])
def test_a_plan_of_one_tower_and_what_loads_it(kind: str, tower: str, tmp_path: Path) -> None:
    """The last block has nothing to solve; engines are said to load what was looked up."""
    found = forecast(tiny.save(tiny.build(kind), tmp_path / "model"), grid=GRID, method=GPTQ(), towers=tower)
    assert sum(found.seconds.values()) > 0
    said = {engine: str(judged) for engine, judged in found.engines().items()}
    assert "was not looked up" in said["vllm"] and ("dequantize=True" in said["transformers"]) == (kind == "t5")


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "clip"])
def test_plan_reads_no_weight(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.build(kind), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    found = forecast(folder, grid=GRID, method=GPTQ())
    assert found.estimate.memory[0].peak > 0 and len(found.plan.blocks) == (2 if kind in ("bert", "vit") else 4)


# Of two models with two towers: words, and the towers that they name.
NAMED = {
    "clip": {
        "vision": ["vision_model.encoder.layers"],
        "text_model": ["text_model.encoder.layers"],
        "text_model.encoder.layers": ["text_model.encoder.layers"],
        "text,vision": ["vision_model.encoder.layers", "text_model.encoder.layers"],
    },
    "t5": {"encoder": ["encoder.block"], "decoder": ["decoder.block"]},
    "siglip": {"text": ["text_model.encoder.layers"]},
}


@pytest.mark.parametrize(("kind", "words"), [(kind, words) for kind, each in NAMED.items() for words in each])
def test_only_the_towers_that_are_named(kind: str, words: str, tmp_path: Path) -> None:
    """Their linears are those of a whole run; the others are copied, with the reason in the report, and all of it loads."""
    folder = tiny.save(tiny.build(kind), tmp_path / "model")
    settings: dict[str, Any] = {"method": RTN(), "grid": GRID, "progress": False}
    report = nearplane.quantize(folder, tmp_path / "out", towers=words, **settings)
    blocks = discover(open_source(folder))
    chosen = [site.name for block in blocks if block.tower in NAMED[kind][words] for site in block.sites]
    others = {site.name for block in blocks for site in block.sites} - set(chosen)
    assert sorted(row.name for row in report.linears) == sorted(chosen)
    left = {row["name"] for row in report.dense if row["reason"] == f"left out by towers {', '.join(words.split(','))}"}
    assert left == {name + ".weight" for name in others} and bool(others) is ("," not in words)
    assert nearplane.verify(tmp_path / "out").ok
    whole = nearplane.load(tmp_path / "out", packed=False).state_dict()
    original = nearplane.load(folder).state_dict()
    assert all(torch.equal(whole[name + ".weight"], original[name + ".weight"]) for name in others)
    assert not any(torch.equal(whole[name + ".weight"], original[name + ".weight"]) for name in chosen)


def test_the_other_tower_is_walked_and_stays_as_it_is(tmp_path: Path) -> None:
    """T5's decoder, solved after an encoder that stays dense, sees what the original's sees: GPTAQ has no drift to answer."""
    folder = tiny.with_text(tmp_path).parent
    model = tiny.save(tiny.build("t5"), folder / "t5")
    settings: dict[str, Any] = {"method": GPTQ(), "grid": Grid(bits=3, group_size=32), "progress": False}
    calibration = Calibration(dataset=str(folder / "text.txt"), nsamples=6, seqlen=24)
    found = [
        nearplane.quantize(model, folder / f"out{k}", calibration=calibration, towers=towers, **settings)
        for k, towers in enumerate((("decoder",), ()))
    ]
    first = "decoder.block.0.layer.0.SelfAttention.q"
    cross = "decoder.block.0.layer.1.EncDecAttention.k"
    alone, whole = ({row.name: row.error for row in report.linears} for report in found)
    assert alone[first] == whole[first] and alone[cross] != whole[cross]


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [("clip", "audio", "'audio' names none of this model's; its towers are vision_model.encoder.layers, text_model."),
     ("clip", "encoder", "'encoder' may be several of this model's"),
     ("vit", "text", "'text' names none of this model's; its towers are vit.layers")],
)  # fmt: skip
def test_towers_that_are_not_there(
    kind: str, words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tiny.build(kind), tmp_path / "model")
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--towers", words, "--method", "rtn"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 2 and said in message.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_model_that_sees_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaVA is calibrated on text, on which its image tower does not run: that stays dense, and asking for it is refused."""
    part = {
        key: tiny.SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**part, image_size=32, patch_size=8, projection_dim=32),
        text_config=transformers.LlamaConfig(**part, num_key_value_heads=2, vocab_size=tiny.VOCABULARY),
        image_token_id=tiny.VOCABULARY - 1,
        vision_feature_layer=-1,
    )
    folder = tiny.save(transformers.LlavaForConditionalGeneration(config).eval(), tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(1000))
    report = nearplane.quantize(
        folder, tmp_path / "out", method=GPTQ(), grid=GRID, towers=("text",), progress=False,
        calibration=Calibration(dataset=str(tmp_path / "text.txt"), nsamples=4, seqlen=24),
    )  # fmt: skip
    assert len(report.linears) == 14 and all(
        row.name.startswith("model.language_model.layers") for row in report.linears
    )
    dense = {row["name"] for row in report.dense}
    assert len({name for name in dense if "vision_tower" in name and "mlp.fc1" in name}) == 2
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((1, 16), tiny.VOCABULARY - 1), tiny.tokens(1, 5)], 1)
    with torch.no_grad():
        logits = [
            nearplane.load(tmp_path / name)(input_ids=ids, pixel_values=pixels).logits for name in ("model", "out")
        ]
    assert 0 < float((logits[1] - logits[0]).norm()) < 0.06 * float(logits[0].norm())
    assert main(["quantize", str(folder), str(tmp_path / "no"), "--towers", "vision", "--method", "rtn"]) == 2
    assert "'vision' is a part of this model that does not run on what it is calibrated on" in capsys.readouterr().err
