"""pytorch_model.bin, single and sharded; those that need torch are skipped without it."""

import importlib.util
import json
import pickle
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.interchange import assemble, parameters
from endistill_jax.core.errors import UserError
from endistill_jax.sharding import make_mesh, param_shardings

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch (the hf extra)")


def to_torch(folder, shards=1, dtype="float32", **save_settings):
    """Rewrites a folder's weights as torch files."""
    import torch

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state = {name: torch.tensor(value).to(getattr(torch, dtype)) for name, value in tensors.items()}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **save_settings)
        return
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(state.items())[number::shards])
        torch.save(part, folder / name, **save_settings)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@needs_torch
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_files_hold_the_same_as_safetensors(folder, params, shards, dtype):
    to_torch(folder, shards, dtype)
    storage = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with huggingface.open_folder(folder) as source:
        for parameter in parameters(source.config):
            tensor, expected = source.read(parameter), params
            for name in parameter.path:
                expected = expected[name]
            expected = expected if parameter.layer is None else expected[parameter.layer]
            assert tensor.dtype == storage
            np.testing.assert_array_equal(tensor, expected.astype(storage))


@needs_torch
def test_a_model_that_was_read_does_not_change_with_its_file(folder, params, assert_same):
    to_torch(folder)
    with huggingface.open_folder(folder) as source:
        read, _ = assemble(source, np.float32, param_shardings(source.config, make_mesh()))
        file = folder / "pytorch_model.bin"
        with open(file, "r+b") as opened:  # in place, as a copying tool may do it
            opened.write(bytes(file.stat().st_size))
        assert_same(jax.tree.map(np.asarray, read), params)


@needs_torch
def test_torch_files_from_before_1_6_are_read(folder, params, assert_same):
    to_torch(folder, _use_new_zipfile_serialization=False)
    assert_same(huggingface.load(folder)[0], params)


@needs_torch
def test_safetensors_are_preferred(folder, params, assert_same):
    (folder / "pytorch_model.bin").write_bytes(b"not even a torch file")
    assert_same(huggingface.load(folder)[0], params)


@needs_torch
@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_torch_file_is_one_line_naming_it(folder, legacy):
    to_torch(folder, _use_new_zipfile_serialization=not legacy)
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"<html>not found</html>" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} is damaged or cut short") as caught:
            huggingface.open_folder(folder)
        assert "\n" not in str(caught.value)


class _Program:
    def __reduce__(self):
        return (print, ("a program in a pickle ran",))


@needs_torch
def test_program_in_a_torch_file_does_not_run(folder, capsys):
    import torch

    (folder / "model.safetensors").unlink()
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"shared.weight": _Program()}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="pytorch_model.bin"):
            huggingface.open_folder(folder)
    assert "ran" not in capsys.readouterr().out


@needs_torch
def test_bad_content_of_a_torch_file_is_one_line_naming_file_and_tensor(folder):
    import torch

    to_torch(folder)
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    name = "encoder.final_layer_norm.weight"
    for change, words in (
        ({name: torch.ones(11)}, rf"{path}: {name} has shape \(11,\); config.json makes it \(12,\)"),
        ({name: torch.full((12,), float("nan"))}, f"{path}: {name} holds NaN or infinity"),
        ({name: torch.ones(12, dtype=torch.int8)}, f"{path}: {name} is stored as torch.int8"),
        ({"more.weight": torch.ones(1)}, f"{path} has a tensor that config.json has no place for: more.weight"),
        ({name: "text"}, f"{path} does not hold a dictionary of tensors"),
    ):
        torch.save({**state, **change}, path)
        with pytest.raises(UserError, match=words):
            huggingface.load(folder)
    torch.save(list(state.values()), path)
    with pytest.raises(UserError, match=f"{path} does not hold a dictionary of tensors"):
        huggingface.open_folder(folder)


@needs_torch
def test_missing_torch_shard_and_missing_tensor_are_named(folder):
    import torch

    to_torch(folder, shards=3)
    shard = folder / "pytorch_model-00002-of-00003.bin"
    state = torch.load(shard, weights_only=True)
    dropped = sorted(state)[0]
    del state[dropped]
    torch.save(state, shard)
    with pytest.raises(UserError, match=f"lacks the tensor {dropped}"):
        huggingface.open_folder(folder)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard} is missing; pytorch_model.bin.index.json names it"):
        huggingface.open_folder(folder)


def test_without_torch_one_line_says_what_to_install(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pytorch_model.bin needs torch, .*pip install 'endistill-jax\[hf\]'"):
        huggingface.open_folder(folder)
