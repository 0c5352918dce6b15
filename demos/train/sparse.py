"""Dynamic-LLaVA as a decoder with masks: its two predictors, and a forward pass where dropped tokens stay but vanish.

Paper     arXiv:2412.00876. Class 0 of a predictor's logits means keep.
Image     at the input of `image_layer` each visual token gets a decision; dropped ones are no keys from there on.
Output    at the input of `text_layer` each generated token gets one; in that layer and those above, later tokens see no
          key or value of a dropped one. A token always sees itself.
Differs   the masked softmax has no smoothing term: a row sees itself, so its sum is never 0, and nothing leaks. Two
          layer indices instead of one. Weights start at 1 / sqrt(inputs): .02 is that of a width of 2,500.

This is the plain reference: serving computes the same with tokens that are really gone.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from demos.train.packing import Packed
from pruning.learned.predictors import Predictors

LIMIT = 15.0  # of the exponent by which a dropped key may exceed all kept ones; touches its gradient only


# ── decisions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def gumbel_keep(logits: Tensor, temperature: float, rng: torch.Generator | None) -> Tensor:
    """(...,) 1 or 0 by a Gumbel-softmax draw, with the gradient of the soft value; noise in float32."""
    uniform = torch.rand(logits.shape, generator=rng, device=logits.device).clamp(1e-6, 1 - 1e-6)
    soft = ((logits.float().log_softmax(-1) - (-uniform.log()).log()) / temperature).softmax(-1)[..., 0]
    hard = (soft > 0.5).float()
    return hard + (soft - soft.detach())


def top_keep_soft(logits: Tensor, temperature: float, keep_ratio: float) -> Tensor:
    """(..., N) what `top_keep` keeps, with the gradient of the soft value.

    Draws spread the kept tokens over a picture, and their number differs from picture to picture. A decoder that has
    seen draws only stutters where the tokens of highest score lie side by side, as in photographs.
    """
    soft = (logits.float() / temperature).softmax(-1)[..., 0]
    return top_keep(logits, keep_ratio) + (soft - soft.detach())


def top_keep(logits: Tensor, keep_ratio: float) -> Tensor:
    """(..., N) 1 for the floor(N * keep_ratio) tokens of highest score, at least one; the lower index wins a tie."""
    count = max(1, math.floor(logits.shape[-2] * keep_ratio))
    score = logits.float().log_softmax(-1)[..., 0]
    chosen = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(score).scatter(-1, chosen, 1.0)


@dataclass
class Decide:
    """How decisions are made. Training: a temperature and a source of noise. Serving: top-k and a threshold.

    In training with an image_ratio below 1 images are decided as in serving. Without images (or text) nothing of that
    sort is dropped. fixed: image decisions (B, N) from elsewhere.
    """

    temperature: float | None = None
    rng: torch.Generator | None = None
    image_ratio: float = 1.0
    images: bool = True
    text: bool = True
    threshold: float = 0.0  # keep iff logit 0 - logit 1 > threshold
    fixed: Tensor | None = None

    def image(self, logits: Tensor) -> Tensor:
        if self.temperature is not None:
            if self.image_ratio < 1:
                return top_keep_soft(logits, self.temperature, self.image_ratio)
            return gumbel_keep(logits, self.temperature, self.rng)
        return top_keep(logits, self.image_ratio)

    def output(self, logits: Tensor) -> Tensor:
        if self.temperature is not None:
            return gumbel_keep(logits, self.temperature, self.rng)
        return (logits[..., 0] - logits[..., 1] > self.threshold).float()


@dataclass
class Decisions:
    """image: (n,) of each row; output: (A,) of all answer tokens, in the order of `answer_places`."""

    image: list[Tensor]
    output: Tensor | None = None


def answer_places(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """(row, place, question) of every answer token that would be fed back in decode: all but the last, </s>."""
    asked = packed.target_question
    inside = torch.cat([torch.zeros(1, dtype=torch.bool, device=asked.device), asked[1:] == asked[:-1]])
    return packed.target_row[inside], packed.target_place[inside], asked[inside]


def place_in_answer(question: Tensor) -> Tensor:
    """(A,) index of each answer token in its answer; tokens of one answer stand together."""
    _, counts = question.unique_consecutive(return_counts=True)
    return torch.arange(len(question), device=question.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def by_answer(packed: Packed, kept: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
    """(number of tokens, share kept) of each answer, its first `skip` tokens not counted in the share."""
    _, _, question = answer_places(packed)
    _, index, counts = question.unique_consecutive(return_inverse=True, return_counts=True)
    counted = (place_in_answer(question) >= skip).to(kept.dtype)
    total = torch.zeros(len(counts), device=kept.device).index_add(0, index, counted)
    return counts, torch.zeros_like(total).index_add(0, index, kept * counted) / total.clamp(min=1)


# ── forward ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class MaskedSoftmax(torch.autograd.Function):
    """Softmax over keys that are allowed and kept, in float32; every token keeps itself.

    logits (B, H, T, T), allowed (B, 1, T, T) bool, policy (B, T) of ones and zeros. Straight-through: the gradient of a
    dropped key is that of letting it in, weighed by what its weight would then be. The plain derivative at 0 weighs it
    by exp(logit) / sum of the kept ones, which has no bound and drowns the budget loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, allowed: Tensor, policy: Tensor) -> Tensor:
        kept = policy[:, None, None, :].expand(allowed.shape).clone()
        kept.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        logits = logits.float().masked_fill(~allowed, -math.inf)
        top = logits.masked_fill(kept == 0, -math.inf).amax(-1, keepdim=True)
        share = (logits - top).clamp_(max=LIMIT).exp_()
        weights = share * kept
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(share.div_(total), kept)
        ctx.dtype = logits.dtype
        return weights.div_(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        share, kept = ctx.saved_tensors  # exp(logit) / sum of the kept
        weights = share * kept
        grad = grad.float() - (grad.float() * weights).sum(-1, keepdim=True)
        by_key = torch.where(kept > 0, weights, share / (1 + share)).mul_(grad)
        by_key.diagonal(dim1=-2, dim2=-1).zero_()
        return weights.mul_(grad), None, by_key.sum((1, 2))


def run_layer(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor, policy: Tensor | None
) -> Tensor:
    """A Llama layer (B, T, D) → (B, T, D), with the masked softmax where there is a policy."""
    attention, shape = layer.self_attn, (*hidden.shape[:2], -1, layer.self_attn.head_dim)
    states = layer.input_layernorm(hidden)
    query, key = (f(states).view(shape).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
    value = attention.v_proj(states).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key, value = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in (key, value))
    logits = query @ key.mT * attention.scaling
    if policy is None:
        weights = logits.masked_fill(~allowed, -math.inf).softmax(-1)
    else:
        weights = MaskedSoftmax.apply(logits, allowed, policy)
    mixed = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
    hidden = hidden + attention.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def image_decisions(predictors: Predictors, hidden: Tensor, packed: Packed, decide: Decide) -> list[Tensor]:
    counts = (packed.kept >= 0).sum(1).tolist()
    spans = [row[at : at + n] for row, at, n in zip(hidden, packed.visual_at.tolist(), counts, strict=True)]
    if decide.fixed is not None:
        return [fixed[: len(span)] for fixed, span in zip(decide.fixed, spans, strict=True)]
    if len(set(counts)) == 1:
        return list(decide.image(predictors.image(torch.stack(spans))))
    return [decide.image(predictors.image(span)) for span in spans]


def run_sparse(
    model: LlavaForConditionalGeneration, predictors: Predictors, embeds: Tensor, packed: Packed, decide: Decide
) -> tuple[Tensor, Decisions]:
    """Logits at the targets (S, vocab), and what was kept. embeds (B, T, D) hold the visual tokens."""
    decoder, shape = model.model.language_model, predictors.shape
    rotary = decoder.rotary_emb(embeds, packed.positions)
    hidden, decisions, policy = embeds, Decisions([]), None
    for i, layer in enumerate(decoder.layers):
        if i == shape.image_layer and decide.images:
            decisions.image = image_decisions(predictors, hidden, packed, decide)
            rows = [
                torch.cat([row.new_ones(at), row, row.new_ones(packed.ids.shape[1] - at - len(row))])
                for row, at in zip(decisions.image, packed.visual_at.tolist(), strict=True)
            ]
            policy = torch.stack(rows)
        if i == shape.text_layer and decide.text:
            row, place, question = answer_places(packed)
            drawn = decide.output(predictors.text(hidden[row, place]))
            decisions.output = torch.where(place_in_answer(question) < shape.keep_first, 1.0, drawn)
            policy = hidden.new_ones(packed.ids.shape, dtype=torch.float32) if policy is None else policy
            policy = policy.index_put((row, place), decisions.output)
        hidden = run_layer(layer, hidden, rotary, packed.mask, policy)
    states = decoder.norm(hidden)[packed.target_row, packed.target_place]
    return model.lm_head(states), decisions


# ── cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def layer_flops(config: Any, num_tokens: float, queries: float | None = None) -> float:
    """True FLOPs of one Llama layer over a causal prompt: three MLP matrices, grouped keys, half of the square."""
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    matrices = 2 * width * width + 2 * width * kv_width + 3 * width * config.intermediate_size
    return 2 * (num_tokens * matrices + num_tokens * num_tokens * width)


def predictor_flops(predictors: Predictors, num_visual: int) -> float:
    """Of the image predictor over one medium."""
    matrices = sum(m.weight.numel() for m in predictors.image.modules() if isinstance(m, nn.Linear))
    attention = 2 * num_visual * num_visual * predictors.shape.channels * predictors.shape.num_blocks
    return 2 * (num_visual * matrices + attention)


def prefill_share(config: Any, predictors: Predictors, num_visual: int, num_text: float, keep_ratio: float) -> float:
    """FLOPs of the prefill with dropping / without, the predictor's own included; the logits of one row are not."""
    kept, layers = max(1, math.floor(num_visual * keep_ratio)), config.num_hidden_layers
    before = predictors.shape.image_layer
    whole = layer_flops(config, num_visual + num_text)
    part = before * whole + (layers - before) * layer_flops(config, kept + num_text)
    return (part + predictor_flops(predictors, num_visual)) / (layers * whole)
