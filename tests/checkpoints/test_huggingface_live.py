"""The same model in transformers and here; runs where the `hf` extra is installed."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (the hf extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the hf extra)")
seqio = pytest.importorskip("seqio")

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import record_huggingface_goldens as recorder  # noqa: E402

from endistill_jax.checkpoints import huggingface  # noqa: E402
from endistill_jax.model.t5 import T5  # noqa: E402


def _run_ours(params, config, batch):
    output = T5(config).apply(
        {"params": params},
        {
            "encoder_input_tokens": batch["inputs"],
            "decoder_input_tokens": batch["decoder_inputs"],
            "decoder_target_tokens": batch["targets"],
            "decoder_loss_weights": (batch["targets"] != 0).astype(np.int32),
        },
    )
    return {"encoded": np.asarray(output.encoded), "logits": np.asarray(output.logits)}


def _assert_same_function(ours, theirs, batch):
    source, target = batch["inputs"] != 0, batch["targets"] != 0
    np.testing.assert_allclose(ours["encoded"][source], theirs["encoded"][source], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours["logits"][target], theirs["logits"][target], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", recorder.KINDS)
def test_import_of_what_transformers_saves_computes_the_same(tmp_path, kind):
    model = recorder.build_model(kind, seed=1).float()
    model.save_pretrained(tmp_path)
    params, config = huggingface.load(tmp_path)
    batch = recorder.build_batch(seed=1)
    _assert_same_function(_run_ours(params, config, batch), recorder.run_model(model, batch), batch)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("kind", recorder.KINDS)
def test_transformers_reads_our_export_whole_and_computes_the_same(tmp_path, make_params, kind, copies):
    recorder.build_model(kind).save_pretrained(tmp_path / "theirs")
    _, config = huggingface.load(tmp_path / "theirs")
    params = make_params(config)
    huggingface.save(tmp_path / "ours", params, config, embedding_copies=copies, max_file_bytes=3000)
    model, report = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    batch = recorder.build_batch()
    _assert_same_function(_run_ours(params, config, batch), recorder.run_model(model.eval(), batch), batch)


def test_auto_classes_read_our_export_and_the_tokenizer_gives_our_ids(tmp_path, make_params, config, vocabulary_file):
    config = dataclasses.replace(config, vocab_size=160)
    params = make_params(config)
    huggingface.save(tmp_path / "model", params, config, str(vocabulary_file), dtype="bfloat16")
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
