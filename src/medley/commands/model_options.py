"""Command-line options that several verbs share: the model, generation, batches, questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from medley.datasets.base import DatasetOptions
from medley.datasets.registry import FormatName, make_config
from medley.errors import UserError
from medley.evaluation.questions import Question, read_questions
from medley.generation import GenerationOptions, Mode
from medley.generation.engine import MAX_NUM_SEQS
from medley.generation.speculation import check_speculation
from medley.inference.devices import AUTO_MAP, resolve_device, resolve_dtype
from medley.inference.loading import load_model, resolve
from medley.inference.memory import (
    GPU_MEMORY_UTILIZATION,
    MemoryEstimate,
    check_cache_limits,
    free_memory,
    limit_caches,
)
from medley.inference.model import Model
from medley.modeling.quantization import Quantize
from medley.utils.cli_options import Alias

# How a model runs on a machine. These do not change the results of a run that is resumed.
RUNTIME_OPTIONS = (
    "batch_size", "deterministic", "device", "kv_cache_gb", "gpu_memory_utilization", "speculate",
)  # fmt: skip


def check_output(output: Path, *inputs: Path | None) -> None:
    """Raises UserError for an output that is a folder, has no name, or would replace an input."""
    if not output.name or output.is_dir():
        raise UserError(f"--output {output}: This is a folder, expected the name of a file.")
    for path in inputs:
        if path is not None and path.resolve() == output.resolve():
            raise UserError(
                f"--output {output}: The output would replace an input. Use another name."
            )


def check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"--seed is {seed}, expected 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model and its generation options.

    Args:
        ckpt: checkpoint in any layout, a LoRA adapter, or tiny
        adapter: LoRA adapter that is applied to the checkpoint
        base: base of a checkpoint that is an adapter
        vqgan: folder of a VQGAN with a decoder, for checkpoints without one
        device: auto, cpu, cuda, mps, or auto_map for several GPUs
        dtype: auto, float32, bfloat16 or float16
        quantize: store the layers' matrices in 4 or 8 bits (bitsandbytes)
        kv_cache_gb: gigabytes for keys and values; default a share of the free memory
        gpu_memory_utilization: that share of the memory that is free after loading
        speculate: image codes that one pass draws at most (the images stay the same); auto measures
            what saves time, off draws one
        mode: any, text or image
        max_new_tokens: maximum length of a response
        seed: seed of the sampling
        text_greedy: always take the most probable text token
        text_temperature: temperature of text tokens
        text_top_p: probability mass that text tokens are sampled from
        text_top_k: number of most probable text tokens to sample from; 0 for all
        repetition_penalty: penalty of text tokens that the prompt or the output contains
        image_greedy: always take the most probable image token
        image_temperature: temperature of image tokens
        image_top_p: probability mass that image tokens are sampled from
        image_top_k: number of most probable image tokens to sample from; 0 for all
        guidance_scale_text: guidance weight of the context's text in image generation
        guidance_scale_image: guidance weight of the context's images in image generation
        min_images: minimum number of generated images
        max_images: maximum number of generated images
        stop: texts that end the response, each a single token of the vocabulary
    """

    aliases: ClassVar = {"device": Alias("device", values={"map": AUTO_MAP})}

    ckpt: str
    adapter: Path | None = None
    base: str | None = None
    vqgan: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantize | None = None
    kv_cache_gb: float | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    speculate: Literal["auto", "off"] | int = "auto"
    mode: Mode = GenerationOptions.mode
    max_new_tokens: int = GenerationOptions.max_new_tokens
    seed: int = GenerationOptions.seed
    text_greedy: bool = GenerationOptions.text_greedy
    text_temperature: float = GenerationOptions.text_temperature
    text_top_p: float = GenerationOptions.text_top_p
    text_top_k: int = GenerationOptions.text_top_k
    repetition_penalty: float = GenerationOptions.repetition_penalty
    image_greedy: bool = GenerationOptions.image_greedy
    image_temperature: float = GenerationOptions.image_temperature
    image_top_p: float = GenerationOptions.image_top_p
    image_top_k: int = GenerationOptions.image_top_k
    guidance_scale_text: float = GenerationOptions.guidance_scale_text
    guidance_scale_image: float = GenerationOptions.guidance_scale_image
    min_images: int = GenerationOptions.min_images
    max_images: int | None = GenerationOptions.max_images
    stop: list[str] | None = None

    def generation(self, model: Model | None = None) -> GenerationOptions:
        """The validated generation options; `model` converts the stop texts to token ids."""
        names = set(GenerationOptions.__dataclass_fields__) - {"stop"}
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        stop = tuple(self._stop_token(text, model) for text in self.stop or []) if model else ()
        return GenerationOptions(**values, stop=stop)

    def _stop_token(self, text: str, model: Model) -> int:
        ids = model.text_tokenizer.encode(text)
        if len(ids) != 1:
            tokens = [model.text_tokenizer.decode([token]) for token in ids]
            raise UserError(
                f"--stop {text!r}: Expected a single token, but the text has several: {tokens}. "
                "Use one of these."
            )
        return int(ids[0])

    def load(self, max_num_seqs: int = 1) -> Model:
        """Loads the model. Prints the memory that it and `max_num_seqs` full sequences need.

        Raises UserError if the weights exceed the free memory.
        """
        check_cache_limits(self.kv_cache_gb, self.gpu_memory_utilization)
        check_speculation(self.speculate, has_images=self.mode != "text")
        checkpoint, adapter = resolve(self.ckpt, self.adapter, self.base)
        device = resolve_device("auto" if self.device == AUTO_MAP else self.device)
        dtype = resolve_dtype(self.dtype, device) or checkpoint.dtype()
        estimate = MemoryEstimate.of(checkpoint.config(), dtype, self.quantize, device)
        free = free_memory(device)
        print(estimate.summary(max_num_seqs, free), flush=True)
        if self.device != AUTO_MAP:
            smaller = MemoryEstimate.smaller(checkpoint.config(), dtype, self.quantize, device)
            estimate.check(free, device, smaller)
        model = load_model(checkpoint, self.device, self.dtype, adapter, self.vqgan, self.quantize)
        limit_caches([model], self.kv_cache_gb, self.gpu_memory_utilization)
        model.engine.set_speculation(self.speculate)
        if self.mode != "text":
            model.image_tokenizer.require_decoder()
        return model


