"""A stand-in for the Hugging Face Hub: takes repositories, branches and commits of small files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubStandIn(ThreadingHTTPServer):
    """Keeps what is sent; `lacks_commits` lets it refuse commits."""

    def __init__(self) -> None:
        """Listen on a free port of this machine."""
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.titles: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.lacks_commits = False


class HubRequest(BaseHTTPRequestHandler):
    """Answers the calls of `create_repo`, `create_branch` and `upload_folder`."""

    server: HubStandIn

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """List the files of a branch: none."""
        self._answer([])

    def do_POST(self) -> None:
        """Take what is sent."""
        content, last = self._content(), self.path.rsplit("/", 1)[1]
        url = f"{self.server.endpoint}/owner/name"
        if self.path.endswith("/api/repos/create"):
            self.server.created.append(json.loads(content))
            self._answer({"url": url})
        elif "/branch/" in self.path:
            self.server.branches.append(last)
            self._answer({})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular"} for file in json.loads(content)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path and not self.server.lacks_commits:
            self._commit(last, [json.loads(line) for line in content.splitlines()])
            self._answer({"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40})
        elif last == "validate-yaml":
            self._answer({"warnings": [], "errors": []})
        else:
            self._answer({"error": "refused"}, 403)

    def _commit(self, branch: str, lines: list[dict[str, Any]]) -> None:
        values = [line["value"] for line in lines if line["key"] == "file"]
        self.server.files[branch] = {
            value["path"]: base64.b64decode(value["content"]) for value in values
        }
        self.server.titles[branch] = next(
            line["value"]["summary"] for line in lines if line["key"] == "header"
        )

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, document: Any, code: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Serve in a thread."""
    with HubStandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
