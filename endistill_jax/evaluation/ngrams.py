"""Unigram and bigram reference losses: what a denoiser gets without reading its input.

Counted on the training targets and scored on held-out ones, over the same events as the model's loss: every
target token of the vocabulary, given (for the bigram) the decoder input token at the same position, which may be a
sentinel or the start token.

    p1(w)     = (c(w) + smoothing) / (n + smoothing * vocab_size)
    p2(w | v) = a(v) * c(v, w) / c(v) + (1 - a(v)) * p1(w)

The weights `a` are Jelinek and Mercer's: one for each power of two of the context's count `c(v)`, fitted by expectation
maximization to the training tokens with each token left out of the counts that predict it (deleted interpolation). A
context never seen has weight 0. With positive smoothing no probability is zero.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from endistill_jax.core.errors import UserError

_BUCKETS = 64  # powers of two of an int64 count


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramModel:
    """A fitted unigram and interpolated bigram model over target tokens."""

    unigram: np.ndarray  # p1, float64 [vocab], sums to one
    context_counts: np.ndarray  # c(v), int64 [vocab]
    pair_codes: np.ndarray  # sorted distinct `v * vocab + w` of the pairs seen, int64 [pairs]
    pair_counts: np.ndarray  # how often each was seen, int64 [pairs]
    interpolation: np.ndarray  # a(v), the weight of the bigram's relative frequency, float64 [vocab]

    def unigram_nats(self, targets: np.ndarray) -> np.ndarray:
        """`-log p1(target)` of each token, in nats; float64 in the shape of `targets`."""
        return -np.log(self.unigram[targets])

    def bigram_nats(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """`-log p2(target | previous)` of each token, in nats; float64 in the shape of `targets`."""
        codes = previous.astype(np.int64) * self.unigram.size + targets
        places = np.minimum(np.searchsorted(self.pair_codes, codes), self.pair_codes.size - 1)
        counts = np.where(self.pair_codes[places] == codes, self.pair_counts[places], 0)
        frequency = counts / np.maximum(self.context_counts[previous], 1)
        weight = self.interpolation[previous]
        return -np.log(weight * frequency + (1 - weight) * self.unigram[targets])


class NgramCounter:
    """Gathers target tokens and the ones before them from batches, for `fit`; 8 bytes a token.

    Feed it one pass over training examples: repeated examples bias the pair counts. Once `max_tokens` are gathered,
    `full` is true and further batches are ignored.
    """

    def __init__(self, vocab_size: int, *, max_tokens: int = 2_000_000):
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.tokens = 0
        self._codes: list[np.ndarray] = []  # `previous * vocab_size + target`

    @property
    def full(self) -> bool:
        return self.tokens >= self.max_tokens

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts a batch's targets, [batch, target], where `decoder_loss_weights` is not zero; it may be packed."""
        kept = np.asarray(batch["decoder_loss_weights"]) > 0
        room = max(self.max_tokens - self.tokens, 0)
        previous = np.asarray(batch["decoder_input_tokens"])[kept].astype(np.int64)[:room]
        targets = np.asarray(batch["decoder_target_tokens"])[kept].astype(np.int64)[:room]
        largest = max(previous.max(initial=0), targets.max(initial=0))
        if largest >= self.vocab_size:
            raise UserError(f"token id {largest} in the targets; a vocabulary of {self.vocab_size} ends before it")
        self._codes.append(previous * self.vocab_size + targets)
        self.tokens += targets.size

    def fit(self, *, smoothing: float = 0.5, iterations: int = 50) -> NgramModel:
        """Fits a model to the counts so far; counting may continue afterwards.

        `smoothing`, positive, is added to every unigram count. There are fewer than `iterations` of expectation
        maximization where the weights have converged.
        """
        if not self.tokens:
            raise UserError("no target tokens to count for the unigram and bigram references; is the split empty?")
        codes, counts = np.unique(np.concatenate(self._codes), return_counts=True)
        contexts, targets = np.divmod(codes, self.vocab_size)
        context_counts = np.zeros(self.vocab_size, np.int64)
        target_counts = np.zeros(self.vocab_size, np.int64)
        np.add.at(context_counts, contexts, counts)
        np.add.at(target_counts, targets, counts)
        mass = smoothing * self.vocab_size
        # Leave-one-out estimates from the rest of the training tokens.
        left_out_unigram = (target_counts[targets] - 1 + smoothing) / (self.tokens - 1 + mass)
        left_out_bigram = (counts - 1) / np.maximum(context_counts[contexts] - 1, 1)
        bucket_weights = _interpolation_weights(
            left_out_bigram, left_out_unigram, counts, _bucket(context_counts[contexts]), iterations
        )
        return NgramModel(
            unigram=(target_counts + smoothing) / (self.tokens + mass),
            context_counts=context_counts,
            pair_codes=codes,
            pair_counts=counts,
            interpolation=np.where(context_counts > 0, bucket_weights[_bucket(context_counts)], 0.0),
        )


def _bucket(counts: np.ndarray) -> np.ndarray:
    """floor(log2(count)), with counts 0 and 1 in one bucket."""
    return np.log2(np.maximum(counts, 1)).astype(np.int64)


def _interpolation_weights(
    bigram: np.ndarray, unigram: np.ndarray, counts: np.ndarray, buckets: np.ndarray, iterations: int
) -> np.ndarray:
    """The mixture weights, one a bucket, that maximize the left-out likelihood; all but `iterations` [pairs].

    Each round sets a weight to the mean share of the bigram in its bucket's probabilities. Returns float64 [64].
    """
    totals = np.bincount(buckets, counts, minlength=_BUCKETS)
    weights = np.full(_BUCKETS, 0.5)
    for _ in range(iterations):
        mixed = weights[buckets]
        share = mixed * bigram / (mixed * bigram + (1 - mixed) * unigram)
        updated = np.bincount(buckets, counts * share, minlength=_BUCKETS) / np.maximum(totals, 1)
        moved = np.abs(updated - weights).max(where=totals > 0, initial=0.0)
        weights = updated
        if moved < 1e-5:
            break
    # A likelihood that only repeats itself would drive a weight to one and an unseen pair's probability to zero.
    return np.minimum(weights, 1 - 1e-4)
