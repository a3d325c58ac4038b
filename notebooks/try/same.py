"""An adapter for `./run_all.sh try`: LoRA under another name, which is identical to it at laptop scale."""

from peft import LoraConfig


def adapter(model):
    return LoraConfig(r=8, lora_alpha=16, target_modules=["query_proj", "value_proj"])
