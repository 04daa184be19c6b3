import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.checkpoints.fingerprint import fingerprint_params, fingerprint_vocabulary
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import unstack_layers

seqio = pytest.importorskip("seqio")


def _reversed(tree):
    return {name: _reversed(tree[name]) if isinstance(tree[name], dict) else tree[name] for name in reversed(tree)}


def test_params_fingerprint_ignores_dictionary_order_and_layer_layout_and_array_kind(params):
    expected = fingerprint_params(params)
    assert fingerprint_params(_reversed(params)) == expected
    assert fingerprint_params(unstack_layers(params)) == expected
    assert fingerprint_params(jax.tree.map(jnp.asarray, params)) == expected


def test_params_fingerprint_of_bfloat16_equals_that_of_the_same_values_widened(params):
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), narrow)
    assert fingerprint_params(narrow) == fingerprint_params(widened)
    assert fingerprint_params(narrow) != fingerprint_params(params)


@pytest.mark.parametrize("path", [("token_embedder", "embedding"), ("decoder", "layers", "mlp", "wo", "kernel")])
def test_params_fingerprint_sees_one_changed_number(params, path):
    changed = jax.tree.map(np.array, params)
    leaf = changed
    for name in path:
        leaf = leaf[name]
    leaf.flat[-1] = np.nextafter(leaf.flat[-1], np.float32(9.0))
    assert fingerprint_params(changed) != fingerprint_params(params)


def test_params_fingerprint_sees_layers_exchanged_and_a_leaf_reshaped(params):
    exchanged = {**params, "encoder": {**params["encoder"]}}
    exchanged["encoder"]["layers"] = jax.tree.map(lambda leaf: leaf[::-1], params["encoder"]["layers"])
    assert fingerprint_params(exchanged) != fingerprint_params(params)
    reshaped = {**params, "token_embedder": {"embedding": params["token_embedder"]["embedding"].reshape(12, 40)}}
    assert fingerprint_params(reshaped) != fingerprint_params(params)


def _vocabulary(path, extra_ids):
    return seqio.SentencePieceVocabulary(str(path), extra_ids)


def test_vocabulary_fingerprint_is_by_content_not_by_path(tmp_path, make_vocabulary):
    first = make_vocabulary(tmp_path / "first.model")
    second = make_vocabulary(tmp_path / "second.model")
    expected = fingerprint_vocabulary(_vocabulary(first, 10))
    assert fingerprint_vocabulary(_vocabulary(second, 10)) == expected
    assert fingerprint_vocabulary(_vocabulary(first, 12)) != expected


def test_vocabulary_fingerprint_tells_equal_sizes_apart(tmp_path, make_vocabulary):
    first = _vocabulary(make_vocabulary(tmp_path / "a.model", size=30), 10)
    other_text = "pack my box with five dozen jugs of liquor and wine"
    second = _vocabulary(make_vocabulary(tmp_path / "b.model", text=other_text, size=30), 10)
    assert fingerprint_vocabulary(first) != fingerprint_vocabulary(second)
    rules = make_vocabulary(tmp_path / "c.model", size=30, normalization_rule_name="nmt_nfkc_cf")
    assert fingerprint_vocabulary(first) != fingerprint_vocabulary(_vocabulary(rules, 10))


def test_vocabulary_fingerprint_tells_kinds_apart_and_refuses_unknown_ones():
    byte = fingerprint_vocabulary(seqio.ByteVocabulary(extra_ids=100))
    assert byte == fingerprint_vocabulary(seqio.ByteVocabulary(extra_ids=100))
    assert byte != fingerprint_vocabulary(seqio.ByteVocabulary(extra_ids=0))
    size = seqio.ByteVocabulary(extra_ids=100).vocab_size
    assert byte != fingerprint_vocabulary(seqio.PassThroughVocabulary(size))
    with pytest.raises(UserError, match="UnigramVocabulary"):
        fingerprint_vocabulary(seqio.vocabularies.UnigramVocabulary(["a", "b"]))
