"""The public face: `import endistill_jax as ed`."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import endistill_jax as ed

INPUTS, TARGETS = "Return the <extra_id_0> of items in a list.", "<extra_id_0> number"


@pytest.fixture(scope="module")
def teacher():
    return ed.load("bundled")


def test_the_import_loads_nothing_heavy_and_lists_all_that_is_public():
    program = (
        "import sys, endistill_jax as ed\n"
        "assert not {'jax', 'tensorflow', 'numpy', 'seqio'} & set(sys.modules), 'heavy'\n"
        "assert set(ed.__all__) <= set(dir(ed))\n"
        "for name in ed.__all__: getattr(ed, name)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ed.lode


def test_taps_have_a_row_for_every_token(teacher):
    source, target = (len(teacher.tokenizer.encode(text)) + 1 for text in (INPUTS, TARGETS))
    tap = teacher.taps(INPUTS, TARGETS, site="cross")
    assert tap.query.shape == (1, target, teacher.config.inner_dim)
    assert tap.key.shape == tap.value.shape == (1, source, teacher.config.inner_dim)
    with pytest.raises(ed.UserError, match="encoder_self"):
        teacher.taps(INPUTS, TARGETS, site="crossed")
    with pytest.raises(ed.UserError, match="targets"):
        teacher.taps(INPUTS, site="cross")


def test_a_relation_is_a_distribution_over_visible_positions_whatever_is_padded(teacher):
    alone = teacher.relation(INPUTS, TARGETS, site="cross", relation="qk", relation_heads=4)
    batch = teacher.batch([INPUTS, "A much longer text, so that the first one is padded. " + INPUTS], [TARGETS] * 2)
    beside = teacher.relation(batch, site="cross", relation="qk", relation_heads=4)
    np.testing.assert_allclose(alone.sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(beside[:1, :, :, : alone.shape[-1]], alone, atol=1e-5)
    assert not beside[0, :, :, alone.shape[-1] :].any()
    causal = teacher.relation(INPUTS, TARGETS, site="decoder_self", relation="vv")
    assert not np.triu(causal[0, 0], k=1).any()
    with pytest.raises(ed.UserError, match="relation_heads is 3"):
        teacher.relation(INPUTS, TARGETS, relation_heads=3)


def test_text_is_generated_and_ids_serve_as_well(teacher):
    greedy = teacher.generate([INPUTS, "Copy a file."], max_length=6)
    assert len(greedy) == 2 and all(greedy)
    ids = [[*teacher.tokenizer.encode(text), teacher.tokenizer.eos_id] for text in (INPUTS, "Copy a file.")]
    assert teacher.generate(ids, max_length=6) == greedy


def test_what_is_saved_is_the_same_model_with_its_tokenizer(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "folder")
    again = ed.load(tmp_path / "folder")
    assert again.config == teacher.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, teacher.params))
    assert again.tokenizer.encode(INPUTS) == teacher.tokenizer.encode(INPUTS)
    assert (tmp_path / "folder/README.md").is_file()


def test_a_model_without_vocabulary_takes_ids_alone(teacher):
    bare = ed.Model(config=teacher.config, params=teacher.params)
    assert bare.apply([[5, 6, 1]]).encoded.shape == (1, 3, teacher.config.d_model)
    assert bare.apply([[5, 6, 1]], [[7, 1]]).logits.shape == (1, 2, teacher.config.vocab_size)
    with pytest.raises(ed.UserError, match="no vocabulary"):
        bare.apply(INPUTS)


def test_presets_sizes_and_terms_make_an_experiment():
    student = ed.sizes.mini_2x2_128(vocab_size=8192)
    objective = ed.Objective(terms=(ed.objective_terms.ReverseKL(), *ed.presets.minilm(relation_heads=8).terms))
    objective.validate(student, ed.sizes.mini_4x4_256(vocab_size=8192))
    assert set(ed.presets.miniend_d().term_names) < set(ed.presets.union().term_names)
