"""The preference engine: log-probabilities of answers, their reference, and sampled answers, all from one model.

Pairs are laid out in a batch in one of two ways, which give the same numbers. `paired`: rows [chosen; rejected],
right-padded, as TRL has them. `packed`: one row per pair, [prompt[:-1] | p_last+chosen[:-1] | p_last+rejected[:-1]],
so that the prompt is encoded once; the two answers see the prompt and themselves through a 4D mask and restart their
positions. Repeating p_last gives every position one label: the next token of its own answer. The rows lie end to end,
without padding; only attention takes them apart.
"""

import contextlib
import itertools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, LogitsProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lib import models, record
from lib.errors import StudyError
from lib.training import pad_rows, to_device, world

Row = dict[str, Any]  # {"pair": position in the input list, "prompt_ids", "chosen_ids", "rejected_ids": list[int]}

# ---- the head: only answer tokens meet the vocabulary ----
#
# The gradient of a token's log-probability, d log p_t / d hidden = W_t - sum_v p_v W_v, does not wait for the loss, whose
# own gradient only scales it. So it is computed in the forward pass while the chunk's probabilities are at hand: under a
# frozen head nothing of size (tokens, vocabulary) outlives its chunk, and no logit is ever computed twice.

IGNORE = -100
CHUNK = {"cpu": 2**23, "cuda": 2**25}  # logits of a chunk: on a CPU 32 MiB in float32; fewer rows make slower products
SMALLEST_LOG = 1e-30  # a probability whose logarithm float32 still holds to all its digits
MIN_CHUNK = 128  # tokens of a chunk all the same: with fewer, each reads the whole weight for too few products
MAX_KEPT = 2**27  # probabilities that a trained head keeps for its own gradient; beyond, each chunk is computed again


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p[target] (n,) and p (n, V), in float32 or wider."""
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = logits.softmax(dim=-1)
    own = p.gather(1, targets[:, None])[:, 0]
    values, faint = own.log(), own < SMALLEST_LOG
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
        ctx.kept = ctx.trained and len(targets) * len(weight) <= MAX_KEPT
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
    size = max(CHUNK[weight.device.type if weight.device.type in CHUNK else "cuda"] // len(weight), MIN_CHUNK)
    if torch.is_autocast_enabled(weight.device.type):
        kind = torch.get_autocast_dtype(weight.device.type)
        hidden, weight, bias = (x if x is None else x.to(kind) for x in (hidden, weight, bias))
    if torch.is_grad_enabled():
        return _TokenScores.apply(hidden, weight, bias, targets, size)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([_scores(x, weight, bias, t)[0] for x, t in chunks])


@contextlib.contextmanager
def completion_head(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model(..., score_labels=labels)` returns (R, L) log-probabilities of the labels, zero where there is
    none.

    It is reached through `forward` (rather than by calling the backbone) so that PEFT, autocast, DDP and FSDP wrappers
    stay in force. Calls without `score_labels` are the model's own, generation included. The patch is taken off at the
    end, because a deep copy of a patched model would still run the original's weights.
    """
    model = models.unwrapped(model)
    if getattr(model, "_scores_completions", False):
        yield
        return
    config = model.config.get_text_config()
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    if rescaled := [name for name in scales if getattr(config, name, None) not in (None, 1.0)]:
        found = f"{config.model_type}, which rescales its logits ({', '.join(rescaled)})"
        expected = "a model whose log-probabilities are log softmax(hidden W^T + b)"
        raise StudyError("model.name", found, expected, "choose another model")
    original, on_instance, attention = model.forward, "forward" in model.__dict__, config._attn_implementation

    def forward(self, *args, score_labels: Tensor | None = None, trunk: Tensor | None = None, depth=0, **kwargs):
        if score_labels is None:
            return original(*args, **kwargs)
        if depth:
            kwargs |= {"input_ids": None, "inputs_embeds": trunk}
        with _layers_from(self.base_model, depth) if depth else contextlib.nullcontext():
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


