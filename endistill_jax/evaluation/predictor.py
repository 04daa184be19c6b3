"""SeqIO's `predict_fn` and `score_fn` for a model on a mesh, on one or several hosts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.batches import batches_by_length, padded, without_padding
from endistill_jax.evaluation.rank import choices_of_each_input, make_score_step, target_shape
from endistill_jax.models.family import ModelConfig
from endistill_jax.models.generation.generation import Decoding, make_decoder
from endistill_jax.sharding import host_rows, param_shardings, place_batch

Indexed = list[tuple[int, Any]]


class Predictor:
    """Generates and scores for one model; jitted once, for any parameters of its settings.

    Every host passes the same examples, computes its rows of each batch, and gets the results of all. Batches hold
        examples of similar lengths in any order; padding rows are computed and discarded.
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
        placement: str = "sharded",
    ):
        """Compiles nothing yet.

        Args:
            config: the model's settings.
            decoding: how text is generated.
            mesh: where.
            batch_size: rows of a batch, over all hosts.
            inputs_length: longest input, in tokens.
            seed: for sampling.
            placement: how the parameters are sharded; see `sharding.logical_rules`.

        Raises:
            UserError: decoding, mesh or batch do not fit the model or each other.
        """
        spread = mesh.shape["data"] * mesh.shape["fsdp"]
        if batch_size % spread:
            raise UserError(
                f"a batch of {batch_size} examples does not split over data x fsdp = {spread}; "
                f"choose {-(-batch_size // spread) * spread}"
            )
        self.shardings = param_shardings(config, mesh, placement)
        self._mesh, self._spread = mesh, spread
        self._pad_id = config.pad_id
        self._batch_size, self._inputs_length = batch_size, inputs_length
        self._key = jax.random.key(seed)
        self._decode = make_decoder(config, decoding, mesh=mesh, placement=placement)
        self._score = make_score_step(config, mesh, placement)

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
        for batch in batches_by_length(texts, self._batch_size, self._inputs_length, self._pad_id):
            rows = np.zeros(self._batch_size, np.int32)
            rows[: len(batch.indices)] = [row_ids[index] for index in batch.indices]
            placed = self._place(tokens=batch.tokens, row_ids=rows)
            decoded = fetch(self._decode(params, placed["tokens"], self._key, placed["row_ids"]))
            for row, index in enumerate(batch.indices):
                tokens[index], scores[index] = (
                    _padded_with_zeros(decoded.tokens[row], self._pad_id),
                    decoded.scores[row],
                )
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
        indices, inputs, targets = _read(dataset)
        choices = choices_of_each_input(inputs)
        rows = max(self._batch_size // choices // self._spread, 1) * self._spread
        shape = (rows, choices, target_shape(targets))
        scores = np.zeros((len(inputs) // choices, choices), np.float32)
        for batch in batches_by_length(inputs[::choices], rows, self._inputs_length, self._pad_id):
            chosen = [targets[choices * index + choice] for index in batch.indices for choice in range(choices)]
            flat = padded(chosen, (rows * choices, shape[2]), self._pad_id)
            placed = self._place(inputs=batch.tokens, targets=flat.reshape(shape))
            found = fetch(self._score(params, placed["inputs"], placed["targets"]))  # [rows, choices]
            scores[batch.indices] = found[: len(batch.indices)]
        return list(zip(indices, scores.reshape(-1).tolist(), strict=True))

    def _place(self, **arrays: np.ndarray) -> dict[str, jax.Array]:
        return place_batch(host_rows(arrays, self._mesh), self._mesh)


def _padded_with_zeros(tokens: np.ndarray, pad_id: int) -> np.ndarray:
    """A text padded as SeqIO pads: what follows its last token that is no padding of the model's becomes 0."""
    real = np.flatnonzero(tokens != pad_id)
    return np.where(np.arange(len(tokens)) > (real[-1] if real.size else -1), 0, tokens)


def fetch(arrays: Any) -> Any:
    """Gathers sharded arrays into complete NumPy arrays on every host."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return jax.tree.map(lambda array: multihost_utils.process_allgather(array, tiled=True), arrays)


def _read(dataset: Any) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Index, input and target of each example of an enumerated `tf.data.Dataset` with the model's features."""
    examples: list[tuple[int, Mapping[str, np.ndarray]]] = list(dataset.as_numpy_iterator())
    return (
        [int(index) for index, _ in examples],
        [without_padding(example, "encoder_input_tokens") for _, example in examples],
        [without_padding(example, "decoder_target_tokens") for _, example in examples],
    )
