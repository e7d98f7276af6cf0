"""A rotated model is the same model: shown by its logits on many architectures, by dense formulas, and refused elsewhere."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid
from nearplane.cli.main import main
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.models.source import open_source
from nearplane.transforms import view
from nearplane.transforms.hadamard import rotation
from nearplane.transforms.rotation import Rotate, make_rotate, rotated
from nearplane.transforms.view import ChangedStore, RotatedSource

CPU = torch.device("cpu")
BOTH = Rotate(("r1", "r2"), seed=3)


def perturbed(kind: str, seed: int = 0, **sizes: Any) -> Any:
    """A random model whose norms and biases are not trivial, in float64."""
    model = tiny.build(kind, seed, **sizes).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def materialized(source: RotatedSource) -> Any:
    """The rotated model as an ordinary transformers model."""
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(source.config)).double().eval()
    state = {name: source.store.get(disk) for name, disk in source.names.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [n for n in missing if n in source.names]
    return model


def difference(one: Any, other: Any) -> float:
    """Of the logits of tokens that no probe has seen, relative to a token's."""
    ids = tiny.tokens(3, 17, seed=9)
    with torch.no_grad():
        a, b = (model(input_ids=ids, use_cache=False).logits for model in (one, other))
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1)).max())


# Float64 throughout in models with torch's own LayerNorm; transformers' RMSNorms compute in float32.
LAYER = ["gpt2", "opt", "gpt_neox", "gpt_neo", "phi", "mpt", "gptj", "falcon", "starcoder2", "biogpt"]
RMS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "granite", "cohere", "nemotron", "olmo"]


@pytest.mark.parametrize("kind", LAYER + RMS)
def test_the_same_model(kind: str, tmp_path: Path) -> None:
    model = perturbed(kind)
    source = rotated(open_source(tiny.save(model, tmp_path / "m")), BOTH, CPU)
    turned = materialized(source)
    assert difference(model, turned) < (1e-10 if kind in LAYER else 1e-5)
    assert source.store.names >= source.original.names
    # Every matrix of the blocks but those that only attention's queries and keys pass through is another one.
    unchanged = [n for n in source.original.names if torch.equal(source.store.get(n), source.original.get(n))]
    assert not [n for n in unchanged if source.original.get(n).dim() == 2 and "position" not in n], unchanged


@settings(max_examples=8)
@given(
    kind=st.sampled_from(["llama", "qwen3", "opt", "gpt_neox"]),
    heads=st.integers(1, 4),
    share=st.sampled_from([1, 2]),
    width=st.sampled_from([2, 6, 8, 12]),
    odd=st.integers(0, 3),
    biases=st.booleans(),
    tied=st.booleans(),
    kinds=st.sampled_from([("r1",), ("r2",), ("r1", "r2")]),
    seed=st.integers(0, 99),
)
def test_the_same_model_at_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    heads: int,
    share: int,
    width: int,
    odd: int,
    biases: bool,
    tied: bool,
    kinds: tuple[str, ...],
    seed: int,
) -> None:
    """Grouped queries, attention biases, LayerNorm and RMSNorm, hidden sizes that no Hadamard matrix has."""
    hidden = heads * share * width
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads * share, "tie_word_embeddings": tied}
    if kind in ("llama", "qwen3"):  # here the hidden size is free of the heads
        sizes |= {"hidden_size": heads * share * (width + odd), "num_key_value_heads": heads, "head_dim": width}
        sizes |= {"attention_bias": biases}
    elif kind == "opt":
        sizes |= {"word_embed_proj_dim": hidden, "enable_bias": biases}
    else:
        sizes |= {"attention_bias": biases, "use_parallel_residual": tied, "rotary_pct": 1.0}
    model = perturbed(kind, seed, **sizes)
    source = rotated(open_source(tiny.save(model, tmp_path_factory.mktemp("any") / "m")), Rotate(kinds, seed), CPU)
    assert source.untied == (tied and "r1" in kinds)
    assert difference(model, materialized(source)) < 1e-5


