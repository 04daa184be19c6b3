"""Near-copies between training and held-out texts."""

from endistill_jax.data.docstrings import without_near_copies, word_sequences

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
