import errno
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from tensorflow import errors

from endistill_jax.checkpoints.manager import Checkpointer, finished_steps, read_manifest, restore_params
from endistill_jax.core.errors import StorageFailure, UserError

MANIFEST = {
    "schema": 2,
    "model": {"d_model": 4, "mlp_activations": ("gelu", "linear")},
    "teacher": "ab12",
    "mixture": "c4",
}


class State(NamedTuple):
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any


def _state(step: int, value: float | None = None) -> State:
    value = float(step) if value is None else value
    params = {"a": {"kernel": jnp.full((4, 3), value)}, "b": jnp.full((5,), value, jnp.bfloat16)}
    return State(jnp.asarray(step), params, optax.adam(1e-3).init(params))


def _abstract() -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0))


def _assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _save_steps(directory, steps, **settings) -> None:
    with Checkpointer(str(directory), **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step), {"shard": f"position {step}".encode()}, MANIFEST, {"loss": 1.0 / step})


def test_state_data_position_and_manifest_come_back_exactly_in_a_directory_that_did_not_exist(tmp_path):
    directory = tmp_path / "not" / "there" / "yet"
    with Checkpointer(str(directory)) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.save(7, _state(7, 0.1), {"shard": b"\x00\xffbinary", "other": b""}, MANIFEST)
    with Checkpointer(str(directory)) as checkpoints:
        assert checkpoints.latest_step() == 7
        state, data_state, manifest = checkpoints.restore(7, _abstract(), ["shard"])
    _assert_same(state, _state(7, 0.1))
    assert isinstance(state, State) and data_state == {"shard": b"\x00\xffbinary"}
    assert manifest["model"] == {"d_model": 4, "mlp_activations": ["gelu", "linear"]}


def test_saving_is_a_snapshot_that_a_donated_step_right_after_cannot_change(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    state = jax.tree.map(lambda _: jnp.arange(1 << 20, dtype=jnp.float32), {"params": {"w": 0}})
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    params, _ = restore_params(str(tmp_path))
    np.testing.assert_array_equal(params["w"], np.arange(1 << 20, dtype=np.float32))


def test_steps_between_are_skipped_unless_forced_and_a_step_twice_is_harmless(tmp_path):
    with Checkpointer(str(tmp_path), every=5) as checkpoints:
        saved = [checkpoints.save(step, _state(step), {}, MANIFEST) for step in (1, 4, 5, 5, 6)]
        assert saved == [False, False, True, False, False]
        assert checkpoints.save(7, _state(7), {}, MANIFEST, force=True)
        assert not checkpoints.save(7, _state(9), {}, MANIFEST, force=True)
        state, _, _ = checkpoints.restore(7, _abstract())
        assert checkpoints.all_steps() == [5, 7]
    _assert_same(state, _state(7))
    with Checkpointer(str(tmp_path), every=5) as checkpoints:
        assert not checkpoints.save(7, _state(9), {}, MANIFEST, force=True)


def test_the_latest_and_the_best_are_kept_and_not_a_number_is_never_best(tmp_path):
    losses = {1: 0.9, 2: 0.2, 3: float("nan"), 4: 0.5, 5: 0.4, 6: 0.6}
    settings = {"keep_last": 2, "keep_best": "loss"}
    with Checkpointer(str(tmp_path), **settings) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _state(step), {}, MANIFEST, {"loss": losses[step], "other": 1.0})
    with Checkpointer(str(tmp_path), **settings) as checkpoints:  # metrics are read back from disk
        for step in (4, 5, 6):
            checkpoints.save(step, _state(step), {}, MANIFEST, {"loss": losses[step]})
        assert checkpoints.save(7, _state(7), {}, MANIFEST)  # without a rank
    assert finished_steps(str(tmp_path)) == [2, 6, 7]


def test_best_can_be_the_largest(tmp_path):
    with Checkpointer(str(tmp_path), keep_last=1, keep_best="accuracy", best_mode="max") as checkpoints:
        for step, accuracy in ((1, 0.3), (2, 0.8), (3, float("nan")), (4, 0.5)):
            checkpoints.save(step, _state(step), {}, MANIFEST, {"accuracy": accuracy})
    assert finished_steps(str(tmp_path)) == [2, 4]


