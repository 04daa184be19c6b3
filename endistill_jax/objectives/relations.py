"""Relations of attention vectors, compared between a teacher and a student.

A relation of two sets of vectors is the distribution that each vector of the first puts on those of the second by
scaled dot products, per relation head (MiniLMv2, arXiv 2012.15828). It has the same shape for models of any width.
`qk` are queries with keys, `qq`, `kk` and `vv` vectors of one kind with each other.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from endistill_jax.core.attention import SITES, RowMasks, row_masks, visible_keys
from endistill_jax.core.errors import UserError, require_choice
from endistill_jax.core.model_io import Batch, Lengths, Output, Reads, batch_segments
from endistill_jax.objectives.interpolated_targets import joined
from endistill_jax.objectives.relations_blocked import MASKED_SCORE, Pair, Segments, relation_kl_blocked
from endistill_jax.objectives.term import LayerTerm, ModelShape, Ramp, Role, TermInputs

RELATIONS = ("qq", "kk", "vv", "qk")
Scores = Float[Array, "batch heads query key"]
_FIELDS = {"q": "query", "k": "key", "v": "value"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteTerm(LayerTerm):
    """A term that compares one attention module of both models, at "encoder_self", "decoder_self" or "cross"."""

    site: str

    def __post_init__(self):
        require_choice(self, site=SITES)

    @property
    def vectors(self) -> str:
        """Which two kinds of vectors are compared, such as "qk"."""
        raise NotImplementedError

    def reads(self, role: Role) -> Reads:
        return Reads(taps={(self.site, self.layer(role)): self.vectors})

    def masks(self, batch: Batch) -> RowMasks:
        """Of the rows that are compared."""
        return row_masks(self.site, self.vectors, batch_segments(batch))

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Rows: real query positions with at least one visible key."""
        return jnp.sum(jnp.any(visible_keys(*self.masks(batch)), axis=-1), dtype=jnp.float32)

    def flops(self, lengths: Lengths, student: ModelShape, teacher: ModelShape) -> int:
        """2 B Q K (I_teacher + 3 I_student): all scores, masked or not, and two products for the student's gradient."""
        sides = {"encoder": lengths.source, "decoder": lengths.target}
        queries, keys = (sides[SITES[self.site].side(vector)] for vector in self.vectors)
        return 2 * lengths.batch * queries * keys * (teacher.inner_dim + 3 * student.inner_dim)

    def validate(self, student: ModelShape, teacher: ModelShape | None) -> None:
        self.validate_layers(SITES[self.site].stack, student, teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationKL(SiteTerm):
    """KL of the teacher's relation to the student's: summed over rows (query positions), mean over relation heads.

    Both models' heads are joined and split again into relation heads, which must divide num_heads * head_dim of both.
    """

    relation: str  # "qq", "kk", "vv" or "qk"
    relation_heads: int = 16

    def __post_init__(self):
        super().__post_init__()
        require_choice(self, relation=RELATIONS)

    def default_name(self) -> str:
        return self.named(f"{self.site}/{self.relation}")

    @property
    def vectors(self) -> str:
        return self.relation

    def sum(self, inputs: TermInputs) -> Float[Array, ""]:
        student, teacher = self._pair(inputs.student, "student"), self._pair(inputs.teacher, "teacher")
        if inputs.share is not None:
            teacher = tuple(
                joined(ours, own, inputs.share, self.relation_heads) for ours, own in zip(teacher, student, strict=True)
            )
        masks = self.masks(inputs.batch)
        if inputs.implementation.blocks("relations", len(masks.query_segments)):
            return relation_kl_blocked(teacher, student, self.relation_heads, masks, inputs.implementation)
        return relation_kl(teacher, student, self.relation_heads, masks)

    def _pair(self, output: Output, role: Role) -> Pair:
        tap = output.taps[self.site, self.layer(role)]
        first, second = self.relation
        return getattr(tap, _FIELDS[first]), getattr(tap, _FIELDS[second])

    def validate(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().validate(student, teacher)
        common = math.gcd(teacher.inner_dim, student.inner_dim)
        if self.relation_heads < 1 or common % self.relation_heads:
            choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise UserError(
                f"{self.name}: relation_heads is {self.relation_heads}, which does not divide num_heads * head_dim of "
                f"teacher ({teacher.inner_dim}) and student ({student.inner_dim}); choose one of {choices}"
            )


def relation_scores(pair: Pair, segments: Segments, relation_heads: int) -> Scores:
    """`queries_r @ keys_r^T / sqrt(inner / relation_heads)`, without a mask; vectors at segment 0 count as zero."""
    return head_scores(pair, segments, relation_heads) / math.sqrt(pair[0].shape[-1] // relation_heads)


def head_scores(pair: Pair, segments: Segments, heads: int) -> Scores:
    """Dot products of two sets of vectors, head by head; vectors at segment 0 count as zero."""

    def split(
        vectors: Float[Array, "batch length inner"], segments: Int[Array, "batch length"]
    ) -> Float[Array, "batch length heads head_dim"]:
        # Padding is cleared before the arithmetic, not only after: the gradient of a product whose result is later
        # thrown away by a `where` is 0 * NaN = NaN if a factor is not finite.
        vectors = jnp.where(segments[:, :, None] != 0, vectors.astype(jnp.float32), 0.0)
        return vectors.reshape(*vectors.shape[:2], heads, -1)

    queries, keys = map(split, pair, segments)
    # Accelerators would otherwise round float32 factors to fewer bits.
    return jnp.einsum("bqhd,bkhd->bhqk", queries, keys, precision=jax.lax.Precision.HIGHEST)


def relation_kl(teacher: Pair, student: Pair, relation_heads: int, masks: RowMasks) -> Float[Array, ""]:
    """The plain dense form: the sum over rows, float32, in nats. The teacher is a constant, of its own width."""
    visible = visible_keys(*masks)[:, None]  # [batch, 1, query, key]

    def masked_scores(pair: Pair) -> Scores:
        return jnp.where(visible, relation_scores(pair, masks[:2], relation_heads), MASKED_SCORE)

    # Rows that see nothing need no further mask: their scores are the same constants in both models, which differ by
    # exactly 0, and `where` passes no gradient to what it replaced.
    divergence = categorical_kl(masked_scores(teacher), masked_scores(student))  # [batch, relation_heads, query]
    return jnp.sum(divergence) / relation_heads


def categorical_kl(
    teacher_scores: Float[Array, "*rows choices"], student_scores: Float[Array, "*rows choices"]
) -> Float[Array, "*rows"]:
    """KL(softmax(teacher) || softmax(student)) over the last axis, in nats; the teacher is a constant.

    Computed as `sum_j p_t (s_t - s_s) - lse_t + lse_s`, whose gradient with respect to the student's scores is
    `p_s - p_t`; for equal scores both are zero up to rounding.
    """
    teacher_scores = jax.lax.stop_gradient(teacher_scores)
    teacher_lse = jax.nn.logsumexp(teacher_scores, axis=-1)
    student_lse = jax.nn.logsumexp(student_scores, axis=-1)
    teacher_probabilities = jnp.exp(teacher_scores - teacher_lse[..., None])
    expected = jnp.sum(teacher_probabilities * (teacher_scores - student_scores), axis=-1)
    return expected - teacher_lse + student_lse


def relations(
    site: str,
    names: tuple[str, ...],
    *,
    coefficient: float | Ramp = 1.0,
    relation_heads: int = 16,
    teacher_layer: int = -1,
    student_layer: int = -1,
) -> tuple[RelationKL, ...]:
    """A term for each of a site's relations, which share its coefficient equally."""
    share = coefficient.scaled(1 / len(names)) if isinstance(coefficient, Ramp) else coefficient / len(names)
    settings = {"coefficient": share, "relation_heads": relation_heads}
    layers = {"teacher_layer": teacher_layer, "student_layer": student_layer}
    return tuple(RelationKL(site=site, relation=name, **settings, **layers) for name in names)
