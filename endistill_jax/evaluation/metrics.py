"""Metrics of the downstream tasks, in percent as T5 reports them: scalars by name, in SeqIO's metric signature.

`targets` and `predictions` are equally long sequences of label indices, numbers or texts. A prediction that is no label
is `NO_LABEL` and never right. Where no target is known, as in GLUE's test splits, whose labels are hidden, the metrics
on labels and numbers return nothing at all, rather than a meaningless number.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from endistill_jax.core.errors import UserError
from endistill_jax.extras import METRICS, require

NO_LABEL = -1
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

MetricFn = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


def _of_known_targets(metric_fn: MetricFn) -> MetricFn:
    @functools.wraps(metric_fn)
    def checked(targets, predictions):
        hidden = all(target == NO_LABEL for target in targets)
        return {} if hidden else metric_fn(targets, predictions)

    return checked


@_of_known_targets
def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """`accuracy`: share of the predictions that are the target."""
    return {"accuracy": 100 * float(np.mean(np.asarray(targets) == np.asarray(predictions)))}


@_of_known_targets
def f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """`f1`: F1 of label 1 of two (0 and 1); a prediction that is neither counts as the wrong one of the two."""
    targets, predictions = np.asarray(targets), np.asarray(predictions)
    wrong_if_neither = np.where(np.isin(predictions, (0, 1)), predictions, 1 - targets)
    right = np.sum((targets == 1) & (wrong_if_neither == 1))
    marked = np.sum(targets == 1) + np.sum(wrong_if_neither == 1)
    return {"f1": 100 * float(2 * right / marked) if marked else 0.0}


@_of_known_targets
def matthews_corrcoef(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """`matthews_corrcoef`: Matthews correlation, for any number of labels; 0 if all predictions are the same."""
    # Gorodkin (2004): the correlation of the one-hot codings of targets and predictions.
    targets, predictions = np.asarray(targets), np.asarray(predictions)
    labels = np.union1d(targets, predictions)
    # How often each label is a target, and a prediction: [labels]
    target_counts, prediction_counts = (
        np.sum(values[:, None] == labels, axis=0, dtype=float) for values in (targets, predictions)
    )
    size = len(targets)
    covariance = size * np.sum(targets == predictions) - target_counts @ prediction_counts
    variances = (size**2 - target_counts @ target_counts) * (size**2 - prediction_counts @ prediction_counts)
    return {"matthews_corrcoef": 100 * float(covariance / np.sqrt(variances)) if variances else 0.0}


@_of_known_targets
def pearson_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`pearson_corrcoef`: linear correlation; 0 where it is not defined, as for predictions that are all the same."""
    from scipy.stats import pearsonr

    return {"pearson_corrcoef": _correlation(pearsonr, targets, predictions)}


@_of_known_targets
def spearman_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`spearman_corrcoef`: correlation of the ranks; 0 where it is not defined, as in `pearson_corrcoef`."""
    from scipy.stats import spearmanr

    return {"spearman_corrcoef": _correlation(spearmanr, targets, predictions)}


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL` and `rougeLsum`: F-measures of `rouge-score`, as T5 computes them.

    No stemming. For `rougeLsum` a sentence ends at a line end or at a period between spaces (` . `). A score is the
    middle of `BootstrapAggregator`'s interval, the median over 1,000 resamplings of the examples of their mean; these
    are drawn from a fixed seed here, so that the same texts always give the same score.
    """
    check_packages([rouge])
    from rouge_score import rouge_scorer, scoring

    scorer = rouge_scorer.RougeScorer(ROUGE_TYPES)
    aggregator = scoring.BootstrapAggregator()
    for target, prediction in zip(targets, predictions, strict=True):
        aggregator.add_scores(scorer.score(_one_sentence_a_line(target), _one_sentence_a_line(prediction)))
    with _fixed_random_numbers():
        interval = aggregator.aggregate()
    return {name: 100 * float(score.mid.fmeasure) for name, score in interval.items()}


def check_packages(metric_fns: Iterable[Callable[..., Any]]) -> None:
    """Checks that the packages of metrics are installed: before a model is trained, not when it is evaluated."""
    for metric_fn in metric_fns:
        while isinstance(metric_fn, functools.partial):
            metric_fn = metric_fn.func
        if metric_fn is rouge:
            require("rouge_score", "the metric ROUGE", METRICS)


def rank_metrics(
    targets: Sequence[Any], scores: Sequence[float], *, values: Sequence[Any], metric_fns: Sequence[MetricFn]
) -> dict[str, float]:
    """Metrics of a classification by rank: the label with the highest score is the prediction, of equals the first.

    Args:
        targets: the true value of each example, repeated for each of its labels; [examples * labels].
        scores: log-likelihood of each label, an example's labels in their order; [examples * labels].
        values: of each label, what `metric_fns` compare with targets; [labels].
        metric_fns: metrics (targets, predictions) of one entry an example; their names must differ.
    """
    if len(scores) != len(targets) or len(scores) % len(values):
        raise UserError(
            f"{len(scores)} scores for {len(targets)} targets; ranking {len(values)} labels takes one for each of them"
        )
    best = np.asarray(scores, np.float64).reshape(-1, len(values)).argmax(axis=1)  # [examples]
    predictions = [values[index] for index in best]
    computed: dict[str, float] = {}
    for metric_fn in metric_fns:
        computed |= metric_fn(targets[:: len(values)], predictions)
    return computed


def _correlation(function: Callable[..., Any], targets: Sequence[float], predictions: Sequence[float]) -> float:
    if len(set(targets)) < 2 or len(set(predictions)) < 2:
        return 0.0
    return 100 * float(function(targets, predictions).statistic)


def _one_sentence_a_line(text: str) -> str:
    return text.replace(" . ", " .\n")


@contextlib.contextmanager
def _fixed_random_numbers() -> Iterator[None]:
    # rouge-score resamples with NumPy's global generator, whose state is restored.
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)