def test_a_missing_metric_and_a_file_in_place_of_the_directory_are_refused(tmp_path):
    with Checkpointer(str(tmp_path), keep_best="loss") as checkpoints, pytest.raises(UserError, match="'loss'"):
        checkpoints.save(1, _state(1), {}, MANIFEST, {"accuracy": 1.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Checkpointer(str(tmp_path / "file"))


def test_a_manifest_is_read_before_any_array(tmp_path):
    _save_steps(tmp_path, [3])
    shutil.rmtree(tmp_path / "3" / "state" / "d")
    with Checkpointer(str(tmp_path)) as checkpoints:
        assert checkpoints.manifest(3)["teacher"] == "ab12"


def test_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    _save_steps(tmp_path, [2, 4])
    with (
        Checkpointer(str(tmp_path)) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint of step 3.*\[2, 4\]"),
    ):
        checkpoints.restore(3, _abstract())
    with pytest.raises(UserError, match=r"no checkpoint of step 3.*\[2, 4\]"):
        restore_params(str(tmp_path), 3)
    with pytest.raises(UserError, match="has no checkpoint"):
        restore_params(str(tmp_path / "absent"))


@pytest.mark.parametrize("leftover", ["temporary", "no_marker", "no_commit_time", "half_removed"])
def test_leftovers_of_a_kill_are_not_taken_for_a_checkpoint(tmp_path, leftover):
    _save_steps(tmp_path, [1, 2, 3])
    if leftover == "temporary":
        (tmp_path / "3").rename(tmp_path / "3.orbax-checkpoint-tmp")
    elif leftover == "no_marker":
        (tmp_path / "3" / "_CHECKPOINT_METADATA").unlink()
    elif leftover == "no_commit_time":
        (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    else:
        (tmp_path / "3" / "state" / "manifest.ocdbt").unlink()
    assert finished_steps(str(tmp_path)) == [1, 2]
    with Checkpointer(str(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 2
        _assert_same(checkpoints.restore(2, _abstract())[0], _state(2))
        assert checkpoints.save(3, _state(3), {"shard": b"again"}, MANIFEST)
        assert checkpoints.restore(3, _abstract(), ["shard"])[1] == {"shard": b"again"}


def _damage_arrays(folder: pathlib.Path) -> None:
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        _damage_arrays,
        lambda folder: (folder / "state" / "_METADATA").write_text("{"),
        lambda folder: (folder / "facts" / "metadata").write_text("{"),
        lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b"nonsense"),
        lambda folder: [path.unlink() for path in (folder / "data").iterdir()],
    ],
    ids=["arrays", "array_metadata", "manifest", "array_index", "data_state"],
)
def test_damaged_checkpoint_is_one_line_naming_it(tmp_path, damage):
    _save_steps(tmp_path, [1, 2])
    damage(tmp_path / "2")
    with Checkpointer(str(tmp_path)) as checkpoints:
        with pytest.raises(UserError) as caught:
            checkpoints.restore(2, _abstract(), ["shard"])
        _assert_same(checkpoints.restore(1, _abstract())[0], _state(1))
    assert "\n" not in str(caught.value) and str(tmp_path / "2") in str(caught.value)


def _failing(*_: object, **__: object):
    raise errors.UnavailableError(None, None, "503 after ten attempts")


def test_storage_that_cannot_be_asked_is_no_mistake_and_no_damage(tmp_path, monkeypatch):
    _save_steps(tmp_path, [1, 2])
    with Checkpointer(str(tmp_path)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", _failing)
        with pytest.raises(StorageFailure, match=f"{tmp_path}/2 cannot be restored .UnavailableError: 503"):
            checkpoints.restore(2, _abstract(), ["shard"])
    for failing in (_failing, functools.partial(_raise, OSError(errno.EIO, "Input/output error"))):
        with monkeypatch.context() as patch:
            patch.setattr(type(epath.Path(tmp_path)), "read_text", failing)
            with pytest.raises((errors.UnavailableError, OSError)):  # or a whole checkpoint would be set aside
                Checkpointer(str(tmp_path))
            with pytest.raises(StorageFailure):
                read_manifest(str(tmp_path), 2)
    assert finished_steps(str(tmp_path)) == [1, 2]


def _raise(error, *_: object, **__: object):
    raise error


def test_advice_for_a_damaged_checkpoint_works(tmp_path):
    _save_steps(tmp_path, [1, 2])
    _damage_arrays(tmp_path / "2")
    advice = "remove that folder to resume from step 1"
    with Checkpointer(str(tmp_path)) as checkpoints, pytest.raises(UserError, match=advice):
        checkpoints.restore(2, _abstract())
    shutil.rmtree(tmp_path / "2")
    with Checkpointer(str(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.save(2, _state(2), {}, MANIFEST)


def test_state_of_another_structure_or_shape_is_refused(tmp_path):
    _save_steps(tmp_path, [1])
    wider = _abstract()._replace(step=jax.ShapeDtypeStruct((2,), jnp.int32))
    with Checkpointer(str(tmp_path)) as checkpoints:
        for wrong in (wider, _abstract()._replace(opt_state=())):
            with pytest.raises(UserError, match=str(tmp_path / "1")):
                checkpoints.restore(1, wrong)


def test_params_alone_come_back_as_numpy_with_the_manifest(tmp_path):
    _save_steps(tmp_path, [1, 2])
    params, manifest = restore_params(str(tmp_path))
    _assert_same(params, jax.tree.map(np.asarray, _state(2).params))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert manifest["mixture"] == "c4"
    placed, _ = restore_params(str(tmp_path), 1, abstract_params=_abstract().params)
    _assert_same(placed, _state(1).params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))


def test_data_position_of_an_unknown_shard_is_refused_by_name(tmp_path):
    _save_steps(tmp_path, [1])
    with Checkpointer(str(tmp_path)) as checkpoints, pytest.raises(UserError, match="data/shard_3_of_4"):
        checkpoints.restore(1, _abstract(), ["shard_3_of_4"])


@pytest.mark.parametrize("end", ["wait", "close", "save"])
def test_failure_in_the_background_surfaces_and_its_step_does_not_count(tmp_path, monkeypatch, end):
    async def fail(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpointer(str(tmp_path))
    checkpoints.save(1, _state(1), {}, MANIFEST)
    checkpoints.wait()
    monkeypatch.setattr("endistill_jax.checkpoints.manager._write_shards", fail)
    checkpoints.save(2, _state(2), {}, MANIFEST)
    with pytest.raises(Exception, match="No space left on device"):
        {"wait": checkpoints.wait, "close": checkpoints.close, "save": _saves(checkpoints)}[end]()
    monkeypatch.undo()
    if end != "close":
        checkpoints.close()
    assert finished_steps(str(tmp_path)) == [1]
    with Checkpointer(str(tmp_path)) as reopened:
        assert reopened.latest_step() == 1


def _saves(checkpoints):
    return lambda: checkpoints.save(3, _state(3), {}, MANIFEST)


_KILLED_MID_SAVE = """
    import asyncio, os, sys
    import jax.numpy as jnp
    from endistill_jax.checkpoints import manager

    checkpoints = manager.Checkpointer(sys.argv[1])
    checkpoints.save(1, {"params": {"w": jnp.ones(1000)}}, {"shard": b"one"}, {})
    checkpoints.wait()

    async def hang(directory, shards):
        (directory / "half").write_bytes(shards["shard"])
        print("writing", flush=True)
        await asyncio.sleep(600)

    manager._write_shards = hang
    checkpoints.save(2, {"params": {"w": jnp.zeros(1000)}}, {"shard": b"two"}, {})
    checkpoints.wait()
"""


def test_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(_KILLED_MID_SAVE), str(tmp_path / "run")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert any(path.name.startswith("2") for path in (tmp_path / "run").iterdir())
    assert finished_steps(str(tmp_path / "run")) == [1]
    with Checkpointer(str(tmp_path / "run")) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.save(2, {"params": {"w": jnp.full(1000, 3.0)}}, {"shard": b"two"}, {})
    params, _ = restore_params(str(tmp_path / "run"))
    np.testing.assert_array_equal(params["w"], np.full(1000, 3.0, np.float32))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]
