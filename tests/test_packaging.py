"""The wheel: what a plain `pip install .` leaves a user with, away from the checkout."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from endistill_jax import extras

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = ("endistill_jax", "gin", "tasks", "pyproject.toml", "README.md", "LICENSE", ".gitignore")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel, made from a copy of the checkout."""
    pytest.importorskip("hatchling", reason="needs hatchling (the test extra) to build without a network")
    folder = tmp_path_factory.mktemp("packaging")
    (folder / "source").mkdir()
    for part in PARTS:
        copy = shutil.copy if (ROOT / part).is_file() else functools.partial(shutil.copytree, symlinks=True)
        copy(ROOT / part, folder / "source" / part)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run(build, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site, folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def relative_files(folder, suffixes):
    return {file.relative_to(folder) for file in folder.rglob("*") if file.suffix in suffixes}


@pytest.mark.slow
def test_the_wheel_has_every_gin_file_task_and_asset(site):
    package = site / "endistill_jax"
    assert relative_files(package / "gin", {".gin"}) == relative_files(ROOT / "gin", {".gin"})
    assert relative_files(package / "tasks", {".py"}) == relative_files(ROOT / "tasks", {".py"})
    assets = {".model", ".safetensors", ".json"}
    assert relative_files(package / "assets", assets) == relative_files(ROOT / "endistill_jax" / "assets", assets)
    assert relative_files(package, {".model"})
    assert (package / "py.typed").is_file()
    assert list(site.glob("endistill_jax-*.dist-info/licenses/LICENSE"))


@pytest.mark.slow
def test_an_installed_package_finds_gin_files_and_tasks_from_another_folder(site, tmp_path):
    where = run(site, tmp_path, "-c", "import endistill_jax as package; print(package.__file__)").stdout
    assert pathlib.Path(where.strip()).is_relative_to(site)
    flags = ["--gin_file=gin/runs/python_docs_teacher.gin", "--gin.MODEL_DIR=model_dir", "--dry_run"]
    ended = run(site, tmp_path, "-m", "endistill_jax.main", *flags)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "token_embedder/embedding [8192, 256]" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_dependencies_are_bounded_and_extras_there():
    for requirement in PROJECT["dependencies"]:
        assert ">=" in requirement
        assert "<" in requirement or requirement.startswith("packaging"), requirement
    assert {"tpu", "gpu", "test", extras.METRICS, extras.STUDIES} <= set(PROJECT["optional-dependencies"])


def test_links_of_the_checkout_lead_to_the_folders_beside_the_package():
    for name in ("gin", "tasks"):
        link = ROOT / "endistill_jax" / name
        assert link.is_symlink() and link.readlink() == pathlib.Path("..") / name
