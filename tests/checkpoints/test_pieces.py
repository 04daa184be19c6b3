"""Vocabularies told apart by what a tokenizer.json says of them."""

import json

import pytest

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.fingerprint import (
    fingerprint_pieces,
    own_sentinels,
    pieces_of_json,
    pieces_of_vocabulary,
)
from endistill_jax.checkpoints.tokenizer import fingerprint_of_pieces
from endistill_jax.core.errors import UserError

seqio = pytest.importorskip("seqio")


def _fingerprint(path, extra_ids):
    return fingerprint_pieces(pieces_of_vocabulary(seqio.SentencePieceVocabulary(str(path), extra_ids)))


def _write(path, vocabulary, added=(), kind="Unigram"):
    tokens = [{"id": number, "content": piece, "special": True} for number, piece in added]
    path.write_text(json.dumps({"model": {"type": kind, "vocab": vocabulary}, "added_tokens": tokens}))
    return path


def _entries(path):
    pieces = pieces_of_vocabulary(seqio.SentencePieceVocabulary(str(path), 0))
    return [[piece, -float(number)] for number, piece in enumerate(pieces)]


def test_tokenizer_of_the_same_vocabulary_has_its_fingerprint_wherever_the_sentinels_stand(tmp_path, vocabulary_file):
    entries, sentinels = _entries(vocabulary_file), [f"<extra_id_{index}>" for index in (2, 1, 0)]
    numbered = list(enumerate(sentinels, start=len(entries)))
    within = _write(tmp_path / "within.json", [*entries, *([name, 0.0] for name in sentinels)], numbered)
    above = _write(tmp_path / "above.json", entries, [*numbered, (len(entries) + 3, "<mine>")])
    for path in (within, above):
        assert fingerprint_pieces(pieces_of_json(path)) == _fingerprint(vocabulary_file, 3)
        assert fingerprint_pieces(pieces_of_json(path)) != _fingerprint(vocabulary_file, 4)


def test_mt5s_sentinels_are_the_same_by_either_name(tmp_path, mt5_vocabulary_file, vocabulary_file):
    path = _write(tmp_path / "tokenizer.json", _entries(mt5_vocabulary_file))
    assert own_sentinels(pieces_of_json(path)) == 100
    assert fingerprint_of_pieces(tmp_path) == _fingerprint(mt5_vocabulary_file, 0) == _fingerprint(vocabulary_file, 100)


def test_vocabularies_of_one_size_are_told_apart(tmp_path, vocabulary_file):
    entries = _entries(vocabulary_file)
    expected = _fingerprint(vocabulary_file, 0)
    for changed in (
        [*entries[:5], entries[6], entries[5], *entries[7:]],  # two pieces exchanged
        [*entries[:-1], ["other", 0.0]],
    ):
        assert fingerprint_pieces(pieces_of_json(_write(tmp_path / "tokenizer.json", changed))) != expected
    assert pieces_of_vocabulary(seqio.ByteVocabulary(0)) is None and fingerprint_pieces(None) is None


def test_vocabulary_that_is_a_dictionary_is_read_by_its_ids(tmp_path):
    path = _write(tmp_path / "tokenizer.json", {"b": 1, "a": 0, "c": 2}, kind="BPE")
    assert pieces_of_json(path) == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"vocab": [1, 2]}}', '{"model": {"vocab": null}}'])
def test_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json is not a valid tokenizer.json"):
        fingerprint_of_pieces(tmp_path)


def test_only_sentinels_in_t5s_order_at_the_end_count():
    assert own_sentinels(["a", "▁<extra_id_1>", "▁<extra_id_0>"]) == 2
    assert own_sentinels(["a", "<extra_id_0>", "<extra_id_1>"]) == 0
    assert own_sentinels(["<extra_id_1>", "<extra_id_0>", "a"]) == 0
    assert own_sentinels(["<extra_id_0>"]) == 1 and own_sentinels([]) == 0


def test_folder_without_a_sentencepiece_model_tells_its_pieces(tmp_path, params, config, vocabulary_file):
    huggingface.save(tmp_path / "model", params, config)
    assert huggingface.open_folder(tmp_path / "model").pieces is None
    _write(tmp_path / "model" / "tokenizer.json", _entries(vocabulary_file))
    source = huggingface.open_folder(tmp_path / "model")
    assert source.vocabulary is None and source.pieces == _fingerprint(vocabulary_file, 0)
    assert "tokenizer.json alone" in source.notes[0]
    (tmp_path / "model" / "spiece.model").write_bytes(vocabulary_file.read_bytes())
    assert huggingface.open_folder(tmp_path / "model").pieces is None
