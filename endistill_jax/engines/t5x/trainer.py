"""Distillation with `t5x.train`: a T5X model with our loss, and a trainer that passes it the teacher's parameters."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Self

import clu.metrics
import flax.linen as nn
import jax
import jax.numpy as jnp
import seqio
from absl import logging
from flax.core import freeze, unfreeze
from jax.sharding import NamedSharding

from endistill_jax.checkpoints.models import open_model
from endistill_jax.core.errors import UserError
from endistill_jax.engines.t5x.adapter import Transformer, logical_axes
from endistill_jax.models.family import ModelConfig, boxed_init, stack_layers
from endistill_jax.objectives import Objective
from endistill_jax.train.state import init_objective
from endistill_jax.train.step import LossFunction
from endistill_jax.train.training import check_vocabularies

# After the adapter, which says what to do where there is no T5X.
from t5x import decoding, metrics, models, optimizers, train_state, trainer  # isort: skip

Batch = Mapping[str, jax.Array]


class MiniEndModel(models.EncoderDecoderModel):
    """A student distilled by T5X; it evaluates and generates like any other T5X model.

    `loss = sum over terms of coefficient * sum / weight`: the objective takes the place of T5X's label smoothing,
    z-loss and normalizing factor. Give it to `t5x.train` with `MiniEndTrainer`.

    Args:
        module: the student.
        teacher: "bundled", a Hugging Face T5 folder, a T5X checkpoint, or the model directory of a run; None if the
            objective needs none.
        objective: terms without step-dependent coefficients or parameters of their own.
        input_vocabulary: of the task; must be the teacher's, as must `output_vocabulary`.
        teacher_dtype: type of the teacher's parameters and computations.
    """

    def __init__(
        self,
        module: Transformer,
        teacher: str | None,
        objective: Objective,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: optimizers.OptimizerDefType,
        teacher_dtype: str = "bfloat16",
        decode_fn: models.DecodeFnCallable = decoding.beam_search,
        feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
        default_decoder_params: models.DecoderParams | None = None,
    ):
        super().__init__(
            module,
            input_vocabulary,
            output_vocabulary,
            optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=feature_converter_cls,
            default_decoder_params=default_decoder_params,
        )
        self.objective = objective
        if objective.needs_teacher and teacher is None:
            raise UserError("the objective compares with a teacher, but MiniEndModel.teacher is None")
        self.teacher = open_model(teacher, teacher_dtype) if objective.needs_teacher else None
        teacher_config = self.teacher and self.teacher.config
        objective.validate(module.config, teacher_config)
        _check_stateless(objective, module.config, teacher_config)
        check_vocabularies(output_vocabulary, module.config, self.teacher)
        self._loss = LossFunction(student=module.run_config, teacher=teacher_config, objective=objective)
        self._teacher_params = None
        self._weights = None

    def with_teacher(self, teacher_params: Any, weights: Mapping[str, jax.Array] | None = None) -> Self:
        """The same model with a teacher's parameters (stacked), for `loss_fn`.

        With the weights of a whole batch (`Objective.weights`) the loss of a micro-batch is its share of the batch's
        loss: shares, and their gradients, add up to the batch's.
        """
        model = copy.copy(self)
        model._teacher_params, model._weights = teacher_params, weights
        return model

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, clu.metrics.Metric]]:
        """The loss of a batch, and every term of it, the student's cross-entropy and the teacher's as T5X's metrics."""
        if self.objective.needs_teacher and self._teacher_params is None:
            raise UserError("MiniEndModel has no teacher's parameters; train it with trainer_cls = @MiniEndTrainer")
        weights = self.objective.weights(batch)
        whole = weights if self._weights is None else self._weights
        loss, sums = self._loss(stack_layers(unfreeze(params)), self._teacher_params, batch, dropout_rng, weights=whole)
        tokens = jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)
        terms = {name: clu.metrics.Average(total, weights.get(name, tokens)) for name, total in sums.items()}
        return loss, {"loss": metrics.AveragePerStep(total=loss), **terms, **_timing(batch)}


