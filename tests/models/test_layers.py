"""The layers' arithmetic, against NumPy in float64 and against the papers' descriptions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.models.t5.layers import MLP, RelativePositionBias, RMSNorm, relative_position_buckets


def _bucket_by_description(distance, *, bidirectional, buckets, max_distance):
    """The bucket of one key-minus-query distance, in integers alone.

    Raffel et al. (arXiv 1910.10683): half of the buckets are for single distances, the others grow logarithmically and
    end at `max_distance`; further ones share the last. A bidirectional stack gives each direction half of the buckets;
    a causal one has no use for keys to the right. Coarse bucket k begins where
    log(d / exact) / log(max / exact) * coarse >= k, which is d^coarse * exact^k >= max^k * exact^coarse.
    """
    if bidirectional:
        half = buckets // 2
        right = half if distance > 0 else 0
        return right + _bucket_by_description(
            -abs(distance), bidirectional=False, buckets=half, max_distance=max_distance
        )
    back = max(-distance, 0)
    exact = buckets // 2
    coarse = buckets - exact
    if back < exact:
        return back
    begun = [k for k in range(coarse) if back**coarse * exact**k >= max_distance**k * exact**coarse]
    return exact + max(begun)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 12), (16, 40), (64, 256)])
def test_buckets_are_those_of_the_description(bidirectional, buckets, max_distance):
    length = max_distance + 40
    settings = {"bidirectional": bidirectional, "buckets": buckets, "max_distance": max_distance}
    actual = relative_position_buckets(length, length, **settings)
    expected = {d: _bucket_by_description(d, **settings) for d in range(-length + 1, length)}
    distance = np.arange(length)[None] - np.arange(length)[:, None]  # key minus query
    np.testing.assert_array_equal(actual, np.vectorize(expected.get)(distance))
    used = set(expected.values())
    assert used == set(range(buckets)) - ({buckets // 2} if bidirectional else set())


def test_position_bias_of_a_pair_is_its_buckets_entry_for_each_head(config):
    table = np.random.default_rng(0).normal(size=(config.num_heads, config.relative_buckets)).astype(np.float32)
    for bidirectional in (True, False):
        module = RelativePositionBias(config, bidirectional=bidirectional)
        bias = module.apply({"params": {"rel_embedding": table}}, 20, 17)
        assert bias.shape == (1, config.num_heads, 20, 17)
        buckets = relative_position_buckets(20, 17, bidirectional=bidirectional, buckets=8, max_distance=12)
        np.testing.assert_allclose(bias[0], table[:, buckets], rtol=1e-6)


def test_normalisation_divides_by_the_root_mean_square_and_subtracts_no_mean(config):
    rng = np.random.default_rng(0)
    x, scale = rng.normal(3, 2, (2, 5, 10)).astype(np.float32), rng.normal(1, 0.3, 10).astype(np.float32)
    y = RMSNorm(config).apply({"params": {"scale": scale}}, x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale, rtol=1e-5)


def test_normalisation_of_zeros_has_finite_gradients(config):
    scale = {"params": {"scale": jnp.ones(10)}}
    gradient = jax.grad(lambda x: RMSNorm(config).apply(scale, x).sum())(jnp.zeros((1, 2, 10)))
    assert np.isfinite(gradient).all()


def _tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _exact_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


_FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _tanh_gelu,
    "gelu_exact": _exact_gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "linear": lambda x: x,
}


@pytest.mark.parametrize(
    "activations",
    [("relu",), ("gelu_exact",), ("gelu", "linear"), ("silu", "linear"), ("linear", "relu")],
    ids=" ".join,
)
def test_mlp_is_the_product_of_its_activated_branches_projected_back(config, activations):
    rng = np.random.default_rng(0)
    names = ["wi"] if len(activations) == 1 else ["wi_0", "wi_1"]
    kernels = {name: rng.normal(0, 0.5, (10, 14)).astype(np.float32) for name in names}
    kernels["wo"] = rng.normal(0, 0.5, (14, 10)).astype(np.float32)
    x = rng.normal(size=(2, 3, 10)).astype(np.float32)
    module = MLP(dataclasses.replace(config, mlp_activations=activations))
    y = module.apply({"params": {name: {"kernel": kernel} for name, kernel in kernels.items()}}, x, deterministic=True)
    wide = {name: kernel.astype(np.float64) for name, kernel in kernels.items()}
    hidden = math.prod(_FUNCTIONS[f](x @ wide[name]) for f, name in zip(activations, names, strict=True))
    np.testing.assert_allclose(y, hidden @ wide["wo"], rtol=1e-4, atol=1e-5)
