"""Settings of every test run: slow tests on request, quiet libraries, caches that the runs share."""

import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import pytest

# Must stand before anything imports TensorFlow or JAX; tests that start processes hand it on to them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs of tests run once or twice, for milliseconds: without these they take six times as long to compile. Versions
# of XLA that do not know the extra option ignore it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
COMPILE_FAST = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
if COMPILE_FAST not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}".strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    cache = pathlib.Path(config.cache.mkdir("endistill"))
    os.environ.setdefault("ENDISTILL_CACHE", str(cache))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # Processes that tests start elsewhere use the package that is tested, installed or not.
    package = pathlib.Path(importlib.util.find_spec("endistill_jax").origin).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    # Those need eight devices, which a process must ask for before it uses JAX: test_multi_device.py starts one.
    # None leaves the decision to others.
    named = any("multi_device" in argument for argument in config.args)
    return True if collection_path.name == "multi_device" and not named else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        # Files with slow tests first: else one process would be left with them when the other is done.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow and item.path.name != "test_multi_device.py")
        return
    skip = pytest.mark.skip(reason="slow: give --slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


HIDE_MODULES = """
import importlib.machinery, sys

HIDDEN = {hidden}

class Present(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Present
"""


@pytest.fixture(scope="session")
def without_modules() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program with arguments in a process where the packages named by `absent` are not installed."""

    def run(program: str, *arguments: str, absent: Sequence[str]) -> subprocess.CompletedProcess[str]:
        source = HIDE_MODULES.format(hidden=set(absent)) + program
        command = [sys.executable, "-c", source, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    return run


class Bucket(NamedTuple):
    """A bucket of the fake storage: its gs:// path, and the local folder behind it."""

    url: str
    folder: pathlib.Path


@pytest.fixture(scope="session")
def _storage(tmp_path_factory) -> Iterator[pathlib.Path]:
    root = tmp_path_factory.mktemp("buckets")
    server = _fake_bucket().serve(root)
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"  # read once in a process
    yield root
    server.shutdown()


@pytest.fixture
def bucket(_storage, tmp_path, monkeypatch) -> Bucket:
    """An empty bucket of a fake of Google Cloud Storage, to which gs:// leads in this test; see fake_bucket.py."""
    fake_bucket = _fake_bucket()
    fake_bucket.lead_files(monkeypatch, _storage)
    fake_bucket.fake_client(monkeypatch)
    name = f"bucket-{len(list(_storage.iterdir()))}"
    (_storage / name).mkdir()
    return Bucket(f"gs://{name}", _storage / name)


def _fake_bucket() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pathlib.Path(__file__).parent)
        return importlib.import_module("fake_bucket")
