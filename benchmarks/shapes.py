"""What the benchmarks of the step run: a teacher, a student, an objective and batches of a size, by name."""

import argparse
import dataclasses
import math

import jax
import numpy as np

from endistill_jax.core.model_io import Lengths
from endistill_jax.models.family import init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Objective, presets
from endistill_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One size of the whole work.

    Attributes:
        teacher: the frozen model.
        student: the model that is trained.
        objective: what is compared.
        lengths: examples and positions of a batch.
    """

    teacher: T5Config
    student: T5Config
    objective: Objective
    lengths: Lengths


_TINY = T5Config(
    vocab_size=8192,
    d_model=256,
    num_heads=4,
    head_dim=64,
    mlp_dim=384,
    num_encoder_layers=4,
    num_decoder_layers=4,
    tied_head=True,
    scan_layers=False,
)
_SMALL = T5Config(
    vocab_size=32128,
    d_model=512,
    num_heads=6,
    head_dim=64,
    mlp_dim=1024,
    num_encoder_layers=8,
    num_decoder_layers=8,
)
_BASE = dataclasses.replace(
    _SMALL, d_model=768, num_heads=12, mlp_dim=2048, num_encoder_layers=12, num_decoder_layers=12
)
_XL = dataclasses.replace(
    _SMALL, d_model=2048, num_heads=32, mlp_dim=5120, num_encoder_layers=24, num_decoder_layers=24
)


def _smaller(model: T5Config, depth: int, d_model: int, num_heads: int, mlp_dim: int, head_dim: int = 64) -> T5Config:
    return dataclasses.replace(
        model,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
    )


# Name -> teacher, student, relation heads, (batch, source, target).
_SHAPES = {
    "tiny": (_TINY, _smaller(_TINY, 2, 128, 4, 256, head_dim=32), 8, (16, 128, 48)),
    "small": (_SMALL, _smaller(_SMALL, 4, 256, 4, 512), 16, (16, 256, 64)),
    "base": (_BASE, _smaller(_BASE, 6, 384, 12, 1024, head_dim=32), 12, (8, 512, 114)),
    "xl": (_XL, _smaller(_XL, 6, 768, 12, 2048), 32, (64, 512, 114)),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", weight_decay=0.01)


def add_arguments(parser: argparse.ArgumentParser, shape: str) -> None:
    """The settings of the work that every benchmark of the step has; `shape` is the default."""
    parser.add_argument("--shape", choices=_SHAPES, default=shape)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations and teacher"
    )
    parser.add_argument("--batch", type=int, help="examples; the shape's own if not given")
    parser.add_argument("--relation_heads", type=int, help="the shape's own if not given")
    parser.add_argument("--layers", choices=("loop", "unrolled"), help="how both models run theirs; the shape's own")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none", help="of the student")


def shape_of(given: argparse.Namespace) -> Shape:
    """The work that the arguments describe; the objective is the union of both directions of MiniEnD."""
    teacher, student, heads, lengths = _SHAPES[given.shape]
    lengths = Lengths(*lengths)._replace(**({"batch": given.batch} if given.batch else {}))
    changes = {"dtype": given.dtype} | ({"scan_layers": given.layers == "loop"} if given.layers else {})
    objective = presets.union(relation_heads=given.relation_heads or heads)
    student = dataclasses.replace(student, remat=given.remat, **changes)
    shape = Shape(
        teacher=dataclasses.replace(teacher, **changes), student=student, objective=objective, lengths=lengths
    )
    objective.validate(shape.student, shape.teacher)
    return shape


def title_of(given: argparse.Namespace, shape: Shape) -> str:
    """The work in a line."""
    batch, source, target = shape.lengths
    return f"{given.shape}, {given.dtype}, {batch} examples of {source}/{target} tokens"


def settings_of(given: argparse.Namespace, shape: Shape) -> dict:
    """The arguments and what they came to, as plain values."""
    return vars(given) | shape.lengths._asdict() | {"relation_heads": shape.objective.relation_heads}


def random_batch(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; examples fill three quarters to all of both lengths, the first all."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        real = rng.integers(math.ceil(0.75 * length), length + 1, shape.lengths.batch)
        real[0] = length
        drawn = rng.integers(2, shape.student.vocab_size, (shape.lengths.batch, length))
        return np.where(np.arange(length) < real[:, None], drawn, 0).astype(np.int32)

    targets = tokens(shape.lengths.target)
    return {
        "encoder_input_tokens": tokens(shape.lengths.source),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


def random_teacher(shape: Shape, shardings=None):
    """Freshly initialized parameters in the compute type, made where they are sharded."""

    def init(key: jax.Array):
        return jax.tree.map(lambda leaf: leaf.astype(shape.teacher.dtype), init_params(shape.teacher, key))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(1))
