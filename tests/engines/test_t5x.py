"""Our model within T5X: the same numbers as T5X's own network, T5X's searches, and our objective under its trainer."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze, unfreeze

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import abstract_params, stack_layers, unstack_layers
from endistill_jax.models.generation.generation import Decoding, make_decoder
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import (
    CrossEntropy,
    ForwardKL,
    HiddenDistance,
    InterpolatedTargets,
    Objective,
    Ramp,
    relations,
)
from endistill_jax.train.step import LossFunction

HAS_T5X = importlib.util.find_spec("t5x") is not None
needs_t5x = pytest.mark.skipif(not HAS_T5X, reason="needs T5X: docs/t5x.md says how to install it")
ROOT = pathlib.Path(__file__).parents[2]

V1_1 = T5Config(
    vocab_size=29, d_model=10, num_heads=3, head_dim=4, mlp_dim=14, num_encoder_layers=1, num_decoder_layers=2
)
V1_0 = dataclasses.replace(V1_1, mlp_activations=("relu",), tied_head=True)
KINDS = pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1.1", "v1.0"])
OBJECTIVE = Objective(
    terms=(
        *relations("encoder_self", ("qq", "vv"), relation_heads=2),
        *relations("decoder_self", ("kk",), relation_heads=2, coefficient=0.5),
        *relations("cross", ("qk", "vv"), relation_heads=4),
        ForwardKL(),
        CrossEntropy(coefficient=0.25),
    )
)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        center, spread = (1.0, 0.2) if path[-1].key == "scale" else (0.0, 0.4)
        return rng.normal(center, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def make_batch(packed=False):
    """Four rows of unequal lengths; packed ones hold two or three examples each."""
    rng = np.random.default_rng(1)
    lengths = {"encoder": (9, 6, 8, 5), "decoder": (4, 7, 6, 2)}
    batch = {}
    for side, length in (("encoder", 9), ("decoder", 7)):
        real = np.arange(length) < np.array(lengths[side])[:, None]
        tokens = np.where(real, rng.integers(2, V1_1.vocab_size, real.shape), 0).astype(np.int32)
        if side == "encoder":
            batch["encoder_input_tokens"] = tokens
        else:
            batch["decoder_target_tokens"] = tokens
            batch["decoder_input_tokens"] = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
            batch["decoder_loss_weights"] = real.astype(np.int32)
        if packed:
            segments = 1 + (np.arange(length) >= 2) + (np.arange(length) >= 4)
            batch[f"{side}_segment_ids"] = np.where(real, segments, 0).astype(np.int32)
            batch[f"{side}_positions"] = np.where(real, np.arange(length) % 2, 0).astype(np.int32)
    return batch


def t5x_module(config):
    """T5X's own network of the same shape."""
    from t5x.examples.t5 import network

    return network.Transformer(
        network.T5Config(
            vocab_size=config.vocab_size,
            emb_dim=config.d_model,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            mlp_dim=config.mlp_dim,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            mlp_activations=config.mlp_activations,
            dropout_rate=0.0,
            logits_via_embedding=config.tied_head,
        )
    )


def our_module(config, **kwargs):
    from endistill_jax.engines.t5x.adapter import Transformer

    return Transformer(config, **kwargs)


def t5x_model(module, **kwargs):
    import seqio
    from t5x import models

    vocabulary = seqio.PassThroughVocabulary(V1_1.vocab_size, eos_id=1)
    return models.EncoderDecoderModel(module, vocabulary, vocabulary, None, **kwargs)


@pytest.mark.skipif(HAS_T5X, reason="T5X is installed")
@pytest.mark.parametrize("module", ["adapter", "trainer"])
def test_without_t5x_one_line_says_what_is_needed(module):
    with pytest.raises(UserError, match=r"needs T5X.*No module named 't5x'.*docs/t5x\.md") as error:
        importlib.import_module(f"endistill_jax.engines.t5x.{module}")
    assert "\n" not in str(error.value)


