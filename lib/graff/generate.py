"""Exact match by greedy generation: left padding with an explicit mask, sorted by length, cut at the end token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lib import record
from lib.graff import answers, base_model

LOOP, PERIOD, LOOK = (
    64,
    16,
    8,
)  # tokens that repeat themselves, of which period at most, looked for every so many tokens


class Looping(StoppingCriteria):
    """Ends a row whose last LOOP tokens repeat the same PERIOD or fewer: greedy decoding goes on like that to the last
    token it is allowed, and a model that answers nothing does so in nearly every row."""

    def __init__(self, prompt: int):
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        """(B,) whether the row ends here."""
        written = input_ids.shape[1] - self.prompt
        ends = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if written >= LOOP and written % LOOK == 0:
            tail = input_ids[:, -LOOP:]
            for period in range(1, PERIOD + 1):
                ends |= (tail[:, period:] == tail[:, :-period]).all(1)
        return ends


@torch.no_grad()
def texts(model, tokenizer, questions: list[str], longest: int, batch_size: int) -> tuple[list[str], float]:
    """(what the model writes to each question, units of the virtual clock: prompt tokens once, decoded tokens once
    each).

    Greedy whatever the model's own sampling configuration says; the cache is on; a row that only repeats itself is
    ended."""
    model.eval()
    row = [{"question": q, "answer": ""} for q in questions]
    ids = [e["ids"][: e["prompt"]] for e in (base_model.encode(tokenizer, r, 1 << 20) for r in row)]
    order, found, units = sorted(range(len(ids)), key=lambda i: len(ids[i])), [""] * len(ids), 0
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=longest, pad_token_id=pad, eos_token_id=end, use_cache=True
    )
    device = next(model.parameters()).device
    for start in record.batches("evaluation", range(0, len(order), batch_size)):
        mine = order[start : start + batch_size]
        width = max(len(ids[i]) for i in mine)
        batch = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in mine], device=device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in mine], device=device)
        out = model.generate(
            input_ids=batch,
            attention_mask=mask,
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([Looping(width)]),
        )[:, width:]
        units += batch.numel() + out.numel()
        for i, written in zip(mine, out.tolist(), strict=True):
            text = tokenizer.decode(
                written[: written.index(end)] if end in written else written, skip_special_tokens=True
            )
            found[i] = text.split("Question:")[0]  # as the harness: what follows is a question the model asks itself
    return found, units


def scored(model, tokenizer, problems: list[dict], longest: int, batch_size: int) -> tuple[list[dict], float]:
    """([{"text", "reference", "strict", "flexible"}], units): strict and flexible are whether the answer is right."""
    written, units = texts(model, tokenizer, [p["question"] for p in problems], longest, batch_size)
    rows = []
    for text, problem in zip(written, problems, strict=True):
        right = answers.reference(problem["answer"])
        rows.append(
            {
                "text": text,
                "reference": right,
                "strict": answers.strict(text) == right,
                "flexible": answers.flexible(text) == right,
            }
        )
    return rows, units
