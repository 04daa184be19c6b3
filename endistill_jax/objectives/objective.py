"""Paths: what a student learns from, as plain data."""

import dataclasses
import math
from typing import Literal, Protocol

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.interpolated_targets import InterpolatedTargets
from endistill_jax.objectives.relations import check_relation_heads

RELATIONS = ("qq", "kk", "vv", "qk")
SITES = ("encoder_self", "decoder_self", "cross")

Role = Literal["teacher", "student"]


class Dimensions(Protocol):
    """What a path must know of a model to be checked against it; a model's configuration has these."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def inner_dim(self) -> int: ...
    @property
    def num_encoder_layers(self) -> int: ...
    @property
    def num_decoder_layers(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One attention module whose queries, keys and values are compared between teacher and student.

    Attributes:
      relations: which pairs are compared, from `qq`, `kk`, `vv`, `qk`.
      weight: weight of the site in the loss, shared equally by its relations; 0 turns it off.
      relation_heads: number of heads into which both models' joined heads are split anew; must divide the inner
        dimension (num_heads * head_dim) of both.
      teacher_layer: which layer of the teacher's stack; negative counts from its end.
      student_layer: which layer of the student's stack.
    """

    relations: tuple[str, ...]
    weight: float = 1.0
    relation_heads: int = 16
    teacher_layer: int = -1
    student_layer: int = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """What a student learns from; every part is off unless given. Pure data: `validate` checks it.

    Attributes:
      encoder_self: relations of the encoder's self-attention.
      decoder_self: relations of the decoder's (causal) self-attention.
      cross: relations of the decoder's attention to the encoder; queries are the decoder's, keys and values the
        encoder's.
      logits_weight: weight of the divergence of the vocabulary distributions.
      temperature: softens both distributions of that divergence.
      lm_weight: weight of the cross-entropy with the real targets.
      z_loss: coefficient of the squared log normaliser, within the cross-entropy.
      interpolated_targets: the relations' and words' targets move from the student's own to the teacher's.
    """

    encoder_self: Site | None = None
    decoder_self: Site | None = None
    cross: Site | None = None
    logits_weight: float = 0.0
    temperature: float = 1.0
    lm_weight: float = 0.0
    z_loss: float = 0.0
    interpolated_targets: InterpolatedTargets | None = None

    @property
    def sites(self) -> dict[str, Site]:
        """The sites that are compared: given, and of positive weight."""
        return {name: site for name, site in self._given_sites().items() if site.weight > 0}

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but the real targets is learnt from."""
        return bool(self.sites) or self.logits_weight > 0

    @property
    def relation_heads(self) -> dict[str, int]:
        """The number of relation heads of each compared site."""
        return {name: site.relation_heads for name, site in self.sites.items()}

    def tap_layers(self, role: Role) -> dict[str, int]:
        """The layer of each compared site, in the teacher or the student."""
        return {name: getattr(site, f"{role}_layer") for name, site in self.sites.items()}

    def needs_logits(self, role: Role) -> bool:
        """Whether the teacher or the student must compute vocabulary logits."""
        return self.logits_weight > 0 or (role == "student" and self.lm_weight > 0)

    def validate(self, student: Dimensions, teacher: Dimensions | None = None) -> None:
        """Checks the path by itself and against the models.

        Args:
          student: dimensions of the student, for instance its configuration.
          teacher: dimensions of the teacher; not needed if `needs_teacher` is false.

        Raises:
          UserError: for a relation that does not exist or is given twice, a weight that is negative or not finite, a
            temperature that is not positive, a path that teaches nothing, a missing teacher, relation heads that do not
            divide both inner dimensions, a layer that does not exist, logits of two vocabulary sizes.
        """
        self._check_numbers()
        for name, site in self._given_sites().items():
            _check_relations(site, f"path.{name}.relations")
        if not (self.needs_teacher or self.lm_weight > 0):
            raise UserError(
                "path teaches nothing; give it a site of positive weight, a logits_weight or a lm_weight above 0"
            )
        if not self.needs_teacher:
            if self.interpolated_targets is not None:
                raise UserError("path.interpolated_targets moves towards a teacher's, but nothing is learnt from one")
            return
        if teacher is None:
            raise UserError(
                "path compares the student with a teacher, but there is none; give one, or only a lm_weight"
            )
        for name, site in self.sites.items():
            check_relation_heads(
                site.relation_heads, teacher.inner_dim, student.inner_dim, f"path.{name}.relation_heads"
            )
            _check_layer(site.teacher_layer, teacher, name, "teacher")
            _check_layer(site.student_layer, student, name, "student")
        if self.logits_weight > 0 and teacher.vocab_size != student.vocab_size:
            raise UserError(
                f"path.logits_weight is {self.logits_weight}, but the vocabularies of teacher and student have "
                f"{teacher.vocab_size} and {student.vocab_size} entries; distilling logits needs one for both"
            )

    def _given_sites(self) -> dict[str, Site]:
        return {name: site for name in SITES if (site := getattr(self, name)) is not None}

    def _check_numbers(self) -> None:
        weights = {f"path.{name}.weight": site.weight for name, site in self._given_sites().items()}
        weights |= {f"path.{name}": getattr(self, name) for name in ("logits_weight", "lm_weight", "z_loss")}
        for where, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"{where} is {weight}; it must be a finite number, 0 or more")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"path.temperature is {self.temperature}; it must be a finite number above 0")


def _check_relations(site: Site, where: str) -> None:
    if not isinstance(site.relations, tuple) or not site.relations:
        raise UserError(f"{where} is {site.relations!r}; it must be a tuple such as ('qk', 'vv'), not empty")
    for relation in site.relations:
        if relation not in RELATIONS:
            raise UserError(f"{where} has {relation!r}, which is no relation; choose from {', '.join(RELATIONS)}")
        if site.relations.count(relation) > 1:
            raise UserError(f"{where} has {relation!r} more than once; name each relation once and use the weight")


def _check_layer(layer: int, dimensions: Dimensions, site: str, role: Role) -> None:
    stack = "encoder" if site == "encoder_self" else "decoder"
    layers = dimensions.num_encoder_layers if stack == "encoder" else dimensions.num_decoder_layers
    if not -layers <= layer < layers:
        raise UserError(
            f"path.{site}.{role}_layer is {layer}, but the {role}'s {stack} has {layers} layers; "
            f"choose from {-layers} to {layers - 1}"
        )
