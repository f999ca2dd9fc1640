"""A stand-in for the Hugging Face hub on loopback: one dataset, its commits, signed addresses of content, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

PIECE = 1 << 16  # bytes that are sent at once
PAGE = 2  # entries of a page of the tree
SMALL = re.compile(r"(?!.*large).*\.(md|jsonl)")
"""Files in git itself: answered by the hub, which ignores ranges; all others are at signed addresses."""


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose path matches ``where``.

    kind: "status" (with ``headers``), "page" (an HTML page with status 200), "whole" (the range is ignored), "short" (an orderly
    end after half of the bytes, and no length), "truncate" (the same, against the length announced), "reset" (the same, with a
    reset), "stall" (half of the bytes, then nothing for a minute), "gone" (no answer), "flip" (one byte is wrong).
    """

    kind: str
    where: str = "/content/"
    times: int = 1
    status: int = 503
    headers: tuple[tuple[str, str], ...] = ()


class Hub:
    """The server; a context manager. ``commit`` makes what is in a folder the newest commit of main.

    Attributes:
        requests: the paths that were asked for, in order; ``sent``: the bytes of content that were sent.
        uses: how many answers a signed address gives before it has expired.
        rate: bytes a second of all content together; None: as fast as it goes.
    """

    def __init__(self, name: str) -> None:
        self.name, self.commits, self.main = name, dict[str, dict[str, bytes]](), ""
        self.served: dict[str, bytes] = {}  # content that is not what the commit says
        self.entries: dict[str, tuple[bytes, dict[str, Any]]] = {}  # what the API says of content, by name
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.leaked_tokens = self.sent = self.expired = 0
        self.uses, self.rate = 1 << 60, float("inf")
        self._left: list[int] = []  # of each signed address, its uses
        self._lock, self._free_at = threading.Lock(), 0.0  # when the throttled link is free
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._content = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url, self.content_url = (f"http://127.0.0.1:{one.server_port}" for one in (self._server, self._content))

    def __enter__(self) -> Hub:
        for server in (self._server, self._content):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._server, self._content):
            server.shutdown()
            server.server_close()

    def commit(self, folder: Path) -> str:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.main = hashlib.sha1(
            repr(sorted((name, git_hash(data)) for name, data in files.items())).encode()
        ).hexdigest()
        self.commits[self.main] = files
        return self.main

    def sign(self) -> int:
        """The number of a new signed address."""
        with self._lock:
            self._left.append(self.uses)
            return len(self._left) - 1

    def is_valid(self, number: int) -> bool:
        """Whether a signed address is good for one more answer."""
        with self._lock:
            self._left[number] -= 1
            self.expired += self._left[number] < 0
            return self._left[number] >= 0

    def pace(self, size: int) -> None:
        """Wait until the link has sent so many bytes more."""
        with self._lock:
            self.sent += size
            self._free_at = max(self._free_at, time.monotonic()) + size / self.rate
            until = self._free_at
        threading.Event().wait(max(0.0, until - time.monotonic()))  # not time.sleep, which tests replace

    def count(self, where: str) -> int:
        return sum(re.search(where, path) is not None for path in self.requests)

    def fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, path):
                fault.times -= 1
                return fault
        return None


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, body: bytes, length: bool = True, /, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if length:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                for start in range(0, len(body), PIECE) if status == 206 else ():
                    hub.pace(len(body[start : start + PIECE]))
                    self.wfile.write(body[start : start + PIECE])
                if status != 206:
                    self.wfile.write(body)
            self.close_connection = True

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            hub.requests.append(path)
            fault = hub.fault(path)
            if fault is not None and fault.kind == "gone":
                self.close_connection = True
            elif fault is not None and fault.kind == "status":
                self.send(fault.status, b"", **dict(fault.headers))
            elif fault is not None and fault.kind == "page":
                self.send(200, b"<!DOCTYPE html><title>Sign in to the network</title>", Content_Type="text/html")
            elif path.startswith("/content/"):
                self.content(path, query, fault)
            elif path == "/api/agent-harnesses":
                self.send(200, b'{"standardEnvVars": [], "harnesses": {}}')
            elif path.startswith((f"/api/datasets/{hub.name}/", f"/datasets/{hub.name}/resolve/")):
                self.repository(path, query)
            else:
                self.send(401, b"", X_Error_Code="RepoNotFound")

        do_HEAD = do_POST = do_GET

        def repository(self, path: str, query: dict[str, list[str]]) -> None:
            what, revision, *rest = path.split(f"/{hub.name}/", 1)[1].split("/", 2)
            sha = hub.main if revision == "main" else revision
            files = hub.commits.get(sha)
            if files is None:
                self.send(404, b"", X_Error_Code="RevisionNotFound")
            elif what == "revision":
                self.send(200, json.dumps({"id": hub.name, "sha": sha}).encode())
            elif what == "tree":
                self.tree(files, rest[0] if rest else "", query)
            elif what == "paths-info":
                wanted = set(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).get("paths", []))
                known = [entry for entry in self.entries(files) if entry["path"] in wanted]
                self.send(200, json.dumps(known).encode())
            elif rest[0] not in files:
                self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            elif SMALL.fullmatch(rest[0]):
                self.send(200, files[rest[0]], ETag=f'"{git_hash(files[rest[0]])}"', X_Repo_Commit=sha)
            else:
                self.send(
                    302,
                    b"",
                    Location=f"{hub.content_url}/content/{sha}/{rest[0]}?signed={hub.sign()}",
                    X_Repo_Commit=sha,
                )

        def tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
            recursive, start = "recursive" in query, int(query.get("cursor", ["0"])[0])
            prefix = f"{folder}/" if folder else ""
            inside = [entry for entry in self.entries(files) if entry["path"].startswith(prefix)]
            inside = [entry for entry in inside if recursive or "/" not in entry["path"][len(prefix) :]]
            if folder and not inside:
                self.send(404, b"", X_Error_Code="EntryNotFound")
                return
            more = urlencode({**{key: value[0] for key, value in query.items()}, "cursor": start + PAGE})
            link = {"Link": f'<{hub.url}{urlsplit(self.path).path}?{more}>; rel="next"'}
            page = json.dumps(inside[start : start + PAGE]).encode()
            self.send(200, page, **(link if start + PAGE < len(inside) else {}))

        def entries(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
            """What the API says of all files and folders."""
            folders = {str(parent) for name in files for parent in list(PurePosixPath(name).parents)[:-1]}
            listed = [
                {"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name} for name in folders
            ]
            listed += [self.entry(name, data) for name, data in files.items()]
            return sorted(listed, key=lambda entry: str(entry["path"]))

        def entry(self, name: str, data: bytes) -> dict[str, Any]:
            known = hub.entries.get(name)
            if known is None or known[0] is not data:
                known = hub.entries[name] = data, self.described(name, data)
            return known[1]

        def described(self, name: str, data: bytes) -> dict[str, Any]:
            entry = {"type": "file", "oid": git_hash(data), "size": len(data), "path": name}
            large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
            return entry if SMALL.fullmatch(name) else entry | large

        def content(self, path: str, query: dict[str, list[str]], fault: Fault | None) -> None:
            hub.leaked_tokens += "Authorization" in self.headers
            if not hub.is_valid(int(query["signed"][0])):
                self.send(403, b"<Error><Code>AccessDenied</Code></Error>")
                return
            _, _, sha, name = path.split("/", 3)
            data, kind = hub.served.get(name, hub.commits[sha][name]), fault.kind if fault is not None else ""
            given = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if given is None or kind == "whole":
                self.send(200, data)
                return
            first, end = int(given[1]), int(given[2]) + 1
            body = data[first:end]
            if kind == "flip":
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 255]) + body[middle + 1 :]
            headers = {"Content_Range": f"bytes {first}-{end - 1}/{len(data)}"}
            if kind in ("truncate", "reset", "stall"):
                headers["Content_Length"] = str(len(body))
            if kind in ("truncate", "short", "reset", "stall"):
                self.send(206, body[: len(body) // 2], False, **headers)
                if kind == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if kind == "stall":
                    self.wfile.flush()
                    threading.Event().wait(60)
            else:
                self.send(206, body, **headers)

    return Handler
