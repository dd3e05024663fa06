"""A small Hub on this machine, for the real huggingface_hub client: what the client asks over HTTP, in memory.

`tests/conftest.py` starts one and names it in HF_ENDPOINT, so that no test can reach the Hub itself.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_owner": "owner", "hf_reader": "reader"}  # who may write what is owner/..., and somebody else
LARGE = (".safetensors", ".bin", ".png", ".npz")


@dataclass
class Repo:
    """One repository: its commits as {path: content}, oldest first, and the branches and tags that name them."""

    kind: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts a commit on a branch; returns its 40 hexadecimal digits."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.names[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        return revision if revision in self.commits else self.names[revision]


class HubServer:
    """The Hub. `requests` lists what was asked, as "METHOD path"; `faults` makes what matches a pattern fail.

    A fault is "stall" (half an upload is read, then no more), "truncate" (half the file is sent, then the end) or a
    status; with it stands how often it still happens. `stalled` is set when an upload hangs.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, list] = {}
        self.lock = Lock()
        self.stalled, self.released = Event(), Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        Thread(target=self.http.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.released.set()
        for state in (self.repos, self.objects, self.requests, self.faults):
            state.clear()
        self.stalled, self.released = Event(), Event()

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False, kind: str = "model") -> str:
        """A repository that is already there, or its next commit; returns the commit."""
        repo = self.repos.setdefault(f"{kind}s/{repo_id}", Repo(kind, private))
        return repo.commit(dict(files))

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        repo = self.repos[f"{kind}s/{repo_id}"]
        return repo.commits[repo.resolve(revision)]

    def uploads(self) -> list[str]:
        """The requests that changed something."""
        return [r for r in self.requests if r.startswith("PUT ") or "/commit/" in r]

    @contextmanager
    def failing(self, pattern: str, fault: str | int, times: int = 1000):
        """While inside, requests whose "METHOD path" matches the pattern fail, the first `times` of them."""
        self.faults[pattern] = [fault, times]
        try:
            yield
        finally:
            del self.faults[pattern]

    def fault(self, request: str) -> str | int | None:
        with self.lock:
            self.requests.append(request)
            for pattern, fault in self.faults.items():
                if fault[1] and re.search(pattern, request):
                    fault[1] -= 1
                    return fault[0]
        return None


def blob_id(path: str, content: bytes) -> str:
    """The id that the Hub gives a file: sha256 of a large one, git's sha1 of a small one."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    """An answer that is an error: its status, the Hub's code for it, what to say, and further fields."""


