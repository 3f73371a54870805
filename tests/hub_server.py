"""A model hub for tests: a small HTTP server that speaks the part of the Hugging Face API that downloads use.

    with HubServer({"org/model": folder}) as server:
        subprocess.run([...], env={**os.environ, **server.environment(tmp_path)})
        assert server.sent("resolve") < 1000

It serves model info (``/api/models/...``) and files (``/org/model/resolve/...``) with ETag, commit, ranges and the
error codes of the hub, and takes uploads (``hub_uploads``). A repository is a folder, or a folder per branch or tag;
its commit is a hash of its content, so a changed folder is a new commit. The attributes of ``HubServer`` make it
misbehave, and can be set while it runs.

huggingface_hub reads its address when it is imported: clients run in processes of their own, with ``environment``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_uploads import Uploads

__all__ = ["TOKEN", "HubServer", "Request"]

TOKEN = "hf_TestTokenThatMustNeverBeShown"
_INFO = re.compile(r"/api/models/(?P<repo>.+?)(?:/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?:cdn/)?(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Request:
    """One request as answered; ``sent`` counts the bytes of the body that went out."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


class HubServer:
    """A hub on 127.0.0.1 that serves ``repositories``; a context manager. ``log`` holds every request."""

    def __init__(self, repositories: Mapping[str, Path | Mapping[str, Path]] | None = None) -> None:
        self.repositories = dict(repositories or {})
        self.log: list[Request] = []
        self._hashes: dict[tuple[str, int, int], str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.reset()

    def reset(self) -> None:
        """Forget the log and behave well."""
        self.log.clear()
        self.gated: set[str] = set()  # repositories whose files need a token of `allowed`
        self.allowed: set[str] = set()
        self.bad_tokens: set[str] = set()  # tokens that every request is refused with
        self.fail_status = 0  # answer with this status ...
        self.fail_times = -1  # ... so many times; -1 for ever
        self.retry_after: str | None = None  # sent with it
        self.delay = 0.0  # seconds before each answer
        self.ignores_ranges = False
        self.range_shift = 0  # bytes by which a range answer starts too late
        self.cuts_at = -1  # bytes after which a file answer hangs up; -1 for never
        self.uses_cdn = False  # send files from another host, "localhost", by redirect as the hub does with weights
        self.info: bytes | None = None  # sent in place of all model info
        self.changes: dict[str, Any] = {}  # laid over all model info
        self.writers: set[str] = set()  # tokens that may write
        self.private: set[str] = set()  # repositories
        self.uploads: Uploads | None = None  # takes what is written
        self.fails_on = ""  # a part of the paths that `fail_status` is for

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a client process: this hub, caches below ``home``, nothing of the user's own settings."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "no-token"),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }

    def requests(self, part: str = "") -> list[Request]:
        """The logged requests whose path contains ``part``; the library's own errands are left out."""
        return [request for request in self.log if part in request.path and "agent-harnesses" not in request.path]

    def sent(self, part: str = "") -> int:
        """Bytes of bodies sent for paths that contain ``part``."""
        return sum(request.sent for request in self.requests(part))

    def commit(self, repo: str, revision: str = "main") -> str:
        """The commit that a branch or tag stands for now."""
        folder = self._branches(repo)[revision]
        listing = [(name, self.hash(path)) for name, path in _files(folder).items()]
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()

    def hash(self, path: Path) -> str:
        """SHA-256 of a file, remembered."""
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashes[key]

    def find(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """The commit and folder of a branch, tag or commit."""
        for branch, folder in self._branches(repo).items():
            commit = self.commit(repo, branch)
            if revision in (branch, commit):
                return commit, folder
        return None

    def _branches(self, repo: str) -> Mapping[str, Path]:
        folders = self.repositories[repo]
        return {"main": folders} if isinstance(folders, Path) else folders


def _files(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        request: Any
        entry: Request

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            path, host = unquote(urlsplit(self.path).path), self.headers.get("Host", "").partition(":")[0]
            self.entry = Request(self.command, path, host, self.headers.get("Range"), token)
            hub.log.append(self.entry)
            try:
                self.answer()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(hub.delay)
            raw, token = urlsplit(self.path).path, self.entry.token
            if hub.fail_status and hub.fail_times and hub.fails_on in raw:
                hub.fail_times -= 1
                return self.refuse(hub.fail_status, "", "the hub is on fire")
            if token in hub.bad_tokens:
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            if self.command in ("POST", "PUT"):
                return self.take(raw, body)
            asked = _FILE.fullmatch(raw) or _INFO.fullmatch(raw)
            if asked is None or (repo := unquote(asked["repo"])) not in hub.repositories:
                return self.refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
            if (found := hub.find(repo, unquote(asked["revision"] or "main"))) is None:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {asked['revision']}")
            if asked.re is _INFO:
                return self.send_info(repo, *found)
            if repo in hub.gated and token not in hub.allowed:
                status = 401 if token is None else 403
                return self.refuse(status, "GatedRepo", f"Access to model {repo} is restricted.")
            path = _files(found[1]).get(unquote(asked["name"]))
            if path is None:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.send_file(found[0], path, is_cdn=raw.startswith("/cdn/"))

        def take(self, path: str, body: bytes) -> None:
            if self.command == "POST" and self.entry.token not in hub.writers:
                return self.refuse(401 if self.entry.token is None else 403, "", "You may not write here")
            status, answer = hub.uploads.take(hub, path, body) if hub.uploads else (404, {})
            return self.send(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

        def send_info(self, repo: str, commit: str, folder: Path) -> None:
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in _files(folder).items()]
            gate = "manual" if repo in hub.gated else False
            info = {
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": repo in hub.private,
                "gated": gate,
                "siblings": siblings,
            }
            body = json.dumps({**info, **hub.changes}).encode() if hub.info is None else hub.info
            self.send(200, {"Content-Type": "application/json"}, body)

        def send_file(self, commit: str, path: Path, is_cdn: bool) -> None:
            etag, size = f'"{hub.hash(path)}"', path.stat().st_size
            headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
            headers["Content-Disposition"] = f'inline; filename="{path.name}";'
            if hub.uses_cdn and not is_cdn:
                there = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn{self.path}?Signature=secret-signature"
                linked = {"Location": there, "X-Linked-ETag": etag, "X-Linked-Size": str(size)}
                return self.send(302, {**headers, **linked}, b"")
            status, start, stop = 200, 0, size
            if (part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.entry.range or "")) and not hub.ignores_ranges:
                start = int(part[1]) + hub.range_shift
                stop = min(int(part[2]) + 1, size) if part[2] else size
                if start >= size:
                    return self.refuse(416, "", "Range not satisfiable")
                status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
            self.start(status, {**headers, "Content-Length": str(stop - start)})
            if self.command == "HEAD":
                return None
            if hub.cuts_at >= 0:
                stop, self.close_connection = min(stop, start + hub.cuts_at), True
            with path.open("rb") as file:
                file.seek(start)
                while chunk := file.read(min(1 << 16, stop - file.tell())):
                    self.write(chunk)
            return None

        def refuse(self, status: int, code: str, message: str) -> None:
            headers = {"Content-Type": "application/json", "X-Error-Message": message}
            if hub.retry_after is not None:
                headers["Retry-After"] = hub.retry_after
            self.send(status, {**headers, "X-Error-Code": code} if code else headers, b'{"error":"refused"}')

        def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.start(status, {**headers, "Content-Length": str(len(body))})
            if self.command != "HEAD":
                self.write(body)

        def write(self, data: bytes) -> None:
            self.entry.sent += len(data)  # first, for a client may be done before we go on
            self.wfile.write(data)

        def start(self, status: int, headers: Mapping[str, str]) -> None:
            self.entry.status = status
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler
