"""A hub on this machine: it speaks as much of the hub's protocol as the real client needs to download and to upload."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import yaml

COMMIT = "a" * 40
TOKEN = "token-that-may-write"


class Hub(BaseHTTPRequestHandler):
    """Serves `server.folder` as the repository `server.id`, where it is there, and takes what a client commits.

    As the hub does, it keeps weights apart from git: their bytes come first, by their sha256, and a commit names them.
    `server.refused` maps the end of a path to the status and message that it is refused with.
    """

    def log_message(self, *args):
        pass

    def answer(self, body, headers=(), status=200):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = {"Content-Type": "application/json"}
        for name, value in {**kind, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, folder, id_ = unquote(urlsplit(self.path).path), self.server.folder, self.server.id
        self.server.asked.append((self.command, path))
        files = {str(each.relative_to(folder)): each for each in sorted(folder.rglob("*")) if each.is_file()}
        if path.startswith(f"/{id_}/resolve/") and path.split("/", 5)[5] in files:
            body = files[path.split("/", 5)[5]].read_bytes()
            tag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"}
            return self.answer(body, tag)
        if path.startswith(f"/{id_}/resolve/"):
            return self.answer({}, {"X-Error-Code": "EntryNotFound"}, 404)
        if path.startswith(f"/api/models/{id_}/tree/"):
            rows = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40} for n, f in files.items()]
            return self.answer(rows)
        if path.startswith(f"/api/models/{id_}") and folder.is_dir():
            siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
            return self.answer({"id": id_, "sha": COMMIT, "siblings": siblings, "private": self.server.private})
        return self.answer({}, {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, path))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            said = "Invalid credentials in Authorization header"
            return self.answer({"error": said}, {"X-Error-Message": said}, 401)
        for end, (status, said) in self.server.refused.items():
            if path.endswith(end):
                return self.answer({"error": said}, (), status)
        for end, act in ACTS.items():
            if path.endswith(end):
                return self.answer(act(self.server, body))
        raise AssertionError(f"the client asked for {path}, which this hub does not know")


def _create(server, body):
    asked = json.loads(body)
    assert f"{asked['organization']}/{asked['name']}" == server.id and not server.folder.exists()
    server.folder.mkdir()
    server.private = asked.get("visibility") == "private"
    return {"url": f"{server.endpoint}/{server.id}"}


def _validate(server, body):
    assert yaml.safe_load(json.loads(body)["content"].split("---\n")[1])["library_name"] == "diffusers"
    return {"warnings": [], "errors": []}


def _preupload(server, body):
    rows = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(server.large) else "regular",
            "shouldIgnore": file["path"] in server.ignored,
        }
        for file in json.loads(body)["files"]
    ]
    return {"files": rows}


def _batch(server, body):
    actions = {"upload": {"href": f"{server.endpoint}/store"}}
    return {"transfer": "basic", "objects": [{**each, "actions": actions} for each in json.loads(body)["objects"]]}


def _commit(server, body):
    server.commits.append([json.loads(line) for line in body.splitlines()])
    for operation in server.commits[-1][1:]:
        value = operation["value"]
        content = server.stored[value["oid"]] if operation["key"] == "lfsFile" else base64.b64decode(value["content"])
        (server.folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
        (server.folder / value["path"]).write_bytes(content)
    return {"commitUrl": f"{server.endpoint}/{server.id}/commit/{COMMIT}", "commitOid": COMMIT}


ACTS = {
    "/api/repos/create": _create,
    "/api/validate-yaml": _validate,
    "/preupload/main": _preupload,
    "/info/lfs/objects/batch": _batch,
    "/commit/main": _commit,
}


@contextmanager
def hub_server(id_, folder, cache, monkeypatch):
    """A hub whose one repository is `folder`; the client asks it alone, with an empty cache and a token that may write.

    Yields:
        The server; `asked` are the requests, `commits` the operations of each commit.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.id, server.folder, server.private = id_, folder, False
    server.large, server.ignored, server.refused = (".safetensors", ".png"), (), {}
    server.asked, server.stored, server.commits = [], {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.endpoint, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # With hf_xet the client takes weights to a second service, of a protocol of its own; without, by git's LFS.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
