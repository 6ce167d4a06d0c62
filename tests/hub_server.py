"""A Hugging Face Hub on the loopback interface, in memory: to push models to, and to load models and data sets from.

Only what huggingface_hub 1.33 and 2.4 ask for. HF_ENDPOINT is read when huggingface_hub is imported, so its clients are
other processes, started with :meth:`Hub.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_accepted"
OWNER = "somebody"


class Hub:
    """Repositories by name; a context manager that serves them.

    A request with another token than TOKEN gets 401; without one it may read. Repositories of other owners than OWNER
    can be read only.

    Attributes:
        url: where it listens.
        requests: what it was asked, "GET /api/...".
        created: what create_repo asked for, by repository.
        commits: the number of commits that it took, by repository.
        full: repositories that take no commit, for want of room.
    """

    def __init__(self):
        self.requests, self.created, self.commits, self.full = [], {}, {}, set()
        self.branches = {}  # (kind, repository) -> {branch: sha}; kind is "models" or "datasets"
        self.trees = {}  # sha -> {path: bytes}
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("HubHandler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=TOKEN, **others):
        """The environment of a process that knows this Hub and no other; ``home`` is for its caches."""
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        tokens = {"HF_TOKEN": token} if token else {}
        return {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1", **names, **tokens, **others}

    def add(self, repo, files, kind="models", branch="main"):
        """Commit ``files``, a mapping of paths to bytes, as the whole content of a branch."""
        sha = hashlib.sha1(f"{kind} {repo} {branch} {len(self.trees)}".encode()).hexdigest()
        self.trees[sha] = dict(files)
        self.branches.setdefault((kind, repo), {})[branch] = sha
        return sha

    def files(self, repo, kind="models", branch="main"):
        """What a branch holds now, path to bytes."""
        return self.trees[self.branches[kind, repo][branch]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, value=b"", headers=()):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code, headers=()):
        """404; what is missing is told by the header, which decides the exception that the client raises."""
        self.answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code, **dict(headers)})

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.path_parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token not in ("", TOKEN) or (not token and self.command == "POST"):
                return self.answer(401, {"error": "Invalid username or password."})
            return self.api(body) if self.path_parts[0] == "api" else self.resolve()

    do_HEAD = do_POST = do_GET

    def api(self, body):
        match self.path_parts[1:]:
            case ["validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            case ["repos", "create"]:
                return self.create(json.loads(body))
            case [("models" | "datasets") as kind, owner, name, *rest]:
                return self.repository(kind, f"{owner}/{name}", rest, body)
        return self.missing("RepoNotFound")

    def create(self, wanted):
        repo = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        kind = f"{wanted.get('type') or 'model'}s"
        exists = (kind, repo) in self.hub.branches
        if not repo.startswith(f"{OWNER}/"):
            return self.answer(403, {"error": f"You have no right to write to {repo}"})
        if not exists:
            self.hub.created[repo] = wanted
            self.hub.add(repo, {".gitattributes": b""}, kind)
        return self.answer(409 if exists else 200, {"url": f"{self.hub.url}/{repo}"})

    def repository(self, kind, repo, rest, body):
        if (kind, repo) not in self.hub.branches:
            return self.missing("RepoNotFound")
        branches = self.hub.branches[kind, repo]
        match rest:
            case ["auth-check", "write"]:
                return self.answer(200 if repo.startswith(f"{OWNER}/") else 403, {})
            case ["branch", branch]:
                exists = branch in branches
                branches.setdefault(branch, branches["main"])
                return self.answer(409 if exists else 200, {})
            case ["preupload", _]:
                same = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}  # no LFS, no Xet
                return self.answer(200, {"files": [{"path": f["path"], **same} for f in json.loads(body)["files"]]})
            case ["commit", branch]:
                return self.commit(kind, repo, branch, body)
        revision = rest[1] if len(rest) > 1 else "main"
        sha = branches.get(revision, revision)
        if sha not in self.hub.trees:
            return self.missing("RevisionNotFound")
        tree = self.hub.trees[sha]
        match rest:
            case [] | ["revision", _]:
                names = [{"rfilename": path} for path in tree]
                return self.answer(200, {"id": repo, "sha": sha, "siblings": names, "private": False, "tags": []})
            case ["tree", _, *folder]:
                start = "".join(f"{part}/" for part in folder)
                found = [self.entry(tree, path) for path in tree if path.startswith(start)]
                return self.answer(200, found) if found or not folder else self.missing("EntryNotFound")
            case ["paths-info", _]:
                is_json = "json" in self.headers.get("Content-Type", "")
                asked = (json.loads(body) if is_json else parse_qs(body.decode()))["paths"]
                return self.answer(200, [self.entry(tree, path) for path in asked if path in tree])
        return self.missing("EntryNotFound", {"X-Repo-Commit": sha})

    def entry(self, tree, path):
        return {"type": "file", "path": path, "size": len(tree[path]), "oid": hashlib.sha1(tree[path]).hexdigest()}

    def commit(self, kind, repo, branch, body):
        if repo in self.hub.full:
            return self.answer(403, {"error": "Private repository storage limit reached"})
        tree = dict(self.hub.files(repo, kind, branch))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        sha = self.hub.add(repo, tree, kind, branch)
        self.hub.commits[repo] = self.hub.commits.get(repo, 0) + 1
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self):
        """A file: [datasets/]OWNER/NAME/resolve/REVISION/PATH."""
        kind, parts = "models", self.path_parts
        if parts[0] == "datasets":
            kind, parts = "datasets", parts[1:]
        owner, name, _resolve, revision, *path = [*parts, "", "", ""][: max(len(parts), 4)]
        branches = self.hub.branches.get((kind, f"{owner}/{name}"))
        if branches is None:
            return self.missing("RepoNotFound")
        sha = branches.get(revision, revision)
        if sha not in self.hub.trees:
            return self.missing("RevisionNotFound")
        content = self.hub.trees[sha].get("/".join(path))
        if content is None:
            return self.missing("EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")  # asked for by streams
        if wanted is None:
            return self.answer(200, content, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return self.answer(206, content[start:end], headers)