# ---- the trunk: layers below the first adapter give a row the same output in every arm, step and epoch ----
#
# Training and scoring enter behind it. Generation cannot: every token that it writes is new to the trunk.

TRUNK_OF = ("llama", "mistral", "qwen2", "qwen3")  # whose first layer takes inputs_embeds as they are
TRUNK_BYTES = 2**30  # of all rows; more go through all layers each time


@contextlib.contextmanager
def _layers_from(stack: torch.nn.Module, depth: int) -> Iterator[None]:
    """Inside, the decoder `stack` begins at layer `depth`."""
    layers = stack.layers
    stack.layers = layers[depth:]
    try:
        yield
    finally:
        stack.layers = layers


def trunk_depth(model: torch.nn.Module, last_layers: int | None, rows: list[dict]) -> int:
    """How many first layers of the model give `rows` an output to be kept, where adapters are on the `last_layers` alone;
    0 where rows cannot enter behind them, or are too many."""
    config = model.config.get_text_config()
    size = sum(map(packed_tokens, rows)) * config.hidden_size * model.dtype.itemsize
    fits = world() == 1 and config.model_type in TRUNK_OF and layout(model) is packed_batch and size <= TRUNK_BYTES
    return max(config.num_hidden_layers - last_layers, 0) if last_layers and fits else 0


def with_trunk(rows: list[dict], depth: int, hidden: Tensor) -> list[dict]:
    """Rows with `trunk`: (depth, their own part of `hidden`, (tokens, H), which has them end to end)."""
    parts = hidden.split([packed_tokens(row) for row in rows])
    return [{**row, "trunk": (depth, part)} for row, part in zip(rows, parts, strict=True)]


# ---- log-probabilities of pairs ----

SCORING_TOKENS = 4096  # tokens of a batch when scoring without gradients
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3

# of a batch: what the model is given
INPUTS = ("input_ids", "attention_mask", "position_ids", "lengths", "trunk", "depth")

Batch = dict[str, Tensor | tuple[int, ...] | int]


def paired_batch(rows: list[dict]) -> Batch:
    """input_ids, attention_mask and labels (already shifted), each (2B, L): chosen answers, then rejected."""
    sequences, labels = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            prompt, answer = row["prompt_ids"], row[side]
            sequences.append(prompt + answer[:-1])  # nothing is predicted from the last token
            labels.append([IGNORE] * (len(prompt) - 1) + answer)
    return {
        "input_ids": pad_rows(sequences, 0),  # any token: what is padding never reaches a score
        "attention_mask": pad_rows([[1] * len(s) for s in sequences], 0),
        "labels": pad_rows(labels, IGNORE),
    }


def packed_batch(rows: list[dict]) -> Batch:
    """input_ids, position_ids, labels (1, T) of B rows end to end; their `lengths`; segments (B, L) and a boolean
    attention_mask (B, 1, L, L; True: may look) of the rows laid out, and `slots` (T,), each token's place in those. Where
    the rows have it, also the `trunk` (1, T, H), which enters at layer `depth`."""
    tokens, positions, labels, segments = [], [], [], []
    for row in rows:
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        head, last = len(prompt) - 1, prompt[-1:]
        tokens += prompt[:-1] + last + chosen[:-1] + last + rejected[:-1]
        positions += [*range(head), *range(head, head + len(chosen)), *range(head, head + len(rejected))]
        labels += [IGNORE] * head + chosen + rejected
        segments.append([PROMPT] * head + [CHOSEN] * len(chosen) + [REJECTED] * len(rejected))
    parts = [row["trunk"][1] for row in rows if "trunk" in row]
    trunk = {"trunk": torch.cat(parts)[None], "depth": rows[0]["trunk"][0]} if parts else {}
    segment = pad_rows(segments, PADDING)
    query, key = segment[:, :, None], segment[:, None, :]
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        # Padding looks at the prompt and at padding, never at nothing: a row without keys would give NaN.
        "attention_mask": (((key == PROMPT) | (key == query)).tril())[:, None],
        "labels": torch.tensor([labels]),
        "segments": segment,
        "slots": (segment != PADDING).flatten().nonzero()[:, 0],
        "lengths": tuple(map(len, segments)),
        **trunk,
    }


