"""The downstream metrics against the libraries that define them, called directly."""

import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation import metrics
from endistill_jax.evaluation.metrics import NO_LABEL

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("rouge_score", reason="needs rouge-score")

TEXTS = (
    ["the cat sat . the dog ran .", "a list of all names", "Return the number of items.", "one two three"],
    ["the dog ran . a cat sat .", "a list of names", "Returns how many items there are.", "four"],
)


def random_labels(number, size=200):
    draws = np.random.default_rng(0)
    targets = draws.integers(0, number, size)
    return targets, np.where(draws.random(size) < 0.6, targets, draws.integers(0, number, size))


@pytest.mark.parametrize("number", [2, 3])
def test_label_metrics_are_scikit_learns(number):
    import sklearn.metrics

    targets, predictions = random_labels(number)
    assert metrics.accuracy(targets, predictions) == {"accuracy": 100 * np.mean(targets == predictions)}
    expected = 100 * sklearn.metrics.matthews_corrcoef(targets, predictions)
    assert metrics.matthews_corrcoef(targets, predictions)["matthews_corrcoef"] == pytest.approx(expected)
    if number == 2:
        expected = 100 * sklearn.metrics.f1_score(targets, predictions)
        assert metrics.f1(targets, predictions)["f1"] == pytest.approx(expected)


def test_f1_counts_what_is_no_label_as_the_wrong_label():
    # Two right of the three ones; what is no label makes one more missed and one more false one.
    targets, predictions = [1, 1, 1, 0, 0], [1, 1, NO_LABEL, NO_LABEL, 0]
    assert metrics.f1(targets, predictions)["f1"] == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.f1([1, 0], [0, 0])["f1"] == 0.0


def test_correlations_are_scipys():
    import scipy.stats

    draws = np.random.default_rng(1)
    targets = draws.uniform(0, 5, 50)
    predictions = targets + draws.normal(0, 1, 50)
    pearson, spearman = metrics.pearson_corrcoef(targets, predictions), metrics.spearman_corrcoef(targets, predictions)
    assert pearson["pearson_corrcoef"] == pytest.approx(100 * scipy.stats.pearsonr(targets, predictions)[0])
    assert spearman["spearman_corrcoef"] == pytest.approx(100 * scipy.stats.spearmanr(targets, predictions)[0])


def test_constant_predictions_correlate_with_nothing():
    targets, same = [0.0, 2.0, 5.0], [3.0, 3.0, 3.0]
    assert metrics.pearson_corrcoef(targets, same) == {"pearson_corrcoef": 0.0}
    assert metrics.spearman_corrcoef(targets, same) == {"spearman_corrcoef": 0.0}
    assert metrics.matthews_corrcoef([0, 1, 1], [1, 1, 1]) == {"matthews_corrcoef": 0.0}


@pytest.mark.parametrize(
    "metric_fn",
    [metrics.accuracy, metrics.f1, metrics.matthews_corrcoef, metrics.pearson_corrcoef, metrics.spearman_corrcoef],
)
def test_hidden_targets_have_no_figure(metric_fn):
    # Or predictions that are no label would all be right.
    assert metric_fn([NO_LABEL] * 3, [NO_LABEL, 0, 1]) == {}


def test_rouge_is_rouge_scores_middle_of_the_bootstrap():
    from rouge_score import rouge_scorer, scoring

    scorer, aggregator = rouge_scorer.RougeScorer(metrics.ROUGE_TYPES), scoring.BootstrapAggregator()
    for target, prediction in zip(*TEXTS, strict=True):
        lines = [text.replace(" . ", " .\n") for text in (target, prediction)]
        aggregator.add_scores(scorer.score(*lines))
    np.random.seed(0)
    expected = {name: 100 * score.mid.fmeasure for name, score in aggregator.aggregate().items()}
    assert metrics.rouge(*TEXTS) == pytest.approx(expected)
    assert set(expected) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_rouge_is_the_same_every_time_and_leaves_numpys_random_state_alone():
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    first = metrics.rouge(*TEXTS)
    assert np.array_equal(np.random.random(3), expected)
    assert metrics.rouge(*TEXTS) == first


def test_rouge_lsum_does_not_mind_the_order_of_sentences():
    rouge = metrics.rouge(["the cat sat . the dog ran ."], ["the dog ran . the cat sat ."])
    assert rouge["rougeLsum"] == 100.0 > rouge["rougeL"]
    assert metrics.rouge(["the cat sat\nthe dog ran"], ["the dog ran . the cat sat"])["rougeLsum"] == 100.0


def test_perfect_predictions_score_a_hundred():
    labels = [0, 1, 1, 0]
    for metric_fn in (metrics.accuracy, metrics.f1, metrics.matthews_corrcoef):
        assert list(metric_fn(labels, labels).values()) == pytest.approx([100.0])
    for metric_fn in (metrics.pearson_corrcoef, metrics.spearman_corrcoef):
        assert list(metric_fn([0.0, 1.2, 5.0], [0.0, 1.2, 5.0]).values()) == pytest.approx([100.0])
    assert list(metrics.rouge(TEXTS[0], TEXTS[0]).values()) == pytest.approx([100.0] * 4)


def test_rank_predicts_the_label_of_highest_score():
    targets = [0, 0, 0, 2, 2, 2, 1, 1, 1]
    scores = [-1.0, -2.0, -3.0, -9.0, -5.0, -4.0, -2.0, -7.0, -1.0]  # labels 0, 2 and 2
    ranked = metrics.rank_metrics(targets, scores, values=(0, 1, 2), metric_fns=(metrics.accuracy,))
    assert ranked["accuracy"] == pytest.approx(100 * 2 / 3)


def test_rank_wants_a_score_for_every_label():
    with pytest.raises(UserError, match="5 scores for 5 targets; ranking 3 labels"):
        metrics.rank_metrics([0] * 5, [0.0] * 5, values=(0, 1, 2), metric_fns=(metrics.accuracy,))