def test_the_formulas(tmp_path: Path) -> None:
    """Llama with biases, against dense products written out."""
    model = perturbed("llama", attention_bias=True, tie_word_embeddings=True)
    source = rotated(open_source(tiny.save(model, tmp_path / "m")), BOTH, CPU)
    old, new = dict(model.named_parameters()), source.store.get
    R, P = rotation(64, 3).matrix, rotation(16, 3 + 1).matrix  # of the stream; of the values of block 0
    heads = {count: torch.block_diag(*[P] * count) for count in (2, 4)}
    at = "model.layers.0."
    first, second, last = (
        old[n] for n in (f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight", "model.norm.weight")
    )
    expected = {
        "model.embed_tokens.weight": old["model.embed_tokens.weight"] @ R,
        "lm_head.weight": old["model.embed_tokens.weight"] * last @ R,
        "model.norm.weight": torch.ones(64),
        f"{at}input_layernorm.weight": torch.ones(64),
        f"{at}self_attn.q_proj.weight": old[f"{at}self_attn.q_proj.weight"] * first @ R,
        f"{at}self_attn.q_proj.bias": old[f"{at}self_attn.q_proj.bias"],
        f"{at}self_attn.v_proj.weight": heads[2].T @ (old[f"{at}self_attn.v_proj.weight"] * first) @ R,
        f"{at}self_attn.v_proj.bias": heads[2].T @ old[f"{at}self_attn.v_proj.bias"],
        f"{at}self_attn.o_proj.weight": R.T @ old[f"{at}self_attn.o_proj.weight"] @ heads[4],
        f"{at}self_attn.o_proj.bias": R.T @ old[f"{at}self_attn.o_proj.bias"],
        f"{at}mlp.up_proj.weight": old[f"{at}mlp.up_proj.weight"] * second @ R,
        f"{at}mlp.down_proj.weight": R.T @ old[f"{at}mlp.down_proj.weight"],
    }
    for name, value in expected.items():
        torch.testing.assert_close(new(name), value.double(), rtol=1e-10, atol=1e-12, msg=name)
    assert "lm_head.weight" not in source.original.names and source.written_config()["tie_word_embeddings"] is False


def test_a_shift_goes_into_biases_or_stays(tmp_path: Path) -> None:
    """GPT-2: its blocks' linears have biases; its head has none, so the last norm keeps a shift, rotated."""
    model = perturbed("gpt2")
    source = rotated(open_source(tiny.save(model, tmp_path / "m")), BOTH, CPU)
    old, new = dict(model.named_parameters()), source.store.get
    assert not new("transformer.h.0.ln_1.bias").any() and bool((new("transformer.ln_f.weight") == 1).all())
    R = rotation(64, 3, keeps_mean=True).matrix
    expected = (old["transformer.ln_f.bias"] / old["transformer.ln_f.weight"]) @ R
    torch.testing.assert_close(new("transformer.ln_f.bias"), expected)
    assert float(new("transformer.wte.weight").sum(1).abs().max()) < 1e-12  # the stream has no mean
    with torch.no_grad():
        old["transformer.ln_f.weight"][5] = 0
    with pytest.raises(SettingError, match=r"lm_head has no bias to take the shift of transformer\.ln_f"):
        rotated(open_source(tiny.save(model, tmp_path / "zero")), BOTH, CPU)


def test_tensors_are_made_when_asked_for_from_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = open_source(tiny.save(perturbed("llama", tie_word_embeddings=True), tmp_path / "m"))
    source = rotated(original, BOTH, CPU)
    assert all(p.is_meta for p in [*original.model.parameters(), *source.model.parameters()])  # nothing stays in memory
    read: list[str] = []
    get = type(source.original).get
    monkeypatch.setattr(type(source.original), "get", lambda self, name: read.append(name) or get(self, name))
    name = "model.layers.1.self_attn.v_proj.weight"
    whole = ChangedStore.get(source.store, name)  # type: ignore[arg-type]
    assert read == [name, "model.layers.1.input_layernorm.weight"]
    monkeypatch.setattr(view, "AT_ONCE", 200)  # three rows at a time
    torch.testing.assert_close(ChangedStore.get(source.store, name), whole, rtol=0, atol=1e-13)  # type: ignore[arg-type]


REFUSED = {
    "gemma2": "adds to the stream are not outputs of its linears as they are",
    "olmo2": "adds to the stream are not outputs of its linears as they are",
    "bloom": "its first block is not given a sum of embeddings",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_stream_that_cannot_be_followed_is_refused(kind: str, tmp_path: Path) -> None:
    model = perturbed(kind).float()
    source = open_source(tiny.save(model, tmp_path / "m"))
    with pytest.raises(SettingError, match=REFUSED[kind]):
        rotated(source, Rotate(("r1",)), CPU)
    # What attention passes on has nothing to do with that.
    assert difference(model, materialized(rotated(source, Rotate(("r2",)), CPU))) < 1e-5


def test_a_norm_behind_the_sum_is_refused(tmp_path: Path) -> None:
    """OPT-350m's order: the stream itself is normalized."""
    source = open_source(tiny.save(perturbed("opt", do_layer_norm_before=False), tmp_path / "m"))
    with pytest.raises(SettingError, match=r"model\.decoder\.layers\.0 adds to the stream"):
        rotated(source, BOTH, CPU)


def patch_forward(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    """Change the output of a module of Llama."""
    kind = getattr(transformers.models.llama.modeling_llama, name)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: change(forward(self, *args, **kwargs)))


def test_values_that_attention_changes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tiny.save(perturbed("llama"), tmp_path / "m"))
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def gated(*args: Any, **kwargs: Any) -> Any:
        output, weights = attend(*args, **kwargs)
        return output * torch.linspace(1, 2, output.shape[-1], dtype=output.dtype), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", gated)
    with pytest.raises(SettingError, match=r"in model\.layers\.0 0 linears read attention's values"):
        rotated(source, Rotate(("r2",)), CPU)


def test_a_norm_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tiny.save(perturbed("llama"), tmp_path / "m"))
    patch_forward(monkeypatch, "LlamaRMSNorm", torch.tanh)
    with pytest.raises(
        SettingError, match="input_layernorm reads the stream and is neither an RMSNorm nor a LayerNorm"
    ):
        rotated(source, BOTH, CPU)


