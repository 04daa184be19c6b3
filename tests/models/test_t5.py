"""T5's function: what it computes, what it exposes, and what it must not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Lengths, Reads
from endistill_jax.models.family import abstract_params, forward_flops
from endistill_jax.models.t5.layers import relative_position_buckets
from endistill_jax.models.t5.t5 import T5

SITES = ("encoder_self", "decoder_self", "cross")
FIRST = (("encoder_self", 0), ("decoder_self", 0), ("cross", 0))
LAST = (("encoder_self", -1), ("decoder_self", -1), ("cross", -1))


def reads(taps, head=True, **others):
    """All vectors of some (site, layer), with the head."""
    return Reads(taps=dict.fromkeys(taps, "qkv"), head=head, **others)


@functools.cache
def forward(config, taps=(), head=True):
    def apply(params, batch):
        return T5(config).apply({"params": params}, batch, reads(taps, head))

    return jax.jit(apply)


def assert_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


def real_rows(output, batch):
    """What stands at real tokens, example by example, whatever row and place each of them has."""
    segments = {
        stack: np.asarray(batch.get(f"{stack}_segment_ids", batch[f"{stack}_{tokens}_tokens"] != 0))
        for stack, tokens in (("encoder", "input"), ("decoder", "target"))
    }
    count = range(1, segments["decoder"].max() + 1)

    def rows(array, stack):
        return [np.asarray(a)[s == number] for a, s in zip(array, segments[stack], strict=True) for number in count]

    found = {"logits": rows(output.logits, "decoder"), "encoded": rows(output.encoded, "encoder")}
    for (site, _), tap in output.taps.items():
        for name in ("query", "key", "value"):
            of_decoder = site == "decoder_self" or (site == "cross" and name == "query")
            found[f"{site}/{name}"] = rows(getattr(tap, name), "decoder" if of_decoder else "encoder")
    return {name: [rows for rows in arrays if rows.size] for name, arrays in found.items()}


# --- one function, however the layers are run ---


@pytest.fixture(scope="module", params=[False, True], ids=["bias per stack", "bias per layer"])
def every_tap(request, make_params, batch, config):
    """Outputs that together expose every layer of every site, by scan and unrolled."""
    config = dataclasses.replace(config, bias_per_layer=request.param)
    params = make_params(config)
    taps = [(0, 0, 2), (1, 1, 1), (2, 2, 0), (3, -3, -1)]  # decoder layers both in and out of order

    def outputs(cfg, frozen=False):
        def apply(params, batch, layers):
            return T5(cfg).apply({"params": params}, batch, reads(zip(SITES, layers, strict=True)), frozen=frozen)

        return jax.jit(lambda *arguments: [apply(*arguments, layers) for layers in taps])(params, batch)

    found = {scan: outputs(dataclasses.replace(config, scan_layers=scan)) for scan in (True, False)}
    # One head of one example has up to 4 x 6 x 6 = 144 bytes of scores.
    groups = {"frozen": None, "one head at a time": 300, "two examples at a time": 1200}
    return found | {
        name: outputs(dataclasses.replace(config, attention_bytes=size), frozen=True) for name, size in groups.items()
    }


@pytest.mark.parametrize("other", [False, "frozen", "one head at a time", "two examples at a time"])
def test_layers_give_the_same_logits_and_taps_however_they_run_for_every_tapped_layer(every_tap, other):
    # Float32 sums of at most 14 terms in another order, through seven layers.
    assert_close(every_tap[True], every_tap[other], rtol=1e-4, atol=1e-5)


def test_logits_do_not_depend_on_what_is_tapped(every_tap):
    first, *others = [output.logits for output in every_tap[True]]
    for logits in others:
        np.testing.assert_allclose(logits, first, rtol=1e-4, atol=1e-5)


def test_every_layer_exposes_another_tap_and_negative_layers_count_from_the_end(every_tap):
    first, second, third, last = every_tap[True]
    assert not np.allclose(first.taps["encoder_self", 0].query, second.taps["encoder_self", 1].query)
    assert_close(last.taps["decoder_self", -3], first.taps["decoder_self", 0], rtol=1e-4, atol=1e-5)
    assert_close(last.taps["cross", -1], first.taps["cross", 2], rtol=1e-4, atol=1e-5)
    assert not np.allclose(third.taps["cross", 0].key, last.taps["cross", -1].key)


def test_self_attention_s_tap_has_the_bias_that_the_model_adds_and_cross_has_none(config, make_params, batch):
    for per_layer in (False, True):
        cfg = dataclasses.replace(config, bias_per_layer=per_layer)
        params = make_params(cfg)
        taps = forward(cfg, (*FIRST, ("encoder_self", 2)))(params, batch).taps
        for (site, layer), length in ((("encoder_self", 0), 6), (("encoder_self", 2), 6), (("decoder_self", 0), 5)):
            stack, _ = site.split("_")
            settings = {"bidirectional": stack == "encoder", "buckets": 8, "max_distance": 12}
            buckets = relative_position_buckets(length, length, **settings)
            owner = params[stack]["layers"] if per_layer else params[stack]
            table = owner["relpos_bias"]["rel_embedding"]
            expected = (table[layer] if per_layer else table)[:, buckets][None]
            np.testing.assert_allclose(taps[site, layer].bias, expected, rtol=1e-6)
        assert taps["cross", 0].bias is None


def test_bias_of_each_layer_equal_to_the_stack_s_is_the_same_function(config, params, batch):
    per_layer = dataclasses.replace(config, bias_per_layer=True)
    repeated = dict(params)
    for stack, depth in (("encoder", 4), ("decoder", 3)):
        rest = dict(params[stack])
        table = rest.pop("relpos_bias")["rel_embedding"]
        rest["layers"] = rest["layers"] | {"relpos_bias": {"rel_embedding": np.stack([table] * depth)}}
        repeated[stack] = rest
    assert_close(forward(per_layer, LAST)(repeated, batch), forward(config, LAST)(params, batch), rtol=1e-4, atol=1e-5)


VARIANTS = {
    "unrolled": {"scan_layers": False},
    "scan": {},
    "scan, full": {"remat": "full"},
}


@functools.cache
def with_gradients(config):
    # With a loop of two layers below, and one above.
    exposed = reads([("encoder_self", 2), ("decoder_self", 0), ("cross", 0)], hidden=frozenset({("encoder", 0)}))

    @jax.jit
    def run(params, batch):
        output, pullback = jax.vjp(lambda p: T5(config).apply({"params": p}, batch, exposed), params)
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), output)
        return output, pullback(direction)[0]

    return run


@pytest.fixture(scope="module", params=[False, True], ids=["bias per stack", "bias per layer"])
def gradients(request, config, make_params, make_batch):
    """Output and gradient of a random direction, by every way to run the layers; one row is empty, padding alone."""
    batch = make_batch([[0], [1], []], 6, 5, packed=False)
    found = {}
    for name, changes in VARIANTS.items():
        variant = dataclasses.replace(config, num_encoder_layers=3, bias_per_layer=request.param, **changes)
        found[name] = with_gradients(variant)(make_params(variant), batch)
    return found


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "unrolled"])
def test_scan_and_rematerialisation_change_neither_output_nor_gradients(gradients, variant):
    assert_close(gradients[variant][0], gradients["unrolled"][0], rtol=1e-4, atol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients["unrolled"][1]))
    assert_close(gradients[variant][1], gradients["unrolled"][1], rtol=1e-4, atol=1e-6 * scale)


def test_row_of_padding_alone_gives_finite_outputs_and_gradients(gradients):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients["scan"]))


# --- dropout ---


@pytest.fixture(scope="module")
def dropout_gradients(config, make_params):
    """(key, scan) -> gradient of the squared logits of one source and one target token under dropout."""
    batch = {name: np.ones((1, 1), np.int32) for name in ("encoder_input_tokens", "decoder_input_tokens")}
    batch["decoder_target_tokens"] = batch["encoder_input_tokens"]

    @functools.cache
    def gradient(scan):
        cfg = dataclasses.replace(
            config, num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.4, mlp_activations=("linear",),
            mlp_dim=60, scan_layers=scan,
        )  # fmt: skip
        model = T5(cfg)

        def loss(params, key):
            output = model.apply({"params": params}, batch, deterministic=False, rngs={"dropout": key})
            return jnp.sum(output.logits**2)

        return cfg, jax.jit(jax.grad(loss))

    def run(seed, scan):
        cfg, function = gradient(scan)
        # This generator's code takes a third of the time to compile.
        return function(make_params(cfg), jax.random.key(seed, impl="unsafe_rbg"))

    return run


def test_scan_and_unrolled_layers_drop_the_same_units_by_the_same_key(dropout_gradients):
    scanned, unrolled = dropout_gradients(0, True), dropout_gradients(0, False)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(unrolled))
    assert_close(scanned, unrolled, rtol=1e-4, atol=1e-6 * scale)


def test_every_layer_and_every_key_drops_other_units(dropout_gradients):
    patterns = set()
    for seed in (0, 1):
        gradient = dropout_gradients(seed, True)
        for stack in ("encoder", "decoder"):
            for layer in np.asarray(gradient[stack]["layers"]["mlp"]["wi"]["kernel"]):  # [d_model, mlp_dim]
                kept = (layer != 0).any(axis=0)  # of a hidden unit that was dropped, nothing is learnt
                assert 20 < kept.sum() < 50  # of 60, at a rate of 0.4
                patterns.add(kept.tobytes())
    assert len(patterns) == 2 * 2 * 2


def test_dropout_without_a_key_is_an_error_and_deterministic_needs_none(config, params, batch):
    model = T5(dataclasses.replace(config, dropout_rate=0.5))
    jax.eval_shape(lambda: model.apply({"params": params}, batch))
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply({"params": params}, batch, deterministic=False))


# --- what real rows do not depend on ---


@pytest.fixture(scope="module")
def tight(config, params, batch):
    return real_rows(forward(config, LAST)(params, batch), batch)


@pytest.mark.parametrize(
    "layout",
    [
        {"rows": [[0], [1], [2], [3], []], "source": 9, "target": 8, "packed": False},
        {"rows": [[0, 1], [2, 3]], "source": 9, "target": 7, "packed": True},
    ],
    ids=["more padding and an empty row", "packed"],
)
def test_real_rows_do_not_depend_on_padding_and_packing(config, params, make_batch, tight, layout):
    batch = make_batch(**layout)
    assert_close(real_rows(forward(config, LAST)(params, batch), batch), tight, rtol=1e-4, atol=1e-5)


def test_real_rows_do_not_depend_on_the_tokens_at_padding(config, params, make_batch):
    run = forward(config, LAST)
    clean, dirty = (make_batch([[0, 1], [2, 3]], 9, 7, packed=True, fill=fill) for fill in (0, 17))
    assert not np.array_equal(clean["encoder_input_tokens"], dirty["encoder_input_tokens"])
    jax.tree.map(
        np.testing.assert_array_equal, real_rows(run(params, dirty), dirty), real_rows(run(params, clean), clean)
    )


def test_packed_examples_in_one_segment_are_another_function(config, params, make_batch, tight):
    batch = make_batch([[0, 1], [2, 3]], 9, 7, packed=True)
    joined = batch | {name: np.minimum(x, 1) for name, x in batch.items() if "segment" in name}
    # Else the test of packing would show nothing.
    mixed = real_rows(forward(config, LAST)(params, joined), batch)
    assert not np.allclose(mixed["encoded"][0], tight["encoded"][0], rtol=1e-2)


def test_logits_depend_on_no_later_decoder_input_and_on_every_earlier_one(config, params, make_batch):
    batch = make_batch([[1]] * 5, 9, 8, packed=False)
    inputs = batch["decoder_input_tokens"]
    for position in range(4):
        inputs[position + 1, position] = 1 + (inputs[0, position] + 5) % 20
    logits = np.asarray(forward(config, LAST)(params, batch).logits[:, :4])
    for position in range(4):
        changed = logits[position + 1]
        np.testing.assert_array_equal(changed[:position], logits[0, :position])
        assert (np.abs(changed[position:] - logits[0, position:]).max(axis=-1) > 1e-3).all()


def test_every_position_sees_the_whole_source(config, params, make_batch):
    batch = make_batch([[0]] * 5, 9, 8, packed=False)
    for position in range(4):
        batch["encoder_input_tokens"][position + 1, position] = 22
    output = forward(config, LAST)(params, batch)
    for rows in (output.encoded[:, :5], output.logits[:, :3]):  # the encoder looks both ways
        assert (np.abs(rows[1:] - rows[:1]).max(axis=-1) > 1e-4).all()


# --- the arithmetic, by NumPy in float64 ---


def _normalize(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _kernels(params, stack, attention):
    layer = params[stack]["layers"][attention]
    return [layer[name]["kernel"][0].astype(np.float64) for name in ("query", "key", "value", "out")]


def test_taps_of_the_first_layer_are_the_unscaled_projections_of_the_normalised_input(config, params, batch):
    taps = forward(config, FIRST)(params, batch).taps
    embedding = params["token_embedder"]["embedding"].astype(np.float64)
    for stack, site, module in (
        ("encoder", "encoder_self", "attention"),
        ("decoder", "decoder_self", "self_attention"),
    ):
        scale = params[stack]["layers"][f"pre_{module}_layer_norm"]["scale"][0]
        x = _normalize(embedding[batch[f"{stack}_input_tokens"]], scale)
        for tap, kernel in zip(taps[site, 0][:3], _kernels(params, stack, module), strict=False):
            np.testing.assert_allclose(tap, x @ kernel, rtol=1e-4, atol=1e-5)


def test_cross_tap_asks_with_the_decoder_after_its_self_attention_and_answers_with_the_encoder(config, params, batch):
    output = forward(config, FIRST)(params, batch)
    decoder, layers = params["decoder"], params["decoder"]["layers"]
    x = params["token_embedder"]["embedding"].astype(np.float64)[batch["decoder_input_tokens"]]
    normalized = _normalize(x, layers["pre_self_attention_layer_norm"]["scale"][0])
    *projections, out = _kernels(params, "decoder", "self_attention")
    # [batch, length, heads, head_dim]
    query, key, value = ((normalized @ kernel).reshape(*x.shape[:2], 3, 4) for kernel in projections)
    length = x.shape[1]
    buckets = relative_position_buckets(length, length, bidirectional=False, buckets=8, max_distance=12)
    real = batch["decoder_target_tokens"] != 0
    visible = np.tri(length, dtype=bool) & real[:, None, :]  # [batch, query_length, key_length]
    # [batch, heads, query_length, key_length]: T5 divides by no sqrt(head_dim)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) + decoder["relpos_bias"]["rel_embedding"][:, buckets]
    weights = np.exp(scores) * visible[:, None]
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:2], 12) @ out
    cross_query, cross_key, cross_value, _ = _kernels(params, "decoder", "encoder_decoder_attention")
    asked = _normalize(x, layers["pre_cross_attention_layer_norm"]["scale"][0]) @ cross_query
    tap = output.taps["cross", 0]
    np.testing.assert_allclose(np.asarray(tap.query)[real], asked[real], rtol=1e-4, atol=1e-4)
    encoded = np.asarray(output.encoded, np.float64)
    np.testing.assert_allclose(tap.key, encoded @ cross_key, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tap.value, encoded @ cross_value, rtol=1e-4, atol=1e-5)


def test_tied_head_is_the_embedding_scaled_by_the_root_of_the_width(small, make_params, batch):
    params = make_params(small)
    own = params["decoder"].pop("logits_dense")
    logits = forward(dataclasses.replace(small, tied_head=True), LAST)(params, batch).logits
    own["kernel"] = params["token_embedder"]["embedding"].T / np.float32(np.sqrt(small.d_model))
    params["decoder"]["logits_dense"] = own
    np.testing.assert_allclose(logits, forward(small, LAST)(params, batch).logits, rtol=1e-4, atol=1e-5)


def test_embeddings_are_not_scaled_and_both_stacks_share_them(config, params, batch):
    taps = forward(config, FIRST)(params, batch).taps
    doubled = params | {"token_embedder": {"embedding": 2 * params["token_embedder"]["embedding"]}}
    # The first normalization removes the scale, in both stacks.
    for key in FIRST[:2]:
        assert_close(forward(config, FIRST)(doubled, batch).taps[key], taps[key], rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(small, make_params, batch):
    params = make_params(small)
    rounded = forward(dataclasses.replace(small, dtype="bfloat16"), LAST)(params, batch)
    assert rounded.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(([tap[:3] for tap in rounded.taps.values()], rounded.encoded))} == {
        jnp.dtype("bfloat16")
    }
    expected = forward(small, LAST)(params, batch).logits
    error = np.sqrt(np.mean((rounded.logits - expected) ** 2) / np.mean(expected**2))
    # Each product rounds its factors to 8 bits (a relative 2^-9 on average or less); some twenty follow each other.
    assert 2**-12 < error < 20 * 2**-9


# --- what is exposed ---


@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), [(1, 3), (3, 1)])
def test_stacks_have_depths_of_their_own(config, make_params, batch, encoder_layers, decoder_layers):
    cfg = dataclasses.replace(config, num_encoder_layers=encoder_layers, num_decoder_layers=decoder_layers)
    params = make_params(cfg)
    exposed = reads([("encoder_self", encoder_layers - 1), ("decoder_self", decoder_layers - 1)])
    logits = jax.eval_shape(lambda: T5(cfg).apply({"params": params}, batch, exposed).logits)
    assert logits.shape == (4, 5, 23)
    assert {len(leaf) for leaf in jax.tree.leaves(params["encoder"]["layers"])} == {encoder_layers}
    assert {len(leaf) for leaf in jax.tree.leaves(params["decoder"]["layers"])} == {decoder_layers}


def test_taps_have_the_heads_width_and_the_lengths_of_their_sides(config, params, batch):
    output = jax.eval_shape(forward(config, LAST), params, batch)
    assert output.encoded.shape == (4, 6, 10)
    shapes = {site: [leaf.shape for leaf in tap[:3]] for (site, _), tap in output.taps.items()}
    assert shapes == {
        "encoder_self": [(4, 6, 12)] * 3,
        "decoder_self": [(4, 5, 12)] * 3,
        "cross": [(4, 5, 12), (4, 6, 12), (4, 6, 12)],
    }


def test_encoder_needs_no_decoder_features(config, params, batch):
    encoder_side = {"encoder_input_tokens": batch["encoder_input_tokens"]}
    output = jax.eval_shape(forward(config, FIRST[:1], head=False), params, encoder_side)
    assert output.encoded is None and output.logits is None and set(output.taps) == {("encoder_self", 0)}


@pytest.mark.parametrize("scan_layers", [True, False])
def test_residual_streams_are_those_after_a_layer(config, params, batch, scan_layers):
    config = dataclasses.replace(config, scan_layers=scan_layers)
    wanted = frozenset({("encoder", -1), ("encoder", 1), ("decoder", 0), ("decoder", 2)})
    output = T5(config).apply({"params": params}, batch, Reads(hidden=wanted, encoded=True))
    assert set(output.hidden) == wanted and output.head is None
    # The encoder's output is its last residual stream, normalized.
    last = np.asarray(output.hidden["encoder", -1], np.float64)
    np.testing.assert_allclose(
        output.encoded, _normalize(last, params["encoder"]["encoder_norm"]["scale"]), rtol=1e-4, atol=1e-5
    )
    # A tap of a layer is of the stream before it.
    tap = T5(config).apply({"params": params}, batch, reads([("encoder_self", 2)], head=False)).taps["encoder_self", 2]
    layer = params["encoder"]["layers"]
    x = _normalize(np.asarray(output.hidden["encoder", 1]), layer["pre_attention_layer_norm"]["scale"][2])
    np.testing.assert_allclose(tap.query, x @ layer["attention"]["query"]["kernel"][2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tap", "advice"),
    [
        (("encoder", 0), "encoder_self, decoder_self, cross"),
        (("encoder_self", 4), "0 to 3"),
        (("encoder_self", -5), "0 to 3"),
        (("decoder_self", 3), "0 to 2"),
        (("cross", 3), "0 to 2"),
    ],
)
def test_tap_that_does_not_exist_is_refused_with_those_that_do(config, params, batch, tap, advice):
    with pytest.raises(UserError, match=advice):
        jax.eval_shape(lambda: T5(config).apply({"params": params}, batch, reads([tap], head=False)))


# --- an encoder alone ---


def test_encoder_alone_is_the_encoder_of_the_whole_model(config, params, batch):
    alone = dataclasses.replace(config, num_decoder_layers=0)
    own = {name: tree for name, tree in params.items() if name != "decoder"}
    assert jax.tree.structure(abstract_params(alone)) == jax.tree.structure(own)
    exposed = reads([("encoder_self", -1)], head=False, encoded=True, hidden=frozenset({("encoder", 0)}))
    encoder_side = {"encoder_input_tokens": batch["encoder_input_tokens"]}
    expected = T5(config).apply({"params": params}, batch, exposed)
    assert_close(T5(alone).apply({"params": own}, encoder_side, exposed), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "asked",
    [Reads(head=True), reads([("cross", -1)], head=False), Reads(hidden=frozenset({("decoder", 0)}))],
)
def test_what_needs_a_decoder_is_refused_of_an_encoder_alone(config, params, batch, asked):
    alone = dataclasses.replace(config, num_decoder_layers=0)
    with pytest.raises(UserError, match=r"an encoder alone \(num_decoder_layers is 0\)"):
        jax.eval_shape(lambda: T5(alone).apply({"params": params}, batch, asked))
    with pytest.raises(UserError, match="an encoder alone"):
        forward_flops(alone, Lengths(2, 3, 4), asked)
