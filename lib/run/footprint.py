"""What a run of a large model will need, estimated before anything starts: GPU memory, download, checkpoints.

From the model's config.json (local, cached, or asked of the hub) and the run's settings, by counting. Estimates, and
said so: they find what cannot fit, and they are no promise that what they let pass will.
"""

from __future__ import annotations

from dataclasses import dataclass

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, an 8-bit scale per 64 weights, a float per 256 scales
BYTES = {"float32": 4, "bfloat16": 2}
ADAM_BYTES = 16  # per trained weight, all in float32: the weight, its gradient and two moments
CONTEXT_BYTES = 1.0e9  # the CUDA context, its libraries and the allocator's slack
KEPT_CHECKPOINTS = 3  # while a member trains: the best, the last, and the one that is being written


@dataclass(frozen=True)
class Shape:
    """Of a decoder (Llama, Mistral, Qwen) or, as an upper bound, an encoder (DeBERTa): what its size follows from."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one layer's seven projections."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return [
            (self.hidden, query),
            (self.hidden, key),
            (self.hidden, key),
            (query, self.hidden),
            (self.hidden, self.inner),
            (self.hidden, self.inner),
            (self.inner, self.hidden),
        ]

    @property
    def weights(self) -> int:
        """Weights of the layers' projections, which quantisation and adapters touch."""
        return self.layers * sum(i * o for i, o in self.linear)

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def shape(settings: dict) -> Shape | None:
    """The shape that a model's config.json describes; None where it is not of this kind."""
    try:
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        return Shape(
            settings["num_hidden_layers"],
            hidden,
            settings["intermediate_size"],
            heads,
            settings.get("num_key_value_heads") or heads,
            settings.get("head_dim") or hidden // heads,
            settings["vocab_size"],
            bool(settings.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def model_bytes(model: Shape, quantization: str, dtype: str) -> float:
    """The loaded model: quantised projections, the rest in its computing type."""
    wide = BYTES[dtype]
    return model.weights * (NF4_BYTES if quantization == "nf4" else wide) + model.embeddings * wide


def adapter_weights(model: Shape, rank: int) -> int:
    """LoRA's A and B on every projection (all-linear)."""
    return model.layers * rank * sum(i + o for i, o in model.linear)


def rank(run) -> int | None:
    """The rank of the adapters that a run trains, as its study's section calls it; None where the whole model is
    trained."""
    model = run.model
    if peft := getattr(model, "peft", None):
        return peft.lora_r
    if lora := getattr(model, "lora", None):
        return lora.r
    adapter = getattr(model, "adapter", None)
    return max(adapter.rank, adapter.init_r or 0) if adapter and adapter.type != "none" else None


def trained_weights(run, model: Shape) -> int:
    """At most: adapters are counted as if they were on every projection, an encoder as if its blocks were gated."""
    return adapter_weights(model, rank(run)) if rank(run) else model.weights + model.embeddings


def training_bytes(run, model: Shape) -> float:
    """Peak memory of one GPU that trains a member of `run`: weights, optimiser, activations of a full-length
    micro-batch.

    A pair is at most two answers of max_length with their prompt. With checkpointing a layer's input is kept for each
    layer, and one layer's inner values at a time; adapters see their inputs in float32.
    """
    training, wide = run.training, BYTES[run.model.torch_dtype]
    tokens = training.per_device_train_batch_size * 2 * run.dataset.preprocessing.max_length
    if getattr(training, "token_budget", None):
        tokens = min(tokens, max(training.token_budget, 2 * run.dataset.preprocessing.max_length))
    inside = wide * (8 * model.hidden + 4 * model.inner)
    if getattr(run.model, "peft", None):
        inside += 4 * sum(i for i, _ in model.linear)
    kept = wide * model.hidden * model.layers
    activations = tokens * (kept + inside if training.gradient_checkpointing else model.layers * inside)
    state = model_bytes(model, run.model.quantization, run.model.torch_dtype) + ADAM_BYTES * trained_weights(run, model)
    return state / run.compute.devices + activations + CONTEXT_BYTES


def member_bytes(run, model: Shape, *, finished: bool) -> float:
    """A member's record on disk: weights in float32 of the best and the last checkpoint; while it trains, with
    moments."""
    weights = 4 * trained_weights(run, model)
    return 2 * weights if finished else KEPT_CHECKPOINTS * 3 * weights


def batch_limit(run) -> str:
    """The setting that bounds a micro-batch: of pairs or, where there is a budget, of tokens."""
    return "token_budget" if getattr(run.training, "token_budget", None) else "per_device_train_batch_size"


def smaller_batch(run, model: Shape, available: float) -> int | None:
    """The largest value (a half, a quarter, ...) of `batch_limit` that would fit in `available` bytes; None where none
    does."""
    key = batch_limit(run)
    least = 2 * run.dataset.preprocessing.max_length if key == "token_budget" else 1
    size = getattr(run.training, key)
    while size > least:
        size = max(size // 2, least)
        smaller = run.model_copy(update={"training": run.training.model_copy(update={key: size})})
        if training_bytes(smaller, model) <= available:
            return size
    return None