def test_what_else_touches_the_stream_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of its own kind behind a norm, as a router is; a linear that runs twice; one that never does."""
    folder = tiny.save(perturbed("llama"), tmp_path / "m")
    kind = transformers.models.llama.modeling_llama.LlamaMLP
    build = kind.__init__

    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.bias

    def with_scale(self: Any, config: Any) -> None:
        build(self, config)
        self.gate_proj.register_parameter("bias", None)
        self.act_fn.scale = Scale()
        self.act_fn.forward = torch.nn.functional.silu

    def scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + 0 * self.act_fn.scale(x)

    def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.gate_proj(x) + self.up_proj(x))

    def never(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x))

    monkeypatch.setattr(kind, "forward", twice)
    with pytest.raises(
        SettingError, match=r"model\.layers\.0\.mlp\.gate_proj, the probe forward reached it more than once"
    ):
        rotated(open_source(folder), BOTH, CPU)
    monkeypatch.setattr(kind, "forward", never)
    with pytest.raises(SettingError, match=r"model\.layers\.0\.mlp\.up_proj, the probe forward did not reach it"):
        rotated(open_source(folder), BOTH, CPU)
    monkeypatch.setattr(kind, "__init__", with_scale)
    monkeypatch.setattr(kind, "forward", scaled)
    routed = tiny.save(perturbed("llama"), tmp_path / "routed")
    with pytest.raises(SettingError, match=r"mlp\.act_fn\.scale reads .*post_attention_layernorm and is no linear"):
        rotated(open_source(routed), BOTH, CPU)


def test_what_is_not_the_same_model_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A writer is forgotten: the proof finds it, before any calibration."""
    folder = tiny.save(perturbed("llama"), tmp_path / "m")
    monkeypatch.setattr(view.Changes, "_rows_turn", lambda self, name: [])
    with pytest.raises(NumericalError, match=r"the model's logits differ from the original's by .*, relative"):
        rotated(open_source(folder), BOTH, CPU)
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--method", "rtn", "--rotate", "r1"]) == 2
    assert "it would be another model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_words_and_seeds() -> None:
    assert make_rotate("R2, r1", 4) == Rotate(("r1", "r2"), 4) == make_rotate(["r1", "r2"], 4)
    assert make_rotate("", 0) == Rotate()
    for words, seed, sentence in (
        ("r5", 0, "got 'r5'"),
        ("r1", -1, "rotate-seed must be"),
        ("", 2, "nothing is rotated"),
    ):
        with pytest.raises(SettingError, match=sentence):
            make_rotate(words, seed)


