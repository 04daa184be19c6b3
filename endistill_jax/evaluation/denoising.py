"""Held-out denoising loss with references: without sentinels, next to n-gram models, with shuffled inputs.

Sentinels and the end of a sequence are easy to predict and frequent, so a loss over all target tokens looks good long
before a model has learned any language. Reported with it are, all in nats per token: the loss on non-sentinel tokens
(targets that are neither sentinel nor end of sequence), the unigram's and bigram's loss on those same tokens, and the
*shuffled-input gap*: how much the loss grows when each example is given another example's input. A model without a gap
is a language model that ignores its input.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from endistill_jax.checkpoints.tokenizer import sentinel_ids
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.ngrams import NgramCounter, NgramModel
from endistill_jax.models.family import ModelConfig, apply
from endistill_jax.objectives import CrossEntropy
from endistill_jax.objectives.token_terms import TokenDistribution
from endistill_jax.sharding import activation_sharding, host_rows, param_shardings, place_batch
from endistill_jax.train.experiment import Data

# Held-out texts are corrupted the same way in every run, so that metrics of different seeds are on the same examples.
EVALUATION_SEED = 0
REFERENCE_TOKENS = 2_000_000

HostBatch = Mapping[str, np.ndarray]
ApplyLogits = Callable[[Any, Mapping[str, jax.Array]], jax.Array]
DenoisingStep = Callable[[Any, Any], dict[str, jax.Array]]

_REFERENCES = ("unigram_nats", "bigram_nats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingReport:
    """Denoising metrics on held-out text. Losses are in nats per token, each a ratio of sums."""

    loss: float  # over all target tokens (`decoder_loss_weights`), as in training
    token_loss: float  # over non-sentinel tokens: targets that are neither sentinel nor end of sequence
    accuracy: float  # share of all target tokens that are the argmax of the logits
    token_accuracy: float  # the same over non-sentinel tokens
    shuffled_input_loss: float  # over those, when each example is given the input of the next (the last, the first's)
    shuffled_input_gap: float  # `shuffled_input_loss - token_loss`; near zero means that the input is ignored
    unigram_loss: float | None  # of the unigram reference on the same tokens; None without one
    bigram_loss: float | None
    tokens: int
    non_sentinel_tokens: int

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The fields that are there, as floats by name, for metric writers."""
        return {prefix + name: float(value) for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, float]) -> "DenoisingReport":
        """The report with these scalars; unknown names are ignored."""
        return cls(**{field.name: scalars.get(field.name) for field in dataclasses.fields(cls)})

    def summary(self) -> str:
        return (
            f"held-out loss {self.loss:.3f}, on non-sentinel tokens {self.token_loss:.3f}, "
            f"shuffled-input gap {self.shuffled_input_gap:.3f}"
        )


