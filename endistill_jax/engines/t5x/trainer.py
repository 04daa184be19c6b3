"""Distilling with `t5x.train`: a T5X model whose loss is ours, and a trainer that hands it the frozen teacher."""

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
from endistill_jax.models.family import boxed_init
from endistill_jax.models.layout import stack_layers
from endistill_jax.objectives import Path, term_weights
from endistill_jax.train.step import loss_and_sums
from endistill_jax.train.training import check_vocabularies

# After the adapter, which says what to do where there is no T5X.
from t5x import decoding, metrics, models, optimizers, train_state, trainer  # isort: skip

Batch = Mapping[str, jax.Array]


class MiniEndModel(models.EncoderDecoderModel):
    """A student that T5X trains to agree with a teacher; it evaluates and generates as any other model of T5X.

    `loss = sum over terms of coefficient * sum / weight`, as in `losses.objective`: the path takes the place of T5X's
    label smoothing, z-loss and normalising factor. Give it to `t5x.train` with `MiniEndTrainer`.

    Args:
        module: the student.
        teacher: "bundled", a Hugging Face T5 folder, a T5X checkpoint, or the model directory of a run; None if the
            path needs none.
        path: what is compared.
        input_vocabulary: of the task; must be the teacher's.
        output_vocabulary: the same.
        optimizer_def: as for any model of T5X.
        teacher_dtype: type of the teacher's parameters and computations.
        decode_fn: how the student generates text.
        feature_converter_cls: as for any model of T5X.
        default_decoder_params: likewise.

    Raises:
        UserError: if path, models and vocabulary do not fit each other, or there is no such teacher.
    """

    def __init__(
        self,
        module: Transformer,
        teacher: str | None,
        path: Path,
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
        self.path = path
        if path.interpolated_targets is not None:
            raise UserError(
                "path.interpolated_targets moves with the step, which T5X's loss does not know; leave it out"
            )
        if path.needs_teacher and teacher is None:
            raise UserError("the path compares with a teacher, but MiniEndModel.teacher is None")
        self.teacher = open_model(teacher, teacher_dtype) if path.needs_teacher else None
        path.validate(module.config, self.teacher and self.teacher.config)
        check_vocabularies(output_vocabulary, module.config, self.teacher)
        self._teacher_params = None
        self._weights = None

    def taught_by(self, teacher_params: Any, weights: Mapping[str, jax.Array] | None = None) -> Self:
        """The same model with a teacher's parameters at hand (stacked), for `loss_fn`.

        With the weights of a whole batch (`term_weights`) the loss of a micro-batch is its share of the batch's loss:
        shares, and their gradients, add up to the batch's.
        """
        taught = copy.copy(self)
        taught._teacher_params, taught._weights = teacher_params, weights
        return taught

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, clu.metrics.Metric]]:
        """The loss of a batch, and every term of it, the student's cross-entropy and the teacher's as T5X's metrics."""
        if self.path.needs_teacher and self._teacher_params is None:
            raise UserError("MiniEndModel has no teacher at hand; train it with trainer_cls = @MiniEndTrainer")
        weights = term_weights(self.path, batch)
        loss, sums = loss_and_sums(
            stack_layers(unfreeze(params)),
            self._teacher_params,
            batch,
            weights if self._weights is None else self._weights,
            dropout_rng,
            student=self.module.run_config,
            teacher=self.teacher and self.teacher.config,
            path=self.path,
        )
        tokens = jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)
        terms = {name: clu.metrics.Average(total, weights.get(name, tokens)) for name, total in sums.items()}
        return loss, {"loss": metrics.AveragePerStep(total=loss), **terms, **_timing(batch)}


class MiniEndTrainer(trainer.Trainer):
    """T5X's trainer, which also hands the teacher's parameters to every step.

    They are an argument of the compiled step: arrays that a traced function merely refers to are written into the
    executable as constants, on every host, and may not be spread over several hosts. They are no part of the train
    state, and so not of the optimizer's nor of the checkpoint.

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
                model=self._model.taught_by(teacher_params, term_weights(self._model.path, batch)),
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=self._partitioner.data_partition_spec,
            )

        return self._partition(train_step, (self._train_state_axes, None), donate_argnums=(0,))

    @cached_property
    def _partitioned_eval_step(self) -> "_WithTeacher":
        def eval_step(state: train_state.TrainState, teacher_params: Any, batch: Batch) -> Any:
            return trainer.eval_step(self._model.taught_by(teacher_params), state, batch)

        return self._partition(eval_step, None)

    def _partition(self, step: Callable[..., Any], outputs: Any, **kwargs: Any) -> "_WithTeacher":
        params, specs = self._teacher
        inputs = (self._train_state_axes, specs, self._partitioner.data_partition_spec)
        return _WithTeacher(self._partitioner.partition(step, inputs, outputs, **kwargs), params)

    @cached_property
    def _teacher(self) -> tuple[Any, Any]:
        """The teacher's parameters, spread by T5X's rules, and how they are."""
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
