"""Options read from source: as the imported classes have them; every alias, near misses, help, completion, docs/cli.md."""

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nearplane.checkpoint.load import LoadSettings
from nearplane.cli.fields import NO_DEFAULT, fields_of, methods
from nearplane.cli.main import VERBS, completion, known_names, main, verb
from nearplane.cli.options import FIRST, HIDDEN, SWITCHES, help_text, options_of, parse
from nearplane.core.activations import TokenGrid
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.data.text import Calibration
from nearplane.methods import METHODS
from nearplane.run.job import Job
from nearplane.run.names import ALIASES

ROOT = Path(__file__).parents[2]
CLASSES = {
    **{reference: METHODS[name] for name, reference in methods().items()},
    "nearplane.run.job:Job": Job,
    "nearplane.core.grid:Grid": Grid,
    "nearplane.data.text:Calibration": Calibration,
    "nearplane.core.activations:TokenGrid": TokenGrid,
    "nearplane.checkpoint.load:LoadSettings": LoadSettings,
    **{f"nearplane.cli.{name}:Options": verb(name).Options for name in VERBS},
}


@pytest.mark.parametrize("reference", CLASSES)
def test_source_and_import_agree(reference: str) -> None:
    kind: Any = CLASSES[reference]
    made = {field.name: field for field in dataclasses.fields(kind) if field.init}
    found = {field.name: field for field in fields_of(reference)}
    assert list(found) == list(made)
    for name, field in found.items():
        default = made[name].default
        if default is dataclasses.MISSING:
            assert field.default is NO_DEFAULT, name
        elif isinstance(default, str | int | float | bool | tuple | None):
            assert field.default == default, name
        plain = field.kind.types or field.kind.choices
        assert field.doc or not plain, f"{reference}.{name} has no docstring"


def test_methods_are_those_of_the_registry() -> None:
    assert list(methods()) == list(METHODS)
    for name, reference in methods().items():
        module, _, attribute = reference.partition(":")
        assert getattr(importlib.import_module(module), attribute) is METHODS[name]


