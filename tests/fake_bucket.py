"""A stand-in for Google Cloud Storage: everything under gs:// lies in a local folder.

TensorStore's own driver of Google Cloud Storage talks to it over HTTP (the JSON API: read, write, delete and list, with
generations). TensorFlow's file functions, by which epath and SeqIO open everything else, are led to the folder, with a
bucket's ways: a folder's name ends in a slash where it is listed, and a file's folder need not exist. What TensorFlow
itself would do over HTTP is not checked by this.
"""

import http.server
import importlib.machinery
import json
import os
import pathlib
import sys
import threading
import types
import urllib.parse

SCHEME = "gs://"


def serve(root: pathlib.Path) -> http.server.ThreadingHTTPServer:
    """Serves the folder `root`, which has a folder for each bucket, on a port of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    root: pathlib.Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        if name is None:
            return self._list(bucket, query)
        file = self.root / bucket / name
        if not file.is_file():
            return self._answer(404)
        generation = _generation(file)
        if query.get("ifGenerationNotMatch") == generation:
            return self._answer(304)
        if query.get("ifGenerationMatch", generation) != generation:
            return self._answer(412)
        headers = {"x-goog-generation": generation}
        if query.get("alt") != "media":
            return self._answer(200, json.dumps(_described(name, file)).encode(), headers)
        content = file.read_bytes()
        if "Range" not in self.headers:
            return self._answer(200, content, headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], headers)

    def do_POST(self) -> None:
        bucket, _, query = self._asked()
        file = self.root / bucket / query["name"]
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if query.get("ifGenerationMatch", _generation(file)) != _generation(file):
            return self._answer(412)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{threading.get_ident()}")
        partial.write_bytes(content)
        os.replace(partial, file)
        return self._answer(200, json.dumps(_described(query["name"], file)).encode())

    def do_DELETE(self) -> None:
        bucket, name, _ = self._asked()
        file = self.root / bucket / name
        if not file.is_file():
            return self._answer(404)
        file.unlink()
        return self._answer(204)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        files = sorted(file for file in (self.root / bucket).rglob("*") if file.is_file())
        names = {str(file.relative_to(self.root / bucket)): file for file in files}
        first, end = query.get("startOffset", ""), query.get("endOffset")

        def asked(name: str) -> bool:
            return name.startswith(query.get("prefix", "")) and first <= name and (end is None or name < end)

        items = [_described(name, file) for name, file in names.items() if asked(name)]
        self._answer(200, json.dumps({"items": items}).encode())

    def _asked(self) -> tuple[str, str | None, dict[str, str]]:
        url = urllib.parse.urlparse(self.path)
        parts = url.path.partition("/b/")[2].split("/o", 1)
        name = urllib.parse.unquote(parts[1].removeprefix("/")) or None
        return parts[0], name, dict(urllib.parse.parse_qsl(url.query))

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _generation(file: pathlib.Path) -> str:
    return str(file.stat().st_mtime_ns) if file.is_file() else "0"


def _described(name: str, file: pathlib.Path) -> dict[str, str]:
    return {"name": name, "size": str(file.stat().st_size), "generation": _generation(file)}


def lead_files(monkeypatch, root: pathlib.Path) -> None:
    """Leads TensorFlow's file functions from gs:// to the folder `root`."""
    from tensorflow.io import gfile

    def local(path: str | os.PathLike) -> str:
        path = os.fspath(path)
        return str(root / path.removeprefix(SCHEME)) if path.startswith(SCHEME) else path

    def made(path: str) -> str:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        return path

    real = {name: getattr(gfile, name) for name in dir(gfile) if not name.startswith("_")}

    def open_file(name, mode="r"):
        return real["GFile"](local(name) if mode.startswith("r") else made(local(name)), mode)

    def list_folder(path):
        folder = pathlib.Path(local(path))
        return [f"{name}/" if (folder / name).is_dir() else name for name in real["listdir"](str(folder))]

    def find(pattern):
        found = real["glob"](local(pattern))
        return [path.replace(f"{root}/", SCHEME) for path in found] if pattern.startswith(SCHEME) else found

    def moving(function):
        return lambda source, target, **settings: function(local(source), made(local(target)), **settings)

    for name in ("exists", "isdir", "makedirs", "mkdir", "remove", "rmtree", "stat"):
        monkeypatch.setattr(gfile, name, lambda path, function=real[name]: function(local(path)))
    for name in ("rename", "copy"):
        monkeypatch.setattr(gfile, name, moving(real[name]))
    monkeypatch.setattr(gfile, "GFile", open_file)
    monkeypatch.setattr(gfile, "listdir", list_folder)
    monkeypatch.setattr(gfile, "glob", find)


def fake_client(monkeypatch) -> None:
    """Stands for google-cloud-storage, which Orbax asks what kind of bucket it has."""
    import google.cloud

    module = types.ModuleType("google.cloud.storage")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    plain = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    module.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: plain)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(google.cloud, "storage", module, raising=False)
