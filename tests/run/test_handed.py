"""What blocks hand to each other beside the hidden state goes along in the walk, in each stream as its own weights make it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

import nearplane
import nearplane.run.stream
from nearplane import RTN, Calibration, Grid, NearPlane, NearplaneError
from nearplane.core.grid import dequantize
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.estimate import estimate
from nearplane.run.plan import make_plan
from nearplane.run.stream import Place, stream

GRID = Grid(bits=3, group_size=16, sym=False)
LAYERS = ["sliding_attention", "full_attention"] * 2
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": tiny.VOCABULARY, "sliding_window": 6, "layer_types": LAYERS,
}  # fmt: skip


class Notes:
    """An object that blocks write attributes of."""

    def __init__(self) -> None:
        self.last: Tensor | None = None


class SharingConfig(transformers.LlamaConfig):
    model_type = "sharing"


class SharingBlock(LlamaDecoderLayer):
    """Reads and writes containers of every kind, each of them given in another way."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__(config, number)
        self.number, self.writes_keys = number, number == 1

    def forward(self, x: Tensor, pair: Any, shared: Any = None, notes: Any = None, way: str = "", **rest: Any) -> Any:
        log, nested = pair
        if log:
            x = x + torch.stack(log).mean(0)  # all that blocks before have said
        if "values" in nested.get("deep", {}):
            x = x + 0.1 * nested["deep"]["values"]
        if notes.last is not None:
            x = x * (1 + 0.1 * torch.tanh(notes.last))
        y = super().forward(x, **rest)
        log.append(y.roll(1, -1) / 4)
        if self.writes_keys:
            shared["keys"] = (y.sin(), self.number)
        elif self.number > 1:
            y = y + shared["keys"][0]
        nested.setdefault("deep", {})["values"] = y.cos()
        notes.last = (y - x).roll(2, -1)
        if way == "in place":
            log[0].mul_(2)
        return y


class SharingModel(LlamaModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([SharingBlock(config, i) for i in range(config.num_hidden_layers)])
        self.way = ""

    def forward(self, input_ids: Any = None, use_cache: Any = None, **rest: Any) -> Any:
        x = self.embed_tokens(input_ids)
        ids = torch.arange(x.shape[1], device=x.device)[None]
        rotary, log, shared, notes = self.rotary_emb(x, ids), list[Tensor](), dict[str, Any](), Notes()
        nested: dict[str, Any] = {"deep": {}}
        for block in self.layers:
            if self.way == "attribute":
                self.kept = x * 1
            x = block(x, (log, nested), shared=shared, notes=notes, way=self.way, position_embeddings=rotary)
        assert len(log) == len(self.layers)  # code between blocks and behind them sees what was written
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(x + log[0]))


class SharingForCausalLM(LlamaForCausalLM):
    config_class = SharingConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = SharingModel(config)
        self.post_init()


transformers.AutoConfig.register("sharing", SharingConfig)
transformers.AutoModelForCausalLM.register(SharingConfig, SharingForCausalLM)


def build(kind: str) -> Any:
    config: Any
    if kind == "gemma4_text":
        config = transformers.Gemma4TextConfig(**SIZES, **GEMMA, num_kv_shared_layers=2, global_head_dim=32)
    elif kind == "gemma3n_text":
        pattern = [0.9, 0.9, 0.0, 0.0]
        config = transformers.Gemma3nTextConfig(
            **SIZES, **GEMMA, num_kv_shared_layers=2, laurel_rank=16, activation_sparsity_pattern=pattern
        )
    else:
        config = SharingConfig(**{**SIZES, "num_hidden_layers": 3})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            elif not bool(parameter.any()):
                parameter.copy_(torch.rand_like(parameter))  # Gemma 3n's scales begin at zero
    return model


