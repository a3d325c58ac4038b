"""The head of a language model where only answer tokens meet the vocabulary: log softmax(hidden W^T + b)[label].

The gradient of a token's log-probability, d log p_t / d hidden = W_t - sum_v p_v W_v, does not wait for the loss, whose
own gradient only scales it. So it is computed in the forward pass while the chunk's probabilities are at hand: under a
frozen head nothing of size (tokens, vocabulary) outlives its chunk, and no logit is ever computed twice.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lib.errors import StudyError

IGNORE = -100
CHUNK = {"cpu": 2**23, "cuda": 2**25}  # logits of a chunk: on a CPU 32 MiB in float32; fewer rows make slower products
FAINT = 1e-30  # a probability whose logarithm float32 still holds to all its digits
LEAST = 128  # tokens of a chunk all the same: with fewer, each reads the whole weight for too few products
KEPT = 2**27  # probabilities that a trained head keeps for its own gradient; beyond, each chunk is computed again


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p[target] (n,) and p (n, V), in float32 or wider."""
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = logits.softmax(dim=-1)
    own = p.gather(1, targets[:, None])[:, 0]
    values, faint = own.log(), own < FAINT
    if faint.any():  # log sum exp = max logits - log max p; max p >= 1/V is far from underflow
        x = logits[faint]
        values[faint] = x.gather(1, targets[faint, None])[:, 0] - x.amax(dim=-1) + p[faint].amax(dim=-1).log()
    return values, p


def _less_one_hot(p: Tensor, targets: Tensor) -> Tensor:
    """-d log p[target] / d logits, in place."""
    return p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, size):
        ctx.size, ctx.trained, ctx.bias = size, any(ctx.needs_input_grad[1:3]), bias is not None
        ctx.kept = ctx.trained and len(targets) * len(weight) <= KEPT
        values, found = [], []
        for x, t in zip(hidden.split(size), targets.split(size), strict=True):
            value, p = _scores(x, weight, bias, t)
            values.append(value)
            if ctx.kept or not ctx.trained:
                slope = _less_one_hot(p, t).to(weight.dtype)
                found.append(slope if ctx.trained else slope @ weight)
        ctx.save_for_backward(*((hidden, weight, bias, targets) if ctx.trained else ()), *found)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if not ctx.trained:
            slopes = torch.cat(ctx.saved_tensors)
            return slopes.mul_(-gradient[:, None].to(slopes.dtype)), None, None, None, None
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        to_bias = torch.zeros_like(bias) if ctx.bias else None
        for number, start in enumerate(range(0, len(targets), ctx.size)):
            here = slice(start, start + ctx.size)
            x, t = hidden[here], targets[here]
            slope = kept[number] if ctx.kept else _less_one_hot(_scores(x, weight, bias, t)[1], t).to(weight.dtype)
            scale = -gradient[here].to(slope.dtype)
            to_hidden[here] = scale[:, None] * (slope @ weight)
            to_weight.addmm_(slope.T, scale[:, None] * x)
            if ctx.bias:
                to_bias.addmv_(slope.T, scale)
        return to_hidden, to_weight, to_bias, None, None


def token_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden W^T + b)[target], in nats: (N,) in float32 or wider, from (N, H), (V, H), (V,) and (N,)."""
    size = max(CHUNK[weight.device.type if weight.device.type in CHUNK else "cuda"] // len(weight), LEAST)
    if torch.is_autocast_enabled(weight.device.type):
        kind = torch.get_autocast_dtype(weight.device.type)
        hidden, weight, bias = (x if x is None else x.to(kind) for x in (hidden, weight, bias))
    if torch.is_grad_enabled():
        return _TokenScores.apply(hidden, weight, bias, targets, size)
    return torch.cat(
        [_scores(x, weight, bias, t)[0] for x, t in zip(hidden.split(size), targets.split(size), strict=True)]
    )


@contextlib.contextmanager
def completion_head(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model(..., score_labels=labels)` returns (R, L) log-probabilities of the labels, zero where there is
    none.

    It is reached through `forward` (rather than by calling the backbone) so that PEFT, autocast, DDP and FSDP wrappers
    stay in force. Calls without `score_labels` are the model's own, generation included. The patch is taken off at the
    end, because a deep copy of a patched model would still run the original's weights.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(model, "_scores_completions", False):
        yield
        return
    config = model.config.get_text_config()
    rescaled = [
        name
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        if getattr(config, name, None) not in (None, 1.0)
    ]
    if rescaled:
        raise StudyError(
            "model.name",
            f"{config.model_type}, which rescales its logits ({', '.join(rescaled)})",
            "a model whose log-probabilities are log softmax(hidden W^T + b)",
            "choose another model",
        )
    original, on_instance, attention = model.forward, "forward" in model.__dict__, config._attn_implementation

    def forward(self, *args, score_labels: Tensor | None = None, **kwargs):
        if score_labels is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head, scored = self.get_output_embeddings(), score_labels != IGNORE
        values = token_scores(hidden[scored], head.weight, head.bias, score_labels[scored])
        return values.new_zeros(scored.shape).masked_scatter(scored, values)

    model.forward = types.MethodType(forward, model)
    model._scores_completions = True
    if attention == "sdpa":  # for as long as the head is on: recomputing a checkpointed layer needs it in the backward
        config._attn_implementation = "packed_pairs"
    try:
        yield
    finally:
        config._attn_implementation = attention
        del model.forward, model._scores_completions
        if on_instance:
            model.forward = original