@dataclass(frozen=True, kw_only=True)
class BatchOptions(ModelOptions):
    """Options for many prompts.

    Args:
        batch_size: number of sequences that are processed at the same time
        deterministic: process one sequence at a time, so that a result does not depend on the other
            prompts, not even by rounding
    """

    batch_size: int = MAX_NUM_SEQS
    deterministic: bool = False

    def check_batch_size(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}, expected 1 or more.")

    @property
    def max_num_seqs(self) -> int:
        return 1 if self.deterministic else self.batch_size

    def load(self, max_num_seqs: int = 1) -> Model:
        if self.deterministic and self.speculate not in ("auto", "off"):
            raise UserError(
                f"--speculate {self.speculate} with --deterministic: A pass over several tokens "
                "rounds differently than one over a single token. Leave out one of them."
            )
        model = super().load(max_num_seqs)
        if self.deterministic:
            model.engine.set_speculation("off")
        return model


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(DatasetOptions):
    """The format of the questions, and options for reading it.

    Args:
        format: llava, or another dataset format of `medley convert`
    """

    format: FormatName = "llava"

    def questions_in(self, path: Path) -> list[Question]:
        """Reads the questions of a file or folder. Raises UserError with the invalid record."""
        config = make_config(self.format, path, self, find_images=self.format != "llava")
        return read_questions(path, self.format, config)
