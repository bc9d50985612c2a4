"""Memory of a model: its weights before it is loaded, its key-value cache, and what is free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from medley.errors import UserError
from medley.generation.kv_cache import bytes_per_token, round_up_length
from medley.generation.model_runner import BRANCHES
from medley.generation.packed_linear import MAX_PACKED_BYTES
from medley.modeling.quantization import Quantize

if TYPE_CHECKING:
    import transformers

    from medley.inference.model import Model

GPU_MEMORY_UTILIZATION = 0.9  # of the free memory after loading; the rest is for activations
_BYTES_PER_WEIGHT = {"8bit": 1, "4bit": 0.57}  # including the scales of nf4


@dataclass(frozen=True)
class MemoryEstimate:
    """Sizes in bytes.

    Attributes:
        weights: the decoder's weights, with the packed copies that a CPU uses
        per_token: keys and values of one token of one CFG branch
        max_seq_len: maximum number of tokens of one branch
    """

    weights: int
    per_token: int
    max_seq_len: int

    @classmethod
    def of(
        cls,
        config: transformers.ChameleonConfig,
        dtype: torch.dtype,
        quantize: Quantize | None,
        device: torch.device,
    ) -> MemoryEstimate:
        width, inner = config.hidden_size, config.intermediate_size
        key_width = width // config.num_attention_heads * config.num_key_value_heads
        parameters = config.num_hidden_layers * (
            2 * width * width + 2 * width * key_width + 3 * width * inner
        )
        bytes_per_weight = dtype.itemsize if quantize is None else _BYTES_PER_WEIGHT[quantize]
        layers = int(parameters * bytes_per_weight)
        head = config.vocab_size * width * dtype.itemsize
        weights = layers + 2 * head  # the embedding is as large as the head
        if device.type == "cpu" and dtype == torch.float32 and quantize is None:
            weights += sum(size for size in (layers, head) if size <= MAX_PACKED_BYTES)
        return cls(weights, bytes_per_token(config, dtype), config.max_position_embeddings)

    def summary(self, num_seqs: int, free: int) -> str:
        """One line for users: the estimate for `num_seqs` sequences of full length."""
        cache = BRANCHES * num_seqs * self.max_seq_len * self.per_token
        return (
            f"memory: decoder weights {self.weights / 1e9:.2f} GB; keys and values "
            f"{self.per_token / 1e3:.1f} kB per token, at most {cache / 1e9:.2f} GB for "
            f"{num_seqs} {'sequence' if num_seqs == 1 else 'sequences'} with guided images; "
            f"{free / 1e9:.1f} GB free"
        )

    @classmethod
    def smaller(
        cls,
        config: transformers.ChameleonConfig,
        dtype: torch.dtype,
        quantize: Quantize | None,
        device: torch.device,
    ) -> dict[str, int]:
        """Bytes of the weights with other options that need less, by option."""
        half = dtype if dtype.itemsize < 4 else torch.bfloat16
        variants: dict[str, tuple[torch.dtype, Quantize | None]] = {
            "--dtype bfloat16": (torch.bfloat16, quantize),
            "--quantize 8bit": (half, "8bit"),
            "--quantize 4bit": (half, "4bit"),
        }
        own = cls.of(config, dtype, quantize, device).weights
        weights = {name: cls.of(config, *v, device).weights for name, v in variants.items()}
        return {name: nbytes for name, nbytes in weights.items() if nbytes < own}

    def check(self, free: int, device: torch.device, smaller: dict[str, int]) -> None:
        """Raises UserError if the weights exceed the free memory of the device.

        `smaller` has the bytes of the weights with other options.
        """
        if self.weights <= free:
            return
        fits = [f"{n} ({nbytes / 1e9:.1f} GB)" for n, nbytes in smaller.items() if nbytes <= free]
        if fits:
            advice = f"These fit: {', '.join(fits)}."
        else:
            least = "".join(f" {n} needs {b / 1e9:.1f} GB." for n, b in list(smaller.items())[-1:])
            advice = f"Nothing smaller fits.{least} Use a larger device, or --device auto_map."
        raise UserError(
            f"The weights need {self.weights / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB "
            f"free. {advice}"
        )


def free_memory(device: torch.device) -> int:
    """Free bytes of a device, with those that torch has reserved and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    return int(psutil.virtual_memory().available)


# --- key-value caches -------------------------------------------------------------------------


def check_cache_limits(kv_cache_gb: float | None, gpu_memory_utilization: float) -> None:
    """Raises UserError for values of the flags that are out of range."""
    if kv_cache_gb is not None and not kv_cache_gb > 0:
        raise UserError(f"--kv_cache_gb must be positive (got {kv_cache_gb}).")
    if not 0 < gpu_memory_utilization <= 1:
        raise UserError(
            f"--gpu_memory_utilization must be above 0, at most 1 (got {gpu_memory_utilization})."
        )


def limit_caches(
    models: Sequence[Model],
    kv_cache_gb: float | None = None,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
) -> None:
    """Gives each of the loaded models an equal share of the memory for keys and values.

    That is `kv_cache_gb` (10^9 bytes), or a share of what is free on the device, CPU or GPU.
    """
    for model in models:
        total = 1e9 * kv_cache_gb if kv_cache_gb is not None else (
            gpu_memory_utilization * _free_for_cache(model)
        )  # fmt: skip
        model.engine.set_cache_bytes(int(total) // len(models))


def _free_for_cache(model: Model) -> float:
    """Free bytes for a cache that lies where the layers are: the fullest device decides."""
    devices = Counter(
        parameter.device
        for layer in model.engine.decoder.model.layers
        for parameter in layer.parameters()
        if parameter.device.type != "meta"  # accelerate's, for weights on the CPU or the disk
    )
    if not devices:
        return free_memory(model.engine.runner.device)
    total = sum(devices.values())
    return min(free_memory(device) * total / count for device, count in devices.items())


def cache_summary(model: Model) -> str:
    """One line for users: how many sequences of full length have room in the cache."""
    engine = model.engine
    max_bytes, per_token = engine.budget.max_bytes, engine.budget.bytes_per_token
    if max_bytes is None:
        return "key-value cache: no limit"
    rows = max_bytes // (round_up_length(engine.max_seq_len) * per_token)
    return (
        f"key-value cache: up to {max_bytes / 1e9:.2f} GB, room for {rows} sequences of "
        f"{engine.max_seq_len} tokens, or {rows // BRANCHES} with guided images"
    )
