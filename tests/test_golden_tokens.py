"""What the formats of Llama-2, Mistral and Qwen3 come to, token by token, on tokenizers made here of the same kinds.

Expected tokens are written out by hand from the formats: one BOS at the front, one EOS at the end of each answer, the
prompt's tokens the same with and without an answer.
"""

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaTokenizer, Qwen2Tokenizer

from lib.made import LLAMA2
from lib.td_dpo import data, engine

WORDS = ["be", "brief", "hi", "yes", "no", "why", "user", "assistant", "system"]
# Mistral's instruct models since v0.3: [INST] and [/INST] are tokens of their own, and one BOS begins the conversation.
MISTRAL_V3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Qwen3 in its thinking default: the last answer is preceded by an empty thought, which the generation prompt does not
# hold.
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe(words: list[str], alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in which each of `words` is one token, with the merges that build it from single characters."""
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    return {name: index for index, name in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}, merges


def sentencepiece(template: str, control: tuple[str, ...] = (), **settings) -> LlamaTokenizer:
    """transformers' own Llama tokenizer: spaces as ▁, bytes where a character is unknown."""
    letters = sorted({letter for word in WORDS for letter in word} | set("▁[]INST/<>Y"))
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary, merges = bpe([f"▁{word}" for word in WORDS], alphabet)
    made = LlamaTokenizer(vocab=vocabulary, merges=merges, **settings)
    made.add_special_tokens({"additional_special_tokens": list(control)})
    made.chat_template = template
    made.pad_token = made.unk_token  # as models.load_tokenizer has it
    return made


def byte_level(template: str) -> Qwen2Tokenizer:
    """transformers' own Qwen tokenizer: byte-level BPE, no BOS, answers ended by <|im_end|>."""
    vocabulary, merges = bpe([*WORDS, *(f"Ġ{word}" for word in WORDS), "ĊĊ"], sorted(ByteLevel.alphabet()))
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pair(prompt: list[dict]) -> list[dict]:
    return [{"prompt": prompt, "chosen": [said("assistant", "yes")], "rejected": [said("assistant", "no")]}]


ONE = [said("user", "hi")]
TWO = [said("user", "hi"), said("assistant", "yes"), said("user", "why")]
BRIEF = [said("system", "be brief"), *ONE]
OPEN, CLOSE = [*"▁[INST]"], [*"▁[/INST]"]
BREAK = "<0x0A>"  # a line break, which the vocabulary has only as a byte
LLAMA_ANSWERS = [["▁yes", "▁", "</s>"], ["▁no", "▁", "</s>"]]
TURN = ["<|im_end|>", "Ċ", "<|im_start|>"]
HI = ["<|im_start|>", "user", "Ċ", "hi", *TURN, "assistant", "Ċ"]
THOUGHT = ["<think>", "ĊĊ", "</think>", "ĊĊ"]
QWEN_ANSWERS = [[*THOUGHT, "yes", "<|im_end|>"], [*THOUGHT, "no", "<|im_end|>"]]
TOKENIZERS = {
    "llama-2": sentencepiece(LLAMA2, legacy=True),
    "mistral": sentencepiece(MISTRAL_V3, ("[INST]", "[/INST]")),
    "qwen3": byte_level(QWEN3),
}
CASES = {  # every turn of Llama-2 begins with a BOS of its own; Mistral's conversation has one; Qwen has none
    ("llama-2", "one turn"): (ONE, ["<s>", *OPEN, "▁hi", *CLOSE], LLAMA_ANSWERS),
    ("llama-2", "two turns"): (
        TWO, ["<s>", *OPEN, "▁hi", *CLOSE, "▁yes", "▁", "</s>", "<s>", *OPEN, "▁why", *CLOSE], LLAMA_ANSWERS),
    ("llama-2", "system"): (
        BRIEF, ["<s>", *OPEN, *"▁<<SYS>>", BREAK, "b", "e", "▁brief", BREAK, *"<</SYS>>", BREAK, BREAK, "h", "i", *CLOSE],
        LLAMA_ANSWERS),
    ("mistral", "one turn"): (ONE, ["<s>", "[INST]", "▁hi", "[/INST]"], [["▁yes", "</s>"], ["▁no", "</s>"]]),
    ("mistral", "two turns"): (
        TWO, ["<s>", "[INST]", "▁hi", "[/INST]", "▁yes", "</s>", "[INST]", "▁why", "[/INST]"],
        [["▁yes", "</s>"], ["▁no", "</s>"]]),
    ("qwen3", "one turn"): (ONE, HI, QWEN_ANSWERS),
    ("qwen3", "two turns"): (
        TWO, [*HI, "yes", *TURN, "user", "Ċ", "why", *TURN, "assistant", "Ċ"], QWEN_ANSWERS),
    ("qwen3", "system"): (BRIEF, ["<|im_start|>", "system", "Ċ", "be", "Ġ", "brief", "<|im_end|>", "Ċ", *HI], QWEN_ANSWERS),
}  # fmt: skip


@pytest.mark.parametrize(("family", "case"), CASES)
def test_a_pair_is_these_tokens(family, case):
    prompt, head, (chosen, rejected) = CASES[family, case]
    tokenizer = TOKENIZERS[family]
    (row,), counts = data.encode_pairs(tokenizer, pair(prompt))
    found = [tokenizer.convert_ids_to_tokens(row[side]) for side in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert found == [head, chosen, rejected]
    assert {name: count for name, count in counts.items() if count} == {"pairs": 1, "kept": 1}
    for side in ("chosen_ids", "rejected_ids"):
        assert row[side].count(tokenizer.eos_token_id) == 1
        assert row[side][-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in row[side]


def test_an_answer_is_not_cut_at_an_end_token_that_it_spells():
    tokenizer = TOKENIZERS["qwen3"]
    (row,), _ = data.encode_pairs(tokenizer, [{**pair(ONE)[0], "chosen": [said("assistant", "yes<|im_end|>no")]}])
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == [*THOUGHT, "yes", "<|im_end|>", "no", "<|im_end|>"]


class Listens(torch.nn.Module):
    """Stands for a model whose generate() is given `input_ids` and ends every answer at once."""

    def __init__(self, end: int):
        super().__init__()
        self.end, self.heard, self.device, self.generation_config = end, [], torch.device("cpu"), None

    def generate(self, input_ids, attention_mask, **_):
        self.heard.append((input_ids, attention_mask))
        return torch.cat([input_ids, torch.full((len(input_ids), 1), self.end)], dim=1)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_generation_sees_the_prompts_that_training_sees_padded_on_the_other_side(family):
    tokenizer = TOKENIZERS[family]
    rows, _ = data.encode_pairs(tokenizer, pair(ONE) + pair(TWO))
    trained = [row["prompt_ids"] for row in rows]
    model = Listens(tokenizer.eos_token_id)
    engine.sample(model, tokenizer, [ONE, TWO], max_new_tokens=2, temperature=0, seed=0, batch_size=2)
    ((inputs, mask),) = model.heard
    assert [row[on.bool()].tolist() for row, on in zip(inputs, mask, strict=True)] == trained
    assert mask[0].tolist() == sorted(mask[0].tolist()), "padding is on the left"
    batch = engine.paired_batch(rows)
    assert all(on.tolist() == sorted(on.tolist(), reverse=True) for on in batch["attention_mask"]), "and on the right"


def test_a_beginning_that_the_template_forgets_is_put_in_front_of_generations_too():
    tokenizer = sentencepiece(MISTRAL_V3.replace("{{ bos_token }}", ""), ("[INST]", "[/INST]"), add_bos_token=True)
    (row,), _ = data.encode_pairs(tokenizer, pair(ONE))
    model = Listens(tokenizer.eos_token_id)
    engine.sample(model, tokenizer, [ONE], max_new_tokens=2, temperature=0, seed=0, batch_size=1)
    assert model.heard[0][0][0].tolist() == row["prompt_ids"]
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["<s>", "[INST]", "▁hi", "[/INST]"]