def packed_tokens(row: dict) -> int:
    """Tokens of a pair's packed row."""
    return len(row["prompt_ids"]) - 1 + len(row["chosen_ids"]) + len(row["rejected_ids"])


def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, lengths=None, **kwargs):
    """Attention over packed rows (1, heads, T, d): each row by itself, so that none pays for the longest one's padding.

    Without `lengths` (generation) it is transformers' own.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    rows = zip(lengths, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [
        scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[row : row + 1, :, :length, :length], **options)
        for row, (length, q, k, v) in enumerate(rows)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("packed_pairs", packed_attention)
AttentionMaskInterface.register("packed_pairs", sdpa_mask)


def layout(model: torch.nn.Module) -> Callable[[list[dict]], Batch]:
    """The layout that suits the model's attention."""
    config = model.config.get_text_config()
    sliding = getattr(config, "sliding_window", None) is not None
    packs = config._attn_implementation in ("sdpa", "packed_pairs") and model._supports_attention_backend
    # The masks of packed rows are dense: all L^2 products are computed, in a 7B Llama with rows of 3k tokens some 12 %
    # of a pass. FlexAttention's BlockMask could leave out more than half of them; it has to be tried on a GPU.
    return packed_batch if packs and not sliding else paired_batch


def batch_logprobs(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (B,) of the chosen and of the rejected answers, in nats. Inside
    `completion_head(model)`."""
    inputs = {k: v for k, v in batch.items() if k in INPUTS}
    tokens = model(**inputs, score_labels=batch["labels"])
    if "slots" not in batch:
        return tuple(tokens.sum(dim=1).chunk(2))
    rows = batch["segments"]
    tokens = tokens.new_zeros(rows.numel()).index_copy(0, batch["slots"], tokens[0]).view_as(rows)  # pyright: ignore[reportAttributeAccessIssue]
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


def cut_into_passes(rows: list[dict], budget: int, most: int) -> list[list[dict]]:
    """The rows by `token_budget_batches`, the shortest first."""
    return [[rows[i] for i in cut] for cut in token_budget_batches([row_tokens(row) for row in rows], budget, most)]


def row_tokens(row: dict) -> int:
    """Tokens of a pair as a reader counts them: prompt and answer, for both answers."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """No gradients and no dropout inside; the model's mode is put back."""
    training = model.training
    models.keep_4bit_differentiable(model)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sequence_logprobs(model: torch.nn.Module, rows: list[dict], *, depth: int = 0) -> Tensor:
    """(N, 2) summed log-probabilities of chosen and rejected answers, in nats, on the CPU, in the order of `rows`. With a
    `depth` each row is left with its `trunk`, on the CPU too."""
    collate, device = layout(model), model.device
    order, values = [], [torch.empty(0, 2)]
    hook, entered = contextlib.ExitStack(), []
    if depth:
        layer = models.unwrapped(model).base_model.layers[depth]
        hook.callback(layer.register_forward_pre_hook(lambda _, x: entered.append(x[0])).remove)
    with completion_head(model), evaluating(model), hook:
        batches = token_budget_batches([row_tokens(r) for r in rows], SCORING_TOKENS)
        for indices in record.batches("scoring of pairs", batches):
            batch = to_device(collate([rows[i] for i in indices]), device)
            values.append(torch.stack(batch_logprobs(model, batch), dim=1).cpu())
            order += indices
            for i, part in zip(indices, entered.pop()[0].cpu().split(batch["lengths"]), strict=True) if depth else ():
                rows[i]["trunk"] = depth, part
    return torch.cat(values)[torch.tensor(order, dtype=torch.long).argsort()]


# ---- policy against reference ----


def log_ratio_of_samples(model: torch.nn.Module, reference: torch.nn.Module | None, samples: list[dict]) -> Tensor:
    """(N,) sum over tokens of log pi - log pi_0, in nats, of answers {"prompt_ids", "ids"} sampled from pi.

    Their mean is the sampled KL(pi || pi_0) (the k1 estimator). With None as `reference` it is `model`
    with its adapters switched off. An answer is scored as a pair with its own first token, which the layouts need and
    which costs next to nothing.
    """
    answers = [(sample["prompt_ids"], sample["ids"]) for sample in samples]
    rows = [{"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": ids[:1]} for prompt, ids in answers]
    adapters = getattr(model, "peft_config", {}).get("default")
    depth = trunk_depth(model, len(getattr(adapters, "layers_to_transform", None) or ()), rows)
    policy = sequence_logprobs(model, rows, depth=depth)[:, 0]
    with model.disable_adapter() if reference is None else contextlib.nullcontext():
        return policy - sequence_logprobs(reference or model, rows)[:, 0]


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # columns of rows and of batches


def with_reference(rows: list[dict], reference: Tensor) -> list[dict]:
    """Rows with their two columns of reference log-probabilities."""
    chosen, rejected = REFERENCE
    return [{**row, chosen: own, rejected: other} for row, (own, other) in zip(rows, reference.tolist(), strict=True)]


def reference_columns(rows: list[dict], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The columns of a batch that the objective needs besides the policy's log-probabilities."""
    columns = {name: torch.tensor([row[name] for row in rows], dtype=dtype) for name in REFERENCE}
    lengths = {side: torch.tensor([len(row[f"{side}_ids"]) for row in rows]) for side in ("chosen", "rejected")}
    return columns | {f"{side}_length": length for side, length in lengths.items()}


def pair_scores(model: torch.nn.Module, rows: list[dict], reference: Tensor) -> list[dict]:
    """Per pair, in nats: rho (implicit margin), delta (raw margin) and the two log-ratios; None where not finite."""
    table = sequence_logprobs(model, rows)
    r = table - reference.to(table.dtype)
    columns = torch.stack([r[:, 0] - r[:, 1], table[:, 0] - table[:, 1], r[:, 0], r[:, 1]], dim=1).tolist()
    names = ("rho", "delta", "chosen_log_ratio", "rejected_log_ratio")
    return [{n: x if math.isfinite(x) else None for n, x in zip(names, row, strict=True)} for row in columns]


# ---- conversations and sampled answers: no global random state ----


def conversation_ids(tokenizer, conversations: list[list[dict]], **options) -> list[list[int]]:
    """Token ids of each conversation through the chat template (its `options`: tools, add_generation_prompt), with at most
    one BOS.

    The template writes the special tokens as text, so the tokenizer adds none; one that it would have added and that
    the template forgot is put in front. Used for training, evaluation and generation alike, so that all see the same
    prompt.
    """
    if not conversations:
        return []
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, **options)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if (bos := tokenizer.bos_token_id) is None:
        return encoded
    bare = [list(itertools.dropwhile(lambda token: token == bos, ids)) for ids in encoded]
    adds = tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]
    return [[bos, *ids] if adds or len(ids) < len(whole) else ids for ids, whole in zip(bare, encoded, strict=True)]


