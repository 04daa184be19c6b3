"""Tokenizers without SeqIO: ids, texts and fingerprints are those of its vocabularies."""

import pytest

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary, pieces_of_vocabulary
from endistill_jax.checkpoints.models import BUNDLED_FOLDER
from endistill_jax.checkpoints.tokenizer import load_tokenizer, sentinel_ids
from endistill_jax.core.errors import UserError

MODEL = BUNDLED_FOLDER / "spiece.model"
TEXTS = (
    "",
    " ",
    "Return the number of items in a container.",
    "  two   spaces\tand\na line ",
    "naïve café, 雪, 😀 and \u0301",
    "a <extra_id_0> b <extra_id_99>s, not glued<extra_id_1>",
    "<pad> </s> <unk>",
)
IDS = ([], [0, 0], [5, 9, 300, 1, 7, 8], [2, 8099, 8000, 7999, 4], [9000, 100_000, 12, 0, 0], [1], list(range(3, 400)))


@pytest.mark.parametrize(("spec", "extra_ids"), [(MODEL, 100), (MODEL, 7), (MODEL, 0), ("bytes", 100), ("bytes", 0)])
def test_a_tokenizer_is_seqios_vocabulary_of_the_same_file(spec, extra_ids):
    pytest.importorskip("seqio")
    from endistill_jax.data.vocabulary import load_vocabulary

    ours, theirs = load_tokenizer(spec, extra_ids=extra_ids), load_vocabulary(spec, extra_ids=extra_ids)
    for name in ("vocab_size", "extra_ids", "pad_id", "eos_id", "unk_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [ours.encode(text) for text in TEXTS] == [list(theirs.encode(text)) for text in TEXTS]
    assert [ours.decode(ids) for ids in IDS] == [theirs.decode(ids) for ids in IDS]
    assert fingerprint_vocabulary(ours) == fingerprint_vocabulary(theirs)
    assert pieces_of_vocabulary(ours) == pieces_of_vocabulary(theirs)
    assert sentinel_ids(ours) == sentinel_ids(theirs) and len(sentinel_ids(ours)) == extra_ids


def test_the_first_sentinel_has_the_highest_id():
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer.encode("<extra_id_0>") == [sentinel_ids(tokenizer)[-1]] == [tokenizer.vocab_size - 1]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "text.model").write_text("text")
    for spec, extra_ids, message in (
        (tmp_path / "missing.model", 100, "no vocabulary file at .*missing.model"),
        (tmp_path / "text.model", 100, "is not a SentencePiece model"),
        (MODEL, -1, "extra_ids is -1"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(spec, extra_ids=extra_ids)
