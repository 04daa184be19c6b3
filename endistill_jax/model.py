"""A trained model with its tokenizer, as returned by `endistill_jax.load`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.manifest import Manifest
from endistill_jax.checkpoints.model_card import model_card
from endistill_jax.checkpoints.models import choose_vocabulary, open_model, print_notes
from endistill_jax.checkpoints.tokenizer import Tokenizer, VocabularyFile, load_tokenizer
from endistill_jax.core.attention import row_masks, visible_keys
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import LOGITS, Batch, Output, Reads, Tap, batch_segments
from endistill_jax.models.family import ModelConfig, Params, apply
from endistill_jax.models.generation.generation import Decoding, make_decoder
from endistill_jax.objectives.relations import RelationKL, relation_scores
from endistill_jax.sharding import make_mesh

# A text, or several, each a string or its ids.
Texts = str | Sequence[str] | Sequence[Sequence[int]]

# Texts that are generated from are padded to a multiple of this, because the search is compiled once for each length.
_GENERATE_LENGTHS = 32

_cached_decoder = functools.lru_cache(maxsize=8)(make_decoder)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model, its parameters on one device, and its tokenizer.

    For several devices, and for programs that jit, use `models.family.apply` and `models.generation.make_decoder` with
    `config` and `params`.

    Attributes:
        params: nested dictionaries, layers stacked.
        vocabulary_file: its SentencePiece model; None where there is none, and then texts are given as ids.
        step: optimizer steps trained; 0 if unknown.
        manifest: of its checkpoint; empty for a foreign one.
    """

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    vocabulary_file: VocabularyFile | None = None
    step: int = 0
    manifest: Manifest = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        if self.vocabulary_file is None:
            raise UserError("the model has no vocabulary; give load its vocabulary_file, or ids in place of texts")
        return load_tokenizer(self.vocabulary_file.path, extra_ids=self.vocabulary_file.extra_ids)

    def batch(self, inputs: Texts, targets: Texts | None = None) -> Batch:
        """The inputs of `apply`: each text with EOS, padded to the longest."""
        sources = self._ids(inputs)
        batch = {"encoder_input_tokens": _padded(sources, 0), "encoder_segment_ids": _ones(sources)}
        if targets is None:
            return batch
        labels = self._ids(targets)
        if len(labels) != len(sources):
            raise UserError(f"there are {len(sources)} inputs and {len(labels)} targets; give one for each")
        shifted = [[self.config.decoder_start_id, *ids[:-1]] for ids in labels]
        return batch | {
            "decoder_input_tokens": _padded(shifted, 0),
            "decoder_target_tokens": _padded(labels, 0),
            "decoder_loss_weights": _ones(labels),
            "decoder_segment_ids": _ones(labels),
        }

    def apply(self, inputs: Texts | Batch, targets: Texts | None = None, *, reads: Reads | None = None) -> Output:
        """One forward pass with teacher forcing, without dropout.

        Args:
            inputs: texts, or a whole batch.
            targets: texts, one for each input; needed where anything of the decoder is read.
            reads: the outputs to return; None for the logits, or the encoder's output where there are no targets.
        """
        batch = inputs if isinstance(inputs, Mapping) else self.batch(inputs, targets)
        has_targets = "decoder_input_tokens" in batch
        if reads is None:
            reads = LOGITS if has_targets else Reads(encoded=True)
        if reads.decoder and not has_targets:
            raise UserError("what is read is of the decoder; give targets too")
        hashable = tuple(sorted(reads.taps.items())), reads.hidden, reads.encoded, reads.head
        return _compiled(self.config, hashable)(self.params, batch)

    def taps(self, inputs: Texts | Batch, targets: Texts | None = None, *, site: str, layer: int = -1) -> Tap:
        """Queries, keys and values of one attention module, each [batch, length, heads * head_dim].

        Args:
            inputs: texts, or a whole batch.
            targets: texts, one for each input; needed for a site of the decoder.
            site: "encoder_self", "decoder_self" or "cross".
            layer: negative ones count from the top.
        """
        term = RelationKL(site=site, relation="qk", student_layer=layer)  # checks the name of the site
        return self.apply(inputs, targets, reads=Reads(taps={(term.site, layer): "qkv"})).taps[site, layer]

    def relation(
        self,
        inputs: Texts | Batch,
        targets: Texts | None = None,
        *,
        site: str = "cross",
        relation: str = "qk",
        layer: int = -1,
        relation_heads: int = 1,
    ) -> np.ndarray:
        """What is distilled: a distribution for each position, [batch, relation_heads, queries, keys], 0 at padding.

        `relation` is "qk", "qq", "kk" or "vv"; the joined heads are split into `relation_heads`, which must divide
        heads * head_dim. For the rest see `taps`.
        """
        term = RelationKL(site=site, relation=relation, relation_heads=relation_heads, student_layer=layer)
        term.validate(self.config, self.config)
        batch = inputs if isinstance(inputs, Mapping) else self.batch(inputs, targets)
        tap = self.taps(batch, site=site, layer=layer)
        vectors = {"q": tap.query, "k": tap.key, "v": tap.value}
        masks = row_masks(site, relation, batch_segments(batch))
        scores = relation_scores(tuple(vectors[each] for each in relation), masks[:2], relation_heads)
        visible = visible_keys(*masks)[:, None]
        return np.asarray(jax.nn.softmax(scores, axis=-1, where=visible))

    def generate(
        self, texts: Texts, *, max_length: int = 64, key: jax.Array | None = None, **decoding: Any
    ) -> list[str]:
        """The model's continuation of each text: what its decoder generates, without the end.

        Args:
            texts: what the encoder reads.
            max_length: tokens generated at most.
            key: for `strategy="sample"`, such as `jax.random.key(0)`.
            **decoding: as of `models.generation.generation.Decoding`: `strategy`, `temperature`, `beams`, ...
        """
        sources = self._ids(texts)
        longest = max(map(len, sources), default=1)
        length = -(-longest // _GENERATE_LENGTHS) * _GENERATE_LENGTHS
        tokens = _padded(sources, self.config.pad_id, length)
        decoder = _cached_decoder(self.config, Decoding(max_length=max_length, **decoding))
        generated = np.asarray(decoder(self.params, tokens, key).tokens)
        return [self.tokenizer.decode(ids[ids != self.config.pad_id]) for ids in generated]

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: str | None = None) -> None:
        """Writes a Hugging Face folder: weights, settings, tokenizer, model card. It appears atomically.

        The folder must not exist, or be empty. `dtype` is float32, bfloat16 or float16; None writes what the model has.
        """
        name = os.path.basename(os.path.abspath(folder))
        card = model_card(name, self.config, self.manifest, self.step)
        dtype = dtype or self.config.dtype
        huggingface.save(folder, self.params, self.config, self.vocabulary_file, dtype, model_card=card)

    def _ids(self, texts: Texts) -> list[list[int]]:
        """Ids with EOS after each text; those that are ids already are taken as they are."""
        texts = [texts] if isinstance(texts, str) else texts
        return [
            [*self.tokenizer.encode(each), self.config.eos_id] if isinstance(each, str) else list(each)
            for each in texts
        ]


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    vocabulary_file: str | None = None,
    extra_ids: int = 100,
) -> Model:
    """Reads a model: the bundled teacher, a run, a Hugging Face folder or hub name, or a T5X checkpoint.

    Args:
        source: "bundled", a model directory (its last step) or `checkpoints/<step>` in it, or a foreign checkpoint.
        dtype: float32 or bfloat16: of its parameters and its computations.
        vocabulary_file: a SentencePiece model; None uses the one stored with the model.
        extra_ids: sentinels above the pieces of `vocabulary_file`.
    """
    opened = open_model(os.fspath(source), dtype)
    vocabulary = choose_vocabulary(opened, vocabulary_file, extra_ids)
    print_notes(opened)
    # Each array goes straight onto the device, so that no second copy of the model is in memory.
    params = opened.load_on(make_mesh(1, devices=jax.devices()[:1]))
    return Model(
        config=opened.config,
        params=params,
        vocabulary_file=vocabulary,
        step=opened.step,
        manifest=opened.manifest,
    )


@functools.lru_cache(maxsize=32)
def _compiled(config: ModelConfig, reads: tuple) -> Callable[[Params, Batch], Output]:
    """The forward pass, compiled once for what is read and for each length: operation by operation it is far slower."""
    taps, hidden, encoded, head = reads
    reads = Reads(taps=dict(taps), hidden=hidden, encoded=encoded, head=head)
    return jax.jit(lambda params, batch: apply(config, params, batch, reads))


def _padded(rows: Sequence[Sequence[int]], value: int, length: int | None = None) -> jax.Array:
    """int32 [rows, length], by default as long as the longest."""
    filled = np.full((len(rows), length or max(map(len, rows), default=0)), value, np.int32)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = row
    return jnp.asarray(filled)


def _ones(rows: Sequence[Sequence[int]]) -> jax.Array:
    return _padded([[1] * len(row) for row in rows], 0)
