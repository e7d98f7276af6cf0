"""Upload a finished checkpoint to the model hub: asked first, then in one commit, so that no half of it is ever visible.

Everything that can refuse an upload is asked before: that the folder is finished, the login, the name, what the repository
holds. Files that reached the hub before an upload broke off are not sent again by the next one. The token is the client's
own: it is read here only to strike it out of what an error says.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
    validate_repo_id,
)

from nearplane.core.errors import NearplaneError, SettingError, some_of
from nearplane.formats.companions import CARD, card_text, is_ours
from nearplane.formats.journal import file_hash, unfinished
from nearplane.formats.originals import BASE
from nearplane.formats.read import open_checkpoint
from nearplane.formats.store import INDEX, read_index
from nearplane.models.locate import first_line, given_path

# What is no part of a checkpoint: hidden files and folders (states, caches, git), locks, and what is not finished.
LEFT = [".*", "*/.*", "__pycache__/*", "*/__pycache__/*", "*.unfinished", "*.tmp", "*.lock", "*.pyc"]
# Files that a repository has from its beginning, whatever is uploaded into it.
GIVEN = (".gitattributes", CARD)
# What a token of the hub looks like.
TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}")
DENIED = {
    401: "it does not take this login",
    403: "this login may not do that",
    429: "it was asked too often; wait a while",
}


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and where it is."""

    out: str
    repo: str
    url: str
    files: int
    nbytes: int
    note: str | None = None
    """What was not uploaded, and why."""

    def __str__(self) -> str:
        line = f"{self.out} -> {self.url}: {self.files} files, {self.nbytes / 1e6:.1f} MB, in one commit"
        return line if self.note is None else f"{line}\nnote: {self.note}"

    __repr__ = __str__


@dataclass(frozen=True)
class Remote:
    """A repository that is there already."""

    private: bool
    files: dict[str, str | None]
    """SHA-256 of each large file by its name; None of a small one."""


def push(out: str | Path, repo: str, *, private: bool = False, progress: bool = False) -> Pushed:
    """Upload a finished checkpoint to the model hub, in one commit.

    The login is that of ``hf auth login``, or HF_TOKEN. An upload that broke off is gone on with by the same call. A card in
    the repository that nearplane has not written stays.

    Args:
        out: folder of the checkpoint.
        repo: name of the repository, as USER/NAME, or NAME of one's own. It may be new, empty, or hold the same weights.
        private: make a new repository that others do not see.
        progress: whether to draw bars.

    Returns:
        What was uploaded. Printed, it is one line with the address.

    Raises:
        NearplaneError: a folder that is not finished, no login, no permission, no network, or a repository with other files;
            nothing of the upload is visible then.
    """
    folder = given_path("out", out)
    _finished(folder)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = list(filter_repo_objects(found, ignore_patterns=LEFT))
    api, full = _login(repo)
    remote = _remote(api, full)
    kept = None
    if remote is None:
        with _telling(f"{full} cannot be made"):
            api.create_repo(full, private=private or None, exist_ok=True)
    else:
        _refuse_public(full, remote, private)
        _refuse_others(full, remote, folder, names)
        kept = _kept(api, full, remote, folder)
    left = [*LEFT, CARD] if kept else LEFT
    sent = [name for name in names if name != CARD or kept is None]
    with nullcontext() if progress else _no_bars(), _telling(f"{folder} is not uploaded to {full}", again=True):
        api.upload_folder(repo_id=full, folder_path=folder, ignore_patterns=left, commit_message="Upload by nearplane")
    size = sum((folder / name).stat().st_size for name in sent)
    hidden = sorted(set(found) - set(names))
    notes = [kept, f"not uploaded: {some_of(hidden)} (hidden, locked or not finished)" if hidden else None]
    if kept is None and CARD in sent and not BASE.search(card_text(folder) or ""):
        notes.append(
            f"the card names no base_model, so the hub does not list this under its original; add it to {CARD}"
        )
    return Pushed(str(out), full, f"{api.endpoint}/{full}", len(sent), size, "; ".join(filter(None, notes)) or None)


def check_push(repo: str, *, private: bool = False) -> str:
    """Ask the hub whether a checkpoint that is yet to be made can be uploaded; changes nothing there.

    Args:
        repo: name of the repository.
        private: as ``push`` takes it.

    Returns:
        The full name of the repository.

    Raises:
        NearplaneError: no login, no permission, no network, or a repository that holds files.
    """
    api, full = _login(repo)
    remote = _remote(api, full)
    if remote is not None:
        _refuse_public(full, remote, private)
        held = sorted(set(remote.files) - set(GIVEN))
        if held:
            raise SettingError(f"{full} on the hub holds files already ({some_of(held)}); give the name of a new one.")
    return full