class MiniEndTrainer(trainer.Trainer):
    """T5X's trainer, which also passes the teacher's parameters to every step.

    They are an argument of the compiled step: arrays that a traced function closes over are embedded in the executable
    as constants, on every host, and cannot be sharded over several hosts. They are not part of the train state, so
    neither of the optimizer's state nor of checkpoints.

    Gradients of micro-batches add up to those of the whole batch, whatever their padding.
    """

    @cached_property
    def _partitioned_train_step(self) -> "_WithTeacher":
        def train_step(state: train_state.TrainState, teacher_params: Any, batch: Batch) -> tuple[Any, Any]:
            return trainer.train_with_lr(
                state,
                batch,
                learning_rate=self._learning_rate_fn(state.step),
                dropout_rng=self._get_step_rng(state.step),
                model=self._model.with_teacher(teacher_params, self._model.objective.weights(batch)),
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=self._partitioner.data_partition_spec,
            )

        return self._partition(train_step, (self._train_state_axes, None), donate_argnums=(0,))

    @cached_property
    def _partitioned_eval_step(self) -> "_WithTeacher":
        def eval_step(state: train_state.TrainState, teacher_params: Any, batch: Batch) -> Any:
            return trainer.eval_step(self._model.with_teacher(teacher_params), state, batch)

        return self._partition(eval_step, None)

    def _partition(self, step: Callable[..., Any], outputs: Any, **kwargs: Any) -> "_WithTeacher":
        params, specs = self._teacher
        inputs = (self._train_state_axes, specs, self._partitioner.data_partition_spec)
        return _WithTeacher(self._partitioner.partition(step, inputs, outputs, **kwargs), params)

    @cached_property
    def _teacher(self) -> tuple[Any, Any]:
        """The teacher's parameters, sharded by T5X's rules, and their shardings."""
        teacher = self._model.teacher
        if teacher is None:
            return None, None
        boxed = jax.eval_shape(lambda: boxed_init(teacher.config, jax.random.key(0)))
        variables = {"params": nn.meta.unbox(boxed), "params_axes": logical_axes(boxed, stacked=True)}
        specs = unfreeze(self._partitioner.get_mesh_axes(train_state.InferenceState.create(freeze(variables))).params)
        params = teacher.load(jax.tree.map(lambda spec: NamedSharding(self._partitioner.mesh, spec), specs))
        logging.info("Teacher %s, fingerprint %s.", teacher.source, teacher.fingerprint)
        return params, specs


class _WithTeacher:
    """A partitioned, lowered or compiled step, called with state and batch, that is given the teacher in between."""

    def __init__(self, step: Any, teacher_params: Any):
        self._step = step
        self._teacher_params = teacher_params

    def __call__(self, state: Any, batch: Batch) -> Any:
        return self._step(state, self._teacher_params, batch)

    def lower(self, state: Any, batch: Batch) -> "_WithTeacher":
        return _WithTeacher(self._step.lower(state, self._teacher_params, batch), self._teacher_params)

    def compile(self) -> "_WithTeacher":
        return _WithTeacher(self._step.compile(), self._teacher_params)


def _check_stateless(objective: Objective, student: ModelConfig, teacher: ModelConfig | None) -> None:
    """T5X's loss knows neither the step nor a train state of ours."""
    if objective.interpolated_targets is not None:
        raise UserError("interpolated_targets moves with the step, which T5X's loss does not know; leave it out")
    if moving := [term.name for term in objective.terms if callable(term.coefficient)]:
        raise UserError(f"{', '.join(moving)}: it moves with the step, which T5X's loss does not know; give a number")
    carried = jax.eval_shape(lambda: init_objective(objective, jax.random.key(0), student, teacher))
    if "params" in carried:
        raise UserError(f"{', '.join(carried['params'])}: T5X's train state has no place for a term's own parameters")


def _timing(batch: Batch) -> dict[str, clu.metrics.Metric]:
    rows, length = batch["decoder_target_tokens"].shape
    return {
        "timing/seqs_per_second": metrics.TimeRate.from_model_output(numerator=rows),
        "timing/target_tokens_per_second": metrics.TimeRate.from_model_output(numerator=rows * length),
        "timing/steps_per_second": metrics.StepsPerTime.from_model_output(),
        "timing/seconds": metrics.Time(),
        "non_padding_fraction/loss_weights": clu.metrics.Average(
            total=jnp.sum(batch["decoder_loss_weights"] != 0), count=rows * length
        ),
    }