class _InverseTransform(LogitsProcessor):
    """Leaves one token possible in each row: the one at which the cumulative distribution passes that row's uniform.

    `uniforms` is (B, max_new_tokens). With one number per row and step, drawn before batching, an answer depends
    neither on its neighbors nor on the global generator (which transformers' own sampling uses).
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float):
        self.uniforms, self.temperature, self.step = uniforms, temperature, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)
        # scaled by the last entry, which rounding keeps from being exactly 1
        target = self.uniforms[:, self.step, None].to(cumulative) * cumulative[:, -1:]
        self.step += 1
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _end_tokens(model: torch.nn.Module, tokenizer) -> list[int]:
    """The tokenizer's end token and whatever the model's own configuration adds (Llama-3's <|eot_id|>, say)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def _read_once(model: torch.nn.Module, inputs: Mapping, prompts: list[list[int]]):
    """The cache of all but the prompts' last tokens, computed once for neighbors with the same prompt: a fifth of
    the work where each is answered four times. None where no two are alike."""
    starts = [place == 0 or ids != prompts[place - 1] for place, ids in enumerate(prompts)]
    if all(starts):
        return None
    ids, mask = (inputs[name][starts, :-1] for name in ("input_ids", "attention_mask"))
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model(ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_select_indices(torch.tensor(starts).cumsum(0) - 1)
    return cache


@torch.inference_mode()
def sample(
    model, tokenizer, prompts: list[list[dict]], *, max_new_tokens: int, temperature: float, seed: int, batch_size: int
) -> list[dict]:
    """One answer per prompt (a list of messages ending with a user turn), in the order of `prompts`.

    The answers depend on `seed` and, but for rounding, not on the batch size.
    Each answer: "prompt_ids"; "ids", with the end token if the model gave one; "text" without special tokens;
    "finished", whether it ended by itself. temperature 0 is greedy.
    """
    prompt_ids = conversation_ids(tokenizer, prompts, add_generation_prompt=True)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand((len(prompts), max_new_tokens), generator=generator, dtype=torch.float64)
    ends = _end_tokens(model, tokenizer)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    settings = GenerationConfig(eos_token_id=ends, **settings)
    answers: list[dict | None] = [None] * len(prompts)
    # like lengths together: less padding
    order = sorted(range(len(prompts)), key=lambda index: len(prompt_ids[index]))
    for start in record.batches("generation", range(0, len(order), batch_size)):
        batch = order[start : start + batch_size]
        asked = {"input_ids": [prompt_ids[index] for index in batch]}
        inputs = tokenizer.pad(asked, padding_side="left", return_tensors="pt").to(model.device)
        draw = [_InverseTransform(uniforms[batch].to(model.device), temperature)] if temperature > 0 else []
        # generate() fills what settings leave open from the model's own (a chat model's repetition penalty, say)
        own, model.generation_config = model.generation_config, settings
        try:
            with evaluating(model):
                inputs["past_key_values"] = _read_once(model, inputs, asked["input_ids"])
                output = model.generate(**inputs, generation_config=settings, logits_processor=draw)
        finally:
            model.generation_config = own
        for index, row in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in ends), None)
            ids = row if end is None else row[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answers[index] = {"ids": ids, "text": text, "finished": end is not None, "prompt_ids": prompt_ids[index]}
    return answers


def answer_questions(model, tokenizer, questions: Sequence[dict], *, seed: int, **options) -> list[dict]:
    """Every turn of every question (all have as many), a second one asked after the model's own first answer; ordered by
    question, turn.

    Each answer: those of `sample`, and "question" (its id), "category", "turn" (from 1), "prompt" (messages) and
    "length" (tokens, the end token included).
    """
    histories: list[list[dict]] = [[] for _ in questions]
    answers: list[dict] = []
    for turn in range(1, 1 + len(questions[0]["turns"])):
        turns = [{"role": "user", "content": question["turns"][turn - 1]} for question in questions]
        prompts = [[*history, asked] for history, asked in zip(histories, turns, strict=True)]
        # no turn of one seed shares its numbers with a turn of another
        sampled = sample(model, tokenizer, prompts, seed=2 * seed + turn - 1, **options)
        for i, (question, prompt, answer) in enumerate(zip(questions, prompts, sampled, strict=True)):
            histories[i] = [*prompt, {"role": "assistant", "content": answer["text"]}]
            asked = {"question": question["id"], "category": question["category"], "turn": turn, "prompt": prompt}
            answers.append({**asked, "length": len(answer["ids"]), **answer})
    return sorted(answers, key=lambda answer: (answer["question"], answer["turn"]))