@pytest.mark.parametrize(("kind", "format"), [("llama", "compressed-tensors"), ("mistral", "gptq"), ("gpt2", "gptq")])
def test_a_rotated_checkpoint_loads_like_any_other(kind: str, format: Any, tmp_path: Path) -> None:
    """Tied in the source; at 8 bits the logits are the original's but for rounding."""
    model = perturbed(kind, tie_word_embeddings=True).float()
    folder = tiny.save(model, tmp_path / "m")
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    grid, text = Grid(bits=8, group_size=32), Calibration(str(tmp_path / "text.txt"), nsamples=8, seqlen=24)
    settings: dict[str, Any] = {
        "method": GPTQ(),
        "grid": grid,
        "calibration": text,
        "format": format,
        "progress": False,
    }
    report = nearplane.quantize(folder, tmp_path / "out", rotate="r1,r2", rotate_seed=5, **settings)
    assert report.settings["rotate"] == {"kinds": ["r1", "r2"], "seed": 5}
    assert any(event.startswith("rotated by r1 (Hadamard 64), r2 (Hadamard 16)") for event in report.events)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["nearplane_rotation"] == report.settings["rotate"]
    assert report.bytes["before"] == sum(p.nbytes for p in model.parameters())
    assert nearplane.verify(tmp_path / "out").ok
    ours = nearplane.load(tmp_path / "out", packed=False)
    assert difference(model, ours) < 0.03
    if format == "compressed-tensors":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert difference(theirs.eval(), ours) < 1e-5
    plain = nearplane.quantize(folder, tmp_path / "plain", **settings)
    assert "rotate" not in plain.settings and [r.name for r in plain.linears] == [r.name for r in report.linears]


def test_outliers_are_spread(tmp_path: Path) -> None:
    """What it is for: one large column takes a row's grid for itself, and rotated it does not."""
    model = tiny.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj, layer.mlp.gate_proj):
                linear.weight[:, 3] *= 8
    folder = tiny.save(model, tmp_path / "m")
    errors = []
    for words in ("", "r1,r2"):
        out = tmp_path / f"out{words}"
        nearplane.quantize(folder, out, method=RTN(), grid=Grid(6, -1), rotate=words, progress=False)
        errors.append(difference(model, nearplane.load(out, packed=False)))
    assert errors[1] < 0.5 * errors[0], errors


def test_a_broken_weight_is_named(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NearplaneError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN or Inf"):
        rotated(open_source(tiny.save(model, tmp_path / "m")), BOTH, CPU)


@pytest.mark.parametrize("part", ["up_proj", "v_proj"])
def test_zeros_tell_no_role(part: str, tmp_path: Path) -> None:
    """A down projection that reads zeros is not taken for attention's output; an output projection that does is named."""
    made = tiny.build("llama")
    layer = made.model.layers[1]
    with torch.no_grad():
        (layer.mlp.up_proj if part == "up_proj" else layer.self_attn.v_proj).weight.zero_()
    source = open_source(tiny.save(made, tmp_path / "model"))
    if part == "up_proj":
        rotated(source, Rotate(("r1", "r2")), torch.device("cpu"))
        return
    with pytest.raises(SettingError, match=r"self_attn\.o_proj reads zeros only"):
        rotated(source, Rotate(("r2",)), torch.device("cpu"))
