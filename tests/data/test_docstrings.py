"""Reading docstrings: what is found, what is left out, and which split a text is in."""

import ast
import sys
import textwrap

import pytest

from endistill_jax.data import docstrings
from endistill_jax.data.docstrings import Document, content_key, split_of, without_near_copies, word_sequences

LONG = "A text that is long enough to be kept in the corpus, number {}."


def _document(text, source="stdlib", name="f"):
    return Document(text=text, module="m", name=name, source=source)


def test_every_docstring_has_its_qualified_name():
    source = '''
        """Module."""
        try:
            class Outer:
                """Outer
                    indented."""
                async def method(self):
                    """Method."""
                    def inner():
                        "Inner."
        except ImportError:
            def fallback():
                """Fallback."""
        def without(): pass
    '''
    found = dict(docstrings.docstrings(ast.parse(textwrap.dedent(source))))
    assert found == {
        "": "Module.",
        "Outer": "Outer\nindented.",
        "Outer.method": "Method.",
        "Outer.method.inner": "Inner.",
        "fallback": "Fallback.",
    }


def test_tests_and_generated_code_are_left_out_and_nothing_is_run(tmp_path):
    package = tmp_path / "package"
    for name in ("__init__.py", "module.py", "test_module.py", "types_pb2.py", "tests/helpers.py", "broken.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(f'"""Docstring of {name}."""\nraise SystemExit("was run")\n')
    (package / "broken.py").write_text('"""Docstring."""\ndef (:\n')
    found = list(docstrings.read_folder(tmp_path, "here"))
    assert [(document.module, document.source) for document in found] == [
        ("package", "here"),
        ("package.module", "here"),
    ]
    assert "package" not in sys.modules


def test_short_and_repeated_texts_are_dropped_and_the_standard_library_comes_first():
    same = LONG.format(1)
    kept = docstrings.unique_documents(
        [_document(same.replace(" ", "\n  "), "other"), _document(same), _document("Short."), _document(LONG.format(2))]
    )
    assert sorted(document.text for document in kept) == [same, LONG.format(2)]
    assert {document.source for document in kept} == {"stdlib"}


def test_order_does_not_depend_on_the_order_of_reading():
    documents = [_document(LONG.format(number), name=str(number)) for number in range(20)]
    assert docstrings.unique_documents(documents) == docstrings.unique_documents(reversed(documents))


def test_split_ignores_case_digits_punctuation_and_space():
    assert split_of("Returns `x` 12 times.") == split_of("returns x\n  3 times")
    assert content_key("a  b\n") == content_key("a b") != content_key("ab")


def test_splits_have_their_shares_and_never_change():
    texts = [f"{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)} text" for n in range(4000)]
    splits = [split_of(text) for text in texts]
    assert splits.count("train") == pytest.approx(3600, abs=100)
    assert splits.count("validation") == pytest.approx(200, abs=70)
    # Recorded: a changed split would put texts that a teacher has trained on among the held-out ones.
    recorded = {"alpha": "train", "old dog": "validation", "gold": "test", "12 + 34": "train"}
    assert {text: split_of(text) for text in recorded} == recorded


def test_closure_of_installed_distributions():
    closure = docstrings.installed_closure(["seqio"])
    assert {"seqio", "numpy", "absl-py"} <= closure.keys()
    assert list(closure) == sorted(closure)
    assert docstrings.installed_closure(["no-such-distribution"]) == {}


WORDS = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(200)]


def _text(start, stop):
    return " ".join(WORDS[start:stop])


def test_word_sequences_ignore_case_digits_and_punctuation():
    assert word_sequences("One two (three), four 5 five six seven EIGHT nine.") == {
        "one two three four five six seven eight",
        "two three four five six seven eight nine",
    }
    assert word_sequences("Too short") == {"too short"}
    assert word_sequences("") == {""}


def test_training_texts_that_are_mostly_held_out_go():
    train, held_out = without_near_copies([_text(0, 30), _text(20, 60), _text(100, 150)], [_text(0, 40)])
    assert train == {_text(20, 60), _text(100, 150)}
    assert held_out == {_text(0, 40)}


def test_held_out_texts_that_long_training_texts_contain_go():
    train, held_out = without_near_copies([_text(0, 100)], [_text(0, 30), _text(90, 130)])
    assert train == {_text(0, 100)}
    assert held_out == {_text(90, 130)}
