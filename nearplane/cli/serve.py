"""``nearplane serve``: transformers' own server, its models' linears packed.

Options are transformers': this file has none. It looks at the model that is given, so that what is wrong with it is one
sentence before a port is opened.
"""

from pathlib import Path

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.models.locate import locate, refuse_missing

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
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise SettingError(EXTRA)
    from transformers.cli.transformers import app

    from nearplane.checkpoint.enable import enable

    enable()
    app(["serve", *map(_found, words[:1]), *words[1:]], prog_name="nearplane")
    return 0


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
