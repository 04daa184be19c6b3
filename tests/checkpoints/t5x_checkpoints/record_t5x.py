"""Records goldens/: tiny random models of T5X's networks and what they compute, and checkpoints that T5X wrote.

Run it from the repository's root where T5X is installed (docs/t5x.md) when a kind of model is added:

    python tests/checkpoints/t5x_checkpoints/record_t5x.py

Weights are exact in float16. Everything is computed in float32, T5X's own type for logits.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
from t5x import adafactor, checkpoints, partitioning, train_state
from t5x.examples.scalable_t5 import network as scalable_network
from t5x.examples.t5 import network

GOLDENS = pathlib.Path(__file__).parent / "goldens"
STEP = 7
V1_0 = {"mlp_activations": ["relu"], "logits_via_embedding": True}
V1_1 = {"mlp_activations": ["gelu", "linear"], "logits_via_embedding": False}
# mT5's vocabulary has 250,112 rows; here, too, it is far wider than the model, and no power of two.
KINDS = {"v1_0": V1_0, "v1_1": V1_1, "mt5": {**V1_1, "vocab_size": 150}, "scanned": V1_1, "scanned_first": V1_0}
SCAN_AXES = {"scanned": 1, "scanned_first": 0}
GOLDEN_KINDS = ("v1_0", "v1_1", "mt5", "scanned")
# Unequal depths; two heads of four make an inner width of 8 in a model of width 12.
SIZES = {
    "vocab_size": 40,
    "emb_dim": 12,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_dim": 20,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "dropout_rate": 0.1,
}
# Long enough, in one kind, to reach the last distance bucket of the encoder.
LENGTHS = {"v1_1": (136, 20)}

Flat = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of T5X's.

    Attributes:
        kind: which of `KINDS`.
        flat: its tensors by the names of `t5x.examples.t5`, whatever its own layout is.
    """

    kind: str
    flat: Flat

    @property
    def settings(self) -> dict:
        """The fields of T5X's T5Config."""
        return {**SIZES, **KINDS[self.kind]}

    def network(self, scan: bool = True):
        """T5X's network; a scanned kind's own, or the same with its layers apart."""
        if self.kind not in SCAN_AXES:
            return network.Transformer(network.T5Config(**self.settings))
        axis = SCAN_AXES[self.kind]
        return scalable_network.Transformer(
            scalable_network.T5Config(**self.settings, scan_layers=scan, param_scan_axis=axis)
        )

    def params(self, scan: bool = True) -> dict:
        """The tensors in the layout of that network."""
        if self.kind not in SCAN_AXES:
            return flax.traverse_util.unflatten_dict(self.flat, sep="/")
        return flax.traverse_util.unflatten_dict(scalable(self.flat, SCAN_AXES[self.kind] if scan else None), sep="/")


def build(kind: str, seed: int = 0) -> Reference:
    """A random model with activations and logits of about one, weights exact in float16."""
    rng = np.random.default_rng(seed)
    settings = {**SIZES, **KINDS[kind]}
    tokens = jnp.ones((1, 2), jnp.int32)
    module = network.Transformer(network.T5Config(**settings))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False))
    flat = {}
    for name, leaf in sorted(flax.traverse_util.flatten_dict(shapes["params"], sep="/").items()):
        values = rng.normal(size=leaf.shape)
        if name.endswith("kernel"):
            values *= leaf.shape[0] ** -0.5
        elif name.endswith("scale"):
            values = 1.0 + 0.2 * values
        flat[name] = values.astype(np.float16).astype(np.float32)
    return Reference(kind, flat)


def scalable(flat: Flat, axis: int | None) -> Flat:
    """Tensors of `t5x.examples.t5` as those of `scalable_t5`, scanned along an axis or not at all."""
    heads, head_dim = SIZES["num_heads"], SIZES["head_dim"]
    split = {}
    for name, value in flat.items():
        module = name.split("/")[-2]
        if module in ("query", "key", "value"):
            value = value.reshape(-1, heads, head_dim)
        elif module == "out":
            value = value.reshape(heads, head_dim, -1)
        split[name] = value
    for stack in ("encoder", "decoder"):
        bias = split.pop(f"{stack}/relpos_bias/rel_embedding")
        for layer in range(SIZES[f"num_{stack}_layers"]):
            split[f"{stack}/layers_{layer}/relpos_bias/rel_embedding"] = bias
    if axis is None:
        return split
    stacked = {name: value for name, value in split.items() if "/layers_" not in name}
    for stack in ("encoder", "decoder"):
        for name in [name for name in split if name.startswith(f"{stack}/layers_0/")]:
            layers = [split[name.replace("_0", f"_{i}", 1)] for i in range(SIZES[f"num_{stack}_layers"])]
            stacked[name.replace("layers_0", stack)] = np.stack(layers, axis)
    return stacked


