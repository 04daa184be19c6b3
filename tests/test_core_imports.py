"""The core needs JAX, Flax, Optax, NumPy and jaxtyping alone: it runs where nothing else is installed."""

import ast
import pathlib
import subprocess
import sys

import pytest

import endistill_jax

PACKAGE = pathlib.Path(endistill_jax.__file__).parent
CORE = sorted(
    path.relative_to(PACKAGE).as_posix()
    for pattern in (
        "core/*.py", "models/**/*.py", "objectives/*.py", "sharding.py",
        "train/state.py", "train/step.py", "train/optimizer.py",
    )
    for path in PACKAGE.glob(pattern)
)  # fmt: skip
OUTSIDE = {"jax", "flax", "optax", "numpy", "jaxtyping"}
# No files, no processes, no network: what remains of the standard library is for describing and computing.
STANDARD = {
    "abc", "collections", "contextlib", "dataclasses", "difflib", "enum", "functools", "inspect", "itertools", "math",
    "re", "types", "typing", "importlib", "json", "pkgutil",  # which find model families, and write values in messages
}  # fmt: skip


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_core_is_found():
    assert {
        "models/t5/t5.py",
        "objectives/relations.py",
        "sharding.py",
        "train/step.py",
    } <= set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_core_file_imports_only_what_the_core_may(name):
    tree = ast.parse((PACKAGE / name).read_text())
    core_modules = {"endistill_jax." + path.removesuffix(".py").replace("/", ".") for path in CORE}
    core_modules |= {module.removesuffix(".__init__") for module in core_modules}
    for module in imported_modules(tree):
        top = module.split(".")[0]
        assert top in OUTSIDE | STANDARD or module in core_modules, f"{name} imports {module}"


@pytest.mark.parametrize("name", CORE)
def test_core_file_knows_of_no_other_process_and_no_file(name):
    tree = ast.parse((PACKAGE / name).read_text())
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not any(attribute.startswith("jax.distributed") for attribute in attributes)
    assert "open" not in {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_losses_know_nothing_of_models_nor_models_of_losses():
    for name in CORE:
        modules = set(imported_modules(ast.parse((PACKAGE / name).read_text())))
        if name.startswith("objectives/"):
            assert not any(module.startswith("endistill_jax.models") for module in modules), name
        if name.startswith("models/"):
            assert not any(module.startswith("endistill_jax.objectives") for module in modules), name


TRAIN_WITHOUT_THE_REST = """
import importlib.abc, sys

ABSENT = {"tensorflow", "seqio", "gin", "orbax", "tensorflow_datasets", "clu", "etils", "sentencepiece", "safetensors"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        # Flax's and Optax's own optional imports are theirs to guard; ours must not be.
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import jax
import numpy as np
from endistill_jax.objectives import CrossEntropy, Objective, relations
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import make_mesh, place_batch
from endistill_jax.models.family import abstract_params
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer
from endistill_jax.train.state import init_state
from endistill_jax.train.step import make_train_step, window_means

config = T5Config(vocab_size=8, d_model=4, num_heads=1, head_dim=4, mlp_dim=4, num_encoder_layers=1,
                  num_decoder_layers=1, mlp_activations=("relu",), tied_head=True)
rng = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(config))
mesh, optimizer = make_mesh(1, devices=jax.devices()[:1]), make_optimizer(OptimizerConfig(), 2)
objective = Objective(terms=(*relations("cross", ("qk",), relation_heads=1), CrossEntropy()))
step = make_train_step(student=config, teacher=config, objective=objective, optimizer=optimizer, mesh=mesh)
names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
batch = place_batch({name: np.ones((2, 3), np.int32) for name in names}, mesh)
state = init_state(config, optimizer, mesh, jax.random.key(0), params)
logs = []
for _ in range(2):
    state, metrics = step(state, params, batch)
    logs.append(window_means([metrics]))
assert logs[1]["lm"] < logs[0]["lm"], logs
assert not ABSENT & {name.split(".")[0] for name in sys.modules}
print("trained", len(logs))
"""


def test_core_trains_where_only_jax_and_its_libraries_are_installed():
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN_WITHOUT_THE_REST], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "trained 2\n"
