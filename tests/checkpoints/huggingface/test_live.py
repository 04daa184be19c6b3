"""The same model in transformers and here; runs where the `hf` extra is installed."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (the hf extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the hf extra)")
seqio = pytest.importorskip("seqio")

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]

import record_goldens as recorder  # noqa: E402
from comparison import differences, generate_ours, run_ours  # noqa: E402

from endistill_jax.checkpoints import huggingface  # noqa: E402
from endistill_jax.checkpoints.fingerprint import fingerprint_pieces, pieces_of_vocabulary  # noqa: E402
from endistill_jax.checkpoints.tokenizer import VocabularyFile  # noqa: E402
from endistill_jax.core.errors import UserError  # noqa: E402
from endistill_jax.models.family import family_named  # noqa: E402


def assert_same_function(params, config, model, batch):
    theirs = recorder.run_model(model, batch)
    assert max(differences(run_ours(params, config, batch), theirs, batch).values()) < 1e-4
    if config.depth("decoder"):
        generated = recorder.generate(model, batch)
        np.testing.assert_array_equal(generate_ours(params, config, batch, recorder.GENERATED), generated)


@pytest.mark.parametrize("kind", recorder.KINDS)
def test_import_of_what_transformers_saves_computes_and_generates_the_same(tmp_path, kind):
    model = recorder.build_model(kind, seed=1).float()
    model.save_pretrained(tmp_path)
    params, config = huggingface.load(tmp_path)
    assert_same_function(params, config, model, recorder.build_batch(kind, seed=1))


def test_generation_ends_where_transformers_ends_it(tmp_path):
    model, batch = recorder.build_model("gated_untied").float(), recorder.build_batch("gated_untied")
    tokens = recorder.generate(model, batch)
    late = next(token for token in tokens[0, 2:] if token not in tokens[1])
    with torch.no_grad():  # the end becomes likely where that token was
        model.lm_head.weight[1] = 1.1 * model.lm_head.weight[late]
    model.save_pretrained(tmp_path)
    tokens = recorder.generate(model, batch)
    assert 1 in tokens[0] and tokens[0, -1] == 0 and 1 not in tokens[1]
    params, config = huggingface.load(tmp_path)
    np.testing.assert_array_equal(generate_ours(params, config, batch, recorder.GENERATED), tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", recorder.KINDS)
def test_import_and_export_give_transformers_its_tensors_back(tmp_path, kind, dtype, assert_same):
    model = recorder.build_model(kind, seed=2).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    params, config = huggingface.load(tmp_path / "theirs")
    huggingface.save(tmp_path / "ours", params, config, dtype=dtype)
    again = recorder.model_class(kind).from_pretrained(tmp_path / "ours")
    expected, found = model.state_dict(), again.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    # With float16, transformers keeps some of the tensors in float32, in memory and in what it saves.
    again.save_pretrained(tmp_path / "again")
    assert_same(huggingface.load(tmp_path / "again")[0], params)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("kind", recorder.KINDS)
def test_transformers_reads_our_export_whole_and_computes_and_generates_the_same(tmp_path, make_params, kind, copies):
    recorder.build_model(kind).save_pretrained(tmp_path / "theirs")
    _, config = huggingface.load(tmp_path / "theirs")
    params = make_params(config)
    huggingface.save(tmp_path / "ours", params, config, embedding_copies=copies, max_file_bytes=3000)
    cls = recorder.model_class(kind) if recorder.is_encoder(kind) else transformers.AutoModelForSeq2SeqLM
    model, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert_same_function(params, config, model.eval(), recorder.build_batch(kind))


def test_plain_generate_works_on_our_export_whichever_stack_is_deeper(tmp_path, make_params, config):
    batch = recorder.build_batch("gated_untied")
    for depths in ((1, 3), (3, 1)):
        shape = dataclasses.replace(config, num_encoder_layers=depths[0], num_decoder_layers=depths[1])
        params = make_params(shape)
        huggingface.save(tmp_path / str(depths), params, shape)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / str(depths))
        inputs = {"input_ids": torch.tensor(batch["inputs"]), "attention_mask": torch.tensor(batch["inputs"] != 0)}
        tokens = model.generate(**inputs, max_new_tokens=6)[:, 1:].numpy()
        np.testing.assert_array_equal(generate_ours(params, shape, batch, 6)[:, : tokens.shape[1]], tokens)


def test_auto_classes_read_our_export_and_the_tokenizer_gives_our_ids(tmp_path, make_params, config, vocabulary_file):
    config = dataclasses.replace(config, vocab_size=160)  # padded: more rows than ids
    params = make_params(config)
    huggingface.save(tmp_path / "model", params, config, VocabularyFile(str(vocabulary_file), 100), dtype="bfloat16")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert (model.config.vocab_size, model.config.decoder_start_token_id) == (160, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    vocabulary = seqio.SentencePieceVocabulary(str(vocabulary_file), 100)
    text = "the dog  sat on ﬁ the cat, caté\tand the mat"
    assert tokenizer(text).input_ids == [*vocabulary.encode(text), vocabulary.eos_id]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    last = vocabulary.vocab_size - 1
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [last, last - 99]
    assert tokenizer("the <extra_id_0> sat").input_ids.count(last) == 1


def test_vocabulary_or_its_pieces_come_back_through_transformers(
    tmp_path, make_params, config, vocabulary_file, mt5_vocabulary_file
):
    config = dataclasses.replace(config, vocab_size=160)
    params = make_params(config)
    for file, extra_ids in (
        (vocabulary_file, 100),
        (vocabulary_file, 7),
        (vocabulary_file, 0),
        (mt5_vocabulary_file, 0),
    ):
        ours, theirs = (tmp_path / f"{whose}_{file.stem}_{extra_ids}" for whose in ("ours", "theirs"))
        huggingface.save(ours, params, config, VocabularyFile(str(file), extra_ids))
        transformers.AutoModelForSeq2SeqLM.from_pretrained(ours).save_pretrained(theirs)
        transformers.AutoTokenizer.from_pretrained(ours).save_pretrained(theirs)
        source = huggingface.open_folder(theirs)
        if not (theirs / "spiece.model").exists():  # transformers 5
            assert source.vocabulary is None and "tokenizer.json alone" in source.notes[0]
            task_vocabulary = seqio.SentencePieceVocabulary(str(file), extra_ids)
            assert source.pieces == fingerprint_pieces(pieces_of_vocabulary(task_vocabulary))
            (theirs / "spiece.model").write_bytes(file.read_bytes())
            source = huggingface.open_folder(theirs)
        assert source.notes == () and source.pieces is None and source.vocabulary.extra_ids == extra_ids


@pytest.mark.parametrize(
    ("name", "words"), [("Bart", "describes BartForConditionalGeneration"), ("T5", "describes T5Model")]
)
def test_other_architectures_that_transformers_saves_are_refused(tmp_path, name, words):
    sizes = {"vocab_size": 20, "d_model": 8}
    if name == "Bart":
        sizes |= {f"{stack}_{what}": 2 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, pad_token_id=0))
    else:
        sizes |= {"num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 8}
        model = transformers.T5Model(transformers.T5Config(**sizes))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        huggingface.open_folder(tmp_path)


@pytest.mark.parametrize(("kind", "vocab_size", "depth"), [("T5", 32128, 6), ("MT5", 250112, 8), ("UMT5", 250112, 8)])
def test_default_configurations_of_transformers_are_read_as_they_are_meant(kind, vocab_size, depth):
    for scaled in (False, True):
        config_class = getattr(transformers, f"{kind}Config")
        raw = {**config_class(tie_word_embeddings=scaled).to_dict(), "architectures": None}
        config = family_named("t5").huggingface.config_from_json(raw, "config.json")
        assert (config.vocab_size, config.num_encoder_layers, config.num_decoder_layers) == (vocab_size, depth, depth)
        assert config.tied_head == (scaled and kind != "MT5")
        assert config.mlp_activations == (("relu",) if kind == "T5" else ("gelu", "linear"))
