"""Held-out denoising metrics with their references, prepared once and used by every model of a job."""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.denoising import (
    ApplyLogits,
    DenoisingReport,
    evaluate_denoising,
    make_denoising_step,
    model_logits,
)
from endistill_jax.evaluation.ngrams import NgramCounter, NgramModel
from endistill_jax.models.family import ModelConfig
from endistill_jax.sharding import activation_sharding, host_rows, param_shardings, place_batch
from endistill_jax.train.experiment import Data

# Held-out texts are corrupted the same way in every run, so that metrics of different seeds are on the same examples.
EVALUATION_SEED = 0
REFERENCE_TOKENS = 2_000_000


@dataclasses.dataclass(kw_only=True)
class HeldOut:
    """The evaluation batches of a task and the n-gram references counted on its training split.

    Attributes:
        mesh: where models are evaluated.
        batches: unpacked NumPy batches of the held-out split, complete on every host, so that no metric depends on
            the number of hosts.
        ngrams: unigram and bigram references.
        sentinel_ids: ids that the loss on non-sentinel tokens leaves out.
    """

    mesh: Mesh
    batches: list[dict[str, np.ndarray]]
    ngrams: NgramModel
    sentinel_ids: range
    _steps: dict[tuple[ModelConfig, str], Callable] = dataclasses.field(default_factory=dict)

    def evaluate(self, config: ModelConfig, params: Any, placement: str = "sharded") -> DenoisingReport:
        """The metrics of one model, its parameters on the host or on the mesh; compiled once for a configuration.

        Args:
            config: its settings.
            params: its parameters.
            placement: how they are sharded; see `sharding.logical_rules`.
        """
        if (config, placement) not in self._steps:
            logits = self._logits(config, placement)
            self._steps[config, placement] = make_denoising_step(
                logits, sentinel_ids=self.sentinel_ids, eos_id=config.eos_id
            )
        params = jax.device_put(params, param_shardings(config, self.mesh, placement))
        return evaluate_denoising(
            self._steps[config, placement],
            params,
            self.batches,
            ngrams=self.ngrams,
            place=lambda batch: place_batch(host_rows(batch, self.mesh), self.mesh),
        )

    def on(self, mesh: Mesh) -> "HeldOut":
        """The same evaluation on another mesh; reuses the data."""
        return self if mesh == self.mesh else dataclasses.replace(self, mesh=mesh, _steps={})

    def _logits(self, config: ModelConfig, placement: str) -> ApplyLogits:
        def apply(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            with activation_sharding(self.mesh, placement):
                return model_logits(config)(params, batch)

        return apply


def eval_spec(data: Data) -> dict[str, Any]:
    """The eval_spec: what held-out metrics depend on besides the model, as plain values."""
    from endistill_jax.data.registry import resolve_task

    lengths = {"inputs_length": data.inputs_length, "targets_length": data.targets_length}
    return {"task": resolve_task(data.task).name} | lengths | data.evaluated


def check_metric(name: str | None) -> None:
    """Checks that a metric is among the held-out metrics.

    Raises:
        UserError: naming the valid ones.
    """
    known = [field.name for field in dataclasses.fields(DenoisingReport)]
    if name is not None and name not in known:
        raise UserError(f"Run.keep_best is {name!r}, which is no held-out figure; choose one of {', '.join(known)}")


def prepare_held_out(data: Data, mesh: Mesh) -> HeldOut:
    """Reads the held-out batches and counts the references."""
    from endistill_jax.data.pipeline import make_iterator
    from endistill_jax.data.registry import resolve_task
    from endistill_jax.data.vocabulary import sentinel_ids

    def batches(split: str, batch_size: int):
        return make_iterator(
            data.task,
            split=split,
            task_feature_lengths=data.feature_lengths,
            batch_size=batch_size,
            seed=EVALUATION_SEED,
            pack=False,
            # Shuffled once: a neighbor's input must be unrelated.
            shuffle=True,
            repeat=False,
        )

    vocabulary = resolve_task(data.task).output_features["targets"].vocabulary
    counter = NgramCounter(vocabulary.vocab_size, max_tokens=REFERENCE_TOKENS)
    for batch in batches("train", data.batch_size):
        counter.update(batch)
        if counter.full:
            break
    return HeldOut(
        mesh=mesh,
        batches=list(islice(batches(data.eval_split, data.eval_batch_size), data.eval_batches)),
        ngrams=counter.fit(),
        sentinel_ids=sentinel_ids(vocabulary),
    )
