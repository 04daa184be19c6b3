"""Losses of the distributions over the vocabulary, token by token.

CrossEntropy is the language model's own loss. The others compare p, the teacher's distribution softened by a
temperature, with q, the student's, and are multiplied by `temperature^2`, which keeps the size of the gradient about
the same at all temperatures (Hinton et al., arXiv 1503.02531):

    ForwardKL        KL(p || q)
    ReverseKL        KL(q || p)
    GeneralizedJSD   beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q      (arXiv 2306.13649)
    SkewedKL         KL(p || alpha p + (1 - alpha) q)                                         (arXiv 2402.03898)
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from endistill_jax.core.errors import UserError, require_between, require_not_negative, require_positive
from endistill_jax.core.model_io import Batch, Head, Reads
from endistill_jax.objectives.term import ModelShape, Role, Term, TermInputs

Columns = Float[Array, "tokens columns"]
Tokens = Float[Array, " tokens"]
Targets = Int[Array, " tokens"]
Scalar = Float[Array, ""]
Sums = dict[str, Scalar]


class TokenDistribution:
    """softmax(logits) for some tokens, while a program is traced; what several losses need of it is computed once.

    Args:
        logits: float32.
        targets: the real tokens; one that is in no vocabulary has no logit.
        axis: the mesh axis over which the vocabulary's columns are split; None where all of them are here.
    """

    def __init__(self, logits: Columns, targets: Targets, axis: str | None = None):
        self.logits, self.targets, self.axis = logits, targets, axis

    def sum(self, x: Columns) -> Tokens:
        """Sum over the whole vocabulary."""
        total = jnp.sum(x, axis=-1)
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def log_softmax(self, temperature: float = 1.0) -> Columns:
        """Log-probabilities of the softened distribution."""
        shifted, _, total = self.softened(temperature)
        return shifted - jnp.log(total)[:, None]

    def softened(self, temperature: float) -> tuple[Columns, Columns, Tokens]:
        """Logits less each token's largest, their exponentials, and the sum of those."""
        if temperature == 1:
            return self.shifted, self.exp, self.exp_sum
        shifted = self.shifted / temperature
        exp = jnp.exp(shifted)
        return shifted, exp, self.sum(exp)

    @property
    def parts(self) -> int:
        """Devices that the columns are split over."""
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    @functools.cached_property
    def largest(self) -> Tokens:
        """The largest logit; a constant, which no gradient goes through."""
        largest = jnp.max(jax.lax.stop_gradient(self.logits), axis=-1)
        return largest if self.axis is None else jax.lax.pmax(largest, self.axis)

    @functools.cached_property
    def shifted(self) -> Columns:
        """The logits less the largest of the token."""
        return self.logits - self.largest[:, None]

    @functools.cached_property
    def exp(self) -> Columns:
        return jnp.exp(self.shifted)

    @functools.cached_property
    def exp_sum(self) -> Tokens:
        return self.sum(self.exp)

    @functools.cached_property
    def log_normalizer(self) -> Tokens:
        """The log of the sum of the exponentials of the logits."""
        return self.largest + jnp.log(self.exp_sum)

    @functools.cached_property
    def columns(self) -> Targets:
        """The targets as columns of this device; other numbers where a target is another device's."""
        offset = 0 if self.axis is None else self.logits.shape[-1] * jax.lax.axis_index(self.axis)
        return self.targets - offset

    @functools.cached_property
    def is_target(self) -> Bool[Array, "tokens columns"]:
        return jnp.arange(self.logits.shape[-1]) == self.columns[:, None]

    @functools.cached_property
    def in_vocabulary(self) -> Bool[Array, " tokens"]:
        """Whether the target is in the vocabulary."""
        return (self.targets >= 0) & (self.targets < self.parts * self.logits.shape[-1])

    @functools.cached_property
    def cross_entropy(self) -> Tokens:
        """Nats of the target, not for differentiation; NaN where it is in no vocabulary."""
        shifted = jnp.take_along_axis(self.shifted, self.columns[:, None], axis=1, mode="clip")[:, 0]
        here = (self.columns >= 0) & (self.columns < self.logits.shape[-1])
        shifted = jnp.where(here, shifted, 0.0)
        if self.axis is not None:
            shifted = jax.lax.psum(shifted, self.axis)
        return jnp.where(self.in_vocabulary, jnp.log(self.exp_sum) - shifted, jnp.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTerm(Term):
    """A loss of the distributions over the vocabulary, summed over target tokens by their loss weights.

    A subclass gives `token_loss`. It is called with all tokens (dense) or some at a time (blocked), on a device that
    may have only some of the vocabulary's columns, and is differentiated there, with respect to the logits alone.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.init_params is not Term.init_params:
            raise TypeError(f"{cls.__name__} is a TokenTerm, which cannot have parameters of its own; subclass Term")

    def reads(self, role: Role) -> Reads:
        return Reads(head=role == "student" or self.needs_teacher)

    def weight(self, batch: Batch) -> Scalar:
        return jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)

    def token_loss(self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Targets) -> Tokens:
        """Nats a token. Sums over the vocabulary are `student.sum`, so that its columns may be split."""
        raise NotImplementedError

    def loss_and_gradient(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Targets
    ) -> tuple[Tokens, Columns]:
        """`token_loss`, and its gradient with respect to the student's logits.

        Derived here; a term that can do it in fewer passes over the logits overrides this.
        """

        def total(logits: Columns) -> tuple[Scalar, Tokens]:
            losses = self.token_loss(TokenDistribution(logits, student.targets, student.axis), teacher, targets)
            return jnp.sum(losses), losses

        gradient, losses = jax.grad(total, has_aux=True)(student.logits)
        # Every device has the whole loss, and a sum over devices transposes to a sum: each counts the others' too.
        return losses, gradient / student.parts

    def sum(self, inputs: TermInputs) -> Scalar:
        """Of all logits at once. A loss computes its token terms together; see `loss_and_sums`."""
        teacher = None if inputs.teacher is None else inputs.teacher.head
        targets, weights = inputs.batch["decoder_target_tokens"], inputs.batch["decoder_loss_weights"]
        return dense_token_sums((self,), inputs.student.head, teacher, targets, weights)[self.name]

    def validate(self, student: ModelShape, teacher: ModelShape | None) -> None:
        for role, model in (("student", student), ("teacher", teacher if self.needs_teacher else None)):
            if model is not None and not model.depth("decoder"):
                raise UserError(f"{self.name}: the {role} is an encoder alone, and has no distribution over tokens")
        if self.needs_teacher and teacher is not None and teacher.vocab_size != student.vocab_size:
            sizes = f"{teacher.vocab_size} and {student.vocab_size} entries"
            raise UserError(f"{self.name}: the vocabularies of teacher and student differ: {sizes}; it needs the same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(TokenTerm):
    """`lse(logits) - logits[target] + z_loss * lse(logits)^2`.

    The coefficient `z_loss` of the squared log normalizer keeps it near zero. A target outside the vocabulary gives NaN
    rather than a plausible number.
    """

    z_loss: float = 0.0

    def __post_init__(self):
        require_not_negative(self, "z_loss")

    def default_name(self) -> str:
        return "lm"

    @property
    def needs_teacher(self) -> bool:
        return False

    def token_loss(self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Targets) -> Tokens:
        # A comparison and a sum rather than a gather: its gradient is no scatter, and stays where the columns are.
        target = student.sum(jnp.where(student.is_target, student.logits, 0.0))
        normalizer = student.log_normalizer
        losses = normalizer - target + self.z_loss * jnp.square(normalizer)
        return jnp.where(student.in_vocabulary, losses, jnp.nan)

    def loss_and_gradient(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Targets
    ) -> tuple[Tokens, Columns]:
        losses = student.cross_entropy + self.z_loss * jnp.square(student.log_normalizer)
        slope = (1 + 2 * self.z_loss * student.log_normalizer) / student.exp_sum
        gradient = student.exp * slope[:, None] - student.is_target
        return losses, jnp.where(student.in_vocabulary[:, None], gradient, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Divergence(TokenTerm):
    temperature: float = 1.0

    def __post_init__(self):
        require_positive(self, "temperature")

    def token_loss(self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Targets) -> Tokens:
        log_p, log_q = teacher.log_softmax(self.temperature), student.log_softmax(self.temperature)
        return self.temperature**2 * student.sum(self.terms(log_p, log_q))

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        """What is summed over the vocabulary, of the two log-probabilities."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKL(_Divergence):
    """KL(teacher || student): the student covers all that the teacher does."""

    def default_name(self) -> str:
        return "logits"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        return jnp.exp(log_p) * (log_p - log_q)

    def loss_and_gradient(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Targets
    ) -> tuple[Tokens, Columns]:
        # By hand: the exponentials are those of the cross-entropies, and no log-probability is formed.
        teacher_shifted, teacher_exp, teacher_sum = teacher.softened(self.temperature)
        student_shifted, student_exp, student_sum = student.softened(self.temperature)
        teacher_share, student_share = 1 / teacher_sum, 1 / student_sum
        expected = student.sum(teacher_exp * (teacher_shifted - student_shifted)) * teacher_share
        losses = self.temperature**2 * (expected + jnp.log(student_sum) - jnp.log(teacher_sum))
        gradient = student_exp * student_share[:, None] - teacher_exp * teacher_share[:, None]
        return losses, self.temperature * gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKL(_Divergence):
    """KL(student || teacher): the student keeps to where the teacher is."""

    def default_name(self) -> str:
        return "reverse_kl"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        return jnp.exp(log_q) * (log_q - log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralizedJSD(_Divergence):
    """Between both: near beta = 0 like the forward, near 1 like the reverse divergence, each times beta (1 - beta)."""

    beta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        require_between(self, "beta", 0, 1, open_ends=True)

    def default_name(self) -> str:
        return "jsd"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        log_m = jnp.logaddexp(log_p + jnp.log(self.beta), log_q + jnp.log1p(-self.beta))
        return self.beta * jnp.exp(log_p) * (log_p - log_m) + (1 - self.beta) * jnp.exp(log_q) * (log_q - log_m)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewedKL(_Divergence):
    """KL from the teacher to a mixture of both, which is bounded where the student has no mass."""

    alpha: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require_between(self, "alpha", 0, 1, open_ends=True)

    def default_name(self) -> str:
        return "skewed_kl"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        log_m = jnp.logaddexp(log_p + jnp.log(self.alpha), log_q + jnp.log1p(-self.alpha))
        return jnp.exp(log_p) * (log_p - log_m)


def weighted_sum(losses: Tokens, weights: Tokens) -> Scalar:
    # Not by a product: what is at weight 0 may be NaN, such as the cross-entropy of an impossible target.
    return jnp.sum(jnp.where(weights != 0, weights * losses, 0.0))


def cross_entropy_sums(student: TokenDistribution, teacher: TokenDistribution | None, weights: Tokens) -> Sums:
    """The models' own cross-entropies, by the names of their metrics."""
    sums = {"cross_entropy": weighted_sum(jax.lax.stop_gradient(student.cross_entropy), weights)}
    if teacher is not None:
        sums["teacher_cross_entropy"] = weighted_sum(teacher.cross_entropy, weights)
    return sums


def dense_token_sums(
    terms: Sequence[TokenTerm],
    student: Head,
    teacher: Head | None,
    targets: Int[Array, "batch target"],
    weights: Num[Array, "batch target"],
) -> Sums:
    """The plain form: by name the sum of every term and of the models' cross-entropies, which are constants.

    The teacher's head is a constant; weights are not negative, and 0 at padding.
    """

    def distribution(head: Head) -> TokenDistribution:
        # Cleared before the arithmetic: a `where` on the result alone would leave 0 * NaN in the gradient.
        hidden = jnp.where((weights != 0)[..., None], head.hidden, 0)
        return TokenDistribution(head._replace(hidden=hidden).logits().reshape(targets.size, -1), targets.reshape(-1))

    ours, theirs = distribution(student), None if teacher is None else distribution(teacher)
    targets, weights = targets.reshape(-1), weights.astype(jnp.float32).reshape(-1)
    return cross_entropy_sums(ours, theirs, weights) | {
        term.name: weighted_sum(term.token_loss(ours, theirs, targets), weights) for term in terms
    }
