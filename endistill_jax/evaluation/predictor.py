"""SeqIO's `predict_fn` and `score_fn` for a model on a mesh, on one or several hosts.

Batches are made of texts of similar lengths, in any order and a few shapes. Several targets of one input, such as the
labels that are ranked, share its encoder pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from endistill_jax.models.family import ModelConfig, apply
from endistill_jax.models.generation.generation import Decoding, make_decoder
from endistill_jax.sharding import activation_sharding, check_rows, host_rows, param_shardings, place_batch

# A batch is as long as one of these parts of the longest: each is a shape, and so a compilation, of its own.
PARTS = (4, 2, 1)

Indexed = list[tuple[int, Any]]
ScoreStep = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Predictor:
    """Generates and scores for one model; jitted once, for any parameters of its settings.

    Every host passes the same examples, computes its rows of each batch, and gets the results of all. Padding rows are
    computed and discarded.

    Args:
        batch_size: rows of a batch, over all hosts.
        inputs_length: longest input, in tokens.
        seed: for sampling.
        sharding: how the parameters are sharded; see `sharding.logical_rules`.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoding: Decoding,
        mesh: Mesh,
        *,
        batch_size: int,
        inputs_length: int,
        seed: int = 0,
        sharding: str = "sharded",
    ):
        check_rows("the batch size", batch_size, mesh)
        self.shardings = param_shardings(config, mesh, sharding)
        self._mesh = mesh
        self._pad_id = config.pad_id
        self._batch_size, self._inputs_length = batch_size, inputs_length
        self._key = jax.random.key(seed)
        self._decode = make_decoder(config, decoding, mesh=mesh, sharding=sharding)
        self._score = make_score_step(config, mesh, sharding)

    def generate(
        self, params: Any, texts: Sequence[Sequence[int]], row_ids: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Text for each input.

        Args:
            params: the parameters, on the mesh.
            texts: ids of each input, its end included.
            row_ids: what is drawn for an input depends on its number here; by default its position.

        Returns:
            int32 tokens [texts, max_length], each up to and with its end, then 0; and float32 scores [texts].
        """
        row_ids = range(len(texts)) if row_ids is None else row_ids
        tokens: list[Any] = [None] * len(texts)
        scores = np.zeros(len(texts), np.float32)
        for indices, inputs in batches_by_length(texts, self._batch_size, self._inputs_length, self._pad_id):
            rows = np.zeros(self._batch_size, np.int32)
            rows[: len(indices)] = [row_ids[index] for index in indices]
            placed = self._place(tokens=inputs, row_ids=rows)
            decoded = self._decode(params, placed["tokens"], self._key, placed["row_ids"])
            decoded = multihost_utils.process_allgather(decoded, tiled=True)  # complete on every host
            for row, index in enumerate(indices):
                tokens[index] = _padded_with_zeros(decoded.tokens[row], self._pad_id)
                scores[index] = decoded.scores[row]
        return np.stack(tokens) if tokens else np.zeros((0, 1), np.int32), scores

    def predict(self, params: Any, dataset: Any) -> tuple[Indexed, np.ndarray]:
        """SeqIO's `predict_fn` for these parameters, (index, tokens) of each example, with the score of each."""
        indices, inputs, _ = _read(dataset)
        tokens, scores = self.generate(params, inputs, indices)
        return list(zip(indices, tokens, strict=True)), scores

    def score(self, params: Any, dataset: Any) -> Indexed:
        """SeqIO's `score_fn` for these parameters: (index, log-likelihood of the targets) of each example.

        The encoder runs once for consecutive examples with the same input, as the labels of one example are.
        """
        numbers, inputs, targets = _read(dataset)
        choices = choices_of_each_input(inputs)
        spread = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        rows = max(self._batch_size // choices // spread, 1) * spread
        # One length for all targets, so one compilation: the longest's, rounded up to a multiple of 8.
        target_length = -(-max(map(len, targets), default=1) // 8) * 8
        scores = np.zeros((len(inputs) // choices, choices), np.float32)
        for indices, tokens in batches_by_length(inputs[::choices], rows, self._inputs_length, self._pad_id):
            chosen = [targets[choices * index + choice] for index in indices for choice in range(choices)]
            flat = _padded(chosen, (rows * choices, target_length), self._pad_id)
            placed = self._place(inputs=tokens, targets=flat.reshape(rows, choices, target_length))
            found = self._score(params, placed["inputs"], placed["targets"])  # [rows, choices]
            found = multihost_utils.process_allgather(found, tiled=True)
            scores[indices] = found[: len(indices)]
        return list(zip(numbers, scores.reshape(-1).tolist(), strict=True))

    def _place(self, **arrays: np.ndarray) -> dict[str, jax.Array]:
        return place_batch(host_rows(arrays, self._mesh), self._mesh)


def make_score_step(config: ModelConfig, mesh: Mesh, sharding: str = "sharded") -> ScoreStep:
    """Builds the jitted function (params, inputs, targets) -> log-likelihoods; reuse it.

    `inputs` are int32 [batch, source] and `targets` int32 [batch, choices, target], both padded with the model's
    `pad_id`; the result is float32 [batch, choices]: the sum over the tokens of a target, its end included, of their
    log-probabilities given the input and the target's tokens before, and 0 for a target of nothing but padding. Without
    dropout.
    """

    @jax.jit
    def step(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        def of_one_choice(target: jax.Array) -> jax.Array:  # [batch, target] -> [batch]
            previous = jnp.pad(target, ((0, 0), (1, 0)), constant_values=config.decoder_start_id)[:, :-1]
            batch = {
                "encoder_input_tokens": inputs,
                "decoder_input_tokens": previous,
                "decoder_target_tokens": target,
                "encoder_segment_ids": jnp.asarray(inputs != config.pad_id, jnp.int32),
                "decoder_segment_ids": jnp.asarray(target != config.pad_id, jnp.int32),
            }
            logits = apply(config, params, batch).logits  # [batch, target, vocab_size]
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)  # [batch, target]
            return -jnp.sum(jnp.where(target != config.pad_id, nats, 0.0), axis=-1)

        with activation_sharding(mesh, sharding):
            # vmapped over choices only: the encoder does not depend on them and runs once.
            return jax.vmap(of_one_choice, in_axes=1, out_axes=1)(targets)

    return step


def choices_of_each_input(inputs: Sequence[Sequence[int]]) -> int:
    """How many consecutive examples share an input, at least, everywhere: the number of labels that are ranked; else 1.

    Two examples with the same input may follow each other, so that one run may be twice as long as others.
    """
    return math.gcd(*(len(list(run)) for _, run in groupby(inputs)))


def batches_by_length(
    texts: Sequence[Sequence[int]], batch_size: int, max_length: int, pad_id: int = 0
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Every text once, short ones with short ones: at most three shapes, `max_length` and its half and quarter.

    Yields positions in `texts`, one a real row, and int32 tokens [batch_size, length]. The real rows come first; the
    last batch of each shape is filled up with rows of padding.
    """
    lengths = sorted({max(max_length // part, 1) for part in PARTS})
    of_shape: dict[int, list[int]] = {length: [] for length in lengths}
    for index, text in enumerate(texts):
        of_shape[next(length for length in lengths if len(text) <= length)].append(index)
    for length, members in of_shape.items():
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            yield indices, _padded([texts[index] for index in indices], (batch_size, length), pad_id)


def _padded(rows: Sequence[Sequence[int]], shape: tuple[int, int], pad_id: int) -> np.ndarray:
    """Rows of ids as one int32 array of that shape, padding after their ends and for the rows that are not there."""
    array = np.full(shape, pad_id, np.int32)
    for row, ids in zip(array, rows, strict=False):
        row[: len(ids)] = ids
    return array


def _padded_with_zeros(tokens: np.ndarray, pad_id: int) -> np.ndarray:
    """A text padded as SeqIO pads: what follows its last token that is no padding of the model's becomes 0."""
    real = np.flatnonzero(tokens != pad_id)
    return np.where(np.arange(len(tokens)) > (real[-1] if real.size else -1), 0, tokens)


def _read(dataset: Any) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Index, input and target of each example of an enumerated `tf.data.Dataset` with the model's features."""
    examples: list[tuple[int, Mapping[str, np.ndarray]]] = list(dataset.as_numpy_iterator())
    return (
        [int(index) for index, _ in examples],
        [_without_padding(example["encoder_input_tokens"]) for _, example in examples],
        [_without_padding(example["decoder_target_tokens"]) for _, example in examples],
    )


def _without_padding(ids: np.ndarray) -> tuple[int, ...]:
    return tuple(np.trim_zeros(ids, "b").tolist())
