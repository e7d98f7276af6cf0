"""Uploads to the hub: against a stub of its client, and by the real client against a small server of our own."""

import hashlib
import json
import shutil
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import tiny
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

import nearplane
from nearplane import NearplaneError
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.formats.companions import sealed
from nearplane.formats.journal import STATE, Journal

SECRET = "hf_" + "Secret123" * 3
WHO = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": "write"}}}
RTN = ["--method", "rtn", "--bits", "4", "--group-size", "32", "--quiet"]


class Hub:
    """Repositories in memory; an instance stands in place of ``HfApi``."""

    endpoint = "https://hub.example"

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.asked: list[str] = []
        self.who: Any = WHO
        self.fails: dict[str, Exception] = {}

    def __call__(self) -> "Hub":
        return self

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what in self.fails:
            raise self.fails[what]

    def whoami(self) -> Any:
        self._ask("whoami")
        return self.who

    def model_info(self, repo: str, *, files_metadata: bool) -> Any:
        self._ask("model_info")
        if repo not in self.repos:
            raise errors.RepositoryNotFoundError("404", response=response(404))
        files = [
            SimpleNamespace(
                rfilename=name, lfs=SimpleNamespace(sha256=digest(data)) if name.endswith("tensors") else None
            )
            for name, data in self.repos[repo].items()
        ]
        return SimpleNamespace(private=self.private[repo], siblings=files if files_metadata else None)

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        self._ask("create_repo")
        assert exist_ok
        self.repos[repo], self.private[repo] = {".gitattributes": b""}, bool(private)

    def hf_hub_download(self, repo: str, name: str) -> str:
        folder = Path(self.cache) / repo
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(self.repos[repo][name])
        return str(folder / name)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str
    ) -> None:
        self._ask("upload_folder")
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            self.repos[repo_id][name] = (folder_path / name).read_bytes()
        self.commits.append(commit_message)


def response(status: int) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push")
    tiny.save(tiny.build("llama"), place / "model")
    assert main(["quantize", str(place / "model"), str(place / "out"), *RTN]) == 0
    return place


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "out", tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    made.cache = tmp_path / "cache"  # type: ignore[attr-defined]
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: SECRET)
    return made


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    status, said = main(words), capsys.readouterr()
    assert status == 2 and "Traceback" not in said.err and SECRET not in said.err + said.out
    return " ".join(said.err.split())


def test_one_commit_of_the_checkpoint_and_nothing_else(out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    for name in (
        ".cache/huggingface/x",
        ".git/config",
        ".env",
        "part-00001.unfinished",
        "a/.hidden",
        "x.lock",
        "__pycache__/a.pyc",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    assert main(["push", str(out), "me/small", "--private"]) == 0
    said = capsys.readouterr().out
    assert (
        set(hub.repos["me/small"]) == wanted | {".gitattributes"} and len(hub.commits) == 1 and hub.private["me/small"]
    )
    assert {"README.md", "SHA256SUMS", "report.json", "config.json"} <= wanted
    assert f"{len(wanted)} files" in said and "https://hub.example/me/small" in said and "not uploaded: .cache" in said
    assert nearplane.push(out, "small").repo == "me/small" and not hub.private.get("small")  # again: the same weights
    assert nearplane.push(out, "team/other").repo == "team/other" and not hub.private["team/other"]


def test_a_card_without_its_original_is_told(out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(out), "me/x"]) == 0
    assert "the card names no base_model" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("---\n", "---\nbase_model: me/original\n", 1))
    assert main(["push", str(out), "me/y"]) == 0
    assert "base_model" not in capsys.readouterr().out and b"me/original" in hub.repos["me/y"]["README.md"]


