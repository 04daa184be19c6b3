"""Held-out denoising figures with their references, prepared once and used by every model of a job."""

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.evaluation.denoising import DenoisingReport, evaluate_denoising, make_denoising_step, t5_logits
from endistill_jax.evaluation.ngrams import NgramCounter, NgramModel
from endistill_jax.jobs.settings import Data
from endistill_jax.model.config import T5Config
from endistill_jax.sharding import param_shardings, place_batch

# Held-out texts are corrupted the same way in every run, so that figures of different seeds are of the same examples.
EVALUATION_SEED = 0
REFERENCE_TOKENS = 2_000_000


@dataclasses.dataclass(kw_only=True)
class HeldOut:
    """The evaluation batches of a task and the n-gram references counted on its training split.

    Attributes:
        mesh: where models are evaluated.
        batches: unpacked NumPy batches of the held-out split.
        ngrams: unigram and bigram references.
        sentinel_ids: ids that do not count as pieces.
    """

    mesh: Mesh
    batches: list[dict[str, np.ndarray]]
    ngrams: NgramModel
    sentinel_ids: range
    _steps: dict[T5Config, Callable] = dataclasses.field(default_factory=dict)

    def evaluate(self, config: T5Config, params: Any) -> DenoisingReport:
        """The figures of one model, its parameters on the host or on the mesh; compiled once for a configuration."""
        if config not in self._steps:
            self._steps[config] = make_denoising_step(t5_logits(config), sentinel_ids=self.sentinel_ids)
        params = jax.device_put(params, param_shardings(config, self.mesh))
        place = partial(place_batch, mesh=self.mesh)
        return evaluate_denoising(self._steps[config], params, self.batches, ngrams=self.ngrams, place=place)


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
            # Shuffled once: a neighbour's input must be a really wrong one.
            shuffle=True,
            repeat=False,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
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