def padded_batch(vocab_size: int, lengths: tuple[int, int] = (16, 10), seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens, the second row half padding."""
    rng = np.random.default_rng(seed)
    inputs, targets = (rng.integers(2, vocab_size, (2, length)).astype(np.int32) for length in lengths)
    for tokens in (inputs, targets):
        tokens[1, tokens.shape[1] // 2 :] = 0
    return {"inputs": inputs, "targets": targets, "decoder_inputs": np.pad(targets[:, :-1], ((0, 0), (1, 0)))}


def packed_batch(vocab_size: int, lengths: tuple[int, int] = (16, 10), seed: int = 0) -> dict[str, np.ndarray]:
    """Two and three examples a row, of uneven lengths, with padding at the end of the second row."""
    batch = padded_batch(vocab_size, lengths, seed)
    source, target = lengths
    batch["encoder_segments"] = np.stack([_segments(source, 0.6, 1.0), _segments(source, 0.1, 0.3, 0.5)])
    batch["decoder_segments"] = np.stack([_segments(target, 0.3, 1.0), _segments(target, 0.2, 0.3, 0.5)])
    starts = np.diff(batch["decoder_segments"], axis=1, prepend=0) != 0
    batch["decoder_inputs"] = np.where(starts, 0, batch["decoder_inputs"])
    return batch


def _segments(length: int, *ends: float) -> np.ndarray:
    segments = np.zeros(length, np.int32)
    for number, (start, end) in enumerate(zip((0.0, *ends), ends, strict=False), start=1):
        segments[int(start * length) : int(end * length)] = number
    return segments


def run(reference: Reference, batch: dict[str, np.ndarray], params: dict | None = None) -> dict[str, np.ndarray]:
    """What T5X's network computes: `logits`, `encoded`, and `encoder_self/query` and so on of the last layers."""
    encoder_segments, decoder_segments = batch.get("encoder_segments"), batch.get("decoder_segments")
    tokens = (batch["inputs"], batch["decoder_inputs"], batch["targets"])

    def apply(module, variables, **settings):
        encoded = module.apply(variables, tokens[0], encoder_segments, enable_dropout=False, method=module.encode)
        segments = (encoder_segments, decoder_segments)
        return encoded, module.apply(variables, *tokens, *segments, enable_dropout=False, decode=False, **settings)

    def apply_captured(module, variables):
        return apply(module, variables, capture_intermediates=lambda layer, _: layer.name in ("query", "key", "value"))

    params = reference.params() if params is None else params
    if reference.kind in SCAN_AXES:
        # A scan hides what happens in its layers, so for the taps the same layers are run one by one.
        encoded, logits = jax.jit(lambda variables: apply(reference.network(), variables))({"params": params})
        params = reference.params(scan=False)
    apart = jax.jit(lambda variables: apply_captured(reference.network(scan=False), variables))({"params": params})
    captured = apart[1][1]
    if reference.kind not in SCAN_AXES:
        encoded, logits = apart[0], apart[1][0]
    outputs = {"encoded": encoded, "logits": logits}
    for site, stack, attention in (
        ("encoder_self", "encoder", "attention"),
        ("decoder_self", "decoder", "self_attention"),
        ("cross", "decoder", "encoder_decoder_attention"),
    ):
        last = captured["intermediates"][stack][f"layers_{SIZES[f'num_{stack}_layers'] - 1}"][attention]
        for name in ("query", "key", "value"):
            value = last[name]["__call__"][0]  # [batch, length, heads, head_dim]
            outputs[f"{site}/{name}"] = value.reshape(*value.shape[:2], -1)
    return {name: np.asarray(value) for name, value in outputs.items()}


def state_of(reference: Reference, optimizer: bool = True):
    """T5X's state of a model in training, or, without an optimizer, in evaluation."""
    tokens = jnp.ones((1, 2), jnp.int32)
    module = reference.network()
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False))
    variables = flax.core.freeze({**variables, "params": jax.tree.map(jnp.asarray, reference.params())})
    if not optimizer:
        return train_state.InferenceState.create(variables).replace_step(jnp.asarray(STEP))
    definition = adafactor.Adafactor(1e-3, logical_factor_rules=adafactor.standard_logical_factor_rules())
    state = train_state.FlaxOptimTrainState.create(definition, variables)
    return state.replace_step(jnp.asarray(STEP))


def save_native(reference: Reference, folder: str, optimizer: bool = True, save_dtype=np.float32) -> None:
    """T5X's own Checkpointer writes `checkpoint_7`."""
    state, partitioner = state_of(reference, optimizer), partitioning.PjitPartitioner(num_partitions=1)
    checkpoints.Checkpointer(state, partitioner, folder, save_dtype=save_dtype).save(state)


def save_orbax(reference: Reference, folder: str, optimizer: bool = True) -> None:
    """T5X's manager of Orbax checkpoints writes `checkpoint_7`."""
    state, partitioner = state_of(reference, optimizer), partitioning.PjitPartitioner(num_partitions=1)
    manager = checkpoints.OrbaxCheckpointManagerInterface(folder, state, partitioner)
    manager.save(state)
    manager.wait_until_finished()
    manager.close()


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for kind in GOLDEN_KINDS:
        reference = build(kind)
        lengths = LENGTHS.get(kind, (16, 10))
        stored = {f"tensor/{name}": value.astype(np.float16) for name, value in reference.flat.items()}
        for name, batch in (
            ("padded", padded_batch(reference.settings["vocab_size"], lengths)),
            ("packed", packed_batch(reference.settings["vocab_size"])),
        ):
            stored |= {f"{name}/{key}": value for key, value in batch.items()}
            stored |= {f"{name}/output/{key}": value for key, value in run(reference, batch).items()}
        path = GOLDENS / f"{kind}.npz"
        np.savez_compressed(path, settings=json.dumps(reference.settings), **stored)
        print(f"{path}: {path.stat().st_size} bytes, jax {jax.__version__}")
    for name, kind, optimizer, write in (
        ("native", "v1_1", True, save_native),
        ("native_scanned", "scanned", False, save_native),
        ("orbax", "v1_0", False, save_orbax),
        ("orbax_scanned_first", "scanned_first", False, save_orbax),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write(build(kind), folder, optimizer)
            for named in pathlib.Path(folder).rglob("commit_success.txt"):
                named.unlink()  # it names the folder it was written in
            path = pathlib.Path(shutil.make_archive(str(GOLDENS / name), "zip", folder))
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
