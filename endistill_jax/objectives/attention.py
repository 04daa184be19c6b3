"""The attention distributions themselves, with the position bias and the scale that the models give their scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from endistill_jax.core.attention import RowMasks, visible_keys
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Output, Tap
from endistill_jax.objectives.implementation import MeshAxes, per_device, with_formed_gradient
from endistill_jax.objectives.interpolated_targets import joined
from endistill_jax.objectives.relations import SiteTerm, categorical_kl, head_scores
from endistill_jax.objectives.relations_blocked import MASKED_SCORE
from endistill_jax.objectives.term import ModelShape, Role, TermInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionKL(SiteTerm):
    """KL of the teacher's attention to the student's: summed over rows (query positions), mean over heads.

    T5 scales no score and adds a relative position bias to those of self-attention.
    """

    num_heads: int  # of both models, which are compared head by head

    def default_name(self) -> str:
        return self.named(f"{self.site}/attention")

    @property
    def vectors(self) -> str:
        return "qk"

    def sum(self, inputs: TermInputs) -> Float[Array, ""]:
        student, teacher = self._tap(inputs.student, "student"), self._tap(inputs.teacher, "teacher")
        if inputs.share is not None:
            teacher = self._interpolated(teacher, student, inputs.share)
        masks = self.masks(inputs.batch)
        if inputs.implementation.blocks("relations", len(masks.query_segments)):
            axes = inputs.implementation.sharded_axes
            return _blocked(self.num_heads, masks.causal, axes, student, teacher, masks[:2])
        return _dense(self.num_heads, masks, student, teacher)

    def _tap(self, output: Output, role: Role) -> Tap:
        tap = output.taps[self.site, self.layer(role)]
        return Tap(tap.query, tap.key, None, tap.bias)

    def _interpolated(self, teacher: Tap, student: Tap, share: Float[Array, ""]) -> Tap:
        query, key = (
            joined(ours, own, share, self.num_heads, keep_scale=True)
            for ours, own in zip(teacher[:2], student[:2], strict=True)
        )
        biases = zip((teacher.bias, jax.lax.stop_gradient(student.bias)), (share, 1 - share), strict=True)
        parts = [part * bias for bias, part in biases if bias is not None]
        return Tap(query, key, None, sum(parts) if parts else None)

    def validate(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().validate(student, teacher)
        if not self.num_heads == student.num_heads == teacher.num_heads:
            raise UserError(
                f"{self.name}: num_heads is {self.num_heads}, and teacher and student have {teacher.num_heads} and "
                f"{student.num_heads}; attention is compared head by head. Compare relations instead"
            )


def _dense(heads: int, masks: RowMasks, student: Tap, teacher: Tap) -> Float[Array, ""]:
    """The plain form, of any number of examples: the sum over rows, float32."""
    visible = visible_keys(*masks)[:, None]  # [batch, 1, query, key]

    def masked_scores(tap: Tap) -> Float[Array, "batch heads query key"]:
        scores = head_scores(tap[:2], masks[:2], heads)
        return jnp.where(visible, scores if tap.bias is None else scores + tap.bias, MASKED_SCORE)

    return jnp.sum(categorical_kl(masked_scores(teacher), masked_scores(student))) / heads


def _blocked(
    heads: int, causal: bool, axes: MeshAxes | None, student: Tap, teacher: Tap, segments: tuple
) -> Float[Array, ""]:
    """An example at a time, its gradient formed beside its value: only one example's scores are ever in memory."""
    parts = 1 if axes is None or heads % axes.model_parts else axes.model_parts

    def one_device(student: Tap, teacher: Tap, segments: tuple, with_gradient: bool) -> tuple[jax.Array, Tap | None]:
        def one_example(d_bias: jax.Array | None, arrays: tuple) -> tuple[jax.Array | None, tuple]:
            arrays = jax.tree.map(lambda x: x[None], arrays)
            (query, key), teacher_vectors, segments = arrays

            def total(query: jax.Array, key: jax.Array, bias: jax.Array | None) -> jax.Array:
                theirs = Tap(*teacher_vectors, None, teacher.bias)
                return _dense(heads // parts, RowMasks(*segments, causal), Tap(query, key, None, bias), theirs)

            if not with_gradient:
                return None, (total(query, key, student.bias), None)
            value, (d_query, d_key, by_bias) = jax.value_and_grad(total, argnums=(0, 1, 2))(query, key, student.bias)
            return (None if d_bias is None else d_bias + by_bias), (value, (d_query[0], d_key[0]))

        start = jnp.zeros_like(student.bias) if with_gradient and student.bias is not None else None
        d_bias, (totals, gradient) = jax.lax.scan(one_example, start, (student[:2], teacher[:2], segments))
        if not with_gradient:
            return jnp.sum(totals, keepdims=True) / parts, None
        if d_bias is not None and axes is not None:
            d_bias = jax.lax.psum(d_bias, axes.batch)
        # The mean over a device's heads, of as many devices as share them.
        gradient = jax.tree.map(lambda x: x / parts, Tap(*gradient, None, d_bias))
        return jnp.sum(totals, keepdims=True) / parts, gradient

    def sharded(student: Tap, constants: tuple, with_gradient: bool) -> tuple[jax.Array, None, Tap | None]:
        run = functools.partial(one_device, with_gradient=with_gradient)
        in_specs = out_specs = None
        if axes is not None:
            model = axes.model if parts > 1 else None
            vectors, bias = PartitionSpec(axes.batch, None, model), PartitionSpec(None, model)

            def specs(tap: Tap) -> Tap:
                return Tap(vectors, vectors, None, None if tap.bias is None else bias)

            sums = PartitionSpec((*axes.batch, axes.model) if parts > 1 else axes.batch)
            in_specs = (specs(student), specs(constants[0]), PartitionSpec(axes.batch))
            out_specs = (sums, specs(student) if with_gradient else None)
        totals, gradient = per_device(run, axes, in_specs, out_specs)(student, *constants)
        return jnp.sum(totals), None, gradient

    return with_formed_gradient(sharded, student, (teacher, segments))[0]
