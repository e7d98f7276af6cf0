"""When a token is decoded in C++ and when not: what transformers' generation, caches, hooks and adapters ask for stays right."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers
from test_decode import decoded, error, front, pack, packed
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache

from nearplane.runtime import cpu, fused, growing

pytestmark = pytest.mark.skipif(cpu.best() is None, reason="no C++ kernel was built (no compiler)")
IDS = tiny.tokens(1, 20, seed=3)


def generated(model: Any, way: Any, ids: Tensor = IDS[:, :5], **options: Any) -> list[list[int]]:
    """Tokens that transformers generates, and how many of them C++ decoded is in ``front(model).tokens``."""
    fused.set_decode(model, way)
    torch.manual_seed(0)
    given = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": None,
    } | options
    found: Tensor = model.generate(ids, **given)
    return list(found.tolist())


OPTIONS: dict[str, tuple[dict[str, Any], int]] = {  # with the number of tokens that C++ decodes: all but the first
    "greedy": ({}, 19),
    "an end token": ({"max_new_tokens": 40}, 39),
    "penalties": ({"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, 19),
    "sampled": ({"do_sample": True, "temperature": 0.7, "top_k": 5}, 19),
    "beams": ({"num_beams": 3}, 0),
    "two sequences": ({"num_return_sequences": 2, "do_sample": True}, 0),
    "a static cache": ({"cache_implementation": "static"}, 0),
    "no cache": ({"use_cache": False}, 0),
    "scores": ({"output_attentions": True}, 0),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_generation_is_that_of_the_plain_path(name: str) -> None:
    options, count = OPTIONS[name]
    model = packed(tie_word_embeddings=False)
    wanted = generated(model, "plain", **options)
    assert front(model).tokens == 0
    assert generated(model, "auto", **options) == wanted
    assert front(model).tokens == count


def test_padding_and_batches_are_decoded_as_before() -> None:
    model, ids = packed(), IDS[:, :6]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    assert generated(model, "auto", ids, attention_mask=mask) == generated(model, "plain", ids, attention_mask=mask)
    both = tiny.tokens(2, 6)
    assert generated(model, "auto", both) == generated(model, "plain", both)
    assert front(model).tokens == 0


def test_prompt_lookup_and_assistants() -> None:
    """Several tokens at a time by the plain forward, one at a time in C++, and a cache that is cropped between."""
    model, small = packed(), packed(num_hidden_layers=1)
    ids = IDS[:, [0, 1, 2, 3, 0, 1, 2]]
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": small}):
        wanted = generated(model, "plain", ids)
        assert generated(model, "auto", ids, **options) == wanted


def test_a_cache_that_was_changed_between_tokens_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cropped, copied, continued by several tokens or another path, emptied: what follows is as from a plain cache."""
    monkeypatch.setattr(growing, "SPARE", 2)

    def crop(model: Any, cache: Any) -> Any:
        cache.crop(-2)
        return cache

    def several(model: Any, cache: Any) -> Any:
        return model(input_ids=IDS[:, 10:13], past_key_values=cache).past_key_values

    def copied(model: Any, cache: Any) -> Any:
        found = copy.deepcopy(cache)
        model(input_ids=IDS[:, 10:11], past_key_values=cache)  # which the copy must not see
        cache.layers[0].keys[:] = torch.nan
        return found

    def pickled(model: Any, cache: Any) -> Any:
        return pickle.loads(pickle.dumps(cache))

    def plainly(model: Any, cache: Any) -> Any:
        fused.set_decode(model, "plain")
        model(input_ids=IDS[:, 10:11], past_key_values=cache)
        fused.set_decode(model, "auto")
        return cache

    def emptied(model: Any, cache: Any) -> Any:
        cache.reset()
        return model(input_ids=IDS[:, 2:5], past_key_values=cache).past_key_values

    changes: list[Callable[[Any, Any], Any]] = [crop, several, copied, pickled, plainly, emptied]
    for kind, settings in (("llama", {}), ("mistral", {"sliding_window": 16}), ("mistral", {"sliding_window": 4})):
        model = packed(kind, **settings)
        for change in changes:
            if settings == {"sliding_window": 4} and change is crop:
                continue  # transformers refuses it
            found = []
            for way in ("auto", "plain"):
                fused.set_decode(model, way)
                with torch.no_grad():
                    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
                    for i in range(4, 10):
                        model(input_ids=IDS[:, i : i + 1], past_key_values=cache)
                    cache = change(model, cache)
                    logits = [model(input_ids=IDS[:, i : i + 1], past_key_values=cache).logits for i in range(13, 18)]
                found.append((torch.cat(logits), cache.get_seq_length(), cache.layers[1].keys))
            assert torch.allclose(found[0][0], found[1][0], atol=1e-4, rtol=1e-4), (kind, settings, change.__name__)
            assert found[0][1] == found[1][1]
            assert torch.allclose(found[0][2], found[1][2], atol=1e-5, rtol=1e-4), (kind, settings, change.__name__)


