"""Where a checkpoint comes from, for its card: the base model on the hub, and what the source's card says of itself.

A base model is a hub id, never a path: a card is read by others. The id is the one that was given, or the one of the
hub's cache. Of another folder it is the one that config.json or the card of the folder names; where neither does, the
card of the checkpoint names none.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from nearplane.formats.companions import CARD
from nearplane.models.locate import HUB_ID, first_line, with_revision

# What is carried over from the front matter of the source's card. A license that is "other" is named by two more fields.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# The demo model, which comes from a package, and what its card on the hub says.
DEMO: dict[str, Any] = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
# A folder in the hub's cache.
CACHED = re.compile(r"models--(.+)")
# Names that a training run gives its folders, one below another, and that look like a hub id.
FOLDERS = re.compile(r"(outputs?|results|models?|snapshots?|tmp|runs?)/.*|(.*/)?checkpoint-\d+", re.IGNORECASE)


def front_matter(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Read the front matter of a folder's card.

    Returns:
        The fields, none where there is no card; and a sentence where the card cannot be read, without its full stop.
    """
    path = folder / CARD
    if not path.is_file():
        return {}, None
    try:
        return dict(metadata_load(path) or {}), None
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = f"{path} has no front matter that can be read ({first_line(error)})"
        return {}, f"{told}, so that license and language are not carried over into the checkpoint's card"


def base_of(model: str, folder: Path, config: Mapping[str, Any], stated: Mapping[str, Any]) -> str | list[str] | None:
    """Return the hub id of a source.

    Args:
        model: as the user gave it: a folder, a hub id with or without a revision, or demo.
        folder: where its files are.
        config: its config.json.
        stated: the front matter of its card.

    Returns:
        One id, or the several that the card states; None where none is known.
    """
    if model == "demo":
        return str(DEMO["base_model"])
    if not Path(model).expanduser().exists():
        return with_revision(model, None)[0]
    cached = CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    if cached:
        return cached[1].replace("--", "/", 1)
    named = config.get("_name_or_path")
    return named if _is_id(named) and "/" in str(named) else stated_base(stated)


def stated_base(stated: Mapping[str, Any]) -> str | list[str] | None:
    """Return the base model that front matter states, one or several; None where it states none that is a hub id."""
    named = stated.get("base_model")
    found = [str(some) for some in (named if isinstance(named, list) else [named]) if _is_id(some)]
    return (found[0] if len(found) == 1 else found) if found else None


def carried(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint's card takes over from the front matter of its source's card: words, and lists of words."""
    found = {}
    for name in CARRIED:
        value = stated.get(name)
        words = [_word(name, part) for part in (value if isinstance(value, list) else [value])]
        known = [word for word in words if word]
        if known:
            found[name] = known if isinstance(value, list) else known[0]
    return found


def _word(name: str, value: Any) -> str | None:
    """Return a word of front matter; YAML takes Norwegian, ``no``, for false."""
    if name == "language" and value is False:
        return "no"
    return value.strip() or None if isinstance(value, str) else None


def _is_id(name: Any) -> bool:
    """Tell whether a name can be a hub id and is no folder, neither here nor where the model was trained."""
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or FOLDERS.fullmatch(name):
        return False
    return not Path(name).exists()
