"""Reports as dictionaries, of any shape, and what tests ask of a page."""

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "input", "link", "img", "hr"}
LLAMA = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


def linear(name: str, error: float | None = 0.004, rtn: float | None = 0.02, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("loss", "bound", "bound_ratio", "clipped", "alpha", "rounds", "rejected"))
    return empty | {
        "name": name, "shape": [32, 64], "error": error, "rtn_error": rtn, "weight_error": 0.05, "damp_percent": 0.01,
        "damp_raised": 0, "residual": False, "tokens": 512, "dropped": 0, "seconds": 0.1, "bits": 3, "group_size": 32,
        "rounded": False, **values,
    }  # fmt: skip


def report(
    count: int = 2, parts: tuple[str, ...] = LLAMA, prefix: str = "model.layers", **values: Any
) -> dict[str, Any]:
    """A whole report; error of part j in block i: (1 + j + 10 i) / 1000, five times as much where it is rounded to nearest."""
    rows = [
        linear(f"{prefix}.{i}.{part}", (1 + j + 10 * i) / 1000, (1 + j + 10 * i) / 200)
        for i in range(count)
        for j, part in enumerate(parts)
    ]
    weights = 32 * 64 * len(rows)
    made: dict[str, Any] = {
        "model": "someone/Small-1B",
        "out": "runs/small-3bit",
        "config": {"nearplane": "0.1.0", "model": "someone/Small-1B", "bits": 3},
        "settings": {
            "method": {"name": "GPTQ", "damp_percent": 0.01},
            "grid": {"bits": 3, "group_size": 32, "sym": False, "fit": "auto", "scale_dtype": "float16"},
            "calibration": {"dataset": None, "nsamples": 8, "seqlen": 64, "seed": 7},
            "format": "compressed-tensors",
        },
        "versions": {"nearplane": "0.1.0", "torch": "2.9.0"},
        "data": {"windows": 8, "seqlen": 64, "tokens": 512, "origin": "text.txt", "sha256": "c0ffee" * 10},
        "linears": rows,
        "rounds": {"kept": 0, "rejected": 0},
        "events": [],
        "dense": [{"name": "model.embed_tokens.weight", "bytes": 5_000_000, "reason": "not a linear of a block"}],
        "bytes": {"before": 20_000_000, "after": 8_000_000, "quantized": weights * 3 // 8, "dense": 5_000_000},
        "seconds": {"forward": 1.0, "solve": 3.0},
        "memory": {"planned": 2_000_000_000, "close": True, "available": 8_000_000_000, "peak": 1_500_000_000},
        "resumed": 0,
        "blocks": [{"name": f"{prefix}.{i}", "error": 0.01 * (i + 1), "rtn_error": 0.05 * (i + 1)} for i in range(count)],
        "check": {
            "windows": 4, "origin": "text.txt", "held_out": True, "tokens": 510, "block": f"{prefix}.{count - 1}",
            "error": 0.05, "rtn_error": 0.2, "kl": 0.25, "top1": 0.75, "reference_perplexity": 20.0, "perplexity": 25.0,
        },
        "engines": {
            "vllm": {"refusals": [], "caveats": [], "basis": "run here with vllm 1"},
            "llama.cpp": {"refusals": ["it does not know the format"], "caveats": [], "basis": "read"},
        },
    }  # fmt: skip
    return made | values


class Parsed(HTMLParser):
    """A page, read strictly: tags that do not close are an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.labels: list[str] = []
        self.pieces: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.labels += [value or "" for name, value in attrs if name == "aria-label"]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:], self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        """What a person reads, spaces made one."""
        return " ".join(" ".join(self.pieces).split())


def sound(page: str) -> Parsed:
    """The page, parsed, once it is known to be well-formed, alone, and not to point anywhere."""
    found = Parsed(page)
    for tag, name, value in found.attributes:
        assert name not in ("src", "srcset", "background", "poster", "action", "data", "xlink:href"), (tag, name)
        assert not name.startswith("on"), (tag, name, value)
        assert name != "href" or (tag == "a" and value[0] == "#" and value[1:] in found.ids), (tag, value)
    assert not {"link", "img", "iframe", "object", "base"} & found.tags.keys()
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "http://" not in page and "https://" not in page
    assert len(found.ids) == len(set(found.ids))
    return found
