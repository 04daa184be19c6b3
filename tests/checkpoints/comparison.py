"""What a model of ours computes, and how far another implementation is from it."""

from typing import Any

import numpy as np

from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.decoding import greedy
from endistill_jax.models.t5.t5 import SITES, T5

Arrays = dict[str, np.ndarray]


def to_batch(batch: Arrays) -> Arrays:
    """The features of a model from `inputs`, `decoder_inputs` and `targets`, each [batch, length].

    When examples are packed there are `encoder_segments` and `decoder_segments` of the same shapes.
    """
    segments = {f"{stack}_segment_ids": f"{stack}_segments" for stack in ("encoder", "decoder")}
    return {
        "encoder_input_tokens": batch["inputs"],
        "decoder_input_tokens": batch["decoder_inputs"],
        "decoder_target_tokens": batch["targets"],
        "decoder_loss_weights": (batch["targets"] != 0).astype(np.int32),
        **{feature: batch[name] for feature, name in segments.items() if name in batch},
    }


def run_ours(params: Any, config: T5Config, batch: Arrays) -> Arrays:
    """`encoded`, `logits`, and the last layer's projections as `encoder_self/query` and so on for all sites."""
    output = T5(config).apply({"params": params}, to_batch(batch), tap_layers=dict.fromkeys(SITES, -1))
    taps = {f"{site}/{name}": value for site, tap in output.taps.items() for name, value in tap._asdict().items()}
    arrays = {"encoded": output.encoded, "logits": output.logits, **taps}
    return {name: np.asarray(value) for name, value in arrays.items()}


def generate_ours(params: Any, config: T5Config, batch: Arrays, length: int) -> np.ndarray:
    """Greedy decoding: [batch, length], padded after the end."""
    return np.asarray(greedy(config, params, to_batch(batch), length))


def differences(ours: Arrays, theirs: Arrays, batch: Arrays) -> dict[str, float]:
    """The largest differences at real tokens, of `logits`, `encoded`, and `taps` (the largest of all nine)."""
    assert set(ours) == set(theirs) and len(ours) == 2 + 3 * len(SITES)
    found = {"logits": 0.0, "encoded": 0.0, "taps": 0.0}
    for name, value in ours.items():
        of_source = name == "encoded" or name.startswith("encoder_self") or name in ("cross/key", "cross/value")
        real = batch["inputs" if of_source else "targets"] != 0
        assert value.shape == theirs[name].shape, name
        largest = float(np.abs(value[real].astype(np.float64) - theirs[name][real]).max())
        kind = name if name in found else "taps"
        found[kind] = max(found[kind], largest)
    return found