KINDS = ["gemma4_text", "gemma3n_text", "sharing"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of the models, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("handed"), {}
    (folder / "text.txt").write_text(tiny.text(2000))

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.save(build(kind), folder / kind)
        return made[kind]

    return get


def inputs(model: Any, names: Any, ids: Tensor) -> dict[str, Tensor]:
    """What goes into modules of a whole model, (tokens, width)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        def kept(_module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[name].append(x.detach().reshape(-1, x.shape[-1]).clone())

        return kept

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in seen]
    with torch.no_grad():
        for batch in ids.split(2):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "paused") for kind in KINDS), ("gemma4_text", "anew"), ("sharing", "anew"), ("sharing", "offloaded")],
)
def test_each_stream_gets_what_its_own_weights_make(
    kind: str, how: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H and D of every stage, and the hidden state before every block, against two whole models that know of no walk."""
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 32)  # two sequences of 16 tokens per batch
    if how == "anew":
        monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", 0)
    ids, source = tiny.tokens(4, 16, seed=3), open_source(models(kind))
    plain, rounded = (nearplane.load(models(kind)).double().eval() for _ in range(2))
    place = Place(torch.device("cpu"), torch.float64, tmp_path if how == "offloaded" else None)
    blocks, drift = discover(source), 0.0
    whole = inputs(plain, [*(b.name for b in blocks), *(s[0].name for b in blocks for s in b.stages)], ids)
    for opened in stream(source, blocks, ids, place=place, reference=True):
        name = opened.block.name
        for number, stage in enumerate(opened.stages):
            now = inputs(rounded, {name: None, stage[0].name: None}, ids)
            if number == 0 and opened.k:
                for kept, wanted in zip(opened.walk.streams, (now[name], whole[name]), strict=True):
                    hidden = [kept.hidden[opened.block.tower][batch] for batch in range(2)]
                    found = torch.cat([h.reshape(-1, 64) for h in hidden if h is not None])
                    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
            if number == 1:
                opened.output(0)  # as a budget looks ahead: nothing of it may stay
            moments = opened.observe(stage, frozenset({"H", "D"}))
            xhat, x = now[stage[0].name], whole[stage[0].name]
            torch.testing.assert_close(moments.H, xhat.T @ xhat / len(xhat), rtol=1e-7, atol=1e-9)
            assert moments.D is not None and moments.tokens == len(xhat)
            torch.testing.assert_close(moments.D, (x - xhat).T @ xhat / len(xhat), rtol=1e-6, atol=1e-9)
            drift = max(drift, float((x - xhat).norm() / x.norm()))
            for site in stage:
                quantized = RTN().solve(opened.weight(site), None, GRID)
                opened.replace(site, quantized, GRID)
                rounded.get_submodule(site.name).weight.data = dequantize(quantized, GRID).double()
    assert drift > 0.05  # the streams differ, so that one could not stand for the other
    assert list(tmp_path.iterdir()) == []


def run(model: Path, out: Path, **settings: Any) -> dict[str, str]:
    """Quantize, and return the hashes of the shards."""
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=4, seqlen=16)
    nearplane.quantize(
        model, out, **{"method": NearPlane(), "grid": GRID, "calibration": calibration, "progress": False, **settings}
    )
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["gemma4_text", "sharing"])
def test_resumed_offloaded_or_anew_the_bytes_are_the_same(
    kind: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 32)
    whole = run(models(kind), tmp_path / "whole")
    solve, calls = NearPlane.solve, 0

    def ended(self: NearPlane, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (10 if kind == "sharing" else 20):  # in the third block
            raise KeyboardInterrupt
        return solve(self, *args)

    monkeypatch.setattr(NearPlane, "solve", ended)
    with pytest.raises(KeyboardInterrupt):
        run(models(kind), tmp_path / "resumed")
    assert run(models(kind), tmp_path / "resumed", resume=True) == whole
    assert run(models(kind), tmp_path / "offloaded", offload=tmp_path / "scratch") == whole
    monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", 0)
    assert run(models(kind), tmp_path / "anew") == whole


@pytest.mark.parametrize("kind", KINDS)
def test_packed_the_model_is_its_rounded_weights(kind: str, models: Any, tmp_path: Path) -> None:
    run(models(kind), tmp_path / "out", grid=Grid(bits=8, group_size=16))
    ids, found = tiny.tokens(2, 20, seed=5), []
    for model in (nearplane.load(tmp_path / "out"), nearplane.load(tmp_path / "out", packed=False), build(kind)):
        with torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits)
    assert float((found[0] - found[1]).norm()) < 1e-3 * float(found[1].norm())
    assert 0 < float((found[0] - found[2]).norm()) < 0.1 * float(found[2].norm())
    assert nearplane.verify(tmp_path / "out").ok