@needs_t5x
@KINDS
def test_parameters_have_t5x_s_names_shapes_and_axes(config):
    tokens = jnp.ones((2, 3), jnp.int32)
    ours, theirs = (
        unfreeze(jax.eval_shape(lambda m=module: m.init(jax.random.key(0), *[tokens] * 3, enable_dropout=False)))
        for module in (our_module(config), t5x_module(config))
    )
    assert jax.tree.map(jnp.shape, ours["params"]) == jax.tree.map(jnp.shape, theirs["params"])
    assert ours["params_axes"] == theirs["params_axes"]


@needs_t5x
@KINDS
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_logits_are_those_of_t5x_s_network(config, packed):
    params = unstack_layers(random_params(config))
    batch = make_batch(packed)
    expected = jax.jit(t5x_model(t5x_module(config))._compute_logits)(params, batch)
    real = batch["decoder_target_tokens"] != 0
    assert np.abs(expected[real]).max() > 1
    for loop_layers in (False, True):
        logits = jax.jit(t5x_model(our_module(config, loop_layers=loop_layers))._compute_logits)(params, batch)
        assert np.abs(logits - expected)[real].max() < 1e-5


@needs_t5x
@KINDS
@pytest.mark.parametrize("loop_layers", [False, True], ids=["unrolled", "looped"])
def test_beam_search_finds_what_it_finds_with_t5x_s_network(config, loop_layers):
    params = unstack_layers(random_params(config))
    batch = make_batch() | {"decoder_input_tokens": np.zeros((4, 10), np.int32)}

    def search(module):
        model = t5x_model(module)
        search = functools.partial(model.predict_batch_with_aux, num_decodes=3, return_all_decodes=True)
        return jax.jit(search)(params, batch)

    tokens, aux = search(our_module(config, loop_layers=loop_layers))
    expected, expected_aux = search(t5x_module(config))
    assert len(np.unique(expected.reshape(-1, expected.shape[-1]), axis=0)) > 6
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(aux["scores"], expected_aux["scores"], atol=1e-4)


@needs_t5x
@KINDS
def test_temperature_sampling_at_zero_is_our_greedy_search(config):
    from t5x import decoding as t5x_decoding

    params = random_params(config)
    batch = make_batch() | {"decoder_input_tokens": np.zeros((4, 10), np.int32)}
    model = t5x_model(our_module(config), decode_fn=t5x_decoding.temperature_sample)
    tokens = jax.jit(model.predict_batch)(unstack_layers(params), batch)
    expected = make_decoder(config, Decoding(max_length=10))(params, batch["encoder_input_tokens"])
    np.testing.assert_array_equal(tokens, expected.tokens)


@needs_t5x
def test_several_samples_of_one_example_keep_caches_of_their_own():
    from t5x import decoding as t5x_decoding

    params = unstack_layers(random_params(V1_1))
    batch = make_batch() | {"decoder_input_tokens": np.zeros((4, 10), np.int32)}

    def sample(module):
        model = t5x_model(module, decode_fn=t5x_decoding.temperature_sample)
        how = {"topk": 0, "temperature": 1.0, "decode_rng": jax.random.PRNGKey(3)}
        search = functools.partial(
            model.predict_batch_with_aux, num_decodes=4, return_all_decodes=True, decoder_params=how
        )
        return jax.jit(search)(params, batch)[0]

    sampled = [sample(module) for module in (our_module(V1_1), t5x_module(V1_1))]
    assert len(np.unique(sampled[1].reshape(16, -1), axis=0)) > 8
    np.testing.assert_array_equal(*sampled)