def test_a_cache_that_a_hand_gave() -> None:
    """Without a configuration, empty, static, or of another model."""
    model = packed()
    with torch.no_grad():
        wanted = model(input_ids=IDS[:, :8]).logits[0, -4:]
        for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=16), DynamicCache(config=model.config)):
            got = [
                model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0] for i in range(8)
            ]
            assert torch.allclose(torch.cat(got[-4:]), wanted, atol=1e-4, rtol=1e-3)
        assert front(model).tokens == 14
        other = packed(num_hidden_layers=3)(input_ids=IDS[:, :8], use_cache=True).past_key_values
        model(input_ids=IDS[:, 8:9], past_key_values=other)
        assert front(model).tokens == 14


def test_a_tokenizer_that_is_handed_down_changes_nothing() -> None:
    """As transformers' server does."""
    model = packed()
    wanted = decoded(model, IDS, 3)
    assert torch.equal(decoded(model, IDS, 3, tokenizer=object()), wanted) and front(model).tokens == 34


REQUESTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "hidden states": lambda _: {"output_hidden_states": True},
    "attentions": lambda _: {"output_attentions": True},
    "a tuple": lambda _: {"return_dict": False},
    "labels": lambda _: {"labels": IDS[:, :1]},
    "a position": lambda _: {"position_ids": torch.tensor([[9]])},
    "a mask": lambda _: {"attention_mask": torch.tensor([[0, 1, 1, 1]])},
    "a wide mask": lambda _: {"attention_mask": torch.zeros(1, 1, 1, 4)},
    "embeddings": lambda model: {"inputs_embeds": model.model.embed_tokens(IDS[:, 3:4]), "input_ids": None},
    "logits by index": lambda _: {"logits_to_keep": torch.tensor([0])},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_only_the_plain_forward_serves(name: str) -> None:
    model, found = packed(), []
    for way in ("auto", "plain"):
        fused.set_decode(model, way)
        with torch.no_grad():
            cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
            asked = {"input_ids": IDS[:, 3:4], "past_key_values": cache} | REQUESTS[name](model)
            out = model(**asked)
        found.append(out[0] if isinstance(out, tuple) or "labels" in asked else out.logits)
    assert torch.allclose(*found, atol=0, rtol=0, equal_nan=True) and front(model).tokens == 0


def watch(model: Any) -> Any:
    return model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def test_hooks_are_called() -> None:
    """One that comes after tokens were decoded in C++, one inside and one for all modules, and C++ again when it has gone."""
    model = packed()
    assert error(model, IDS) < 1e-4
    free = decoded(model, IDS, 3)
    for register in (
        lambda: watch(model),
        lambda: model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda module, inputs: (inputs[0] / 2,)
        ),
        lambda: nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None),
    ):
        before, handle = front(model).tokens, register()
        got = decoded(model, IDS, 3)
        assert front(model).tokens == before
        assert torch.equal(got, decoded(model, IDS, 3, "plain"))
        assert "hook" in fused.why(model)
        handle.remove()
        assert torch.equal(decoded(model, IDS, 3), free) and front(model).tokens == before + 17


