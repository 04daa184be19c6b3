"""Names on the hub, with a hub that is not there: no test here uses a network."""

import importlib.util
import shutil
import sys

import pytest

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.models import open_source
from endistill_jax.core.errors import UserError

NAME = "google/t5-v1_1-tiny"


class FakeHub:
    """Copies from a folder what matches; or raises what the hub would."""

    def __init__(self, published, cache):
        self.published, self.cache, self.error = published, cache, None

    def snapshot_download(self, name, *, allow_patterns):
        assert name == NAME
        if self.error is not None:
            raise self.error
        self.cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in self.published.glob(pattern):
                shutil.copy(path, self.cache / path.name)
        return str(self.cache)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (the hf extra)")
    fake = FakeHub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def fetched(hub):
    return sorted(path.name for path in hub.cache.iterdir()) if hub.cache.exists() else []


def test_only_what_is_needed_is_fetched(hub, params, assert_same):
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "spiece.model", "README.md",
                 "tokenizer.json", "tokenizer_config.json", "model.fp16.safetensors"):  # fmt: skip
        (hub.published / name).write_text("{}")
    folder = huggingface.download(NAME)
    assert fetched(hub) == ["config.json", "generation_config.json", "model.safetensors", "spiece.model",
                            "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    for name in ("spiece.model", "tokenizer.json"):  # which hold nothing here
        (hub.cache / name).unlink()
    assert_same(huggingface.load(folder)[0], params)


def test_sharded_safetensors_are_fetched_whole(hub, params, config, assert_same):
    huggingface.save(hub.published, params, config, overwrite=True, max_file_bytes=4000)
    with open_source(NAME) as source:
        assert source.config == config and source.where == str(hub.cache)
    assert_same(huggingface.load(hub.cache)[0], params)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_torch_files_are_fetched_where_there_are_no_safetensors(hub, name):
    (hub.published / "model.safetensors").unlink()
    shards = ["pytorch_model-00001-of-00002.bin"] if name.endswith("json") else []
    for file in (name, *shards, "training_args.bin", "optimizer.bin"):
        (hub.published / file).write_text("{}")
    huggingface.download(NAME)
    assert fetched(hub) == sorted(["config.json", "generation_config.json", name, *shards])


def test_weights_of_another_architecture_are_not_fetched(hub, edit):
    edit(hub.published, architectures=["BartForConditionalGeneration"], model_type="bart")
    with pytest.raises(UserError, match="BartForConditionalGeneration"):
        open_source(NAME)
    assert fetched(hub) == ["config.json", "generation_config.json"]


def _response(errors, name, status):
    """An error of the hub's client, which wants the answer that it came from; that of httpx or of requests."""
    if importlib.util.find_spec("httpx"):
        import httpx

        response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    else:
        import requests

        response = requests.Response()
        response.status_code = status
    return getattr(errors, name)("many\nlines", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda errors: _response(errors, "GatedRepoError", 403), r"\(GatedRepoError: .*many lines"),
        (lambda errors: errors.LocalEntryNotFoundError("no\nnet"), r"\(LocalEntryNotFoundError: no net\)"),
        (lambda errors: ConnectionError("broken\npipe"), r"could not be fetched .*\(ConnectionError: broken pipe\)"),
        (lambda errors: OSError(28, "No space left on device"), "could not be fetched .*No space left on device"),
    ],
)
def test_what_can_go_wrong_on_the_way_is_one_line(hub, error, words):
    from huggingface_hub import errors

    hub.error = error(errors)
    with pytest.raises(UserError, match=words) as caught:
        open_source(NAME)
    assert "\n" not in str(caught.value) and NAME in str(caught.value)
    assert fetched(hub) == []


def test_without_huggingface_hub_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=rf"{NAME} .* needs huggingface_hub, .*pip install 'endistill-jax\[hf\]'"):
        open_source(NAME)


def test_a_folder_of_that_name_is_never_looked_for_on_the_hub(hub, tmp_path):
    hub.error = AssertionError("the hub was asked")
    (tmp_path / "google").mkdir()
    shutil.copytree(hub.published, tmp_path / NAME)
    with open_source(NAME) as source:
        assert source.where == NAME
