"""The model card of a checkpoint: front matter that a hub reads, and what a person asks before a download.

A card holds no times, no name of OUT and no path of this machine. So a resumed run ends with the card of an uninterrupted
one, and a card can be published. Figures are the report's own. A command stands there for each engine whose verdict
(``checkpoint/engines``) is that it loads the folder.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from nearplane.checkpoint.engines import TITLES, Verdict
from nearplane.checkpoint.hub.origin import DEMO, base_of, carried, front_matter, stated_base
from nearplane.core.grid import Grid
from nearplane.formats.base import grid_name
from nearplane.formats.companions import sealed
from nearplane.page.words import options_in

# The folders of a path, from a root, a home or a place above: of a file that a command names, the name is enough. A folder
# may hold spaces, but neither begins nor ends with one.
PART = r"[^\s:,\"'/\\](?:[^:,\"'/\\\n]*[^\s:,\"'/\\])?"
FOLDERS = re.compile(rf"(?<![\w./:])(?:[A-Za-z]:)?(?:~\w*|\.\.?)?[/\\](?:{PART}[/\\])*")
# What runs a checkpoint in each engine; MODEL is the repository or the folder. Shown where the verdict is that it loads.
COMMANDS = {
    "vllm": "vllm serve MODEL",
    "sglang": "python -m sglang.launch_server --model-path MODEL",
    "transformers": (
        "import nearplane\nfrom transformers import AutoModelForCausalLM\n\nnearplane.enable()  # weights stay packed\n"
        'model = AutoModelForCausalLM.from_pretrained("MODEL")'
    ),
    "llama.cpp": 'llama-completion -m FILE -p "The capital of France is" -n 32',
    "mlx": 'mlx_lm.generate --model MODEL --prompt "The capital of France is"',
    "onnxruntime-genai": (
        "python -m onnxruntime_genai.models.builder -i MODEL -o out-onnx -p int4 -e cpu -c cache "
        "--extra_options accuracy_level=4 nodes_to_exclude=/lm_head/MatMul"
    ),
    "openvino": "python runs/engines/openvino.py MODEL IDS.json OUT.npz  # in a clone of nearplane",
}
PACKED = 'pip install nearplane\nnearplane generate MODEL --prompt "The capital of France is"'
# What the hub calls the library that reads a format; the others are transformers'.
LIBRARIES = {"mlx": "mlx", "gguf": "gguf"}


@dataclass(frozen=True)
class Made:
    """A checkpoint, as its card describes it."""

    model: str
    """What it was made of, as the user gave it: a folder, a hub id or demo."""
    format: str
    grids: tuple[Grid, ...]
    """Of its quantized weights, the commonest first."""
    base: str | list[str] | None
    """Hub id of the model it was made of."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the front matter that come from the source's card."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Of the run that chose the codes; empty where another tool did."""
    engines: Mapping[str, Verdict] = field(default_factory=dict)
    nbytes: int | None = None
    """Of its tensors."""
    file: str | None = None
    """The file for llama.cpp, where there is one."""
    causal: bool = True
    """Whether it predicts the next token."""
    version: str = ""
    """Of nearplane, which writes the checkpoint."""

    @property
    def exactly(self) -> str | None:
        """The hub id of exactly the files that were quantized; None: another source only names a base."""
        known = self.model == "demo" or self.report.get("commit")
        return self.base if known and isinstance(self.base, str) else None

    @property
    def name(self) -> str:
        """The name of the model it was made of."""
        return (self.exactly or Path(self.model).name or "model").rpartition("/")[2]


def described(
    model: str, folder: Path, config: Mapping[str, Any], *, converted: bool = False
) -> tuple[dict[str, Any], str | None]:
    """Look up what a card takes from its source.

    Args:
        model: as the user gave it.
        folder: of the source's files.
        config: its config.json.
        converted: the source is a quantized checkpoint, whose card names the original as its base.

    Returns:
        ``base`` and ``carried`` of ``Made``; and a sentence where the source's card cannot be read.
    """
    stated, broken = front_matter(folder)
    base = (stated_base(stated) if converted else None) or base_of(model, folder, config, stated)
    taken = carried(DEMO if model == "demo" else stated)
    return {"base": base, "carried": taken}, broken


def card(made: Made) -> str:
    """Write the card of a checkpoint, with the line by which nearplane knows it again."""
    parts = [f"# {made.name}, {_bits(made.grids)} ({made.format})", _lead(made)]
    parts += [_table(made), *_measured(made.report), *_engines(made), *_recipe(made)]
    return sealed(f"---\n{_front(made)}\n---\n\n" + "\n\n".join(parts) + "\n")


def _front(made: Made) -> str:
    """Write the front matter."""
    widths = sorted({grid.storage_bits for grid in made.grids})
    known = LIBRARIES.get(made.format, "transformers")
    tags = ["nearplane", "quantized", made.format, *(f"{width}-bit" for width in widths)]
    data = ModelCardData(
        base_model=made.base,
        base_model_relation=None if made.base is None else "quantized",
        library_name=known,
        tags=list(dict.fromkeys(tags)),
        **made.carried,
    )
    return str(data.to_yaml(line_break="\n"))


def _bits(grids: Sequence[Grid]) -> str:
    widths = sorted({grid.storage_bits for grid in grids})
    return f"{widths[0]} bits" if len(widths) == 1 else f"{widths[0]} to {widths[-1]} bits"


def _lead(made: Made) -> str:
    """Say what it is, in one or two sentences."""
    bases = [made.base] if isinstance(made.base, str) else made.base or []
    links = ", ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    commit = made.report.get("commit")
    original = f"`{made.name}`, which names {links} as its base" if links else f"`{made.name}`"
    if made.exactly:
        original = f"{links} at commit `{commit[:12]}`" if isinstance(commit, str) else links
    said = f"{original}: its weights are quantized with nearplane."
    if not made.report:
        said = f"{original}: quantized by another tool, and written as {made.format} by nearplane with the same values."
    return said + (" The demo of nearplane was made of a 4-bit file of it." if made.model == "demo" else "")


def _table(made: Made) -> str:
    """Write method, grids and sizes as a table."""
    settings, totals, size = (made.report.get(key) or {} for key in ("settings", "totals", "bytes"))
    rows = {}
    if settings.get("method"):
        rows["method"] = str(settings["method"]["name"])
    rows["weights"] = "; ".join(dict.fromkeys(grid_name(grid) for grid in made.grids[:4]))
    rows["weights"] += f"; and {len(made.grids) - 4} more kinds" * (len(made.grids) > 4)
    bits = totals.get("bits_per_weight")
    if bits:
        rows["weights"] += f": {bits:.2f} bits per weight with scales, in {totals['linears']} linears"
    for key, name in (("activations", "activations"), ("rotate", "rotations"), ("tune", "tuning")):
        if settings.get(key):
            rows[name] = _said(key, settings[key])
    if made.nbytes:
        before = size.get("before")
        rows["size"] = f"{before / 1e6:.1f} MB before, " if before else ""
        rows["size"] += f"{made.nbytes / 1e6:.1f} MB now"
    data = made.report.get("data", {})
    if "windows" in data:
        rows["calibrated on"] = f"{data['tokens']} tokens of {plainly(data['origin'])}" if "tokens" in data else (
            plainly(str(data["origin"])))  # fmt: skip
    cells = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *cells])


def _said(key: str, value: Any) -> str:
    """Say a setting in words."""
    if key == "activations":
        return f"rounded to {value['bits']} bits while the model runs"
    if key == "tune":
        return f"{value} steps on scales, norms and biases"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _measured(report: Mapping[str, Any]) -> list[str]:
    """Say what the run measured against the original, with the protocol."""
    check = report.get("check") or {}
    if "kl" not in check and check.get("error") is None:
        return []
    lines = []
    if "kl" in check:
        lines.append(f"- KL(original ‖ this): {check['kl']:.4g} nats a token")
        lines.append(f"- same most probable token: {100 * check['top1']:.1f}%")
    if "perplexity" in check and "reference_perplexity" in check:
        lines.append(f"- perplexity: {check['reference_perplexity']:.4g} before, {check['perplexity']:.4g} now")
    if check.get("error") is not None:
        nearest = "" if check.get("rtn_error") is None else f"; rounding to nearest: {check['rtn_error']:.4f}"
        lines.append(f"- error of the last hidden state: {check['error']:.4f}{nearest}")
    where = "windows that calibration has not used" if check.get("held_out") else "calibration windows"
    chose = " These windows also judged the tuning." if check.get("judged_tuning") else ""
    counted = f"{check['tokens']} tokens scored, " if "tokens" in check else ""
    protocol = f"Protocol: {counted}{check['windows']} {where}, of {plainly(str(check['origin']))}."
    advice = "A few windows rank methods; `nearplane eval MODEL --reference ORIGINAL` measures with more."
    return ["## Measured", "\n".join(lines), f"{protocol}{chose} {advice}"]


def _engines(made: Made) -> list[str]:
    """Give a command for each engine that loads the checkpoint, and say how that is known."""
    parts = ["## Run it", "`MODEL` is this repository's id, or the folder.", f"**nearplane**\n\n```\n{PACKED}\n```"]
    if not made.causal:
        parts[-1] = '**nearplane**\n\n```python\nimport nearplane\n\nmodel = nearplane.load("MODEL")\n```'
    for engine, judged in made.engines.items():
        if judged.refusals or not (made.causal or engine == "transformers"):
            continue
        command = COMMANDS[engine].replace("FILE", made.file or "MODEL")
        language = "python" if engine == "transformers" else ""
        if not made.causal:
            command = command.replace("AutoModelForCausalLM", "AutoModel")
        basis, title = judged.basis.replace(" here", ""), TITLES[engine].rpartition(" ")[0]
        without = "\n\nWithout `nearplane.enable()`:" * bool(judged.caveats and engine == "transformers")
        notes = "".join(f"\n- {caveat}" for caveat in judged.caveats)
        said = f"{without}\n{notes}" if notes else ""
        parts.append(f"**{title}**, {basis}\n\n```{language}\n{command}\n```{said}")
    return parts


def _recipe(made: Made) -> list[str]:
    """Say how it was made: the commands, and the versions."""
    report, source = made.report, "demo" if made.model == "demo" else made.exactly or made.name
    told = report.get("config")
    lines = []
    if isinstance(told, Mapping):
        if report.get("commit") and made.exactly and "revision" not in told:
            source = f"{source}@{report['commit']}"
        lines.append(f"nearplane quantize {source} OUT {plainly(shlex.join(options_in(told)))}".rstrip())
    format = (report.get("settings") or {}).get("format", "another format")
    if format != made.format:
        lines.append(f"nearplane convert OUT NEW --format {made.format}")
    versions = report.get("versions") or {"nearplane": made.version}
    used = ", ".join(f"{name} {versions[name]}" for name in ("nearplane", "torch", "transformers") if name in versions)
    rest = ["```\n" + "\n".join(lines) + "\n```"] if lines else []
    unsaid = told.get("not_kept", []) if isinstance(told, Mapping) else []
    if unsaid:
        rest.append(f"Given as objects of Python, which these words leave out: {', '.join(unsaid)}.")
    kept = " Every setting and the error of every linear are in `report.json`." if report else ""
    return ["## How it was made", *rest, f"With {used}.{kept}"]


def plainly(text: str) -> str:
    """Return a text without the folders of its paths: of a file on this machine the name is enough."""
    return FOLDERS.sub("", text)


def commonest(grids: Iterable[Grid]) -> tuple[Grid, ...]:
    """Return every kind of grid once, the commonest first."""
    counts: dict[Grid, int] = {}
    for grid in grids:
        counts[grid] = counts.get(grid, 0) + 1
    return tuple(sorted(counts, key=lambda grid: -counts[grid]))
