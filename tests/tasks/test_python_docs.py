"""The downstream tasks of the offline corpus, on a corpus of a few source files."""

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.data.python_docs import PythonDocsConfig
from endistill_jax.data.text_pipeline import resolve_task
from endistill_jax.tasks import python_docs
from endistill_jax.tasks.python_docs import module_pair, names_pattern, summary_pair
from endistill_jax.tasks.text_to_text import ranked_task, task_labels

REST = "The items are read one by one until there are none, and each is handed on to the function that is given."
LENGTHS = {"inputs": 64, "targets": 16}
LABELS = ("jax", "jaxlib", "logging")


def module_pair_of(text, module):
    return module_pair(text, module, labels=frozenset(LABELS), pattern=names_pattern(LABELS))


def test_a_summary_is_the_first_paragraph_and_the_input_the_rest():
    text = f"Count the items\nof a sequence.\n\n{REST}\n\nReturns:\n    how many there are"
    assert summary_pair(text) == (f"summarize: {REST} Returns: how many there are", "Count the items of a sequence.")


@pytest.mark.parametrize(
    "text",
    [
        "Count the items of a sequence.",
        f"Count the items of a sequence\n\n{REST}",
        f"Count items.\n\n{REST}",
        f"{'Count ' * 48}items.\n\n{REST}",
        "Count the items of a sequence.\n\nReads them all.",
        f"Count the items of a sequence.\n\nIn short: count the items\nof a sequence. {REST}",
        "",
    ],
    ids=["one paragraph", "no sentence", "short", "long", "nothing to summarize", "said again", "empty"],
)
def test_docstrings_that_do_not_serve_are_left_out(text):
    assert summary_pair(text) is None


def test_a_module_is_told_from_a_text_without_names():
    text = "Traces jax.numpy code,\n  and returns\na my_jax.Tracer of JAX; the logging is as ever, and as it was."
    expected = "module: Traces _ code, and returns a _ of _; the _ is as ever, and as it was."
    assert module_pair_of(text, "jax.interpreters.ad") == (expected, "jax")
    assert module_pair_of(text, "jaxlib.mlir")[1] == "jaxlib"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("ajax relogging jaxon", "ajax relogging jaxon"),
        ("jaxlib.xla_client.Client, jax.", "_, _."),
        ("_jax jax_ __jax__ do_logging", "_ _ _ _"),
        ("`jax`: (logging.Handler)", "`_`: (_)"),
    ],
)
def test_whole_names_are_masked_and_nothing_else(text, masked):
    assert names_pattern(LABELS).sub("_", text) == masked


def test_texts_of_other_modules_or_of_few_words_are_left_out():
    text = "One of the few texts that have enough words in them."
    assert module_pair_of(text, "scipy.stats") is None
    assert module_pair_of(text, "loggings") is None
    assert module_pair_of("jax jax jax jax jax jax jax jax and seven more words.", "jax") is None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of two packages with two hundred functions each, and its configuration."""
    folder = tmp_path_factory.mktemp("corpus")
    for package, thing in (("first", "apples"), ("second", "pears")):
        (folder / package).mkdir()
        words = [f"{a}{b}" for a in ("ba", "do", "fu", "ke", "li", "mo", "na") for b in ("b", "d", "g", "k", "l", "m")]
        functions = [
            f'def f{n}():\n    """Return the {word} {thing} of {other}.\n\n    '
            f'{" ".join(f"{thing} {word} {other} {more}" for more in words[n : n + 12])} {package}.\n    """\n'
            for n, (word, other) in enumerate((w, o) for w in words[:14] for o in words[:14])
        ]
        (folder / package / "__init__.py").write_text("\n".join(functions))
    return PythonDocsConfig(name="fruit", folder=str(folder), files=2)


@pytest.fixture
def tasks(corpus):
    summary = python_docs.python_docs_summary_task(corpus)
    return summary, python_docs.python_docs_module_task(corpus, modules=("first", "second"))


def pairs(task, split):
    dataset = task.get_dataset(LENGTHS, split, shuffle=False)
    return {
        (e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in dataset.as_numpy_iterator()
    }


def test_tasks_read_the_corpus_and_keep_its_splits(tasks):
    for task in tasks:
        train, validation, test = (pairs(task, split) for split in ("train", "validation", "test"))
        assert train and validation and test
        texts = [{inputs for inputs, _ in split} for split in (train, validation, test)]
        assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    summary, module = tasks
    assert all(
        target.startswith("Return the ") and inputs.startswith("summarize: ")
        for inputs, target in pairs(summary, "train")
    )
    assert {target for _, target in pairs(module, "train")} == {"first", "second"}
    assert not any("first" in inputs or "second" in inputs for inputs, _ in pairs(module, "train"))


def test_a_model_that_knows_the_answers_scores_a_hundred(tasks, evaluate_copying):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    pytest.importorskip("rouge_score", reason="needs rouge-score")
    summary, module = tasks
    assert evaluate_copying(summary, "test") == pytest.approx(
        dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 100.0)
    )
    assert evaluate_copying(module, "test") == {"accuracy": 100.0}
    assert evaluate_copying(ranked_task(module), "test") == {"accuracy": 100.0}


def test_registered_tasks_have_labels_that_their_vocabulary_can_write():
    for config, count in (("stdlib", 11), ("packages", 26)):
        task = resolve_task(f"python_docs_{config}_module_v1")
        vocabulary = task.output_features["targets"].vocabulary
        labels = task_labels(task)
        assert len(set(labels)) == count
        assert [vocabulary.decode(vocabulary.encode(label)) for label in labels] == list(labels)
        assert set(resolve_task(f"python_docs_{config}_downstream").rate_per_task_name.values()) == {1.0}
        assert task_labels(f"python_docs_{config}_summary_v1") == ()


def test_a_corpus_of_ones_own_needs_modules(corpus):
    with pytest.raises(UserError, match="configuration 'fruit' needs `modules`"):
        python_docs.python_docs_module_task(corpus)
