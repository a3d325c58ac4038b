"""Sequence log-probabilities of answers: how pairs are laid out in a batch, and how only answer tokens are scored.

Three layouts give the same numbers. `paired`: rows [chosen; rejected], right-padded, as TRL has them. `shared`: one row
per pair, [prompt[:-1] | p_last+chosen[:-1] | p_last+rejected[:-1]], so that the prompt is encoded once; the two answers
see the prompt and themselves through a 4D mask and restart their positions. Repeating p_last gives every position one
label: the next token of its own answer. `packed`: the same without its padding, all rows end to end; only attention
lays them out as rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib import record
from lib.td_dpo.head import IGNORE, completion_head

SCORING_TOKENS = 4096  # tokens of a batch when scoring without gradients
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3

Batch = dict[str, Tensor | tuple[int, ...]]


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
    return {
        "input_ids": _padded(sequences, pad),
        "attention_mask": _padded([[1] * len(s) for s in sequences], 0),
        "labels": _padded(labels, IGNORE),
        "segments": _padded(segments, PADDING),
    }


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
    return {
        "input_ids": _padded(sequences, pad),
        "position_ids": _padded(positions, 0),
        "attention_mask": mask,
        "labels": _padded(labels, IGNORE),
        "segments": segment,
    }


def packed_batch(rows: list[dict], pad: int) -> Batch:
    """The shared layout's real tokens end to end: input_ids, position_ids, labels (1, T), `lengths` of the B rows, and
    `slots` (T,), the place of each token in the (B, L) rows that segments and attention_mask keep."""
    batch = shared_batch(rows, pad)
    real = batch["segments"] != PADDING
    slots = real.flatten().nonzero()[:, 0]
    for name in ("input_ids", "position_ids", "labels"):
        batch[name] = batch[name].flatten()[slots][None]
    return {**batch, "slots": slots, "lengths": tuple(real.sum(dim=1).tolist())}


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lengths: tuple[int, ...] | None = None,
    **kwargs,
):
    """Attention over packed rows (1, heads, T, d): each row by itself, so that none pays for the longest one's padding.

    Without `lengths` (generation) it is transformers' own.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    found = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask[row : row + 1, :, :length, :length],
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for row, (length, q, k, v) in enumerate(
            zip(lengths, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        )
    ]
    return torch.cat(found, dim=2).transpose(1, 2), None


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
    # Dense L x L masks, under which all L^2 products are computed: in a 7B Llama with rows of 3k tokens some 12 % of a
    # pass. FlexAttention's BlockMask could leave out more than half of them; it has to be compiled and tried on a GPU.
    mask_dtype = model.dtype if attention == "eager" else None
    return lambda rows: shared_batch(rows, pad, mask_dtype)


def batch_logprobs(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (B,) of the chosen and of the rejected answers, in nats. Inside
    `completion_head(model)`."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids", "lengths")}
    tokens = model(**inputs, score_labels=batch["labels"])
    if "position_ids" not in batch:
        return tuple(tokens.sum(dim=1).chunk(2))
    if "slots" in batch:
        rows = batch["segments"]
        tokens = tokens.new_zeros(rows.numel()).index_copy(0, batch["slots"], tokens[0]).view_as(rows)
    return tuple(torch.where(batch["segments"] == side, tokens, 0).sum(dim=1) for side in (CHOSEN, REJECTED))


def token_budget_batches(lengths: list[int], budget: int, rows: int | None = None) -> Iterator[list[int]]:
    """Indices in order of length, cut so that rows x longest row stays within `budget` tokens, and the rows within
    `rows` (but at least one row)."""
    chunk: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and ((len(chunk) + 1) * lengths[index] > budget or len(chunk) == rows):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


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


def sequence_logprobs(
    model: torch.nn.Module,
    rows: list[dict],
    *,
    pad: int = 0,
    layout: str | None = None,
    token_budget: int = SCORING_TOKENS,
) -> Tensor:
    """(N, 2) summed log-probabilities of chosen and rejected answers, in nats, on the CPU, in the order of `rows`."""
    collate, device = collator(model, pad, layout), model.device
    out: Tensor | None = None
    with completion_head(model), evaluating(model):
        batches = token_budget_batches([row_tokens(r) for r in rows], token_budget)
        for indices in record.batches("scoring of pairs", batches):
            batch = on_device(collate([rows[i] for i in indices]), device)
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
    rows = [
        {
            "prompt_ids": samples[i]["prompt_ids"],
            "chosen_ids": samples[i]["completion_ids"],
            "rejected_ids": samples[i]["completion_ids"][:1],
        }
        for i in spoken
    ]
    table = sequence_logprobs(model, rows, **options)
    out = table.new_zeros(len(samples))
    out[spoken] = table[:, 0]
    return out
