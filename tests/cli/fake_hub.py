"""A hub on this machine: the parts of the hub's HTTP interface that huggingface_hub uses to make a repository, commit
to it and download from it, with the answers and headers that the client (2.4) reads.

Files that end in .safetensors go through git-LFS, as on the hub: batch, upload, verify, and a redirect on download.
The hub would offer Xet to a client that has it, so tests switch that off (HF_HUB_DISABLE_XET).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """The state of the hub, and every request that it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.store = f"http://localhost:{self.server_address[1]}/objects"  # another host: the client tells them apart


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")
            bad = [] if len(front) > 2 else [{"message": "no front matter"}]
            return self._json(400 if bad else 200, {"errors": bad, "warnings": []})
        if path == "/verify":
            return self._json(200 if json.loads(body)["oid"] in self.server.objects else 404, {})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        _, _, _, owner, name, verb, revision = path.split("/", 6)
        repo = self.server.repos.get(f"{owner}/{name}")
        if repo is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        return getattr(self, f"_{verb}")(f"{owner}/{name}", repo, revision, body)

    def do_PUT(self) -> None:
        data, oid = self._body(), self.path.rpartition("/")[2]
        self.server.requests.append("PUT object")
        if hashlib.sha256(data).hexdigest() != oid:
            return self._json(400, {"error": "wrong hash"})
        self.server.objects[oid] = data
        return self._json(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/objects/"):
            if "Authorization" in self.headers:
                return self._json(400, {"error": "the token must not leave the hub"})
            return self._send(200, self.server.objects[path.rpartition("/")[2]], {})
        if "/resolve/" not in path:
            return self._error(404, "NotFound", path)
        _, owner, name, _, revision, file = path.split("/", 5)
        repo = self.server.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        if revision not in repo.branches and revision not in repo.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.branches.get(revision, repo.branches["main"])
        if file not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        return self._file(file, files[file], repo.commits[-1])

    def _file(self, file: str, data: bytes, commit: str) -> None:
        oid = hashlib.sha256(data).hexdigest()
        if not file.endswith(".safetensors"):
            return self._send(200, data, {"ETag": f'"{oid}"', "X-Repo-Commit": commit})
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
        return self._send(302, b"", {**linked, "Location": f"{self.server.store}/{oid}"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            return self._json(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.server.repos:
            return self._json(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        self.server.repos[name] = Repo(asked.get("visibility") == "private")
        return self._json(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _branch(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        if revision in repo.branches:
            return self._json(409, {"error": "Reference already exists"})
        repo.branches[revision] = dict(repo.branches["main"])
        return self._json(200, {})

    def _preupload(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        found = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return self._json(200, {"files": found})

    def _batch(self, asked: dict[str, Any]) -> None:
        found = []
        for wanted in asked["objects"]:
            actions = {"upload": {"href": f"{self.server.store}/{wanted['oid']}"}, "verify": {"href": f"{self.server.url}/verify"}}  # fmt: skip
            new = wanted["oid"] not in self.server.objects
            found.append({**wanted, "authenticated": True, **({"actions": actions} if new else {})})
        return self._json(200, {"transfer": "basic", "objects": found})

    def _commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            lfs = line["key"] == "lfsFile"
            data = self.server.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
            repo.branches[revision][value["path"]] = data
        repo.commits.append(hashlib.sha1(body + bytes([len(repo.commits)])).hexdigest())
        url = f"{self.server.url}/{name}/commit/{repo.commits[-1]}"
        return self._json(200, {"success": True, "commitOid": repo.commits[-1], "commitUrl": url})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
