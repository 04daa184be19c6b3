"""Tokenizer files, in the forms that versions of transformers have given them."""

import dataclasses
import json

import pytest

from endistill_jax.checkpoints.tokenizer import VocabularyFile, check_vocabulary, vocabulary_of, write_tokenizer
from endistill_jax.core.errors import UserError

SENTINELS = [f"<extra_id_{index}>" for index in range(7)]


@pytest.fixture
def tokenizer(tmp_path, vocabulary_file):
    """A folder with a SentencePiece model alone."""
    (tmp_path / "spiece.model").write_bytes(vocabulary_file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("files", "extra_ids"),
    [
        ({}, 100),
        ({"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}, 100),
        ({"tokenizer_config.json": {"extra_ids": 0, "additional_special_tokens": None}}, 0),  # mT5
        ({"tokenizer_config.json": {"extra_ids": 7, "additional_special_tokens": SENTINELS}}, 7),
        ({"tokenizer_config.json": {"extra_ids": None, "additional_special_tokens": SENTINELS}}, 7),
        ({"tokenizer_config.json": {"additional_special_tokens": [{"content": s} for s in SENTINELS]}}, 7),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": SENTINELS[0]}}}}, 1),
        ({"tokenizer_config.json": {"extra_special_tokens": ["<pad>", *SENTINELS]}}, 7),  # transformers 5
        ({"tokenizer_config.json": {"extra_ids": 5}, "tokenizer.json": {"added_tokens": SENTINELS}}, 5),
        ({"tokenizer.json": {"added_tokens": [{"id": 9, "content": s} for s in SENTINELS]}}, 7),
    ],
)
def test_number_of_sentinels_is_found_however_it_is_said(tokenizer, files, extra_ids):
    for name, content in files.items():
        (tokenizer / name).write_text(json.dumps(content))
    assert vocabulary_of(tokenizer) == VocabularyFile(str(tokenizer / "spiece.model"), extra_ids)


def test_sentinels_that_are_pieces_already_are_not_counted_again(tmp_path, make_vocabulary):
    make_vocabulary(tmp_path / "spiece.model", user_defined_symbols=SENTINELS[:5])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": SENTINELS}))
    assert vocabulary_of(tmp_path).extra_ids == 2


def test_model_that_ends_with_sentinels_needs_no_others(tmp_path, mt5_vocabulary_file):
    (tmp_path / "spiece.model").write_bytes(mt5_vocabulary_file.read_bytes())
    sentinels = [f"<extra_id_{index}>" for index in range(100)]
    for settings in ({}, {"extra_ids": 0}, {"additional_special_tokens": sentinels}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert vocabulary_of(tmp_path).extra_ids == 0


def test_folder_without_a_sentencepiece_model_has_no_vocabulary(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}))
    assert vocabulary_of(tmp_path) is None


def test_damaged_tokenizer_files_are_named(tokenizer):
    (tokenizer / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        vocabulary_of(tokenizer)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tokenizer / "spiece.model").write_text("not a model")
    with pytest.raises(UserError, match="spiece.model is not a SentencePiece model"):
        vocabulary_of(tokenizer)


def test_vocabulary_that_cannot_go_with_the_model_is_refused(tmp_path, config, vocabulary_file, make_vocabulary):
    text = tmp_path / "text.model"
    text.write_text("not a model")
    begins = make_vocabulary(tmp_path / "begins.model", bos_id=3, unk_piece="?", pad_id=-1)
    for file, words in (
        (tmp_path / "absent.model", "no vocabulary file at .*absent.model"),
        (text, "is not a SentencePiece model"),
        (begins, r"ids \(-1, 1, 2\); T5's are \(0, 1, 2\)"),
        (vocabulary_file, r"ids \(100 of them extra\) and the model only 40"),
    ):
        with pytest.raises(UserError, match=words):
            check_vocabulary(VocabularyFile(str(file), 100), config)
    check_vocabulary(VocabularyFile(str(vocabulary_file), 100), dataclasses.replace(config, vocab_size=32128))


def test_vocabulary_must_pad_and_end_as_the_model_does(tmp_path, config, vocabulary_file, make_vocabulary):
    # MADLAD-400's: unknown 0, beginning 1, which pads, end 2.
    madlad = VocabularyFile(str(make_vocabulary(tmp_path / "m.model", pad_id=-1, unk_id=0, bos_id=1, eos_id=2)), 0)
    config = dataclasses.replace(config, vocab_size=300)
    with pytest.raises(UserError, match="T5's are"):
        check_vocabulary(madlad, config)
    own = dataclasses.replace(config, pad_id=1, eos_id=2)
    check_vocabulary(madlad, own)
    with pytest.raises(UserError, match=r"has pad and eos ids \(0, 1\); the model's are \(1, 2\)"):
        check_vocabulary(VocabularyFile(str(vocabulary_file), 0), own)
    write_tokenizer(tmp_path, madlad, own.pad_id)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["pad_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_written_files_name_the_vocabulary_and_its_special_pieces_and_are_found_again(tmp_path, vocabulary_file):
    write_tokenizer(tmp_path, VocabularyFile(str(vocabulary_file), 10))
    assert (tmp_path / "spiece.model").read_bytes() == vocabulary_file.read_bytes()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["pad_token"], settings["eos_token"], settings["unk_token"]) == ("<pad>", "</s>", "<unk>")
    assert settings["extra_ids"] == 10 and settings["additional_special_tokens"][9] == "<extra_id_9>"
    assert vocabulary_of(tmp_path) == VocabularyFile(str(tmp_path / "spiece.model"), 10)