def test_what_people_use_first_is_there() -> None:
    """And what the grid must have, whatever it is made of inside."""
    for name in ("quantize", "plan"):
        names = {option.name for option in options_of(verb(name)) if not option.own}
        assert set(FIRST) <= names and {"fit", "act_bits", "damp_percent", "override", "budget"} <= names
        assert not names & set(HIDDEN)
    assert {option.name for option in options_of(verb("inspect"))} >= {"bits", "group_size", "sym", "fit"}
    for name in ("eval", "generate"):
        given = {option.name for option in options_of(verb(name))}
        assert {field.name for field in dataclasses.fields(LoadSettings)} <= given


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("bits: list[dict[str, int]] = None", "is no annotation that an option can be made of"),
        ("bits: Callable[[int], int] = print", "is no annotation"),
        ("bits: Nowhere = 1", "has no Nowhere that can be read as source"),
        ("def bits(self): ...", "has no field that can be read"),
    ],
)
def test_what_cannot_be_read_is_an_error(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"unreadable_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(f"class Broken:\n    {source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingError, match=says):
        fields_of(f"{name}:Broken")
    with pytest.raises(SettingError, match=r"has no Other|cannot be found"):
        fields_of(f"{name}:Other")


OWN = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Literal
{imports}
Mode = Literal["fast", "slow"]
@dataclass(frozen=True)
class Mine({base}):
    '''A method of a user.'''
    mode: Mode = "fast"
    '''How.'''
    strength: float | None = field(default=None)
"""


@pytest.mark.parametrize(
    ("imports", "base"),
    [
        ("from nearplane.methods.gptq import GPTQ", "GPTQ"),
        ("from nearplane import GPTQ as Theirs", "Theirs"),
        ("import nearplane", "nearplane.GPTQ"),
        ("import nearplane.methods as family", "family.GPTQ"),
    ],
)
def test_a_users_own_method(
    imports: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"mine_{base.replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN.replace("{imports}", imports).replace("{base}", base))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["m", "o", "--method", f"{name}:Mine", "--mode", "slow", "--strength", "0.5", "--damp-percent", "0.1"]
    _, settings = parse(verb("quantize"), words)
    job = Job.of(None, settings)
    assert vars(job.method) | {"mode": "slow", "strength": 0.5, "damp_percent": 0.1} == vars(job.method)
    assert main(["help", "quantize", "--method", f"{name}:Mine"]) == 0
    printed = capsys.readouterr().out
    assert "--mode fast|slow" in printed and "--strength X" in printed and "--order natural" in printed


@pytest.mark.parametrize("alias", sorted(ALIASES))
@pytest.mark.parametrize("form", ["--{}", "--{}="])
def test_every_alias(alias: str, form: str) -> None:
    value: Any = 0.5 if ALIASES[alias] == "damp_percent" else 3
    for typed in (alias, alias.replace("_", "-")):
        flag = form.format(typed)
        words = [f"{flag}{value}"] if form.endswith("=") else [flag, str(value)]
        _, settings = parse(verb("quantize"), ["m", "o", *words, "--method", "gptq"])
        assert settings == {ALIASES[alias]: value, "method": "gptq"}


@pytest.mark.parametrize("switch", sorted(SWITCHES))
def test_every_switch(switch: str) -> None:
    wanted: dict[str, Any] = {"--asym": {"sym": False}, "--act-asym": {"act_sym": False}, "--true-sequential": {}}
    _, settings = parse(verb("quantize"), ["m", "o", switch])
    assert settings == wanted.get(switch, {"order": "activation"})


def test_values() -> None:
    words = [
        "m",
        "--group-size",
        "-1",
        "--ignore",
        "a",
        "--ignore=b",
        "--override",
        "x=bits=8",
        "--widths",
        "2",
        "4",
        "out",
    ]
    with pytest.raises(SettingError, match="--widths takes a whole number; got 'out'"):
        parse(verb("quantize"), words)
    options, settings = parse(verb("quantize"), [*words[:-1], "--bits", "ternary", "--no-sym", "--quiet", "out"])
    assert (options.model, options.out, options.quiet) == ("m", Path("out"), True)
    assert settings == {
        "group_size": -1, "ignore": ("a", "b"), "override": ("x=bits=8",), "widths": (2, 4), "bits": "ternary", "sym": False,
    }  # fmt: skip
    _, settings = parse(verb("plan"), ["m", "--rotate", "r1,r2", "--towers", "text", "--no-resume", "--offload", "d"])
    assert settings == {"rotate": "r1,r2", "towers": "text", "resume": False, "offload": Path("d")}
    options, settings = parse(verb("generate"), ["m", "--prompt=-x y", "--head-bits", "8"])
    assert options.prompt == "-x y" and settings == {"head_bits": 8}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "quantize m o --bit 3",
            "unknown option --bit; did you mean --bits? nearplane quantize --help lists the options.",
        ),
        ("quantize m o --bist=3", "did you mean --bits?"),
        ("quantize m o --groupsz 3", "did you mean --group-size?"),
        ("quantize m o --wbit 3", "did you mean --bits?"),
        ("quantize m o --no-symm", "did you mean --no-sym?"),
        ("quantize m o --xyzzy", "unknown option --xyzzy; nearplane quantize --help lists the options."),
        ("quantize m o -b 3", "unknown option -b"),
        ("quantize m o --rounds two", "--rounds takes a whole number; got 'two'."),
        ("quantize m o --damp-percent much", "--damp-percent takes a number; got 'much'."),
        ("quantize m o --fit min-max", "--fit takes auto, minmax, mse or hessian; got 'min-max'; did you mean minmax?"),
        ("quantize m o --dtype float64", "did you mean float16?"),
        ("quantize m o --bits", "--bits needs a value"),
        ("quantize m o p", "unexpected word 'p'"),
        ("quantize m", "OUT must be given; nearplane quantize --help says how."),
        ("quantize", "MODEL, OUT must be given"),
        ("quantize m o --sym=yes", "--sym"),
        ("quantize m o --method nearplain", "unknown method 'nearplain'; did you mean nearplane?"),
        ("quantize m o --method gptq --no-gate", "--no-gate is an option of --method nearplane, not of gptq"),
        ("generate m", "--prompt must be given"),
        ("generate m --promt x", "did you mean --prompt?"),
        ("bench m --against fp64", "--against takes bf16 or fp32; got 'fp64'"),
        ("eval m --bits 3", "unknown option --bits; did you mean"),
        ("verify o --engin vllm", "did you mean --engine?"),
        ("inspekt m", "unknown command 'inspekt'; did you mean inspect?"),
        ("xyzzy", "unknown command 'xyzzy'; the commands are quantize, plan,"),
        ("help xyzzy", "unknown command 'xyzzy'"),
        ("xyzzy", "report, push, serve, help, completion."),
        ("serv", "did you mean serve?"),
        ("complete bash", "did you mean completion?"),
        ("completion fish", "completion is for bash or zsh; got 'fish'. For these it is printed: add eval"),
        ("completion", "completion is for bash or zsh; name one of them."),
        ("--install-completion", 'add eval "$(nearplane completion bash)" to ~/.bashrc'),
        ("--install-completion=zsh", 'eval "$(nearplane completion zsh)" to ~/.zshrc'),
        ("--show-completion bash", "nearplane completion bash"),
    ],
)
def test_mistakes_are_one_sentence(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("nearplane: ")
    assert says in printed.err, printed.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"bits": 3, "grup_size": 64}', "unknown setting 'grup_size'; did you mean group_size?"),
        ("method: gptq\nrounds: 2\n", "rounds is a setting of method nearplane, not of gptq."),
        ('{"xyzzy": 1}', "unknown setting 'xyzzy'; docs/cli.md lists the settings, by names with dashes."),
    ],
)
def test_a_setting_that_a_file_cannot_hold(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is named, and nothing is opened before."""
    path = tmp_path / ("kept.json" if text.startswith("{") else "kept.yaml")
    path.write_text(text)
    assert main(["quantize", "no/such/model", "out", "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"nearplane: --config {path}: {says}\n"
    path.write_text(
        '{"bits": 3, "act_bits": 8, "override": ["q_proj=bits=4"], "ignore": ["x"], "rounds": 1, "offload": "d"}'
    )
    assert parse(verb("quantize"), ["m", "o", "--config", str(path)])[1]["rounds"] == 1


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("columns", ["80", "200", "60"])
def test_help_fits(
    name: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for method in methods() if name in ("quantize", "plan") else ("",):
        words = [name, "--help", *(["--method", method] if method else [])]
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= min(80, int(columns))
        assert printed.startswith(f"usage: nearplane {name} ")
        assert not re.search(r"--\w*-\n", printed), "a flag is broken"
        assert main(["help", *[word for word in words if word != "--help"]]) == 0
        assert capsys.readouterr().out == printed


def test_help_begins_with_what_people_use_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == main(["--help"]) == main([]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    text = help_text(verb("quantize"), [])
    first = text[text.index("options used first:") : text.index("\noutput:")]
    assert re.findall(r"^  (--[\w-]+)", first, re.MULTILINE) == [f"--{name.replace('_', '-')}" for name in FIRST]
    for title in ("method nearplane:", "grid:", "calibration:", "activations:", "mixed bits:", "rotation:", "run:"):
        assert f"\n{title}\n" in text


def test_every_option_is_in_one_group_of_help() -> None:
    for name in VERBS:
        module: ModuleType = verb(name)
        text = help_text(module, [])
        for option in options_of(module):
            shown = option.metavar if option.by_place else option.flag
            wanted = 0 if option.name in getattr(module, "WITHOUT", ()) else 1
            assert len(re.findall(rf"^  {shown}\b(?!-)", text, re.MULTILINE)) == wanted, (name, shown)


def test_completion_completes() -> None:
    """In a real bash: verbs, flags, values of a flag, files elsewhere."""

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        script = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _nearplane; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(
            ["bash", "-c", completion("bash") + "\n" + script], capture_output=True, text=True, check=True
        )
        assert not done.stderr
        return done.stdout.split()

    assert completed("nearplane", "qu") == ["quantize"] and "completion" in completed("nearplane", "")
    assert completed("nearplane", "quantize", "m", "--group") == ["--group-size"]
    found = completed("nearplane", "quantize", "--no-s")
    assert sorted(found) == ["--no-sandwich", "--no-static-groups", "--no-sym"]
    assert completed("nearplane", "plan", "m", "--method", "gp") == ["gptq", "gptaq"]
    assert completed("nearplane", "quantize", "m", "--fit", "m") == ["minmax", "mse"]
    assert completed("nearplane", "quantize", "m") == []
    assert completed("nearplane", "help", "ev") == ["eval"]
    assert completed("nearplane", "se") == completed("nearplane", "help", "se") == ["serve"]
    assert completed("nearplane", "comp") == completed("nearplane", "help", "comp") == ["completion"]
    assert completed("nearplane", "he") == ["help"] and completed("nearplane", "completion", "") == ["bash", "zsh"]
    assert completed("nearplane", "serve", "out", "--po") == ["--port"] and completed("nearplane", "serve", "ou") == []
    assert completion("zsh").count("bashcompinit") == 2


def test_the_page_of_the_command_line_is_fresh() -> None:
    """docs/cli.md is what docs/make_cli.py makes of the dataclasses now."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs/make_cli.py", "--print"], capture_output=True, text=True, check=True
    )
    assert done.stdout == (ROOT / "docs/cli.md").read_text(), "run: python docs/make_cli.py"
    for names in known_names().values():
        assert all(f"`{name}`" in done.stdout for name in names)
