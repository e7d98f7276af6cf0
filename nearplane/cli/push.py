"""``nearplane push``: a finished checkpoint onto the model hub."""

from dataclasses import dataclass
from typing import Any

from nearplane.machine.progress import printed

SETTINGS: dict[str, None] = {}
# OUT is a folder, and never a hub id to be fetched.
LOCAL = True


@dataclass(frozen=True)
class Options:
    """Upload a finished checkpoint to the model hub, in one commit, with the login of hf auth login or HF_TOKEN.

    A folder that is not finished is refused, and so is a repository with other files. An upload that broke off goes on with
    the same command. The model card is README.md in OUT; one that somebody wrote on the hub stays.
    """

    out: str
    """Folder of the checkpoint."""
    repo: str
    """Name of the repository, USER/NAME, or NAME of your own. It may be new, empty, or hold the same weights."""
    private: bool = False
    """Make a new repository that others do not see."""


def run(options: Options, _: dict[str, Any]) -> int:
    """Upload, and print the address."""
    from nearplane.checkpoint.hub.push import push

    printed(push(options.out, options.repo, private=options.private, progress=True))
    return 0
