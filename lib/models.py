"""Tokenizers, base models, 4-bit, adapters: what every study loads, from a local directory or the hub.

Trainable parameters are always float32, whatever the compute dtype: in bfloat16 an update of 5e-7 is mostly rounded
away.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lib import hub, record
from lib.errors import MissingError, StudyError

transformers.utils.logging.disable_progress_bar()  # of what is loaded, and one per saved checkpoint: they flood a log


def current_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU (no MPS: its results are not deterministic)."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _locate(name: str, needs: str) -> str:
    """`name` as a local directory that holds the file `needs`, else as a hub id; never waits for the hub."""
    path = hub.local_path(name)
    if path is None and hub.is_hub_id(name):
        hub.prepare()
        return name
    if path is None or not (path / needs).is_file():
        found = f"no {needs} in {path}" if path else f"no such directory (from {Path.cwd()} or {hub.ROOT})"
        expected = "a directory written by save_pretrained or hf download, or a hub id"
        raise MissingError(f"model.name = {name}", found, expected, "--set model.name=<path>")
    return str(path)


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False, needs_chat_template: bool = False
) -> transformers.PreTrainedTokenizerBase:
    """Tokenizer with a pad token, padding on the right (training; generation sets left itself).

    Without a pad token it pads with the unknown or the end token: masks come from lengths, so padding is never scored.
    """
    source = _locate(name, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError or what a tokenizer's backend raises
        raise hub.explain(error, name, kind="model", revision=revision) from error
    if needs_chat_template and not tokenizer.chat_template:
        found, expected = "a tokenizer without a chat template", "a chat model's tokenizer"
        raise StudyError(f"model.name = {name}", found, expected, "name the chat or instruct version of the model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_inputs(folder: Path, *names: str) -> SimpleNamespace:
    """What a study's `prepare` wrote into `folder` (which may have been renamed since) for all members of a run:
    `tokenizer`, `report` (counts and baselines for the record), `base` (the base model's name or folder), and what
    `names` are, each from the JSON file called so."""
    given = SimpleNamespace(**{name: record.read_json(folder / f"{name}.json") for name in ("report", *names)})
    given.tokenizer = load_tokenizer(str(folder / "tokenizer"))
    given.base = str(folder / "base") if (folder / "base").is_dir() else given.report["base"]
    return given


def nf4(compute: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """NF4 with double quantization (QLoRA), computing in `compute`; `storage` is bfloat16 under FSDP."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
    )


def load_causal_lm(
    name: str,
    *,
    torch_dtype: str = "float32",
    quantization: str = "none",
    quant_storage: str | None = None,
    device: str | torch.device | None = None,
    auto_class: Any = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:
    """A model from a local directory (which has no `revision`) or the hub, in evaluation mode, on `device` (default:
    the CUDA device, else the CPU).

    `auto_class` serves other heads (AutoModelForSequenceClassification). `options` go to from_pretrained:
    revision, trust_remote_code, attn_implementation, num_labels, use_safetensors=None (the default is safetensors only;
    a few models publish none).
    """
    dtype, source = getattr(torch, torch_dtype), _locate(name, "config.json")
    place = torch.device(device) if device is not None else current_device()
    options = {"dtype": dtype, "use_safetensors": True} | options
    if quantization == "nf4":
        config = nf4(dtype, getattr(torch, quant_storage or "uint8"))
        options |= {"quantization_config": config, "device_map": {"": place}}
    try:
        model = auto_class.from_pretrained(source, **options)
    except torch.OutOfMemoryError:
        found = f"{place} has not enough free memory"
        fix = "--set model.quantization=nf4, a smaller model or a larger GPU"
        raise MissingError(f"model.name = {name}", found, "a GPU that holds it", fix) from None
    except Exception as error:
        raise hub.explain(error, name, kind="model", revision=options.get("revision")) from error
    if quantization == "none":
        model = model.to(place)
    if source == str(hub.fetched(name)):
        model.name_or_path = name  # as adapters name their base: another machine has it from the hub
    model.config.use_cache = False  # training; generate() turns it on for itself
    return model.eval()


def load_base(run, base: str, **options: Any) -> PreTrainedModel:
    """The base model of a run as its `model` section wants it (dtype, quantization), on the device."""
    keys = ("revision", "torch_dtype", "quantization", "trust_remote_code")
    return load_causal_lm(base, **{key: getattr(run.model, key) for key in keys if hasattr(run.model, key)}, **options)


def unwrapped(model: nn.Module) -> Any:
    """The model under its adapters, if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_config(model: PreTrainedModel, peft: dict, task_type: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration of a `peft` section (lora_r, lora_alpha, lora_dropout, target_modules; last_layers: on so many
    of the model's last layers alone)."""
    from peft import LoraConfig

    given = {"lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", **peft}
    if last := given.pop("last_layers", None):
        layers = model.config.num_hidden_layers
        given["layers_to_transform"] = list(range(max(0, layers - last), layers))
    return LoraConfig(r=given.pop("lora_r"), task_type=task_type, **given)


def add_lora(model: PreTrainedModel, peft: dict, seed: int, *, task_type: str = "CAUSAL_LM") -> nn.Module:
    """Float32 LoRA adapters per a `peft` section (`lora_config`), drawn from `seed`.

    The base is frozen. No prepare_model_for_kbit_training: it casts the whole unquantized rest to float32 and fails
    under FSDP.
    """
    from peft import get_peft_model

    config = lora_config(model, peft, task_type)
    with torch.random.fork_rng():  # the caller's random state is as it was
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    return float32_trainables(adapted)


def float32_trainables(model: nn.Module) -> nn.Module:
    """`model`, every trainable parameter of which is now float32; there is at least one."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable, "the model has no trainable parameter"
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return model


def keep_4bit_differentiable(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 a forward in eval mode makes bitsandbytes repack 4-bit weights for a kernel that has no
    backward, for good: training after it would silently lose every gradient that passes through the base model. It is
    switched off, and undone where it has happened (bitsandbytes' inverse rounds double-quantized scales once more).
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
