"""Settings of every test run: slow tests on request, quiet libraries, caches that the runs share."""

import importlib.util
import os
import pathlib

import pytest

# Must stand before anything imports TensorFlow or JAX; tests that start processes hand it on to them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


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
        return
    skip = pytest.mark.skip(reason="slow: give --slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)
