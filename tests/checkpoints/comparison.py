"""What a model of ours computes, and how far another implementation is from it."""

from typing import Any

import jax
import numpy as np

from endistill_jax.core.attention import SITES
from endistill_jax.core.model_io import LOGITS, Reads
from endistill_jax.models.family import ModelConfig, apply
from endistill_jax.models.generation.generation import Decoding, make_decoder

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


# As the references were when they were recorded; the tests' other programs round differently.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def run_ours(params: Any, config: ModelConfig, batch: Arrays) -> Arrays:
    """`encoded`, `logits`, and the last layer's projections as `encoder_self/query` and so on for all sites.

    Of an encoder alone, what it has.
    """
    sites = [site for site in SITES if config.depth(SITES[site].stack)]
    reads = Reads(taps={(site, -1): "qkv" for site in sites}, encoded=True)
    reads = reads | LOGITS if config.depth("decoder") else reads
    output = jax.jit(lambda *arrays: apply(config, *arrays, reads), compiler_options=OPTIMIZED)(params, to_batch(batch))
    arrays = {"encoded": output.encoded} | ({} if output.head is None else {"logits": output.logits})
    for (site, _), tap in output.taps.items():
        arrays |= {f"{site}/{name}": getattr(tap, name) for name in ("query", "key", "value")}
    return {name: np.asarray(value) for name, value in arrays.items()}


def generate_ours(params: Any, config: ModelConfig, batch: Arrays, length: int) -> np.ndarray:
    """Greedy decoding: [batch, length], padded after the end."""
    return np.asarray(make_decoder(config, Decoding(max_length=length))(params, batch["inputs"]).tokens)


def differences(ours: Arrays, theirs: Arrays, batch: Arrays) -> dict[str, float]:
    """The largest differences at real tokens, of `logits`, `encoded`, and `taps` (the largest of all nine)."""
    assert set(ours) == set(theirs) and len(ours) in (2 + 3 * len(SITES), 1 + 3)  # or of an encoder alone
    found = {"logits": 0.0, "encoded": 0.0, "taps": 0.0}
    for name, value in ours.items():
        of_source = name == "encoded" or name.startswith("encoder_self") or name in ("cross/key", "cross/value")
        side, tokens = ("encoder", "inputs") if of_source else ("decoder", "targets")
        real = batch[f"{side}_segments" if f"{side}_segments" in batch else tokens] != 0
        assert value.shape == theirs[name].shape, name
        largest = float(np.abs(value[real].astype(np.float64) - theirs[name][real]).max())
        kind = name if name in found else "taps"
        found[kind] = max(found[kind], largest)
    return found