def test_a_hook_on_the_model_itself_sees_every_token() -> None:
    model, seen = packed(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    decoded(model, IDS, 3)
    assert len(seen) == 18 and front(model).tokens == 17


def change_weight(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data * 2


def change_in_place(model: Any) -> None:
    model.model.norm.weight.data.mul_(2)


def change_codes(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.codes = 255 - model.model.layers[0].mlp.up_proj.codes


def change_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    before = mlp.forward
    mlp.forward = lambda x: 2 * before(x)


def change_module(model: Any) -> None:
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Tanh()).eval()


def change_dtype(model: Any) -> None:
    model.bfloat16()


def train(model: Any) -> None:
    model.train()


def change_one_scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 3


def change_every_scaling(model: Any) -> None:
    for block in model.model.layers:
        block.self_attn.scaling *= 3


def change_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 5.0


def change_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.3)


def change_rotation(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.5


NUMBERS = [change_one_scaling, change_every_scaling, change_epsilon, change_frequencies, change_rotation]
CHANGES = [change_weight, change_in_place, change_codes, change_forward, change_module, change_dtype, train, *NUMBERS]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_first_token_are_followed(change: Callable[[Any], None]) -> None:
    model = packed()
    free = decoded(model, IDS, 3)
    change(model)
    got, wanted = decoded(model, IDS, 3), decoded(model, IDS, 3, "plain")
    bound = 5e-2 if change is change_dtype else 1e-4
    assert (got - wanted).norm() < bound * wanted.norm() and (
        change is train or (got - free).norm() > 1e-3 * free.norm()
    )


def test_a_forward_that_a_class_was_given_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed()
    free = decoded(model, IDS, 3)
    kind = type(model.model.layers[0].mlp)
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * before(self, x))
    got, wanted = decoded(model, IDS, 3), decoded(model, IDS, 3, "plain")
    assert (got - wanted).norm() < 1e-4 * wanted.norm() and (got - free).norm() > 1e-3 * free.norm()


def test_adapters_and_gradients_are_not_passed_by() -> None:
    peft = pytest.importorskip("peft")
    model = packed()
    free = decoded(model, IDS, 3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    fused.set_decode(model, "auto")
    with torch.no_grad():
        out = adapted(input_ids=IDS[:, :3], use_cache=True)
        logits = adapted(input_ids=IDS[:, 3:4], past_key_values=out.past_key_values).logits[0, 0]
        wanted = adapted(input_ids=IDS[:, :4]).logits[0, -1]
    assert torch.allclose(logits, wanted, atol=1e-4) and not torch.allclose(logits, free[0], atol=1e-2)
    assert "linear's place" in fused.why(model)
    model = packed()
    model.model.norm.weight.requires_grad_(True)
    cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
    model(input_ids=IDS[:, 3:4], past_key_values=cache).logits.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_copies_and_pickles_decode_by_themselves() -> None:
    model = packed()
    wanted = decoded(model, IDS, 3)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert front(made) is not front(model) and front(made).model() is made
        assert torch.equal(decoded(made, IDS, 3), wanted) and front(made).tokens == 17
    fused.set_decode(model, "plain")
    assert front(copy.deepcopy(model)).decode == "plain"


def test_the_front_is_a_forward_to_others() -> None:
    """transformers reads the signature of a forward, and the names in it."""
    import inspect

    model, plain = packed(), tiny.build("llama")
    assert str(inspect.signature(model.forward)) == str(inspect.signature(plain.forward))
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(IDS, nonsense=3)
    with pytest.raises(TypeError):
        model(IDS, IDS, IDS, IDS, IDS, IDS, IDS, IDS, IDS, IDS, IDS)
    assert torch.equal(model(IDS).logits, type(model).forward(model, IDS).logits)


def test_tokens_that_are_no_tokens() -> None:
    model = packed()
    with torch.no_grad():
        for token in (-1, 128):
            cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
            with pytest.raises(IndexError):
                model(input_ids=torch.tensor([[token]]), past_key_values=cache)


def test_under_a_compiler_the_plain_forward_is_traced() -> None:
    model = packed()
    wanted = decoded(model, IDS, 3, "plain")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache = compiled(input_ids=IDS[:, :3], use_cache=True).past_key_values
        logits = compiled(input_ids=IDS[:, 3:4], past_key_values=cache).logits[0, 0]
    assert torch.allclose(logits, wanted[0], atol=1e-4) and front(model).tokens == 0


def test_two_sequences_at_once_and_in_two_threads() -> None:
    """Each cache has memory of its own."""
    import threading

    model = packed()
    other = tiny.tokens(1, 20, seed=9)
    wanted = [decoded(model, ids, 3) for ids in (IDS, other)]
    found: list[Any] = [None, None]
    with torch.no_grad():
        caches = [model(input_ids=ids[:, :3], use_cache=True).past_key_values for ids in (IDS, other)]
        logits: list[list[Tensor]] = [[], []]
        for i in range(3, 20):
            for ids, cache, into in zip((IDS, other), caches, logits, strict=True):
                into.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[0, 0])
    assert all(torch.equal(torch.stack(got), want) for got, want in zip(logits, wanted, strict=True))

    def go(number: int, ids: Tensor) -> None:
        found[number] = decoded(model, ids, 3)

    threads = [threading.Thread(target=go, args=(i, ids)) for i, ids in enumerate((IDS, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def test_a_model_without_head_is_left_alone() -> None:
    model = tiny.build("llama")
    fused.fuse(model.model)
    assert "forward" not in model.model.__dict__
    assert isinstance(pack(tiny.build("llama")), transformers.LlamaForCausalLM)
