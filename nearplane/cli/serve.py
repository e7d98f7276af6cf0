"""``nearplane serve``: transformers' own server, its models' linears packed.

Options are transformers': this file describes the common ones, and checks none. It looks at the model that is given, so that
what is wrong with it is one sentence before a port is opened.
"""

from importlib.util import find_spec
from pathlib import Path

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.models.locate import locate, refuse_missing

# Options of transformers' server that completion offers, and help shows where the server's packages are missing.
COMMON = ("--host", "--port", "--device", "--dtype", "--trust-remote-code", "--log-level", "--help")
HELP = """usage: nearplane serve [MODEL] [options of transformers serve]

transformers' own OpenAI-compatible server, the linears of its models packed:
a checkpoint of nearplane, a folder, a hub id, or "demo".

  --host NAME, --port N                 where to listen: localhost, 8000
  --device NAME                         auto, cpu, cuda:0, ...
  --dtype NAME                          auto, float32, bfloat16, float16
  --trust-remote-code                   run Python code that comes with MODEL
  --log-level NAME                      warning, info, ...
"""
# What transformers asks for before it serves (is_serve_available).
PACKAGES = ("transformers", "pydantic", "fastapi", "uvicorn", "openai")
EXTRA = "nearplane serve runs transformers' server, which needs further packages; pip install 'nearplane[serve]'."


def run(words: list[str]) -> int:
    """Serve until interrupted.

    Args:
        words: the command line behind ``serve``: a folder, a hub id or ``demo``, and options of ``transformers serve``.

    Returns:
        The exit status.

    Raises:
        SettingError: a package of the server is missing.
        NearplaneError: the model cannot be loaded.
    """
    asks = bool({"-h", "--help"} & set(words))
    if not importable():
        if asks:
            print(f"{HELP}\nFor these and transformers' other options: pip install 'nearplane[serve]'.")
            return 0
        raise SettingError(EXTRA)
    if asks:
        words = ["--help"]
    from transformers.cli.transformers import app

    from nearplane.checkpoint.enable import enable

    enable()
    app(["serve", *map(_found, words[:1]), *words[1:]], prog_name="nearplane")
    return 0


def importable() -> bool:
    """Tell whether the server's packages are installed. Imports none of them."""
    return all(find_spec(name) is not None for name in PACKAGES)


def _found(word: str) -> str:
    """Return what transformers' server is to load for the first word. Raises NearplaneError for an unusable folder."""
    if word.startswith("-"):
        return word
    refuse_missing(word)
    from nearplane.formats.store import read_json

    folder = locate(word) if word == "demo" or Path(word).is_dir() else None
    if folder is None:  # a hub id, which transformers fetches
        return word
    named = read_json(folder / "config.json").get("architectures")
    if not isinstance(named, list) or not named:
        raise NearplaneError(
            f"{folder / 'config.json'} names no architectures, by which transformers' server finds the class of a model; "
            'add "architectures", such as ["LlamaForCausalLM"].'
        )
    return str(folder) if word == "demo" else word  # requests must name the model by the same word
