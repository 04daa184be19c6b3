"""The same distillation as a PyTorch user writes it: Hugging Face T5s, forward hooks on q, k and v, AdamW.

Written to be fast: scaled dot products as one batched product, fused AdamW, no synchronization but for the loss.
"""

import contextlib
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import transformers

from endistill_jax.core.attention import SITES
from endistill_jax.objectives import ForwardKL, Objective, RelationKL
from endistill_jax.train.optimizer import OptimizerConfig

_VECTORS = {"q": "query", "k": "key", "v": "value"}
Taps = dict[str, torch.Tensor]  # "site/q" -> [batch, length, inner]


class Distillation:
    """A training step with its student, teacher and batch: each call is one update.

    Args:
        teacher: a folder; frozen, in evaluation mode, in `dtype`.
        student: a folder; parameters in float32, computed in `dtype` by autocast.
        objective: relations of the last layers and `ForwardKL` at temperature 1; as ours.
        batch: SeqIO's features, not packed.
        settings: of AdamW and clipping; constant learning rate.
        dtype: float32 or bfloat16.
        device: cpu or cuda.
        attention: transformers' implementation, sdpa or eager.
        compiled: run forward pass and losses through `torch.compile`.
    """

    def __init__(
        self,
        teacher: str,
        student: str,
        objective: Objective,
        batch: Mapping[str, np.ndarray],
        settings: OptimizerConfig,
        *,
        dtype: str,
        device: str,
        attention: str,
        compiled: bool,
    ):
        self.objective, self.device, self.dtype = objective, device, getattr(torch, dtype)
        self.teacher, self.teacher_taps = self._load(teacher, attention, self.dtype)
        self.student, self.student_taps = self._load(student, attention, torch.float32)
        self.teacher.requires_grad_(False)
        self.batch = {name: torch.from_numpy(np.asarray(array, np.int64)).to(device) for name, array in batch.items()}
        self.clip_norm = settings.clip_norm
        self.optimizer = torch.optim.AdamW(
            _decayed(self.student, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            fused=True,
        )
        self.loss: Callable[[], torch.Tensor] = torch.compile(self._loss) if compiled else self._loss
        self.losses: list[torch.Tensor] = []

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()
        self.losses.append(loss.detach())
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _load(self, folder: str, attention: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Taps]:
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, attn_implementation=attention, dtype=torch.float32
        )
        # Evaluation mode turns dropout off, which is 0 in ours; gradients flow all the same.
        model = model.to(self.device, dtype).eval()
        model.config.use_cache = False
        taps: Taps = {}
        sites = {
            "encoder_self": model.encoder.block[-1].layer[0].SelfAttention,
            "decoder_self": model.decoder.block[-1].layer[0].SelfAttention,
            "cross": model.decoder.block[-1].layer[1].EncDecAttention,
        }
        for site, module in sites.items():
            for vector in _VECTORS:
                getattr(module, vector).register_forward_hook(_keep(taps, f"{site}/{vector}"))
        return model, taps

    def _loss(self) -> torch.Tensor:
        batch = self.batch
        source_mask, target_mask = batch["encoder_input_tokens"] != 0, batch["decoder_target_tokens"] != 0
        inputs = {
            "input_ids": batch["encoder_input_tokens"],
            "attention_mask": source_mask.long(),
            "decoder_input_ids": batch["decoder_input_tokens"],
            "decoder_attention_mask": target_mask.long(),
            "use_cache": False,
        }
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        half = self.dtype != torch.float32
        with torch.autocast(self.device, self.dtype) if half else contextlib.nullcontext():
            student_logits = self.student(**inputs).logits
        sides = {"encoder": source_mask, "decoder": target_mask}
        loss = 0.0
        for term in self.objective.terms:
            match term:
                case ForwardKL():
                    divergence = _logits_kl(teacher_logits, student_logits, target_mask)
                case RelationKL():
                    site = SITES[term.site]
                    names = [f"{term.site}/{vector}" for vector in term.relation]
                    teacher, student = (
                        [taps[each] for each in names] for taps in (self.teacher_taps, self.student_taps)
                    )
                    masks = [sides[site.side(vector)] for vector in term.relation]
                    divergence = _relation_kl(teacher, student, term.relation_heads, masks, site.causal)
            loss = loss + term.coefficient * divergence
        return loss


def matmul_runs(dtypes: list[str], sizes: tuple[int, ...], device: str) -> dict[str, Callable[[], object]]:
    """PyTorch's square products, named "torch_matmul <dtype> <size>"."""
    runs = {}
    for dtype in dtypes:
        for size in sizes:
            factors = [torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2)]

            def run(factors: list[torch.Tensor] = factors) -> None:
                torch.matmul(*factors)
                if device == "cuda":
                    torch.cuda.synchronize()

            runs[f"torch_matmul {dtype} {size}"] = run
    return runs


def _keep(taps: Taps, name: str) -> Callable:
    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        taps[name] = output

    return hook


def _decayed(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; normalization scales and position biases do not."""
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim == 2 and "relative_attention_bias" not in name].append(parameter)
    return [{"params": each, "weight_decay": weight_decay if decays else 0.0} for decays, each in groups.items()]


def _logits_kl(teacher: torch.Tensor, student: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """KL of the token distributions at temperature 1, mean over real target tokens."""
    teacher, student = (x.float().log_softmax(-1) for x in (teacher, student))
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return (divergence * real).sum() / real.sum()


def _relation_kl(
    teacher: list[torch.Tensor], student: list[torch.Tensor], heads: int, masks: list[torch.Tensor], causal: bool
) -> torch.Tensor:
    """KL of one relation, mean over heads and over rows that see a key."""
    queries, keys = masks
    visible = queries[:, :, None] & keys[:, None, :]  # [batch, query_length, key_length]
    if causal:
        visible = visible & torch.ones_like(visible[0]).tril()

    def log_distribution(pair: list[torch.Tensor]) -> torch.Tensor:
        # [batch, length, inner] -> [batch, heads, length, relation_dim]
        first, second = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in pair)
        scores = torch.matmul(first, second.transpose(2, 3)).float() / math.sqrt(first.shape[-1])
        return scores.masked_fill(~visible[:, None], -1e9).log_softmax(-1)

    with torch.no_grad():
        target = log_distribution(teacher)
    divergence = torch.nn.functional.kl_div(log_distribution(student), target, reduction="none", log_target=True)
    rows = visible.any(-1)  # [batch, query_length]
    return (divergence.sum(-1) * rows[:, None]).sum() / heads / rows.sum()
