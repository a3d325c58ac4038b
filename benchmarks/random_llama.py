"""Models of a real shape with random weights, made in memory: to measure speed and memory where no weights can be had.

Nothing that they produce means anything; how long a step takes and what it holds depends on the shape alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lib import models

LLAMA2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}  # fmt: skip


def random_llama(
    shape: dict | None = None,
    *,
    quantization: str = "nf4",
    torch_dtype: str = "bfloat16",
    quant_storage: str | None = None,
    gradient_checkpointing: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """A Llama of `shape` (default: Llama-2-7b), in evaluation mode, as models.load_causal_lm would have loaded it.

    At 7B it holds 13.5 GB for a moment before it is quantized; nothing goes through the disk.
    """
    place, dtype = torch.device(device) if device is not None else models.current_device(), getattr(torch, torch_dtype)
    with torch.random.fork_rng(), torch.device(place):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**(shape or LLAMA2_7B), tie_word_embeddings=False), dtype=dtype
        )
    if quantization == "nf4":
        quantize(model, dtype, getattr(torch, quant_storage or "uint8"))
    model.config.use_cache = False
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def quantize(model: PreTrainedModel, dtype: torch.dtype, storage: torch.dtype) -> None:
    """Every linear map but the head in NF4 with double quantization, in place, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is head:
                continue
            place = child.weight.device
            small = Linear4bit(
                child.in_features,
                child.out_features,
                child.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                quant_storage=storage,
                device="meta",
            )
            small.weight = Params4bit(
                child.weight.data.cpu() if place.type == "cpu" else child.weight.data,
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                quant_storage=storage,
                module=small,
            ).to(place)
            small.bias = child.bias
            setattr(parent, name, small)
    model.is_loaded_in_4bit = True
    model.config.quantization_config = models.nf4(dtype, storage)
