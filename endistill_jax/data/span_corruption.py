"""Span corruption, the denoising task of T5 (Raffel et al., arXiv 1910.10683, section 3.1.4), on TensorFlow ops.

Spans of a text are masked. Each is replaced by one sentinel in the inputs; the targets are the spans, each after its
sentinel. The first sentinel has the highest id of the vocabulary, the next ones descend. Both end with EOS.

    text     Thank you for inviting me to your party last week
    inputs   Thank you <X> me to your party <Y> week EOS
    targets  <X> for inviting <Y> last EOS
"""

from collections.abc import Mapping

from endistill_jax.checkpoints.tokenizer import sentinel_ids
from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import seqio, tf

MINIMUM_TOKENS = 2  # one token to keep and one to take out


def span_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """(tokens taken out, spans they form) of a text of `length` tokens: rounded, and at least one token kept a span."""
    noise_tokens = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(noise_tokens / mean_span_length), 1)
    return noise_tokens, min(spans, noise_tokens, length - noise_tokens)


def corrupted_lengths(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """(inputs length, targets length) of a text of `length` tokens once corrupted, sentinels and EOS included."""
    noise_tokens, spans = span_counts(length, noise_density, mean_span_length)
    return length - noise_tokens + spans + 1, noise_tokens + spans + 1


def corruption_lengths(
    inputs_length: int, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> tuple[int, int]:
    """(length of the longest text whose corrupted inputs fit into `inputs_length`, length of its targets).

    (568, 114) for (512, 0.15, 3.0). Both lengths of a corrupted text, sentinels and EOS included, never fall as the
    text grows, so every shorter text fits too.
    """
    check_corruption(noise_density, mean_span_length)
    tokens_length = MINIMUM_TOKENS
    if corrupted_lengths(tokens_length, noise_density, mean_span_length)[0] > inputs_length:
        raise UserError(f"inputs of {inputs_length} tokens are too short for span corruption; 3 is the least")
    while corrupted_lengths(tokens_length + 1, noise_density, mean_span_length)[0] <= inputs_length:
        tokens_length += 1
    return tokens_length, corrupted_lengths(tokens_length, noise_density, mean_span_length)[1]


def check_corruption(noise_density: float, mean_span_length: float) -> None:
    """Refuses settings out of range."""
    if not 0 < noise_density < 1:
        raise UserError(f"noise_density is {noise_density}; it is a share between 0 and 1, such as 0.15")
    if not mean_span_length >= 1:
        raise UserError(f"mean_span_length is {mean_span_length}; a span has at least 1 token")


def random_segments(items: tf.Tensor, segments: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Lengths of a uniformly random partition of `items` things into `segments` non-empty runs. [segments]"""
    order = tf.argsort(tf.random.stateless_uniform([items - 1], seed))
    cuts = tf.sort(order[: segments - 1]) + 1
    return tf.concat([cuts, [items]], axis=0) - tf.concat([[0], cuts], axis=0)


def random_spans(length: tf.Tensor, noise_density: float, mean_span_length: float, seed: tf.Tensor) -> tf.Tensor:
    """Number of the run each token is in, from 0: even runs are kept, odd ones are taken out. [length]

    The text begins with a kept run and ends with one that is taken out, as in T5.
    """
    exact_length = tf.cast(length, tf.float64)  # as precise as `span_counts`, so that lengths agree with it
    noise_tokens = tf.clip_by_value(tf.cast(tf.round(exact_length * noise_density), tf.int32), 1, length - 1)
    spans = tf.cast(tf.round(tf.cast(noise_tokens, tf.float64) / mean_span_length), tf.int32)
    spans = tf.minimum(tf.maximum(spans, 1), tf.minimum(noise_tokens, length - noise_tokens))
    kept_seed, noise_seed = tf.unstack(tf.random.split(seed, 2))
    kept_lengths = random_segments(length - noise_tokens, spans, kept_seed)
    noise_lengths = random_segments(noise_tokens, spans, noise_seed)
    run_lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])  # [2 * spans]
    return tf.repeat(tf.range(2 * spans), run_lengths)


def replace_runs(tokens: tf.Tensor, runs: tf.Tensor, parity: int, first_sentinel: int) -> tf.Tensor:
    """Tokens with every run of the given parity replaced by its sentinel: `first_sentinel`, and down from there."""
    replaced = runs % 2 == parity
    starts = tf.concat([[True], runs[1:] != runs[:-1]], axis=0)
    sentinels = first_sentinel - runs // 2
    return tf.boolean_mask(tf.where(replaced, sentinels, tokens), ~replaced | starts)


def corrupt(
    tokens: tf.Tensor,
    seed: tf.Tensor,
    *,
    first_sentinel: int,
    eos_id: int,
    noise_density: float,
    mean_span_length: float,
) -> dict[str, tf.Tensor]:
    """Corrupted `inputs` and `targets` of one text of at least two tokens; the seed alone decides which spans go.

    `tokens` are int32 [length], `seed` two integers; `first_sentinel` is the highest id of the vocabulary.
    """
    runs = random_spans(tf.size(tokens), noise_density, mean_span_length, seed)
    inputs = replace_runs(tokens, runs, 1, first_sentinel)
    # Taking out the kept runs instead leaves the spans, each after the sentinel of the kept run before it.
    targets = replace_runs(tokens, runs, 0, first_sentinel)
    return {name: tf.concat([value, [eos_id]], 0) for name, value in (("inputs", inputs), ("targets", targets))}


def split_into_chunks(dataset: tf.data.Dataset, length: int, concatenate: bool) -> tf.data.Dataset:
    """Texts, elements [tokens], cut into chunks of at most `length` tokens and at least two.

    With `concatenate` texts run on into each other, so that every chunk but the last of all is full (as T5 does for
    pretraining); else each text is cut by itself and its end is a short chunk, for packing to fill up.
    """
    if concatenate:
        chunks = dataset.rebatch(length)
    else:
        chunks = dataset.flat_map(lambda tokens: tf.data.Dataset.from_tensors(tokens).rebatch(length))
    return chunks.filter(lambda tokens: tf.size(tokens) >= MINIMUM_TOKENS)


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    *,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    concatenate: bool = True,
) -> tf.data.Dataset:
    """SeqIO preprocessor: tokenized `targets` of whole documents to corrupted `inputs` and `targets`, EOS included.

    Every pass over a text takes out other spans, decided by SeqIO's seed. See `corrupt` and `split_into_chunks`.
    """
    vocabulary = output_features["targets"].vocabulary
    inputs_length = sequence_length["inputs"]
    tokens_length, targets_length = corruption_lengths(inputs_length, noise_density, mean_span_length)
    if sequence_length["targets"] < targets_length:
        raise UserError(
            f"targets of {sequence_length['targets']} tokens are too short: inputs of {inputs_length} with "
            f"noise_density {noise_density} and mean_span_length {mean_span_length} need {targets_length}"
        )
    spans = span_counts(tokens_length, noise_density, mean_span_length)[1]
    sentinels = sentinel_ids(vocabulary)
    if spans > len(sentinels):
        raise UserError(f"{spans} spans need as many sentinels; the vocabulary has {len(sentinels)} (extra_ids)")

    @seqio.map_over_dataset(num_seeds=1)
    def corrupted(tokens: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        return corrupt(
            tokens,
            tf.stack(seed),
            first_sentinel=sentinels[-1],
            eos_id=vocabulary.eos_id,
            noise_density=noise_density,
            mean_span_length=mean_span_length,
        )

    tokens = dataset.map(lambda example: tf.cast(example["targets"], tf.int32), num_parallel_calls=tf.data.AUTOTUNE)
    return corrupted(split_into_chunks(tokens, tokens_length, concatenate))