def _finished(folder: Path) -> None:
    """Raise unless a folder is a whole, quantized checkpoint."""
    if not folder.is_dir():
        raise SettingError(f"{folder} is no folder; give that of a finished checkpoint.")
    state = unfinished(folder)
    if state is not None:
        raise NearplaneError(f"{state.removesuffix('.')}. Only a finished checkpoint is uploaded.")
    checkpoint = open_checkpoint(folder)  # opens every shard
    if checkpoint.format is None:
        raise SettingError(f"{folder} is not quantized; nearplane uploads what it has quantized or converted.")
    placed = set(read_index(folder / INDEX).values()) if (folder / INDEX).is_file() else set()
    for name in sorted(placed):  # a GGUF file is none of the shards that are opened
        if not (folder / name).is_file():
            raise NearplaneError(f"{folder / name} is missing; write the checkpoint again, or restore the file.")


def _login(repo: str) -> tuple[Any, str]:
    """Return the client and the full name of a repository. Raises where login or name will not do."""
    try:
        validate_repo_id(repo)
        named = isinstance(repo, str)
    except errors.HFValidationError:
        named = False
    if not named:
        raise SettingError(f"{_struck(str(repo))!r} is no name of a repository on the hub; give USER/NAME.")
    api = huggingface_hub.HfApi()
    with _telling("the login for the hub cannot be checked"):
        who = api.whoami()
    user, role = str(who.get("name")), ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise NearplaneError(
            f"the login of {user} may only read from the hub; make a token that may write, and run: hf auth login"
        )
    owner, _, name = repo.rpartition("/")
    known = [user, *(str(org.get("name")) for org in who.get("orgs") or ())]
    if owner and owner.lower() not in {each.lower() for each in known}:
        raise SettingError(f"{repo}: the login is of {user}, which may write to {some_of(known)}; give one of these.")
    return api, f"{owner or user}/{name}"


def _remote(api: Any, repo: str) -> Remote | None:
    """Look at a repository; None where there is none."""
    try:
        with _telling(f"{repo} cannot be looked up", but=errors.RepositoryNotFoundError):
            info = api.model_info(repo, files_metadata=True)
    except errors.RepositoryNotFoundError:
        return None
    files = {some.rfilename: getattr(getattr(some, "lfs", None), "sha256", None) for some in info.siblings or ()}
    return Remote(bool(info.private), files)


def _refuse_public(repo: str, remote: Remote, private: bool) -> None:
    """Refuse to show everybody what was to be private."""
    if private and not remote.private:
        raise SettingError(f"{repo} is there and public; leave --private out, make it private, or give another name.")


def _refuse_others(repo: str, remote: Remote, folder: Path, names: list[str]) -> None:
    """Refuse a repository that holds other files, or other weights under the same names."""
    others = sorted(set(remote.files) - set(names) - set(GIVEN))
    if others:
        raise SettingError(
            f"{repo} on the hub holds other files ({some_of(others)}); nothing is uploaded: give another name, or delete them."
        )
    for name, digest in sorted(remote.files.items()):
        weights = digest is not None and name in names and name.endswith((".safetensors", ".gguf"))
        if weights and file_hash(folder / name) != digest:
            raise SettingError(
                f"{repo} on the hub holds other weights ({name}); nothing is uploaded: give another name, or delete them."
            )


def _kept(api: Any, repo: str, remote: Remote, folder: Path) -> str | None:
    """Say that the card in a repository stays; None where it is as nearplane wrote it, or there is none."""
    if CARD not in remote.files:
        return None
    with _telling(f"the card of {repo} cannot be read"):
        there = Path(api.hf_hub_download(repo, CARD)).parent
    same = card_text(there) == card_text(folder)
    return None if same or is_ours(card_text(there)) else f"{CARD} of {repo} is not as nearplane wrote it, and stays"


@contextmanager
def _telling(what: str, *, again: bool = False, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turn errors of the hub into one sentence.

    Args:
        what: what has not come about.
        again: the same command goes on.
        but: errors that pass.
    """
    try:
        yield
    except but:
        raise
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        told = f"{what}: {_reason(error)}"
        told += "; nothing of it is visible there, and the same upload goes on where it ended" if again else ""
        raise NearplaneError(f"{told}.") from None  # the error itself may hold the token


def _reason(error: BaseException) -> str:
    """Say what an error of the hub means, without a token."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that the hub is not asked; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no login; run hf auth login, or set HF_TOKEN to a token that may write"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None or isinstance(error, ValueError | RuntimeError):
        denied = DENIED.get(status or 0)
        said = _struck(first_line(error)).rstrip(".")
        return f"{denied} ({said}); hf auth login changes it" if denied and status != 429 else denied or said
    return f"the hub cannot be reached ({type(error).__name__})"


def _struck(text: str) -> str:
    """Return a text without the token of the login, or anything that looks like one."""
    token = huggingface_hub.get_token()
    return TOKEN.sub("***", text.replace(token, "***") if token else text)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Let the client draw no bars."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