REPO = r"(?P<kind>models|spaces)/(?P<repo>[^/]+/[^/]+)"
FILE_REPO = r"(?:(?P<kind>spaces)/)?(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", rf"/api/{REPO}/branch/(?P<name>.+)", "create_branch"),
    ("POST", rf"/api/{REPO}/tag/(?P<name>.+)", "create_tag"),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>.+)", "commit"),
    ("GET", rf"/api/{REPO}/revision/(?P<revision>.+)", "info"),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^?]+)", "tree"),
    ("GET", rf"/api/{REPO}", "info"),
    ("POST", rf"/{FILE_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("HEAD", rf"/{FILE_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
    ("GET", rf"/{FILE_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args) -> None:
        pass

    def serve(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.fault = self.hub.fault(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        try:
            if self.fault == "stall":
                self.rfile.read(length // 2)
                self.hub.stalled.set()
                self.close_connection = True
                return self.hub.released.wait()
            self.body = self.rfile.read(length) if length else self.chunks()
            if isinstance(self.fault, int):
                raise Refused(self.fault, None, "the test wants it so")
            for method, pattern, name in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    answer = getattr(self, name)(**match.groupdict())
                    return None if answer is None else self.answer(200, answer)
            raise Refused(404, None, f"no route {self.command} {path}")
        except Refused as error:
            status, code, message, *more = error.args
            headers = {"X-Error-Code": code} if code else {}
            self.answer(status, dict(error=message, **dict(*more)), headers | {"X-Error-Message": message})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def chunks(self) -> bytes:
        content = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return content

    def answer(self, status: int, value, headers: dict | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- who may do what ---------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def writer(self, repo_id: str) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        if repo_id.split("/")[0] != user:
            raise Refused(403, None, f"You don't have the rights to create or change {repo_id}")

    def readable(self, kind: str | None, repo_id: str) -> Repo:
        repo, user = self.hub.repos.get(f"{kind or 'models'}/{repo_id}"), self.user()
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound" if user else None, "Repository not found")
        return repo

    def files_at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        try:
            sha = repo.resolve(revision)
        except KeyError:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None
        return sha, repo.commits[sha]

    # --- what is asked -----------------------------------------------------------------------------------------------

    def whoami(self) -> dict:
        if (user := self.user()) is None:
            raise Refused(401, None, "Invalid username or password.")
        return dict(type="user", name=user, orgs=[])

    def create(self) -> dict:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.writer(repo_id)
        kind = asked.get("type") or "model"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if f"{kind}s/{repo_id}" in self.hub.repos:
            raise Refused(409, None, "You already created this repo", dict(url=url))
        if kind == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refused(400, None, "a Space needs an sdk")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.put(repo_id, {".gitattributes": b""}, private, kind)
        return dict(url=url)

    def validate_yaml(self) -> None:
        asked = json.loads(self.body)
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.S)
        try:
            front = yaml.safe_load(match.group(1)) if match else {}
        except yaml.YAMLError as error:
            front, fault = {}, str(error)
        else:
            fault = None
        if asked["repoType"] == "space" and len(front.get("short_description", "")) > 60:
            fault = '"short_description" length must be less than or equal to 60 characters long'
        if asked["repoType"] == "space" and not fault and "sdk" not in front:
            fault = '"sdk" is required'
        errors = [dict(message=fault)] if fault else []
        self.answer(400 if errors else 200, dict(errors=errors, warnings=[]))

    def create_branch(self, kind: str, repo: str, name: str) -> dict:
        self.writer(repo)
        stored = self.readable(kind, repo)
        if name in stored.names:
            raise Refused(409, None, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        stored.names[name] = stored.resolve(start)
        return {}

    def create_tag(self, kind: str, repo: str, name: str) -> dict:
        self.writer(repo)
        stored = self.readable(kind, repo)
        stored.names[json.loads(self.body)["tag"]] = stored.resolve(name)
        return {}

    def preupload(self, kind: str, repo: str, revision: str) -> dict:
        self.writer(repo)
        _, files = self.files_at(self.readable(kind, repo), revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            oid = blob_id(path, files[path]) if path in files else None
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answers.append(dict(path=path, uploadMode=mode, shouldIgnore=False, oid=oid))
        return dict(files=answers)

    def lfs_batch(self, kind: str | None, repo: str) -> dict:
        self.writer(repo)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            upload = dict(upload=dict(href=f"{self.hub.url}/objects/{wanted['oid']}"))
            answers.append(wanted if wanted["oid"] in self.hub.objects else wanted | dict(actions=upload))
        return dict(transfer="basic", objects=answers)

    def lfs_put(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, None, "content does not match its sha256")
        self.hub.objects[oid] = self.body
        return {}

    def commit(self, kind: str, repo: str, revision: str) -> dict:
        self.writer(repo)
        stored = self.readable(kind, repo)
        _, files = self.files_at(stored, revision)
        files = dict(files)
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = stored.commit(files, revision)
        return dict(commitUrl=f"{self.hub.url}/{repo}/commit/{sha}", commitOid=sha)

    def info(self, kind: str, repo: str, revision: str = "main") -> dict:
        stored = self.readable(kind, repo)
        sha, files = self.files_at(stored, revision)
        return dict(id=repo, sha=sha, private=stored.private, siblings=[dict(rfilename=path) for path in files])

    def tree(self, kind: str, repo: str, revision: str) -> list:
        _, files = self.files_at(self.readable(kind, repo), revision)
        return [self.entry(path, content) for path, content in files.items()]

    def entry(self, path: str, content: bytes) -> dict:
        entry = dict(type="file", path=path, size=len(content), oid=hashlib.sha1(content).hexdigest())
        if path.endswith(LARGE):
            entry["lfs"] = dict(oid=blob_id(path, content), size=len(content), pointerSize=134)
        return entry

    def file(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        sha, files = self.files_at(self.readable(kind, repo), revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", f"{path} not found")
        content = files[path]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-")).group(1))
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{blob_id(path, content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "truncate":
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(content[start:])
