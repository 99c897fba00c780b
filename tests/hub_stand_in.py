"""A hub on this machine: the part of the Hugging Face hub's HTTP interface that loading and publishing an SAE needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0" * 39 + "1"


class Hub:
    """Repositories as dicts from path to bytes, and what was asked."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.log: list[str] = []
        self.stored: dict[str, bytes] = {}
        """Large files, by their hash."""


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content_Type", "application/json")
            headers.setdefault("Content_Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def path_and_files(self):
            path = unquote(urlparse(self.path).path)
            hub.log.append(f"{self.command} {path}")
            return path

        def do_GET(self):
            path = self.path_and_files()
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path)
            if found:
                files = hub.repositories.get(found[1])
                if files is None:
                    return self.answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                return self.answer(200, {"id": found[1], "sha": COMMIT, "siblings": siblings, "private": False})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path)
            if found:
                files = hub.repositories.get(found[1], {})
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                    if name.startswith(found[2])
                ]
                return self.answer(200, listed)
            return self.file(path)

        do_HEAD = do_GET

        def file(self, path):
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            data = hub.repositories.get(found[1], {}).get(found[3]) if found else None
            if data is None:
                return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            if self.command == "GET":
                hub.fetched.append(found[3])
            return self.answer(
                200,
                data,
                Content_Type="application/octet-stream",
                ETag=f'"{hashlib.sha1(data).hexdigest()}"',
                X_Repo_Commit=COMMIT,
            )

        def do_POST(self):
            path, body = self.path_and_files(), self.body()
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'user'}/{asked['name']}"
                hub.repositories.setdefault(name, {})
                return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": "1", "name": name})
            if path.endswith("/preupload/main"):
                files = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
                return self.answer(200, {"files": files})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path)
            if found:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        hub.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
                url = f"http://{self.headers['Host']}/{found[1]}/commit/{COMMIT}"
                return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
            return self.answer(200, {})

    return Handler


@contextmanager
def running():
    """The hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
