"""A server on the loopback interface that answers as the Hugging Face Hub does, as far as a download needs it."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """One public repository per entry of `files`; an id in `private` or `gated` is refused; any other is missing.
    The token "wrong" is refused everywhere.

    stall_after  bytes of a .safetensors file after which the transfer hangs, None to send it whole
    requests     "METHOD path" of everything that was asked, a range added where one was asked for
    """

    def __init__(self, files: dict[str, dict[str, bytes]], private: set[str], gated: set[str]) -> None:
        self.files, self.private, self.gated = files, private, gated
        self.stall_after: int | None = None
        self.requests: list[str] = []
        self.stalled = threading.Event()
        self._stop = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self)

            def do_GET(self) -> None:
                hub._answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted_range = request.headers.get("Range")
        self.requests.append(f"{request.command} {request.path}" + (f" {wanted_range}" if wanted_range else ""))
        parts = request.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repository, rest = "/".join(parts[:2]), parts[2:]
        if repository in self.gated:
            return self._send(request, 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if repository in self.private:
            return self._send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
        if request.headers.get("Authorization") == "Bearer wrong":
            return self._send(request, 401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repository not in self.files:
            return self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        files = self.files[repository]
        if rest and rest[0] == "resolve":
            name = "/".join(rest[2:])
            if name not in files:
                return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return self._send_file(request, name, files[name], wanted_range)
        if rest and rest[0] == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._send(request, 200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": name} for name in files]
        description = {"_id": "0", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        description |= {"private": False, "downloads": 0, "likes": 0, "tags": []}
        return self._send(request, 200, json.dumps(description).encode(), {"Content-Type": "application/json"})

    def _send_file(self, request: BaseHTTPRequestHandler, name: str, data: bytes, wanted_range: str | None) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(wanted_range.removeprefix("bytes=").split("-")[0]) if wanted_range else 0
        if wanted_range:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stall_after = self.stall_after if name.endswith(".safetensors") and request.command == "GET" else None
        self._send(request, 206 if wanted_range else 200, data[start:], headers, stall_after)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        stall_after: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        request.wfile.write(body if stall_after is None else body[:stall_after])
        request.wfile.flush()
        if stall_after is not None:
            self.stalled.set()
            self._stop.wait(60)
