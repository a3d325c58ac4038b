"""Sequence log-probabilities of answers: how pairs are laid out in a batch, and how only answer tokens are scored.

Three layouts give the same numbers. `paired`: rows [chosen; rejected], right-padded, as TRL has them. `shared`: one row
per pair, [prompt[:-1] | p_last+chosen[:-1] | p_last+rejected[:-1]], so that the prompt is encoded once; the two answers
see the prompt and themselves through a 4D mask and restart their positions. Repeating p_last gives every position one
label: the next token of its own answer. `packed`: the same without its padding, all rows end to end; only attention
lays them out as rows.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib import witness
from lib.errors import StudyError

IGNORE = -100
HEAD_ELEMENTS = 2**24  # logits held at once by the head (64 MiB in float32); longer batches are scored in chunks
SCORING_TOKENS = 4096  # tokens of a batch when scoring without gradients
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3

Batch = dict[str, Tensor]


def _padded(lists: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([x + [fill] * (width - len(x)) for x in lists])


def paired_batch(rows: list[dict], pad: int) -> Batch:
    """input_ids, attention_mask, labels (already shifted) and segments, each (2B, L): chosen answers, then rejected."""
    sequences, labels, segments = [], [], []
    for side, segment in (("chosen_ids", CHOSEN), ("rejected_ids", REJECTED)):
        for row in rows:
            prompt, answer = row["prompt_ids"], row[side]
            sequences.append(prompt + answer[:-1])  # nothing is predicted from the last token
            labels.append([IGNORE] * (len(prompt) - 1) + answer)
            segments.append([PROMPT] * (len(prompt) - 1) + [segment] * len(answer))
    return {"input_ids": _padded(sequences, pad), "attention_mask": _padded([[1] * len(s) for s in sequences], 0),
            "labels": _padded(labels, IGNORE), "segments": _padded(segments, PADDING)}


def shared_batch(rows: list[dict], pad: int, mask_dtype: torch.dtype | None = None) -> Batch:
    """input_ids, position_ids, labels, segments (B, L) and a 4D attention_mask (B, 1, L, L).

    The mask is boolean (True = may look), or additive in `mask_dtype` for attention code that adds it.
    """
    sequences, positions, labels, segments = [], [], [], []
    for row in rows:
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        head, last = len(prompt) - 1, prompt[-1:]
        sequences.append(prompt[:-1] + last + chosen[:-1] + last + rejected[:-1])
        positions.append([*range(head), *range(head, head + len(chosen)), *range(head, head + len(rejected))])
        labels.append([IGNORE] * head + chosen + rejected)
        segments.append([PROMPT] * head + [CHOSEN] * len(chosen) + [REJECTED] * len(rejected))
    segment = _padded(segments, PADDING)
    query, key = segment[:, :, None], segment[:, None, :]
    # Padding looks at the prompt and at padding, never at nothing: a row without keys would give NaN.
    mask = (((key == PROMPT) | (key == query)).tril())[:, None]
    if mask_dtype is not None:
        mask = torch.zeros(mask.shape, dtype=mask_dtype).masked_fill_(~mask, torch.finfo(mask_dtype).min)
    return {"input_ids": _padded(sequences, pad), "position_ids": _padded(positions, 0), "attention_mask": mask,
            "labels": _padded(labels, IGNORE), "segments": segment}


def packed_batch(rows: list[dict], pad: int) -> Batch:
    """The shared layout's real tokens end to end: input_ids, position_ids, labels (1, T), and `slots` (T,), the place of
    each token in the (B, L) rows that segments and attention_mask keep."""
    batch = shared_batch(rows, pad)
    slots = (batch["segments"] != PADDING).flatten().nonzero()[:, 0]
    for name in ("input_ids", "position_ids", "labels"):
        batch[name] = batch[name].flatten()[slots][None]
    return {**batch, "slots": slots}


def packed_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     dropout: float = 0.0, scaling: float | None = None, slots: Tensor | None = None, **kwargs):
    """Attention over packed rows: (1, heads, T, d) is laid out as (B, heads, L, d) by `slots` and packed again.

    Without `slots` (generation) it is transformers' own.
    """
    if slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows, width = attention_mask.shape[0], attention_mask.shape[-1]

    def laid_out(x: Tensor) -> Tensor:
        flat = x[0].transpose(0, 1)
        places = flat.new_zeros(rows * width, *flat.shape[1:]).index_copy(0, slots, flat)
        return places.view(rows, width, *flat.shape[1:]).transpose(1, 2)

    out = scaled_dot_product_attention(*map(laid_out, (query, key, value)), attn_mask=attention_mask, dropout_p=dropout,
                                       scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)[None], None


AttentionInterface.register("packed_pairs", packed_attention)
AttentionMaskInterface.register("packed_pairs", sdpa_mask)


def collator(model: torch.nn.Module, pad: int, layout: str | None = None):
    """The function from rows to a batch that suits the model's attention; `layout` forces one of the three."""
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if layout is None:
        layout = "packed" if attention in ("sdpa", "packed_pairs") and model._supports_attention_backend else "shared"
        if getattr(config, "sliding_window", None) is not None or attention not in ("sdpa", "packed_pairs", "eager"):
            layout = "paired"
    if layout == "paired":
        return lambda rows: paired_batch(rows, pad)
    if layout == "packed":
        return lambda rows: packed_batch(rows, pad)
    # ponytail: dense 4D masks; FlexAttention's BlockMask is the GPU form when rows get long (O(L^2) mask memory)
    mask_dtype = model.dtype if attention == "eager" else None
    return lambda rows: shared_batch(rows, pad, mask_dtype)


