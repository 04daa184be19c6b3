"""Vocabularies: T5's conventions, the same ids as Hugging Face gives, training that repeats, errors that help."""

import pytest

from endistill_jax.checkpoints.tokenizer import sentinel_ids
from endistill_jax.core.errors import UserError
from endistill_jax.data import vocabulary

NOUNS, OTHERS = ("list", "item", "value", "module", "name"), ("class", "function", "file", "sequence")
TEXTS = [f"The {noun} of the {other} is {verb}." for noun in NOUNS for other in OTHERS for verb in ("read", "closed")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "sub" / "spiece.model"
    vocabulary.train_sentencepiece(TEXTS, path, size=100)
    return path


def test_conventions_of_t5(model):
    loaded = vocabulary.load_vocabulary(model)
    assert (loaded.pad_id, loaded.eos_id, loaded.unk_id) == (0, 1, 2)
    assert loaded.vocab_size == 100 + 100
    text = "The list of the class is read"
    assert loaded.decode(loaded.encode(text)) == text
    assert list(loaded.encode("line\n   end")) == list(loaded.encode("line end"))


def test_training_repeats_and_leaves_nothing_else(model, tmp_path):
    vocabulary.train_sentencepiece(iter(TEXTS), tmp_path / "again.model", size=100)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_printable_ascii_is_never_unknown(model):
    loaded = vocabulary.load_vocabulary(model)
    assert 2 not in loaded.encode("".join(chr(code) for code in range(33, 127)))


def test_bundled_vocabulary():
    bundled = vocabulary.bundled_vocabulary()
    assert bundled.vocab_size == 8100
    pieces = bundled.encode("Return the first item of the sequence, or raise IndexError if it is empty.")
    assert len(pieces) == 17


def test_same_ids_as_hugging_face():
    transformers = pytest.importorskip("transformers")
    import inspect
    import json
    import pathlib
    import shutil
    import tempfile

    bundled = vocabulary.bundled_vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(vocabulary.BUNDLED, pathlib.Path(folder) / "spiece.model")
        tokenizer = transformers.T5Tokenizer.from_pretrained(folder, extra_ids=100)
    assert len(tokenizer) == 8100
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [8099, 8000]
    texts = [inspect.getdoc(thing) for thing in (json.dumps, inspect, shutil.copytree, pathlib.Path, dict, str.format)]
    for text in [*texts, "naïve “quotes” ﬁne ½ \t tab\r\n end", "日本"]:
        assert [*bundled.encode(text), 1] == tokenizer(text).input_ids


def test_sentinels_are_extra_ids_or_the_last_pieces(tmp_path, model):
    plain = vocabulary.load_vocabulary(model, extra_ids=7)
    assert sentinel_ids(plain) == range(100, 107)
    (tmp_path / "mt5.model").write_bytes(plain.sp_model)
    assert sentinel_ids(vocabulary.load_vocabulary(tmp_path / "mt5.model", extra_ids=0)) == range(100, 107)
    assert len(sentinel_ids(vocabulary.load_vocabulary(model, extra_ids=0))) == 0
    assert sentinel_ids(vocabulary.load_vocabulary("bytes")) == range(259, 359)
    assert len(sentinel_ids(vocabulary.load_vocabulary("bytes", extra_ids=0))) == 0


def test_bytes():
    loaded = vocabulary.load_vocabulary("bytes")
    assert loaded.vocab_size == 3 + 256 + 100
    assert loaded.decode(loaded.encode("né\n")) == "né\n"


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], 100, "no text"),
        (["  ", "\n"], 100, "no text"),
        (["hello world"] * 3, 8000, "8000 pieces on this text: Vocabulary size too high"),
        (["hello world"] * 3, 10, "10 pieces on this text: Vocabulary size is smaller"),
    ],
)
def test_impossible_training_is_one_clear_line(texts, size, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        vocabulary.train_sentencepiece(texts, tmp_path / "sub" / "none.model", size=size)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sub").exists()


def test_files_that_are_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match="no vocabulary file at"):
        vocabulary.load_vocabulary(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(UserError, match="text.model is not a SentencePiece model"):
        vocabulary.load_vocabulary(tmp_path / "text.model")
