"""The part of the model hub for tests that takes uploads: repositories, branches, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from hub_server import HubServer

__all__ = ["Uploads"]

_ABOUT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>branch|preupload|commit)/(?P<revision>[^/]+)")
_LARGE = (".safetensors", ".bin")
Answer = tuple[int, dict[str, Any]]


class Uploads:
    """Keeps what is written below ``root``: a folder for each commit. ``commits`` are the bodies of all commits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.large: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []

    def take(self, hub: HubServer, path: str, body: bytes) -> Answer:
        """The answer to a POST or PUT."""
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == path[7:] else (400, {"error": "other content"})
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self._create(hub, json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(hub, o) for o in json.loads(body)["objects"]]}
        found = _ABOUT.fullmatch(path)
        if found is None or found["repo"] not in hub.repositories:
            return 404, {"error": "Repository not found"}
        repo, revision = found["repo"], unquote(found["revision"])
        if found["what"] == "branch":
            return self._branch(hub, repo, revision)
        if found["what"] == "preupload":
            return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}
        return self._commit(hub, repo, revision, [json.loads(line) for line in body.splitlines()])

    def _create(self, hub: HubServer, asked: dict[str, Any]) -> Answer:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}
        (self.root / repo).mkdir(parents=True)
        hub.repositories[repo] = {"main": self.root / repo}
        if asked.get("visibility") == "private" or asked.get("private"):
            hub.private.add(repo)
        return 200, {"url": f"{hub.url}/{repo}"}

    def _branch(self, hub: HubServer, repo: str, name: str) -> Answer:
        branches = hub.repositories[repo]
        assert isinstance(branches, dict)
        if name in branches:
            return 409, {"error": "Reference already exists"}
        branches[name] = branches["main"]
        return 200, {}

    def _place(self, hub: HubServer, entry: dict[str, Any]) -> dict[str, Any]:
        """Where a large file is to be put, unless it is there."""
        actions = {"actions": {"upload": {"href": f"{hub.url}/large/{entry['oid']}"}}}
        return {**entry, **({} if entry["oid"] in self.large else actions)}

    def _commit(self, hub: HubServer, repo: str, revision: str, lines: list[dict[str, Any]]) -> Answer:
        branches = hub.repositories[repo]
        assert isinstance(branches, dict)
        if lines[0]["value"].get("parentCommit") not in (None, hub.commit(repo, revision)):
            return 412, {"error": "A commit has happened since"}
        self.commits.append(lines)
        folder = self.root / f"{repo.replace('/', '--')}-{len(self.commits)}"
        shutil.copytree(branches[revision], folder)
        for line in lines[1:]:
            value = line["value"]
            path = folder / value["path"]
            if line["key"] == "deletedFile":
                path.unlink()
                continue
            path.write_bytes(
                self.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            )
        branches[revision] = folder
        commit = hub.commit(repo, revision)
        return 200, {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}"}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    is_large = file["path"].endswith(_LARGE)
    return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