def _score(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden W^T + b)[target] for each of N positions, in float32 or wider."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return -cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


@contextlib.contextmanager
def completion_head(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model(..., score_labels=labels)` returns (R, L) log-probabilities of the labels, zero where there is none.

    Only labelled positions meet the vocabulary, in chunks that are recomputed in the backward pass. It is reached through
    `forward` (rather than by calling the backbone) so that PEFT, autocast, DDP and FSDP wrappers stay in force. Calls
    without `score_labels` are the model's own, generation included. The patch is taken off at the end, because a
    deep copy of a patched model would still run the original's weights.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(model, "_scores_completions", False):
        yield
        return
    config = model.config.get_text_config()
    rescaled = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
                if getattr(config, name, None) not in (None, 1.0)]
    if rescaled:
        raise StudyError("model.name", f"{config.model_type}, which rescales its logits ({', '.join(rescaled)})",
                         "a model whose log-probabilities are log softmax(hidden W^T + b)", "choose another model")
    original, on_instance, attention = model.forward, "forward" in model.__dict__, config._attn_implementation

    def forward(self, *args, score_labels: Tensor | None = None, **kwargs):
        if score_labels is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head, scored = self.get_output_embeddings(), score_labels != IGNORE
        hidden, targets = hidden[scored], score_labels[scored]
        size = max(HEAD_ELEMENTS // head.weight.shape[0], 1)
        if len(targets) <= size:
            values = _score(hidden, head.weight, head.bias, targets)
        else:
            values = torch.cat([checkpoint(_score, h, head.weight, head.bias, t, use_reentrant=False)
                                for h, t in zip(hidden.split(size), targets.split(size), strict=True)])
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


def batch_logprobs(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (B,) of the chosen and of the rejected answers, in nats. Inside `completion_head(model)`."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids", "slots")}
    tokens = model(**inputs, score_labels=batch["labels"])
    if "position_ids" not in batch:
        return tuple(tokens.sum(dim=1).chunk(2))
    if "slots" in batch:
        rows = batch["segments"]
        tokens = tokens.new_zeros(rows.numel()).index_copy(0, batch["slots"], tokens[0]).view_as(rows)
    return tuple(torch.where(batch["segments"] == side, tokens, 0).sum(dim=1) for side in (CHOSEN, REJECTED))


def token_budget_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices in order of length, cut so that rows x longest row stays within `budget` tokens (at least one row)."""
    chunk: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and (len(chunk) + 1) * lengths[index] > budget:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def row_tokens(row: dict) -> int:
    """Tokens of a pair as a reader counts them: prompt and answer, for both answers."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def keep_4bit_differentiable(model: torch.nn.Module) -> None:
    """On CPUs with AVX512-BF16 a forward in eval mode makes bitsandbytes repack 4-bit weights for a kernel that has no
    backward, for good: training after it would silently lose every gradient that passes through the base model. It is
    switched off, and undone where it has happened (bitsandbytes' inverse rounds double-quantised scales once more).
    """
    if not (getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu"):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)  # a sharded weight has none
            if getattr(state, "packing_format_for_cpu", False):
                module.weight.data, module.weight.quant_state = unpacked(module.weight.data, state)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """No gradients and no dropout inside; the model's mode is put back."""
    training = model.training
    keep_4bit_differentiable(model)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sequence_logprobs(model: torch.nn.Module, rows: list[dict], *, pad: int = 0, layout: str | None = None,
                      token_budget: int = SCORING_TOKENS) -> Tensor:
    """(N, 2) summed log-probabilities of chosen and rejected answers, in nats, on the CPU, in the order of `rows`."""
    collate, device = collator(model, pad, layout), model.device
    out: Tensor | None = None
    with completion_head(model), evaluating(model):
        batches = token_budget_batches([row_tokens(r) for r in rows], token_budget)
        for indices in witness.batches("scoring of pairs", batches):
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in indices]).items()}
            values = torch.stack(batch_logprobs(model, batch), dim=1).cpu()
            if out is None:
                out = values.new_empty(len(rows), 2)
            out[indices] = values
    return torch.empty(0, 2) if out is None else out


def sample_logprobs(model: torch.nn.Module, samples: Iterable[dict], **options) -> Tensor:
    """(N,) summed log-probabilities of single answers {"prompt_ids", "completion_ids"}, in nats; 0 for an empty answer.

    An answer is scored as a pair with its own first token, which the layouts need and which costs next to nothing.
    """
    samples = list(samples)
    spoken = [i for i, sample in enumerate(samples) if sample["completion_ids"]]
    rows = [{"prompt_ids": samples[i]["prompt_ids"], "chosen_ids": samples[i]["completion_ids"],
             "rejected_ids": samples[i]["completion_ids"][:1]} for i in spoken]
    table = sequence_logprobs(model, rows, **options)
    out = table.new_zeros(len(samples))
    out[spoken] = table[:, 0]
    return out
