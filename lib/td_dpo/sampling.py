"""Sampling answers: batched, left-padded, with cached keys and values; no global random state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib import record
from lib.td_dpo.tokens import conversation_ids


class _InverseTransform(LogitsProcessor):
    """Leaves one token possible in each row: the one at which the cumulative distribution passes that row's uniform.

    `uniforms` is (B, max_new_tokens). With one number per row and step, drawn before batching, an answer depends
    neither on its neighbours nor on the global generator (which transformers' own sampling uses).
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


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and whatever the model's own configuration adds (Llama-3's <|eot_id|>, say)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({tokenizer.eos_token_id, *own} - {None})


@contextmanager
def _only(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """In evaluation mode and with `settings` alone: generate() fills what they leave open from the model's own defaults
    (a chat model's repetition penalty, say), so these are put aside meanwhile."""
    own, training = model.generation_config, model.training
    model.generation_config = settings
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[dict]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[dict]:
    """One answer per prompt (a list of messages ending with a user turn), in the order of `prompts`.

    The answers depend on `seed` and, but for rounding, not on the batch size.
    Each answer: "prompt_ids"; "ids", with the end token if the model gave one; "text" without special tokens;
    "finished", whether it ended by itself. temperature 0 is greedy.
    """
    prompt_ids = conversation_ids(tokenizer, [list(prompt) for prompt in prompts], add_generation_prompt=True)
    uniforms = torch.rand(
        (len(prompts), max_new_tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    ends = _end_tokens(model, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad)
    answers: list[dict | None] = [None] * len(prompts)
    # like lengths together: less padding
    order = sorted(range(len(prompts)), key=lambda index: len(prompt_ids[index]))
    for start in record.batches("generation", range(0, len(order), batch_size)):
        batch = order[start : start + batch_size]
        longest = max(len(prompt_ids[index]) for index in batch)
        fill = [longest - len(prompt_ids[index]) for index in batch]
        inputs = torch.tensor([[pad] * n + prompt_ids[index] for n, index in zip(fill, batch, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in fill])
        processors = LogitsProcessorList()
        if temperature > 0:
            processors.append(_InverseTransform(uniforms[batch].to(model.device), temperature))
        with _only(model, settings):
            output = model.generate(
                inputs=inputs.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                logits_processor=processors,
            )
        for index, row in zip(batch, output[:, longest:].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in ends), None)
            ids = row if end is None else row[: end + 1]
            answers[index] = {
                "ids": ids,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "finished": end is not None,
                "prompt_ids": prompt_ids[index],
            }
    return answers


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> list[dict]:
    """Both turns of every question, the second asked after the model's own first answer; ordered by question, turn.

    Each answer: those of `sample`, and "question" (its id), "category", "turn" (1 or 2), "prompt" (messages) and
    "length" (tokens, the end token included).
    """
    histories: list[list[dict]] = [[] for _ in questions]
    answers: list[dict] = []
    for turn in (1, 2):
        prompts = [
            [*history, {"role": "user", "content": question["turns"][turn - 1]}]
            for history, question in zip(histories, questions, strict=True)
        ]
        sampled = sample(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=2 * seed + turn - 1,  # no turn of one seed shares its numbers with a turn of another
            batch_size=batch_size,
        )
        histories = [
            [*prompt, {"role": "assistant", "content": answer["text"]}]
            for prompt, answer in zip(prompts, sampled, strict=True)
        ]
        answers += [
            {"question": question["id"], "category": question["category"], "turn": turn, "prompt": prompt}
            | {"length": len(answer["ids"])}
            | answer
            for question, prompt, answer in zip(questions, prompts, sampled, strict=True)
        ]
    return sorted(answers, key=lambda answer: (answer["question"], answer["turn"]))
