"""A Hub on loopback: the HTTP calls by which huggingface_hub creates, fills, lists and reads a model repository.

with FakeHub() as hub: HF_ENDPOINT=hub.url …; `hub.repositories["user/name"]["main"]` is {path: bytes}.
It speaks LFS, not Xet: clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "api_org_" + "fakefakefake" * 3  # of a form that nothing but its value gives away
LARGE = (".safetensors", ".parquet")


class FakeHub:
    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # name → branch → path → content
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.calls: list[str] = []
        self.refuse: tuple[str, int] | None = None  # (part of a path, status): such a call fails and echoes the token

    def __enter__(self) -> "FakeHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def answer(self, value, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer({"error": f"no such {what}"}, 404, X_Error_Code=what)

    def handle_call(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        given = self.headers.get("Authorization", "")
        writing = self.command in ("POST", "PUT") and not path.startswith("/lfs/")
        if self.hub.refuse and self.hub.refuse[0] in path:
            echo = f"refused {given} with {self.headers}"
            self.answer({"error": echo}, self.hub.refuse[1], X_Error_Message=f"refused {given}")
        elif writing and given != f"Bearer {TOKEN}":
            said = "Invalid credentials in Authorization header"
            self.answer({"error": f"{said}: {given}"}, 401, X_Error_Message=said)
        else:
            for method, pattern, call in CALLS:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    return call(self, *match.groups())
            self.missing("page")

    do_GET = do_HEAD = do_POST = do_PUT = handle_call

    # ---- calls

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = {"main": {}}
            if asked.get("visibility") == "private":
                self.hub.private.add(name)
        self.answer({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409 if known else 200)

    def branch(self, name: str, branch: str) -> None:
        branches = self.hub.repositories[name]
        status = 409 if branch in branches else 200
        branches.setdefault(branch, dict(branches["main"]))
        self.answer({}, status)

    def validate(self) -> None:
        head = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        good = isinstance(head, dict) and isinstance(head.get("tags"), list)
        self.answer({"errors": [] if good else [{"message": "bad head"}], "warnings": []}, 200 if good else 400)

    def preupload(self, name: str, revision: str) -> None:
        files = [
            {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            for path in (one["path"] for one in json.loads(self.body)["files"])
        ]
        self.answer({"files": files})

    def batch(self, name: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        files = dict(self.hub.repositories[name][revision])
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repositories[name][revision] = files
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{commit_of(files)}", "commitOid": commit_of(files)})

    def files(self, name: str, revision: str | None) -> dict[str, bytes] | None:
        """Of a branch or a commit; answers 404 itself."""
        branches = self.hub.repositories.get(name)
        if branches is None:
            return self.missing("RepoNotFound")
        by_commit = {commit_of(files): files for files in branches.values()}
        found = (branches | by_commit).get(revision or "main")
        return self.missing("RevisionNotFound") if found is None else found

    def info(self, name: str, revision: str | None) -> None:
        if (files := self.files(name, revision)) is not None:
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {"id": name, "modelId": name, "sha": commit_of(files), "tags": [], "siblings": siblings}
            self.answer({**about, "private": name in self.hub.private})

    def tree(self, name: str, revision: str, under: str | None) -> None:
        if (files := self.files(name, revision)) is None:
            return
        inside = {path: content for path, content in files.items() if path.startswith(f"{under}/" if under else "")}
        if under and not inside:
            return self.missing("EntryNotFound")
        self.answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(inside.items())
            ]
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (files := self.files(name, revision)) is None:
            return
        if path not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files))
        etag = hashlib.sha256(files[path]).hexdigest()
        self.answer(files[path], ETag=f'"{etag}"', X_Repo_Commit=commit_of(files))


NAME = r"([^/]+/[^/]+)"
CALLS = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", _Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/([0-9a-f]+)", _Handler.put),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    ("GET", f"/api/models/{NAME}(?:/revision/([^/]+))?", _Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
