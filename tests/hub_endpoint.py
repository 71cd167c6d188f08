"""A Hugging Face Hub on localhost, as far as the upload and the download of a folder need it."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

SHA = "0" * 40


class Endpoint(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: the files of each repository, as bytes by path.
        refuses: a request whose path holds this text is answered with status 403.
    """

    refuses: str | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []

    def environment(self, home: Path) -> dict[str, str]:
        """The environment variables with which huggingface_hub talks to this server alone."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {"HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Endpoint

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_test":
            self.answer({"error": "no such token"}, 401)
        elif self.server.refuses and self.server.refuses in self.path:
            self.answer({"error": "You are not allowed to do that"}, 403)
        elif self.path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'somebody'}/{request['name']}"
            self.server.repos.setdefault(repo, {})
            self.answer({"url": f"http://{self.headers['Host']}/{repo}", "name": repo})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            files = self.server.repos[match[1]]
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    self.server.commits.append(value["summary"])
            url = f"http://{self.headers['Host']}/{match[1]}/commit/{SHA}"
            self.answer({"commitUrl": url, "commitOid": SHA, "success": True})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(.+)/tree/.+", path):
            files = self.server.repos[match[1]]
            self.answer([{"type": "file", "path": p, "size": len(c), "oid": SHA} for p, c in files.items()])
        elif match := re.fullmatch(r"/api/models/(.+)/revision/.+", path):
            siblings = [{"rfilename": name} for name in self.server.repos[match[1]]]
            self.answer({"id": match[1], "sha": SHA, "siblings": siblings})
        elif match := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
            content = self.server.repos[match[1]][match[2]]
            self.answer(content, headers={"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA})
        else:
            self.answer({"error": path}, 404)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def endpoint() -> Iterator[Endpoint]:
    """A running server, which no proxy stands before."""
    with Endpoint() as server:
        os.environ["NO_PROXY"] = "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
