"""A small text corpus, a byte vocabulary and models that train in seconds."""

import functools
import pathlib
import pydoc_data.topics
from collections.abc import Callable

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from endistill_jax.checkpoints import huggingface
from endistill_jax.core.errors import UserError
from endistill_jax.data.vocabulary import load_vocabulary
from endistill_jax.evaluation.metrics import accuracy
from endistill_jax.jobs import Data, Experiment, Run, Teacher, distill
from endistill_jax.models.family import abstract_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import presets
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.tasks.text_to_text import TextToText, label_index, text_to_text_task
from endistill_jax.train.optimizer import OptimizerConfig

TASK = "jobs_tests_v1"
COLORS = {"cherry": "red", "leaf": "green", "sky": "blue"}

DISTILL_GIN = """
from __gin__ import dynamic_registration
from endistill_jax import jobs
from endistill_jax.models.t5 import config
from endistill_jax.objectives import presets
from endistill_jax.tasks import pretraining
from endistill_jax.train import optimizer

pretraining.text_files_task:
    name = 'distill_gin_v1'
    train = '{corpus}'
    vocabulary = 'bytes'
    held_out = 0.1
jobs.Data:
    task = @pretraining.text_files_task()
    inputs_length = 48
    targets_length = 16
    batch_size = 4
    eval_batch_size = 4
    eval_batches = 2
config.T5Config:
    vocab_size = 384
    d_model = 16
    num_heads = 2
    head_dim = 8
    mlp_dim = 32
    num_encoder_layers = 2
    num_decoder_layers = 2
    dropout_rate = 0.1
jobs.Run:
    steps = 60
    micro_batches = 2
    log_every = 5
    eval_every = 20
    checkpoint_every = 10
    tensorboard = False
presets.union.relation_heads = 4
jobs.Teacher.source = '{teacher}'
jobs.Experiment:
    student = @config.T5Config()
    teacher = @jobs.Teacher()
    objective = @presets.union()
    data = @jobs.Data()
    optimizer = @optimizer.OptimizerConfig()
    run = @jobs.Run()
jobs.distill:
    model_dir = %MODEL_DIR
    experiment = @jobs.Experiment()
jobs.run.job = @jobs.distill
"""

CHAIN_GIN = """
include '{base}'
from __gin__ import dynamic_registration
from endistill_jax import jobs
jobs.Run.steps = 40
jobs.Interpolation.number = 1
jobs.interpolate:
    model_dir = %MODEL_DIR
    experiment = @jobs.Experiment()
    interpolation = @jobs.Interpolation()
jobs.run.job = @jobs.interpolate
"""


def small_model(*, width: int, layers: int = 2, vocab_size: int = 384) -> T5Config:
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        num_heads=2,
        head_dim=width // 2,
        mlp_dim=2 * width,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        scan_layers=False,
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[..., T5Config]:
    return small_model


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Python's language topics, a document a line."""
    file = tmp_path_factory.mktemp("corpus") / "topics.txt"
    topics = (" ".join(text.split()) for text in pydoc_data.topics.topics.values())
    file.write_text("\n".join(topics), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def data(corpus) -> Data:
    task = text_files_task(TASK, str(corpus), "bytes", held_out=0.1)
    return Data(task=task, inputs_length=48, targets_length=16, batch_size=4, eval_batch_size=4, eval_batches=2)


def register_colors(
    name: str,
    *,
    examples: int = 20,
    splits: tuple[str, ...] = ("train", "validation"),
    vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        numbers = range(48) if split == "train" else range(100, 100 + examples)
        things = [list(COLORS)[number % 3] for number in numbers]
        inputs = [f"{thing} {number}" for thing, number in zip(things, numbers, strict=True)]
        columns = {"inputs": inputs, "targets": [COLORS[thing] for thing in things]}
        texts = {key: tf.constant(x, tf.string) for key, x in columns.items()}
        return tf.data.Dataset.from_tensor_slices(texts | {"idx": tf.range(len(things))})

    labels = tuple(COLORS.values())
    definition = TextToText(
        source=seqio.FunctionDataSource(dataset, splits=splits),
        to_text=lambda examples: examples,
        metric_fns=(accuracy,),
        value_of=functools.partial(label_index, labels=labels),
        labels=labels,
    )
    return text_to_text_task(name, definition, vocabulary or load_vocabulary("bytes"))


@pytest.fixture(scope="session")
def color_source() -> Callable[..., seqio.Task]:
    """Function (name, ...) -> a registered task: which color a numbered thing has."""
    return register_colors


@pytest.fixture(scope="session")
def color_task(color_source) -> seqio.Task:
    return color_source("jobs_tests_color_v1")


def save_random(folder: pathlib.Path, config: T5Config, *more, seed: int = 1) -> str:
    """Writes a model with random parameters as a Hugging Face folder; nothing is compiled for it."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        center, spread = (1.0, 0.0) if path[-1].key == "scale" else (0.0, 0.3)
        return rng.normal(center, spread, shape.shape).astype(np.float32)

    huggingface.save(str(folder), jax.tree_util.tree_map_with_path(leaf, abstract_params(config)), config, *more)
    return str(folder)


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., str]:
    return save_random


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """A teacher as a Hugging Face folder: what it knows does not matter here."""
    return save_random(tmp_path_factory.mktemp("teacher") / "folder", small_model(width=32))


@pytest.fixture(scope="session")
def distill_gin(tmp_path_factory, corpus, teacher) -> pathlib.Path:
    """A gin file for processes of their own: a distillation of 60 steps, logged every 5, evaluated every 20."""
    file = tmp_path_factory.mktemp("gin") / "distill.gin"
    file.write_text(DISTILL_GIN.format(corpus=corpus, teacher=teacher))
    return file


@pytest.fixture(scope="session")
def chain_gin(distill_gin) -> pathlib.Path:
    """A gin file for processes of their own: a chain over one assistant, each of its two stages of 40 steps."""
    file = distill_gin.with_name("chain.gin")
    file.write_text(CHAIN_GIN.format(base=distill_gin))
    return file


@pytest.fixture(scope="session")
def settings(data) -> dict:
    """What every experiment has, for a run of four steps with a checkpoint after two and after four."""
    run = Run(steps=4, log_every=1, checkpoint_every=2, tensorboard=False)
    return {"data": data, "optimizer": OptimizerConfig(learning_rate=1e-3), "run": run}


@pytest.fixture(scope="session")
def student(make_model) -> T5Config:
    return make_model(width=16, layers=1)


@pytest.fixture(scope="session")
def experiment(teacher, student, settings) -> Experiment:
    """A distillation of four steps from an untrained teacher."""
    objective = presets.union(relation_heads=4)
    return Experiment(student=student, teacher=Teacher(source=teacher), objective=objective, **settings)


@pytest.fixture(scope="session")
def pretraining(student, settings) -> Experiment:
    """Four steps without a teacher."""
    return Experiment(student=student, objective=presets.scratch(), **settings)


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, experiment) -> pathlib.Path:
    """A finished distillation."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    distill(model_dir=str(folder), experiment=experiment)
    return folder


def _refused(job, match: str, leaves: str = "model_dir", **arguments) -> None:
    folder = pathlib.Path(arguments[leaves])
    before = sorted(folder.rglob("*")) if folder.exists() else None
    with pytest.raises(UserError, match=match) as error:
        job(**arguments)
    assert "\n" not in str(error.value)
    assert (sorted(folder.rglob("*")) if folder.exists() else None) == before
    assert not list(folder.parent.glob(f".{folder.name}.*"))


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    """Asserts that a job raises a one-line UserError that matches, and leaves its folder as it was."""
    return _refused