@dataclasses.dataclass(kw_only=True)
class HeldOut:
    """The evaluation batches of a task and the n-gram references counted on its training split; an `Evaluation`."""

    mesh: Mesh  # where models are evaluated
    # Unpacked batches of the held-out split, complete on every host, so that no metric depends on the number of hosts.
    batches: list[dict[str, np.ndarray]]
    ngrams: NgramModel
    sentinel_ids: range  # which the loss on non-sentinel tokens leaves out
    _steps: dict[tuple[ModelConfig, str], DenoisingStep] = dataclasses.field(default_factory=dict)

    def evaluate(self, config: ModelConfig, params: Any, sharding: str = "sharded") -> DenoisingReport:
        """The metrics of one model, its parameters on the host or on the mesh; compiled once for a configuration.

        `sharding` is how the parameters are sharded; see `sharding.logical_rules`.
        """
        if (config, sharding) not in self._steps:

            def apply_logits(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
                with activation_sharding(self.mesh, sharding):
                    return model_logits(config)(params, batch)

            self._steps[config, sharding] = make_denoising_step(
                apply_logits, sentinel_ids=self.sentinel_ids, eos_id=config.eos_id
            )
        return evaluate_denoising(
            self._steps[config, sharding],
            jax.device_put(params, param_shardings(config, self.mesh, sharding)),
            self.batches,
            ngrams=self.ngrams,
            place=lambda batch: place_batch(host_rows(batch, self.mesh), self.mesh),
        )

    def on(self, mesh: Mesh) -> "HeldOut":
        """The same evaluation on another mesh; reuses the data."""
        return self if mesh == self.mesh else dataclasses.replace(self, mesh=mesh, _steps={})


def prepare_held_out(data: Data, mesh: Mesh) -> HeldOut:
    """Reads the held-out batches and counts the references."""
    from endistill_jax.data.pipeline import make_iterator
    from endistill_jax.data.text_pipeline import resolve_task

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


def eval_spec(data: Data) -> dict[str, Any]:
    """The eval_spec: what held-out metrics depend on besides the model, as plain values."""
    from endistill_jax.data.text_pipeline import resolve_task

    lengths = {"inputs_length": data.inputs_length, "targets_length": data.targets_length}
    return {"task": resolve_task(data.task).name} | lengths | data.evaluated


def check_metric(name: str | None) -> None:
    """Checks that `Run.keep_best` is one of the held-out metrics, if it is set."""
    known = [field.name for field in dataclasses.fields(DenoisingReport)]
    if name is not None and name not in known:
        raise UserError(f"Run.keep_best is {name!r}, which is no held-out metric; choose one of {', '.join(known)}")


def make_denoising_step(apply_logits: ApplyLogits, *, sentinel_ids: Collection[int], eos_id: int) -> DenoisingStep:
    """Builds the jitted evaluation step; reuse it, as each new one compiles again.

    Args:
        apply_logits: (params, batch) -> logits [batch, target, vocab], without dropout; see `model_logits`.
        sentinel_ids: ids of the sentinels, such as `range(32000, 32100)`.
        eos_id: id of the end of a sequence.

    Returns:
        A pure function (params, batch) -> float32 scalars: for `tokens` and `non_sentinel` tokens the weight,
        `.../loss` and `.../correct`, and `non_sentinel/unigram_nats` and so on for the references in the batch. Sums
        are over the global batch, however it and `params` are sharded.
    """
    excluded = np.unique([*sentinel_ids, eos_id])

    @jax.jit
    def step(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        references = {name: batch[name] for name in _REFERENCES if name in batch}
        logits = apply_logits(params, {name: batch[name] for name in batch if name not in references})
        vocab_size = logits.shape[-1]
        if excluded[-1] >= vocab_size:
            raise UserError(f"sentinel or end id {excluded[-1]} is outside the model's vocabulary of {vocab_size}")
        targets = batch["decoder_target_tokens"]  # [batch, target]
        weights = batch["decoder_loss_weights"].astype(jnp.float32)  # [batch, target]
        counts = jnp.asarray(~np.isin(np.arange(vocab_size), excluded))[targets]  # [batch, target]
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)  # [batch, target]
        flat = TokenDistribution(logits.astype(jnp.float32).reshape(targets.size, -1), targets.reshape(-1))
        nats = CrossEntropy().token_loss(flat, None, flat.targets).reshape(targets.shape)
        sums = {}
        for name, kept in (("tokens", weights), ("non_sentinel", weights * counts)):
            sums[f"{name}/loss"], sums[name] = jnp.sum(jnp.where(kept != 0, kept * nats, 0.0)), jnp.sum(kept)
            sums[f"{name}/correct"] = jnp.sum(kept * correct)
        for name, nats in references.items():
            sums[f"non_sentinel/{name}"] = jnp.sum(weights * counts * nats)
        return sums

    return step


def model_logits(config: ModelConfig) -> ApplyLogits:
    """(params, batch) -> float32 logits of the model with these settings, without dropout."""
    return lambda params, batch: apply(config, params, batch).logits


def evaluate_denoising(
    step: DenoisingStep,
    params: Any,
    batches: Sequence[HostBatch],
    *,
    ngrams: NgramModel | None = None,
    place: Callable[[dict[str, np.ndarray]], Any] = lambda batch: batch,
) -> DenoisingReport:
    """Runs over held-out examples once with their own input and once with another's.

    The metrics depend only on the examples and their order, not on the batch size or on padding rows without weight.
    With several processes all pass the same global batches, and `place` keeps each one's rows; otherwise shuffled
    inputs would depend on the number of processes. Neighbors should be unrelated texts, or the gap is underestimated:
    shuffle once, with a fixed seed.

    Args:
        step: from `make_denoising_step`.
        params: the model's parameters.
        batches: NumPy batches of one shape with one example a row, `encoder_input_tokens` [batch, source] and
            `decoder_input_tokens`, `decoder_target_tokens`, `decoder_loss_weights` [batch, target]. Segment ids and
            positions may be there as long as no row holds two examples.
        ngrams: the references, fitted on training targets.
        place: puts a global batch onto the step's devices, such as a mesh; the batch may hold two more float32 arrays
            [batch, target].
    """
    totals: Counter[str] = Counter()  # Python floats: float64 sums of the steps' float32 sums.
    shuffled_sum = 0.0
    for batch, wrong in zip(batches, with_wrong_inputs(batches), strict=True):
        references = {} if ngrams is None else _reference_nats(ngrams, batch)
        totals.update({name: float(value) for name, value in step(params, place({**batch, **references})).items()})
        shuffled_sum += float(step(params, place(wrong | references))["non_sentinel/loss"])
    if not totals["non_sentinel"]:
        raise UserError("the held-out batches have no target but sentinels and ends; is the span corruption right?")
    per_token = {name: total / totals["non_sentinel"] for name, total in totals.items()}
    token_loss, shuffled_loss = per_token["non_sentinel/loss"], shuffled_sum / totals["non_sentinel"]
    return DenoisingReport(
        loss=totals["tokens/loss"] / totals["tokens"],
        token_loss=token_loss,
        accuracy=totals["tokens/correct"] / totals["tokens"],
        token_accuracy=per_token["non_sentinel/correct"],
        shuffled_input_loss=shuffled_loss,
        shuffled_input_gap=shuffled_loss - token_loss,
        unigram_loss=per_token.get("non_sentinel/unigram_nats"),
        bigram_loss=per_token.get("non_sentinel/bigram_nats"),
        tokens=round(totals["tokens"]),
        non_sentinel_tokens=round(totals["non_sentinel"]),
    )


def _reference_nats(ngrams: NgramModel, batch: HostBatch) -> dict[str, np.ndarray]:
    """The references' losses, float32 [batch, target], so that a step sums them where it sums the model's."""
    previous, targets = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
    nats = (ngrams.unigram_nats(targets), ngrams.bigram_nats(previous, targets))
    return {name: value.astype(np.float32) for name, value in zip(_REFERENCES, nats, strict=True)}


def with_wrong_inputs(batches: Sequence[HostBatch]) -> list[dict[str, np.ndarray]]:
    """The same batches, each example with the encoder side (tokens, segment ids, positions) of the next example.

    The next example is the next row with any weight, across batches: rolling within a batch would make the result
    depend on the batch size, and give one row the empty input of a padding row. The last example gets the first's.
    """
    for name in ("encoder_segment_ids", "decoder_segment_ids"):
        if any(name in batch and batch[name].max(initial=0) > 1 for batch in batches):
            raise UserError(f"{name} of a held-out batch goes beyond 1; evaluate on unpacked examples (pack=False)")
    real = [np.flatnonzero((batch["decoder_loss_weights"] > 0).any(axis=1)) for batch in batches]
    ends = np.cumsum([0, *(rows.size for rows in real)])
    if ends[-1] < 2:
        raise UserError(f"{ends[-1]} held-out examples with targets; shuffled inputs take at least two")
    wrong = [dict(batch) for batch in batches]
    for name in (name for name in wrong[0] if name.startswith("encoder_")):
        inputs = np.concatenate([batch[name][rows] for batch, rows in zip(batches, real, strict=True)])
        following = np.split(np.roll(inputs, -1, axis=0), ends[1:-1])
        for batch, rows, rolled in zip(wrong, real, following, strict=True):
            batch[name] = batch[name].copy()
            batch[name][rows] = rolled
    return wrong
