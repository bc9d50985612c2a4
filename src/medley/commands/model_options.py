"""The flags that all commands with a model share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from medley.checkpoints.checkpoint import Checkpoint
from medley.datasets.registry import FORMATS, ConversionConfig, Name
from medley.errors import UserError
from medley.evaluation.questions import Question, read_questions
from medley.generation import GenerationOptions
from medley.generation.config import Mode
from medley.generation.engine import BRANCHES
from medley.generation.kv_cache import bytes_per_token
from medley.generation.packed_linear import LARGEST
from medley.inference.loading import AUTO_MAP, load_model, resolve, resolve_device, resolve_dtype
from medley.inference.model import Model
from medley.modeling.quantization import Quantize


def check_output(output: Path, *inputs: Path | None) -> None:
    """Raises UserError for an output that is a folder, has no name, or would replace an input."""
    if not output.name or output.is_dir():
        raise UserError(f"--output {output}: a folder, expected the name of a file")
    for path in inputs:
        if path is not None and path.resolve() == output.resolve():
            raise UserError(f"--output {output}: would replace what is read; name another file")


def check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"--seed is {seed}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and how it generates.

    Args:
        ckpt: checkpoint in any layout, an adapter, or tiny
        adapter: adapter that is laid over the checkpoint
        base: base of a checkpoint that is an adapter
        vqgan: folder of a VQGAN with a decoder, for checkpoints that carry none
        device: auto, cpu, cuda, mps, or map for several GPUs
        dtype: auto, float32, bfloat16 or float16
        quantize: keep the layers' matrices in 4 or 8 bits (bitsandbytes)
        mode: any, text or image
        max_new_tokens: longest answer
        seed: seed of the sampling
        text_greedy: take the likeliest word
        text_temperature: temperature of words
        text_top_p: share of probability that words are sampled from
        text_top_k: likeliest words that are sampled from; 0 for all
        repetition_penalty: penalty of words that stand there already
        image_greedy: take the likeliest image code
        image_temperature: temperature of image codes
        image_top_p: share of probability that image codes are sampled from
        image_top_k: likeliest image codes that are sampled from; 0 for all
        guidance_scale_text: weight of the context's words while drawing
        guidance_scale_image: weight of the context's pictures while drawing
        min_images: pictures that have to come
        max_images: pictures that may come
        stop: words that end the answer, each a single text piece of the vocabulary
    """

    ckpt: str
    adapter: Path | None = None
    base: str | None = None
    vqgan: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantize | None = None
    mode: Mode = "any"
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
        """The options of generation, checked; with `model` also the words that end an answer."""
        names = set(GenerationOptions.__dataclass_fields__) - {"stop"}
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        stop = tuple(self._piece(word, model) for word in self.stop or []) if model else ()
        return GenerationOptions(**fields, stop=stop)

    def _piece(self, word: str, model: Model) -> int:
        ids = model.tokenizer.encode(word)
        if len(ids) != 1:
            shown = [model.tokenizer.decode([i]) for i in ids]
            raise UserError(f"--stop {word!r}: not one text piece but {shown}; name one of those")
        return int(ids[0])

    def load(self, rows: int = 1) -> Model:
        """The model; says before what memory it and `rows` answers of full length take.

        Raises UserError where the weights alone have no room.
        """
        checkpoint, adapter = resolve(self.ckpt, self.adapter, self.base)
        device = resolve_device("auto" if self.device == AUTO_MAP else self.device)
        dtype = resolve_dtype(self.dtype, device) or checkpoint.dtype()
        need = MemoryEstimate.of(checkpoint, dtype, self.quantize, device)
        free = memory_free(device)
        print(need.line(rows, free), flush=True)
        if need.weights > free and self.device != AUTO_MAP:
            smaller = "" if self.quantize else "; --quantize 4bit takes a quarter or less"
            raise UserError(
                f"the weights take {need.weights / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB "
                f"free{smaller}"
            )
        model = load_model(checkpoint, self.device, self.dtype, adapter, self.vqgan, self.quantize)
        if self.mode != "text":
            model.image_tokenizer.require_decoder()
        return model


@dataclass(frozen=True, kw_only=True)
class BatchOptions(ModelOptions):
    """Many prompts.

    Args:
        batch_size: rows that are worked on at once
        deterministic: one row after another, so that a row's result does not depend on the others
            even by rounding
    """

    batch_size: int = 32
    deterministic: bool = False

    def check_batch(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}, expected 1 or more")

    @property
    def rows_at_once(self) -> int:
        return 1 if self.deterministic else self.batch_size


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Where questions come from.

    Args:
        image_folder: folder that the questions' pictures are named from
        format: llava, or another format of conversion.convert_dataset
        split: the published split
        language: language of SLAKE's questions
        prompt_format: ScienceQA's prompt, what is asked and what is answered
        prompt: question put to captions
        question_key: column of the questions
        answer_key: column of the answers
        image_key: column of the pictures
    """

    image_folder: Path | None = None
    format: Name = "llava"
    split: str = "all"
    language: Literal["all", "en", "zh"] = "all"
    prompt_format: str = ConversionConfig.prompt_format
    prompt: str | None = None
    question_key: str = ConversionConfig.question_key
    answer_key: str = ConversionConfig.answer_key
    image_key: str = ConversionConfig.image_key

    def questions_in(self, path: Path) -> list[Question]:
        """Raises UserError, with its place, for a bad one, and where there is none."""
        form, folder = FORMATS[self.format], self.image_folder
        if self.split != "all" and not form.splits:
            raise UserError(f"--split {self.split}: {self.format} is published without splits")
        if folder is None and form.images_in is not None and self.format != "llava":
            folder = form.images_in(path)
        names = set(QuestionOptions.__dataclass_fields__) - {"image_folder", "format"}
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names}
        return read_questions(path, self.format, ConversionConfig(path, folder, **chosen))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: the weights (with the copies that the CPU's fast products keep), a token of one
    stream, and how many tokens a stream has at most."""

    weights: int
    token: int
    context: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantize: Quantize | None,
        device: torch.device,
    ) -> MemoryEstimate:
        config = checkpoint.config()
        width, inner = config.hidden_size, config.intermediate_size
        group = width // config.num_attention_heads * config.num_key_value_heads
        matrices = config.num_hidden_layers * (
            2 * width * width + 2 * width * group + 3 * width * inner
        )
        each = {None: dtype.itemsize, "8bit": 1, "4bit": 0.57}[quantize]  # scales of nf4 included
        copied = device.type == "cpu" and dtype == torch.float32 and quantize is None
        layers = int(matrices * each)
        ends = 2 * config.vocab_size * width * dtype.itemsize
        copies = (layers if layers <= LARGEST else 0) + (ends // 2 if ends // 2 <= LARGEST else 0)
        token = bytes_per_token(config, dtype)
        return cls(layers + ends + copies * copied, token, config.max_position_embeddings)

    def line(self, rows: int, free: int) -> str:
        caches = BRANCHES * rows * self.context * self.token
        return (
            f"memory: the decoder's weights {self.weights / 1e9:.2f} GB; keys and values "
            f"{self.token / 1e3:.1f} kB a token, at most {caches / 1e9:.2f} GB for {rows} "
            f"{'answer' if rows == 1 else 'answers'} with guided pictures; {free / 1e9:.1f} GB free"
        )


def memory_free(device: torch.device) -> int:
    """Bytes that a device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # accelerate brings it

    return int(psutil.virtual_memory().available)