def test_an_estimate_counts_what_is_handed_on(models: Any, tmp_path: Path) -> None:
    """Gemma 4: of each kind of layer the keys and values of one, 2 heads of 16 and of 32."""
    settings: dict[str, Any] = {"grid": GRID, "method": NearPlane(), "nsamples": 4, "seqlen": 16}
    plan = make_plan(models("gemma4_text"), sketch=True, **settings)
    assert plan.handed == 2 * (2 * 16) + 2 * (2 * 32) and plan.hidden == 64
    assert (
        estimate(plan, tmp_path).offloaded == 4 * (4 * 16) * (64 + plan.handed) * 2
    )  # bytes, tokens, numbers, streams
    assert make_plan(models("gemma3n_text"), sketch=True, **settings).hidden == 4 * 64  # four hidden states
    source = open_source(models("gemma4_text"))
    for opened in stream(source, discover(source), tiny.tokens(4, 16), place=Place()):
        held = {t.data_ptr(): t for each in opened.walk.streams[0].left.contents.values() for slots in each.values()
                for content in slots if content is not None for pair in content.values() for t in pair}  # fmt: skip
    assert sum(t.numel() for t in held.values()) == 4 * 16 * plan.handed


@pytest.mark.parametrize("sketch", [True, False])
@pytest.mark.parametrize(
    ("way", "said"),
    [("in place", "layers.1 changes a tensor in place that it shares"), ("attribute", "")],
)
def test_what_cannot_go_along_is_named(way: str, said: str, sketch: bool, models: Any) -> None:
    source = open_source(models("sharing"), sketch=sketch)
    source.model.model.way = way  # type: ignore[union-attr]
    if way == "attribute":  # between blocks: no matter
        assert len(discover(source)) == 3
        return
    with pytest.raises(NearplaneError, match=said):
        discover(source)


def test_an_attribute_that_a_block_leaves_outside_is_refused(tmp_path: Path) -> None:
    source = open_source(tiny.save(tiny.build("llama"), tmp_path / "model"))
    model: Any = source.model.model
    for block in model.layers:
        block.mlp.register_forward_hook(lambda _m, _a, output: setattr(model.rotary_emb, "last", output * 1))
    with pytest.raises(NearplaneError, match=r"layers\.0 leaves a tensor in model\.rotary_emb\.last"):
        discover(source)


def test_values_that_are_shared_in_another_way_are_named(tmp_path: Path) -> None:
    """Each block adds to a number that the model asks for: the second is not run again, being like the first."""
    source = open_source(tiny.save(tiny.build("llama"), tmp_path / "model"))
    model: Any = source.model.model
    seen = []

    def asks(_module: Any, _args: Any) -> None:
        if len(seen) < 2:
            raise KeyError("sliding_attention")

    model.embed_tokens.register_forward_pre_hook(lambda *_: seen.clear())
    for block in model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    model.norm.register_forward_pre_hook(asks)
    with pytest.raises(NearplaneError, match=r"share values beside the hidden state .*'sliding_attention'"):
        discover(source)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_channels_leave_what_is_handed_on(kind: str, models: Any, tmp_path: Path) -> None:
    """Norms are divided, and no linear whose values later blocks may read; the scaled model is proved by its logits."""
    model = models(kind)
    settings: dict[str, Any] = {"dataset": str(model.parent / "text.txt"), "nsamples": 4, "seqlen": 20}
    report = nearplane.quantize(
        model, tmp_path / "out", method="rtn", scale="awq", grid=GRID, check=False, progress=False, **settings
    )
    told = [event for event in report.events if "scaled: " in event]
    assert any("layernorm (error x 0." in event for event in told)
    handed = {block.name for block in discover(open_source(model)) if block.handed}
    assert handed and not [e for e in told if e.split(":")[0] in handed and "through self_attn.v_proj" in e]
