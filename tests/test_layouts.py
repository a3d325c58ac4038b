"""Every published layout of preference pairs, columns that change what a row says, texts that stand for messages; and
what a chat template makes of pairs, against TRL's own tokenization."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import config, data, made
from lib.errors import StudyError
from lib.graff import prepare
from lib.iw_lora import data as iw_data
from lib.td_dpo.data import encode_pairs, load_splits
from tests.test_data import assistant, everything, glue, user, write_jsonl

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def pairs_of(path: Path, *rows: dict, **options) -> list[dict]:
    """The pairs made of these rows, each repeated under other questions so that splits can be carved."""
    many = [json.loads(json.dumps(row).replace("QUESTION", f"question {i}")) for i in range(10) for row in rows]
    return everything(load_splits({"name": str(write_jsonl(path / "p.jsonl", many)), **options})[0])


def refusal(path: Path, *rows: dict, **options) -> str:
    with pytest.raises(StudyError) as caught:
        pairs_of(path, *rows, **options)
    return str(caught.value)


ONE = ([user("question 0")], "good", "bad")
BRIEF = ([{"role": "system", "content": "Be brief."}, user("question 0")], "good", "bad")
LONG = ([user("question 0"), assistant("Yes."), user("Why?")], "good", "bad")
LAYOUTS = {
    "UltraFeedback": (
        {"source": "evol", "instruction": "QUESTION", "models": ["a", "b", "c"], "completions": [
            {"model": "a", "response": "fine", "overall_score": 6.0}, {"model": "b", "response": "good", "overall_score": 8.5},
            {"model": "c", "response": "bad", "overall_score": 2.0}]}, ONE),
    "UltraFeedback, binarized": (
        {"prompt": "QUESTION", "prompt_id": "0", "messages": [user("QUESTION"), assistant("good")], "score_chosen": 8.5,
         "chosen": [user("QUESTION"), assistant("good")], "rejected": [user("QUESTION"), assistant("bad")]}, ONE),
    "HH-RLHF": (
        {side: f"\n\nHuman: QUESTION\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant: {answer}"
         for side, answer in (("chosen", "good"), ("rejected", "bad"))}, LONG),
    "HH-RLHF without leading blank lines": (
        {side: f"Human: QUESTION\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant: {answer}"
         for side, answer in (("chosen", "good"), ("rejected", "bad"))}, LONG),
    "a transcript as prompt, whole transcripts as answers": (
        {"prompt": "Human: QUESTION\n\nAssistant:", "chosen": "Human: QUESTION\n\nAssistant: good",
         "rejected": "Human: QUESTION\n\nAssistant: bad"}, ONE),
    "a transcript that ends with the request, answers with their mark": (
        {"prompt": "Human: QUESTION\n\nAssistant: Yes.\n\nHuman: Why?", "chosen": "\n\nAssistant: good",
         "rejected": "Assistant: bad"}, LONG),
    "a transcript without blank lines": (
        {"prompt": "Human: QUESTION\nAssistant: Yes.\nHuman: Why?\nAssistant:", "chosen": "good", "rejected": "bad"}, LONG),
    "OASST's pairwise prompts": (
        {"prompt": "prompter: QUESTION\nassistant: Yes.\nprompter: Why?", "chosen": "good", "rejected": "bad"}, LONG),
    "marks behind three number signs": (
        {"prompt": "### Human: QUESTION\n### Assistant: Yes.\n### Human: Why?\n### Assistant:", "chosen": "good",
         "rejected": "bad"}, LONG),
    "marks in capitals": ({"prompt": "USER: QUESTION\nASSISTANT: Yes.\nUSER: Why?", "chosen": "good", "rejected": "bad"}, LONG),
    "a system text before the first turn": (
        {"prompt": "Be brief.\n\nHuman: QUESTION", "chosen": "good", "rejected": "bad"}, BRIEF),
    "Orca, whose request is its input": (
        {"system": "Be brief.", "input": "QUESTION", "chosen": "good", "rejected": "bad"}, BRIEF),
    "an input that the request has already": (
        {"prompt": "QUESTION", "input": "QUESTION", "chosen": "good", "rejected": "bad"}, ONE),
    "an input that pandas wrote": ({"prompt": "QUESTION", "input": "None", "chosen": "good", "rejected": "bad"}, ONE),
    "history of texts in turn": (
        {"history": ["QUESTION", "Yes."], "prompt": "Why?", "chosen": "good", "rejected": "bad"}, LONG),
    "messages with both pairs of keys, as parquet merges them": (
        {"prompt": [{"role": None, "from": "human", "content": None, "value": "QUESTION"}], "chosen": "good",
         "rejected": "bad"},
        ONE),
    "a blank system turn": (
        {"prompt": [{"role": "system", "content": " "}, user("QUESTION")], "chosen": "good", "rejected": "bad"}, ONE),
    "Orca": ({"system": "Be brief.", "question": "QUESTION", "chosen": "good", "rejected": "bad"}, BRIEF),
    "Orca, no system turn in this row": ({"system": "", "question": "QUESTION", "chosen": "good", "rejected": "bad"}, ONE),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "QUESTION"}],
         "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}, BRIEF),
    "ShareGPT, whole conversations": (
        {side: [{"from": "human", "value": "QUESTION"}, {"from": "gpt", "value": answer}]
         for side, answer in (("chosen", "good"), ("rejected", "bad"))}, ONE),
    "AlpacaEval": (
        {"instruction": "QUESTION", "output_1": "bad", "output_2": "good", "preference": 2, "generator_1": "x"}, ONE),
    "AlpacaEval, weighted": (
        {"instruction": "QUESTION", "output_1": "good", "output_2": "bad", "preference": 1.0312, "annotator": "y"}, ONE),
    "SHP": (
        {"post_id": "a", "history": "QUESTION", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 3}, ONE),
    "TRL, explicit": (
        {"prompt": [user("QUESTION")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, ONE),
    "TRL, implicit": (
        {"chosen": [user("QUESTION"), assistant("good")], "rejected": [user("QUESTION"), assistant("bad")]}, ONE),
    "TRL, implicit, texts": ({"chosen": "QUESTION good", "rejected": "QUESTION bad", "id": "7"}, ONE),
    "messages": ({"messages": [user("QUESTION")], "chosen": "good", "rejected": "bad"}, ONE),
    "messages and a system column": (
        {"messages": [user("QUESTION")], "system_prompt": "Be brief.", "chosen": "good", "rejected": "bad"}, BRIEF),
    "history of pairs": (
        {"history": [["QUESTION", "Yes."]], "instruction": "Why?", "input": None, "chosen": "good", "rejected": "bad"}, LONG),
    "history of messages": (
        {"history": [user("QUESTION"), assistant("Yes.")], "prompt": "Why?", "chosen": "good", "rejected": "bad"}, LONG),
    "answers that repeat the prompt": ({"prompt": "QUESTION", "chosen": "QUESTION good", "rejected": "QUESTION\nbad"}, ONE),
    "a message as JSON": ({"prompt": "QUESTION", "chosen": json.dumps(assistant("good")), "rejected": "bad"}, ONE),
    "ShareGPT as Python prints it": (
        {"prompt": "QUESTION", "chosen": str([{"from": "gpt", "value": "good"}]), "rejected": "bad"}, ONE),
    "JSON with other keys first": (
        {side: json.dumps([{"id": 3, "role": "user", "content": "QUESTION"}, assistant(answer)], indent=2)
         for side, answer in (("chosen", "good"), ("rejected", "bad"))}, ONE),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_maps_itself(tmp_path, layout):
    row, (prompt, chosen, rejected) = LAYOUTS[layout]
    pair = pairs_of(tmp_path, row)[0]
    assert pair == {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], "row": 0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.5}, "preference that names neither"),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "labels that names neither"),
        ({"instruction": "q", "completions": [{"response": "a", "overall_score": 2}] * 2}, "none is preferred"),
        ({"instruction": "q", "completions": [{"text": "a"}]}, "completions without response and score"),
        ({"query": "a long question", "chosen": "so it is", "rejected": "so it was"}, "dataset.columns.prompt=query"),
        ({"system": "A.", "chosen": [{"role": "system", "content": "B."}, user("q"), assistant("x")],
          "rejected": [{"role": "system", "content": "B."}, user("q"), assistant("y")]}, "two system turns"),
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": "x", "images": ["a.png"]}], "rejected": "y"}, "images, "),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": "weather"}, "wrong type in tools"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": "[" * 3000}, "wrong type in tools"),
        ({"prompt": "q", "chosen": [{"role": ["assistant"], "content": "x"}], "rejected": "y"}, "wrong message in chosen"),
        ({"prompt": "q", "chosen": [{**assistant("x"), "thinking": "so"}], "rejected": "y"}, "fix: correct these rows"),
        ({"trajectory": [{"from": "user", "value": "Solve it."}], "chosen": "Step 1: a b", "rejected": "Step 1: c d"},
         "dataset.columns.prompt=trajectory"),
        ({"query": "Capital?", "chosen": "It is Paris", "rejected": "It is Rome"}, "dataset.columns.prompt=query"),
        ({"instruction": "In French.", "question": "A fruit?", "chosen": "x", "rejected": "y"}, "question beside instruction"),
        ({"prompt": "q", "history": ["a", "b", "c"], "chosen": "x", "rejected": "y"}, "history that ends with a request"),
        ({"history": [["q", "Yes."]], "chosen": [user("q"), assistant("x")], "rejected": [user("q"), assistant("y")]},
         "history, "),
        ({"prompt": "<|im_start|>user\nq<|im_end|>", "chosen": "x", "rejected": "y"}, "markup of a chat template"),
        ({"prompt": [user(""), assistant("a"), user("q")], "chosen": "x", "rejected": "y"}, "empty prompt"),
        ({"prompt": "q", "function_call": "weather()", "chosen": "x", "rejected": "y"}, "function_call, "),
    ],
)  # fmt: skip
def test_what_no_layout_can_mean_is_refused_by_name(tmp_path, row, said):
    assert said in refusal(tmp_path, row)


def test_an_answer_may_be_json_and_begin_like_its_prompt(tmp_path):
    rows = [{"prompt": "Paris QUESTION", "chosen": '[{"name": "x"}]', "rejected": '{"role": "king"}'},
            {"prompt": "Pari QUESTION", "chosen": "Pari QUESTIONs", "rejected": "Pari QUESTION!"},
            {"prompt": "Only QUESTION", "chosen": "Only QUESTION yes", "rejected": "no"}]  # fmt: skip
    said = [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs_of(tmp_path, *rows)[:3]]
    assert said == [('[{"name": "x"}]', '{"role": "king"}'), ("Pari question 0s", "Pari question 0!"),
                    ("Only question 0 yes", "no")]  # fmt: skip


@pytest.mark.parametrize("writer", ["pandas", "pandas of parquet", "datasets"])
def test_messages_in_a_csv_are_decoded_whoever_wrote_it(tmp_path, writer):
    import datasets
    import pandas as pd

    odd = "a 'quote', \"two\", } { and\n a line"
    rows = [
        {"chosen": [user(f"{odd} {i}"), assistant(odd)], "rejected": [user(f"{odd} {i}"), assistant("no")]}
        for i in range(12)
    ]
    path = tmp_path / "p.csv"
    if writer == "datasets":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        frame = pd.DataFrame(rows)
        if writer == "pandas of parquet":
            frame.to_parquet(tmp_path / "p.parquet")
            frame = pd.read_parquet(tmp_path / "p.parquet")  # its lists are arrays, printed without commas
        frame.to_csv(path, index=False)
    for i, pair in enumerate(everything(load_splits({"name": str(path)})[0])):
        assert pair["prompt"] == [user(f"{odd} {i}")]
        assert pair["chosen"] == [assistant(odd)]


# ---- columns that change what a row says, in every study


def read_pairs(path: Path, **section):
    return load_splits({"name": str(path), **section})


def read_problems(path: Path, **section):
    return prepare.read_problems(str(path), ("test", "train"), section=section)


def read_examples(path: Path, **section):
    return iw_data.read_task(glue(path, **section), "rte")


STUDIES = {
    "td_dpo": (read_pairs, {"prompt": "q@", "chosen": "x", "rejected": "y"}, "prompt"),
    "graff": (read_problems, {"question": "q@", "answer": "so\n#### 4"}, "question"),
    "iw_lora": (read_examples, {"sentence1": "q@", "sentence2": "b", "label": 1}, "sentence1"),
}


def many(row: dict, count: int = 20) -> list[dict]:
    return [json.loads(json.dumps(row).replace("@", str(i))) for i in range(count)]


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("column", ["context", "images", "tool_calls", "reasoning_content"])
def test_a_column_with_a_meaning_is_refused_by_name_unless_it_is_left_out_on_purpose(tmp_path, study, column):
    read, row, _ = STUDIES[study]
    path = write_jsonl(tmp_path / "rows.jsonl", many({**row, column: ["something"], "id": 7, "source": "web"}))
    with pytest.raises(
        StudyError, match=rf"{column}, which this study does not read .rows 0, 1.*\n.*\n.*columns.{column}=null"
    ):
        read(path)
    splits, report = read(path, columns={column: None})
    assert sum(map(len, splits.values())) == 20
    assert report["columns"]["left_over"] == ["id", "source"]
    nothing = write_jsonl(tmp_path / "nothing.jsonl", many({**row, column: None}) + many({**row, column: []}))
    assert column in read(nothing)[1]["columns"]["left_over"]


@pytest.mark.parametrize("study", STUDIES)
def test_columns_are_mapped_and_the_map_is_checked(tmp_path, study):
    read, row, name = STUDIES[study]
    path = write_jsonl(
        tmp_path / "rows.jsonl", many({("the text" if key == name else key): value for key, value in row.items()})
    )
    plain = read(write_jsonl(tmp_path / "plain.jsonl", many(row)))[0]
    assert read(path, columns={name: "the text"})[0] == plain
    with pytest.raises(StudyError, match="missing nowhere"):
        read(path, columns={name: "nowhere"})
    yaml = next((config.ROOT / "params" / study / "laptop").glob(f"{study}*.yaml"))
    for key, value in ((f"dataset.columns.{name}", "the text"), ("dataset.columns", f"{{{name}: the text}}")):
        run = config.load_run(yaml, scale="laptop", mode="full", overrides={key: value})
        assert run.dataset.columns == {name: "the text"}
    with pytest.raises(StudyError, match=f"did you mean {name}"):
        config.load_run(yaml, scale="laptop", mode="full", overrides={f"dataset.columns.{name}x": "the text"})


@pytest.mark.parametrize("study", ["graff", "iw_lora"])
def test_a_text_that_stands_for_messages_is_refused(tmp_path, study):
    read, row, name = STUDIES[study]
    path = write_jsonl(tmp_path / "rows.jsonl", many({**row, name: str([user("q@")])}))
    with pytest.raises(StudyError, match=rf"wrong type in {name} \(expected text\)"):
        read(path)


# ---- chat templates: the same tokens as TRL's, up to what stands behind the answer's end

MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system, messages = messages[0]['content'], messages[1:] %}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if loop.last and tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + (system + '\n\n' if loop.first and system else '') + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' and message.tool_calls %}"
    "{{ '[TOOL_CALLS]' + message.tool_calls | tojson + eos_token }}"
    "{% elif message['role'] == 'tool' %}{{ '[TOOL_RESULTS]' + message['content'] + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # five of the eight come with TRL
FAMILIES = {  # template, special tokens, which of them ends an answer, what it has besides: system, tools
    "llama-2": (made.LLAMA2, made.LLAMA_TOKENS, "</s>", {"system"}),
    "llama-3": ("llama3", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "additional_special_tokens": HEADERS},
                "<|eot_id|>", {"system"}),
    "gemma": ("gemma", {"bos_token": "<bos>", "eos_token": "<eos>",
                        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}, "<end_of_turn>", set()),
    "phi-3": ("phi3", {"eos_token": "<|endoftext|>", "bos_token": "<s>",
                       "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]},
              "<|endoftext|>", {"system"}),
    "qwen2.5": ("qwen2_5", IM, "<|im_end|>", {"system", "tools"}),
    "qwen3": ("qwen3", IM, "<|im_end|>", {"system", "tools"}),
    "mistral": (MISTRAL, {**made.LLAMA_TOKENS, "additional_special_tokens": ["[INST]", "[/INST]"]}, "</s>",
                {"system", "tools"}),
    "smollm2": (SMOLLM2, IM, "<|im_end|>", {"system"}),
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CONVERSATIONS = {
    "one turn": {"prompt": [user("hi")]},
    "three turns": {"prompt": [user("hi"), assistant("yes"), user("why")]},
    "system": {"prompt": [{"role": "system", "content": "be brief"}, user("hi")]},
    "tools": {"prompt": [user("hi")], "tools": [TOOL]},
}


def tokenizer_of(family: str):
    template, special, *_ = FAMILIES[family]
    template = (TRL / f"{template}.jinja").read_text() if "{" not in template else template
    return made.train_bpe_tokenizer(["hi yes no why be brief user assistant system"] * 3, 320, template, special)


def trls_rows(tokenizer, pairs: list[dict]) -> list[dict]:
    """What trl.DPOTrainer makes of the pairs, without a model."""
    from datasets import Dataset
    from trl import DPOTrainer

    rows = [{**{key: pair[key] for key in ("prompt", "chosen", "rejected")},
             **({"tools": json.dumps(pair["tools"])} if "tools" in pair else {})} for pair in pairs]  # fmt: skip
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, options, "train").to_list()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_trl_and_every_spelled_token_is_kept(family):
    tokenizer, (*_, end, has) = tokenizer_of(family), FAMILIES[family]
    answers = {"chosen": [assistant(f"use {end}blue{end} to strike and go on")], "rejected": [assistant("no")]}
    for name, conversation in CONVERSATIONS.items():
        pair = {**conversation, **answers, "row": 0}
        if name in ("system", "tools") and name not in has:
            with pytest.raises(StudyError, match=f"does not write whole .no {name}.: rows 0"):
                encode_pairs(tokenizer, [pair])
            assert encode_pairs(tokenizer, [pair], on_bad_row="drop")[1]["refused_by_template"] == 1
            continue
        (ours,), _ = encode_pairs(tokenizer, [pair])
        (theirs,) = trls_rows(tokenizer, [pair])
        assert ours["prompt_ids"] == theirs["prompt_ids"], name
        for side in ("chosen_ids", "rejected_ids"):
            assert ours[side] == theirs[side][: len(ours[side])], (name, side)
            assert not tokenizer.decode(theirs[side][len(ours[side]) :]).strip(), "a line break at most"
            assert tokenizer.convert_ids_to_tokens(ours[side][-1:]) == [end]
        assert "to strike and go on" in tokenizer.decode(ours["chosen_ids"])


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "mistral"])
def test_calls_of_tools_are_rendered_as_trl_does(family):
    prompt = [
        user("hi"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes"},
    ]
    pair = {"prompt": prompt, "chosen": [assistant("no")], "rejected": [assistant("why")], "tools": [TOOL], "row": 0}
    tokenizer = tokenizer_of(family)
    (ours,), (theirs,) = encode_pairs(tokenizer, [pair])[0], trls_rows(tokenizer, [pair])
    assert ours["prompt_ids"] == theirs["prompt_ids"]
    assert "weather" in tokenizer.decode(ours["prompt_ids"])


def test_a_conversation_that_a_template_refuses_is_named_and_the_others_are_kept():
    pairs = [{"prompt": prompt, "chosen": [assistant("yes")], "rejected": [assistant("no")], "row": 5 + i}
             for i, prompt in enumerate([[user("hi")], [user("hi"), user("why")], [user("be")]])]  # fmt: skip
    tokenizer = tokenizer_of("gemma")
    with pytest.raises(StudyError, match="1 pairs .*roles must alternate.*rows 6"):
        encode_pairs(tokenizer, pairs)
    rows, counts = encode_pairs(tokenizer, pairs, on_bad_row="drop")
    assert [row["pair"] for row in rows] == [0, 2]
    assert (counts["refused_by_template"], counts["dropped"]) == (1, 1)


def test_the_reader_gives_tools_to_the_template(tmp_path):
    row = {"prompt": "QUESTION", "chosen": "good", "rejected": "bad"}
    for tools in ([TOOL], json.dumps([TOOL])):
        assert pairs_of(tmp_path, {**row, "tools": tools})[0]["tools"] == [TOOL]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    pair = pairs_of(tmp_path, {**row, "chosen": [called]})[0]
    assert pair["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert data.normalize("Ａ  b\n") == "a b"
