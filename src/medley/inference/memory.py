"""Memory of a model before it is loaded: its weights, its key-value cache, and what is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from medley.errors import UserError
from medley.generation.kv_cache import bytes_per_token
from medley.generation.model_runner import BRANCHES
from medley.generation.packed_linear import MAX_PACKED_BYTES
from medley.modeling.quantization import Quantize

if TYPE_CHECKING:
    import transformers

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

    def check(self, free: int, device: torch.device, quantize: Quantize | None) -> None:
        """Raises UserError if the weights exceed the free memory of the device."""
        if self.weights > free:
            advice = "" if quantize else " Use --quantize 4bit, which needs a quarter or less."
            raise UserError(
                f"The weights need {self.weights / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB "
                f"free.{advice}"
            )


def free_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