@needs_t5x
def test_whole_targets_are_not_decoded_and_dropout_is_not_dropped_silently():
    config = dataclasses.replace(V1_1, dropout_rate=0.5)
    variables = {"params": unstack_layers(random_params(config))}
    batch = make_batch()
    encode = our_module(config).encode
    with pytest.raises(UserError, match="without dropout"):
        our_module(config).apply(variables, batch["encoder_input_tokens"], enable_dropout=True, method=encode)
    three = [batch[f"{name}_tokens"] for name in ("encoder_input", "decoder_input", "decoder_target")]
    with pytest.raises(UserError, match="one token at a time"):
        our_module(config).apply(variables, None, *three, decode=False, method=our_module(config).decode)
    module = our_module(config)
    dropped = [module.apply(variables, *three, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 0.1
    np.testing.assert_array_equal(
        module.apply(variables, *three, enable_dropout=False), our_module(V1_1).apply(variables, *three)
    )


# --- the objective ----------------------------------------------------------------------------------------------------

STUDENT = dataclasses.replace(V1_1, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A random teacher, 3 heads of 4, that `open_model` finds by its name."""
    from endistill_jax.checkpoints.models import TrainedModel

    config = dataclasses.replace(V1_1, num_heads=4)
    params = random_params(config, seed=7)
    model = TrainedModel(
        source="teacher", config=config, vocabulary_file=None, step=0, manifest={}, _read=lambda mesh: (params, "00")
    )
    from endistill_jax.engines.t5x import trainer as t5x_distillation

    monkeypatch.setattr(t5x_distillation, "open_model", lambda source, dtype: model)
    return model


def miniend_model(objective=OBJECTIVE, student=STUDENT):
    import seqio
    from t5x import adafactor

    from endistill_jax.engines.t5x.trainer import MiniEndModel

    vocabulary = seqio.PassThroughVocabulary(student.vocab_size, eos_id=1)
    optimizer = adafactor.Adafactor(learning_rate=0.1, logical_factor_rules=adafactor.standard_logical_factor_rules())
    return MiniEndModel(our_module(student), "teacher", objective, vocabulary, vocabulary, optimizer)


def dense_loss(params, teacher, batch):
    """The objective, written out."""
    weights = OBJECTIVE.weights(batch)
    dense = LossFunction(student=STUDENT, teacher=teacher.config, objective=OBJECTIVE)
    loss, sums = dense(params, teacher.params, batch, weights=weights)
    return loss, (sums, weights)


@needs_t5x
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_loss_gradient_and_metrics_are_those_of_the_objective(teacher, packed):
    model, batch, params = miniend_model(), make_batch(packed), random_params(STUDENT)
    gradient_of = jax.jit(jax.value_and_grad(model.with_teacher(teacher.params).loss_fn, has_aux=True))
    (loss, metrics), gradient = gradient_of(unstack_layers(params), batch, None)
    gradient_of = jax.jit(jax.value_and_grad(functools.partial(dense_loss, teacher=teacher, batch=batch), has_aux=True))
    (expected, (sums, weights)), expected_gradient = gradient_of(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), stack_layers(gradient), expected_gradient
    )
    for name in OBJECTIVE.term_names:
        np.testing.assert_allclose(metrics[name].compute(), sums[name] / weights[name], rtol=1e-5)
    assert metrics["loss"].compute() == loss
    assert {"cross_entropy", "teacher_cross_entropy"} <= set(metrics)


@needs_t5x
def test_the_teacher_gets_no_gradient(teacher):
    model, batch, params = miniend_model(), make_batch(), unstack_layers(random_params(STUDENT))

    def loss(teacher_params):
        return model.with_teacher(teacher_params).loss_fn(params, batch, None)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(teacher.params)
    assert value > 0.1
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


@needs_t5x
def test_a_model_without_its_trainer_says_which_one_it_needs(teacher):
    with pytest.raises(UserError, match="MiniEndTrainer"):
        miniend_model().loss_fn(unstack_layers(random_params(STUDENT)), make_batch(), None)


@needs_t5x
@pytest.mark.parametrize(
    "objective",
    [
        Objective(terms=(ForwardKL(),), interpolated_targets=InterpolatedTargets(steps=3)),
        Objective(terms=(ForwardKL(coefficient=Ramp(steps=3)),)),
        Objective(terms=(HiddenDistance(),)),
    ],
)
def test_what_t5x_knows_nothing_of_is_refused_at_once(teacher, objective):
    with pytest.raises(UserError, match="T5X's"):
        miniend_model(objective)


@needs_t5x
def test_models_that_do_not_fit_are_refused_at_once(teacher):
    with pytest.raises(UserError, match="relation_heads"):
        miniend_model(Objective(terms=relations("cross", ("qk",), relation_heads=3)))
    with pytest.raises(UserError, match="vocab"):
        miniend_model(student=dataclasses.replace(STUDENT, vocab_size=31))


def make_trainer(model, params, num_microbatches):
    from t5x import partitioning, train_state

    from endistill_jax.engines.t5x.trainer import MiniEndTrainer

    partitioner = partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=partitioning.standard_logical_axis_rules()
    )
    shapes = {name: leaf.shape for name, leaf in make_batch().items()}
    variables = model.get_initial_variables(jax.random.PRNGKey(0), shapes, dict.fromkeys(shapes, jnp.int32))
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)
    state = state.replace_params(freeze(jax.tree.map(jnp.asarray, params)))
    return MiniEndTrainer(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=["held_out"],
        summary_dir=None,
        train_state_axes=partitioner.get_mesh_axes(jax.eval_shape(lambda: state)),
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 0.1,
        num_microbatches=num_microbatches,
    )


@needs_t5x
def test_a_step_does_not_depend_on_microbatching(teacher):
    params, batch = unstack_layers(random_params(STUDENT)), make_batch()
    assert len(set(batch["decoder_loss_weights"].sum(axis=1))) > 2
    ended = {}
    for count in (None, 2, 4):
        with make_trainer(miniend_model(), params, count) as trainer:
            summary = trainer.train(iter([batch]), 1).result()
            told = {name: summary[name].value for name in ("loss", *OBJECTIVE.term_names)}
            ended[count] = trainer.train_state.params, told
    for count in (2, 4):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ended[count], ended[None])


@needs_t5x
def test_the_teacher_is_an_argument_of_the_step_and_no_part_of_the_state(teacher):
    params, batch = unstack_layers(random_params(STUDENT)), make_batch()
    with make_trainer(miniend_model(), params, None) as trainer:
        trainer.compile_train(batch)
        _, given, _ = trainer._compiled_train_step._step.input_shardings[0]
        teachers = jax.tree.leaves(teacher.params)
        assert len(jax.tree.leaves(given)) == len(teachers)
        state = trainer.train_state
        before = len(jax.tree.leaves(state.state_dict()))
        summary = trainer.train(iter([batch] * 30), 30).result()
        held_out = trainer.eval({"held_out": [batch]})["held_out"]
        assert len(jax.tree.leaves(trainer.train_state.state_dict())) == before
    shapes = {leaf.shape for leaf in jax.tree.leaves(trainer.train_state.state_dict())}
    assert not shapes & {leaf.shape for leaf in teachers if leaf.ndim == 3}
    first = dense_loss(stack_layers(params), teacher, batch)[0]
    assert held_out["loss"].value < summary["loss"].value < first


# --- the programs of T5X ----------------------------------------------------------------------------------------------

TASK_MODULE = '''
import seqio
from endistill_jax.tasks import pretraining

def share_of_equal_tokens(targets, predictions):
    words = [(a.split(), b.split()) for a, b in zip(targets, predictions)]
    equal = sum(x == y for a, b in words for x, y in zip(a, b))
    return {"equal": equal / sum(len(a) for a, _ in words), "examples": len(words)}

corruption = seqio.TaskRegistry.get("python_docs_stdlib_span_corruption_v1")
seqio.TaskRegistry.add(
    "docs_with_a_metric",
    source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: corruption.source.get_dataset(split, shuffle=False).take(6),
        splits=["validation"],
    ),
    preprocessors=corruption.preprocessors,
    output_features=corruption.output_features,
    metric_fns=[share_of_equal_tokens],
)
'''  # fmt: skip
TINY = {
    "d_model": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 16, "num_encoder_layers": 1, "num_decoder_layers": 1,
}  # fmt: skip


def run_t5x(program, folder, *files, **macros):
    """Runs a program of T5X; settings are macros, those with two underscores parameters."""
    bindings = [f"--gin.{name.replace('__', '.')}={value!r}" for name, value in macros.items()]
    command = [sys.executable, "-m", f"t5x.{program}", *(f"--gin_file={name}" for name in files), *bindings]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stderr


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A student after four steps of `t5x.train` with the bundled teacher on the offline corpus."""
    folder = tmp_path_factory.mktemp("t5x")
    (folder / "docs_with_a_metric.py").write_text(TASK_MODULE)
    log = run_t5x(
        "train",
        folder,
        "gin/t5x/distill_python_docs.gin",
        MODEL_DIR=str(folder / "run"),
        TRAIN_STEPS=4,
        EVAL_PERIOD=2,
        BATCH_SIZE=4,
        TASK_FEATURE_LENGTHS={"inputs": 32, "targets": 32},
        **{f"sizes.build__{name}": value for name, value in TINY.items()},
    )
    return folder, log


def of_student(folder):
    return {
        "STUDENT": "mini_2x2_128",
        "VOCAB_SIZE": 8192,
        "MIXTURE_OR_TASK_MODULE": "docs_with_a_metric",
        "MIXTURE_OR_TASK_NAME": "docs_with_a_metric",
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
        "BATCH_SIZE": 4,
        **{f"sizes.build__{name}": value for name, value in TINY.items()},
    }


@needs_t5x
@pytest.mark.slow
def test_t5x_train_distils_and_reports_every_term(distilled):
    folder, log = distilled
    assert "Teacher bundled, fingerprint " in log
    lines = [line for line in log.splitlines() if "collection=train " in line or "collection=training_eval" in line]
    for name in ("encoder_self/qq=", "decoder_self/vv=", "cross/qk=", "logits=", "teacher_cross_entropy=", "loss="):
        assert any("collection=train " in line and name in line for line in lines), name
        assert any("collection=training_eval" in line and name in line for line in lines), name
    size = sum(file.stat().st_size for file in (folder / "run" / "checkpoint_4").rglob("*") if file.is_file())
    assert size < 4e6, "the teacher, of 16 MB, must not be in the checkpoint"


@needs_t5x
@pytest.mark.slow
def test_t5x_infer_and_eval_run_on_what_t5x_train_distilled(distilled):
    folder, _ = distilled
    checkpoint = str(folder / "run" / "checkpoint_4")
    settings = of_student(folder) | {"CHECKPOINT_PATH": checkpoint}
    run_t5x("infer", folder, "gin/t5x/infer.gin", **settings, INFER_OUTPUT_DIR=str(folder / "infer"))
    [written] = (folder / "infer").glob("*.jsonl-00000-of-00001")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(lines) >= 6 and all(isinstance(line["prediction"], str) for line in lines)

    log = run_t5x("eval", folder, "gin/t5x/eval.gin", **settings, EVAL_OUTPUT_DIR=str(folder / "eval"))
    [metrics] = (folder / "eval").glob("**/*-metrics.jsonl")
    found = json.loads(metrics.read_text().splitlines()[-1])
    assert found["examples"] == len(lines) and 0 <= found["equal"] <= 1, log[-2000:]


@needs_t5x
@pytest.mark.slow
def test_t5x_train_fine_tunes_what_it_distilled(distilled):
    folder, _ = distilled
    settings = of_student(folder) | {
        "MIXTURE_OR_TASK_MODULE": "endistill_jax.tasks.pretraining",
        "MIXTURE_OR_TASK_NAME": "python_docs_stdlib_span_corruption_v1",
        "INITIAL_CHECKPOINT_PATH": str(folder / "run" / "checkpoint_4"),
        "MODEL_DIR": str(folder / "tuned"),
        "TRAIN_STEPS": 6,
        "EVAL_STEPS": 1,
        "EVAL_PERIOD": 2,
    }
    run_t5x("train", folder, "gin/t5x/finetune.gin", **settings)
    assert (folder / "tuned" / "checkpoint_6").is_dir()