def test_an_unfinished_folder_is_refused_before_the_hub_is_asked(
    out: Path, folder: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = Path(shutil.copytree(out, tmp_path / "cut"))
    shard = next(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])
    assert "truncated or corrupt" in refused(["push", str(cut), "me/x"], capsys)
    shard.unlink()
    assert "is missing" in refused(["push", str(cut), "me/x"], capsys)
    assert "is not quantized" in refused(["push", str(folder / "model"), "me/x"], capsys)
    assert "is no folder" in refused(["push", "nowhere", "me/x"], capsys)
    assert "is no folder" in refused(["push", str(out / "config.json"), "me/x"], capsys)
    (tmp_path / "bare").mkdir()
    assert "bare holds no weights" in refused(["push", str(tmp_path / "bare"), "me/x"], capsys)
    (out / STATE).mkdir()
    Journal(out).add(0, {})
    assert "holds a run that was not finished, 1 block is done" in refused(["push", str(out), "me/x"], capsys)
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["a/b/c", "", "-x", "a--b", "https://huggingface.co/a/b", f"me/{SECRET}!", "me/x.git", "me/a b"]
)
def test_a_name_that_is_none(name: str, out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["push", str(out), "--", name] if name[:1] == "-" else ["push", str(out), name]
    assert "is no name of a repository" in refused(words, capsys) and hub.asked == []
    with pytest.raises(SettingError, match="is no name of a repository"):
        nearplane.push(out, None)  # type: ignore[arg-type]


def test_what_the_hub_does_not_allow(out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """No login, a wrong one, one that only reads, no network, no permission: one sentence, no token in it, exit status 2."""
    push = ["push", str(out), "me/x"]
    http = errors.HfHubHTTPError
    leaking = f"Illegal header value b'Bearer {SECRET}'"
    cases: list[tuple[str, Exception, str]] = [
        ("whoami", errors.LocalTokenNotFoundError("no token"), "there is no login; run hf auth login"),
        ("whoami", errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        ("whoami", http(f"401 {SECRET}", response=response(401)), "does not take this login"),
        ("whoami", ConnectionError(SECRET), "the hub cannot be reached (ConnectionError)"),
        ("whoami", ValueError(leaking), "Bearer ***"),
        ("model_info", http("500 broken", response=response(500)), "500 broken"),
        (
            "create_repo",
            http("403 Forbidden", response=response(403)),
            "me/x cannot be made: this login may not do that",
        ),
        ("upload_folder", http("403 Forbidden", response=response(403)), "this login may not do that"),
        ("upload_folder", RuntimeError(f"xet: {SECRET}"), "xet: ***; nothing of it is visible there"),
        ("upload_folder", TimeoutError(), "the same upload goes on where it ended"),
        ("upload_folder", ValueError("Invalid metadata in README.md"), "Invalid metadata in README.md"),
    ]
    for what, error, sentence in cases:
        hub.fails = {what: error}
        assert sentence in refused(push, capsys), sentence
        hub.repos.clear()
        with pytest.raises(NearplaneError) as caught:
            nearplane.push(out, "me/x")
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        hub.repos.clear()
    assert hub.commits == []
    hub.fails = {}
    hub.who = WHO | {"auth": {"accessToken": {"role": "read"}}}
    assert "may only read" in refused(push, capsys)
    hub.who = WHO
    assert "may write to me, team" in refused(["push", str(out), "them/x"], capsys)
    assert nearplane.verify(out).ok and main(push) == 0  # all of it left the folder as it was


def test_a_repository_with_other_content_is_left_alone(out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    push = ["push", str(out), "me/x"]
    shard = next(out.glob("*.safetensors")).name
    hub.private["me/x"] = False
    for held, sentence in (
        ({"pytorch_model.bin": b"x", ".gitattributes": b""}, "holds other files (pytorch_model.bin)"),
        ({shard: b"other"}, f"holds other weights ({shard})"),
    ):
        hub.repos["me/x"] = dict(held)
        assert sentence in refused(push, capsys)
        assert hub.repos["me/x"] == held and not hub.commits
    hub.repos["me/x"] = {".gitattributes": b""}
    assert "is there and public" in refused([*push, "--private"], capsys)
    assert main(push) == 0


@pytest.mark.parametrize(
    ("there", "stays"),
    [("---\nlicense: mit\n---\n", True), (sealed("# Old\n"), False), (sealed("# Old\n").replace("Old", "New"), True)],
)
def test_a_card_that_somebody_wrote_on_the_hub_stays(
    there: str, stays: bool, out: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["me/x"], hub.private["me/x"] = {"README.md": there.encode()}, False
    assert main(["push", str(out), "me/x"]) == 0
    assert (hub.repos["me/x"]["README.md"] == there.encode()) == stays
    assert ("is not as nearplane wrote it, and stays" in capsys.readouterr().out) == stays
    assert "report.json" in hub.repos["me/x"]


def test_quantize_asks_before_it_runs_and_uploads_after(
    folder: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    words = ["quantize", str(folder / "model"), str(out), *RTN]
    hub.repos["me/full"], hub.private["me/full"] = {"model.safetensors": b""}, False
    assert "holds files already (model.safetensors)" in refused([*words, "--push-to-hub", "me/full"], capsys)
    assert "may write to me, team" in refused([*words, "--push-to-hub", "them/x"], capsys)
    assert "give --push-to-hub REPO, too" in refused([*words, "--private"], capsys)
    hub.fails = {"whoami": errors.LocalTokenNotFoundError("no token")}
    assert "there is no login" in refused([*words, "--push-to-hub", "me/x"], capsys)
    assert not out.exists() and "create_repo" not in hub.asked
    hub.fails = {"upload_folder": errors.HfHubHTTPError(f"{SECRET}", response=response(500))}
    said = refused([*words, "--push-to-hub", "me/x", "--private"], capsys)
    assert f"{out} is finished; upload it with: nearplane push {out} me/x --private" in said
    assert nearplane.verify(out).ok and not hub.commits
    assert SECRET not in "".join(path.read_text(errors="replace") for path in out.iterdir())
    hub.fails = {}
    assert main(["push", str(out), "me/x", "--private"]) == 0 and len(hub.commits) == 1 and hub.private["me/x"]
    shutil.rmtree(out)
    assert main([*words, "--push-to-hub", "team/y"]) == 0
    assert len(hub.commits) == 2 and "https://hub.example/team/y" in capsys.readouterr().out
    hub.fails, hub.who = {"upload_folder": KeyboardInterrupt()}, WHO  # type: ignore[dict-item]
    assert main([*words[:2], str(tmp_path / "third"), *RTN, "--push-to-hub", "team/z"]) == 130
    said = capsys.readouterr().err
    assert "third is finished; upload it with" in said and "nothing was written" not in said


class Server(BaseHTTPRequestHandler):
    """What the client asks of a hub, for files that are small; the class holds what it was given."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    commits = 0
    broken = False
    tokens: ClassVar[set[str]] = set()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        kind, self_type = self.path.split("?")[0], type(self)
        self_type.tokens.add(self.headers.get("authorization", ""))
        if kind == "/api/whoami-v2":
            self._answer(WHO)
        elif kind.startswith("/api/models/"):
            repo = "/".join(kind.split("/")[3:5])
            files = [{"rfilename": name} for name in self_type.repos.get(repo, {})]
            found = {"id": repo, "private": False, "siblings": files, "sha": "a" * 40}
            self._answer(found if repo in self_type.repos else {"error": "no"}, 200 if repo in self_type.repos else 404)
        else:
            self._answer({"error": self.path}, 404)

    def do_POST(self) -> None:
        body, kind, hub = (
            self.rfile.read(int(self.headers.get("Content-Length", 0))),
            self.path.split("?")[0],
            type(self),
        )
        repo = "/".join(kind.split("/")[3:5])
        if kind == "/api/repos/create":
            wanted = json.loads(body)
            hub.repos[f"{wanted.get('organization') or 'me'}/{wanted['name']}"] = {}
            owner = wanted.get("organization") or "me"
            self._answer({"url": f"{huggingface_hub.constants.ENDPOINT}/{owner}/{wanted['name']}"})
        elif kind == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif kind.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        elif kind.endswith("/commit/main") and not hub.broken:
            lines = [json.loads(line) for line in body.splitlines()]
            hub.repos[repo] |= {
                line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"
            }
            hub.commits += 1
            url = f"{huggingface_hub.constants.ENDPOINT}/{repo}/commit/b"
            self._answer({"success": True, "commitOid": "b" * 40, "commitUrl": url})
        else:
            self._answer({"error": f"{self.path} {self.headers.get('authorization')}"}, 400)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    hub = type("Fresh", (Server,), {"repos": {}, "tokens": set()})
    running = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield hub
    running.shutdown()
    running.server_close()


def test_the_real_client_against_a_server(out: Path, server: type[Server], capsys: pytest.CaptureFixture[str]) -> None:
    """One commit with every file; an answer that shows the token to the client is struck; the second push goes through."""
    server.broken = True
    said = refused(["push", str(out), "me/real"], capsys)
    assert "nothing of it is visible there" in said and server.commits == 0 and server.repos == {"me/real": {}}
    server.broken = False
    assert main(["push", str(out), "me/real"]) == 0
    assert server.commits == 1 and f"Bearer {SECRET}" in server.tokens
    assert set(server.repos["me/real"]) == {path.name for path in out.iterdir()}
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and "/me/real" in said.out
