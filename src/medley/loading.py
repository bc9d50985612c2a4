"""`medley.load`: a checkpoint of any layout, ready to read, write and draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medley.adapters import attach, base_of, find_adapter
from medley.checkpoints import Checkpoint, is_adapter, open_checkpoint
from medley.document import Document, Part, Picture, ids_to_parts, parts_to_ids
from medley.errors import UserError
from medley.files import check_fingerprint
from medley.generation import Engine, GenerationOptions, Request, Result
from medley.image_tokenizer import ImageTokenizer
from medley.images import open_image
from medley.ranks import local_rank, world_size
from medley.vocabulary import TextTokenizer, Vocabulary

Prompt = Sequence["str | Path | Image.Image | Picture"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Answer:
    """Parts of an answer in order, why it ended, and why a picture did not come."""

    parts: list[str | Image.Image]
    finish_reason: str
    note: str | None
    ids: list[int]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if isinstance(part, Image.Image)]


@dataclass(frozen=True)
class Event:
    """What `stream` yields: one of a piece of text, progress of a picture, a whole picture."""

    text: str | None = None
    progress: float | None = None
    image: Image.Image | None = None


class Model:
    """A decoder with its tokenizers. `decoder(input_ids).logits` is (B, S, V), images open."""

    def __init__(
        self, decoder: Any, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer
    ) -> None:
        self.decoder = decoder
        self.tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        inner = decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder
        self.engine = Engine(inner, self.vocabulary, image_tokenizer.codes_per_image)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizers.Tokenizer, marks parsed as its file has them."""
        return self.tokenizer.marked

    # --- documents ------------------------------------------------------------------------

    def with_codes(self, picture: Picture) -> Picture:
        """The same picture with its image codes; one that has them is returned as it is."""
        if picture.codes is not None:
            if len(picture.codes) != self.image_tokenizer.codes_per_image:
                raise UserError(
                    f"a picture with {len(picture.codes)} codes, this checkpoint's have "
                    f"{self.image_tokenizer.codes_per_image}"
                )
            return picture
        image = picture.image if picture.image is not None else open_image(str(picture.path))
        codes = tuple(self.image_tokenizer.encode([image])[0].tolist())
        return replace(picture, codes=codes)

    def encode(self, document: Document) -> list[int]:
        """A document -> its token ids; pictures without codes are read and encoded."""
        return document.map_pictures(self.with_codes).to_ids(self.tokenizer)

    def prompt_ids(self, prompt: Prompt | Document, complete: bool = False) -> list[int]:
        """Parts of a question, or a talk that ends with one -> ids of the prompt.

        `complete` leaves the end-of-turn mark out, so that the text itself is continued.
        """
        if isinstance(prompt, Document):
            ids = self.encode(prompt)[:-1]  # without </s>
        else:
            parts = [self._part(part) for part in ([prompt] if isinstance(prompt, str) else prompt)]
            ids = [self.vocabulary.bos, *parts_to_ids(parts, self.tokenizer)]
        return ids if complete else [*ids, self.vocabulary.end_turn]

    def _part(self, part: str | Path | Image.Image | Picture) -> Part:
        if isinstance(part, Image.Image):
            part = Picture(image=part)
        elif isinstance(part, Path):
            part = Picture(path=part)
        return self.with_codes(part) if isinstance(part, Picture) else part

    # --- generation -----------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | Document,
        mode: Any = "any",
        complete: bool = False,
        **options: Any,
    ) -> list[str | Image.Image]:
        """Parts of the answer to one prompt: strings and PIL images in their order.

        Options are the fields of `GenerationOptions`.
        """
        chosen = GenerationOptions(mode=mode, **options)
        return self.answer_batch([prompt], [chosen], complete)[0].parts

    def generate_batch(
        self, prompts: Sequence[Prompt | Document], mode: Any = "any", **options: Any
    ) -> list[list[str | Image.Image]]:
        """Answers to many prompts in one batch; `mode` is one for all, or one for each."""
        modes: list[Any] = [mode] * len(prompts) if isinstance(mode, str) else list(mode)
        chosen = [GenerationOptions(mode=m, **options) for m in modes]
        return [answer.parts for answer in self.answer_batch(prompts, chosen)]

    def answer_batch(
        self,
        prompts: Sequence[Prompt | Document],
        options: Sequence[GenerationOptions],
        complete: bool = False,
        batch_size: int = 32,
        rows: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Answers with their reasons.

        A row's randomness comes from its seed and its number: its place in `prompts`, unless
        `rows` gives the numbers (of a list that is answered in parts, say).
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more")
        numbers = range(len(prompts)) if rows is None else rows
        requests = [
            self._request(prompt, chosen, row, complete)
            for row, prompt, chosen in zip(numbers, prompts, options, strict=True)
        ]
        return [self._answer(result) for result in self.engine.generate(requests, batch_size)]

    def stream(
        self, prompt: Prompt | Document, mode: Any = "any", complete: bool = False, **options: Any
    ) -> Iterator[Event]:
        """The answer as it comes: pieces of text, progress of pictures, whole pictures."""
        chosen = GenerationOptions(mode=mode, **options)
        text: list[int] = []
        shown = ""
        codes: list[int] = []
        for _, token, _ in self.engine.run([self._request(prompt, chosen, 0, complete)]):
            if token in self.vocabulary.text_pieces:
                text.append(token)
                decoded = self.tokenizer.decode(text)
                if not decoded.endswith("\ufffd"):  # half of a character comes with the next
                    yield Event(text=decoded[len(shown) :])
                    shown = decoded
                continue
            if text and shown != self.tokenizer.decode(text):
                yield Event(text=self.tokenizer.decode(text)[len(shown) :])
                shown = self.tokenizer.decode(text)
            if token is None:
                break
            if token in self.vocabulary.image_codes:
                codes.append(self.vocabulary.id_to_code(token))
                yield Event(progress=len(codes) / self.image_tokenizer.codes_per_image)
            elif token == self.vocabulary.end_image:
                yield Event(image=self.image_tokenizer.decode([codes])[0])
                text, shown, codes = [], "", []

    def _request(
        self, prompt: Prompt | Document, options: GenerationOptions, row: int, complete: bool
    ) -> Request:
        if options.mode != "text":
            self.image_tokenizer.require_decoder()
        return Request(self.prompt_ids(prompt, complete), options, row)

    def _answer(self, result: Result) -> Answer:
        ends = (self.vocabulary.eos, self.vocabulary.end_turn)
        ids = result.ids[:-1] if result.ids and result.ids[-1] in ends else result.ids
        if self.vocabulary.begin_image in ids:  # a picture that the limit cut short is left out
            last = len(ids) - 1 - ids[::-1].index(self.vocabulary.begin_image)
            if self.vocabulary.end_image not in ids[last:]:
                ids = ids[:last]
        parts: list[str | Image.Image] = []
        for part in ids_to_parts(ids, self.tokenizer):
            if isinstance(part, str):
                parts.append(part)
            else:
                assert part.codes is not None
                parts.append(self.image_tokenizer.decode([part.codes])[0])
        return Answer(parts, result.finish_reason, result.note, result.ids)


def load(
    ckpt: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    vqgan: str | Path | None = None,
) -> Model:
    """Opens a checkpoint in any of the three layouts, or `tiny`, the embedded model.

    `device` auto takes CUDA, then MPS, then the CPU; `dtype` auto the checkpoint's own on an
    accelerator and float32 on the CPU. `adapter` is laid over it unmerged; a `ckpt` that is an
    adapter finds its base by itself, or by `base`. `vqgan` names a folder with a VQGAN that has
    a decoder. Raises UserError for anything missing or mismatched.
    """
    path = Path(ckpt)
    if path.is_dir() and (is_adapter(path) or _holds_checkpoints(path)):
        if adapter is not None:
            raise UserError(
                f"{ckpt} is an adapter itself; give the base as --ckpt, or no --adapter"
            )
        adapter = find_adapter(path)
        checkpoint = base_of(adapter, base)
    else:
        if base is not None:
            raise UserError(f"--base names the base of an adapter, and {ckpt} is none")
        checkpoint = open_checkpoint(ckpt)
    return load_checkpoint(checkpoint, device, dtype, adapter, vqgan)


def _holds_checkpoints(path: Path) -> bool:
    return any(is_adapter(folder) for folder in path.glob("checkpoint-*"))


def load_checkpoint(
    checkpoint: Checkpoint,
    device: str,
    dtype: str | torch.dtype,
    adapter: str | Path | None,
    vqgan: str | Path | None,
) -> Model:
    target = pick_device(device)
    chosen = _pick_dtype(dtype, target)
    decoder: Any = checkpoint.decoder(chosen)
    if adapter is not None:
        folder = find_adapter(Path(adapter))
        if (Path(adapter) / "manifest.json").is_file():
            check_fingerprint(Path(adapter), checkpoint.fingerprint(), str(checkpoint.folder))
        decoder = attach(decoder, folder)
    elsewhere = None if vqgan is None else Path(vqgan)
    images = checkpoint.image_tokenizer(elsewhere, device=target)
    return Model(decoder.to(target), checkpoint.text_tokenizer(), images)


def pick_device(name: str) -> torch.device:
    """`auto` or a torch device. Raises UserError for one that is not there."""
    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine (or this torch) has no CUDA; use cpu")
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise UserError(f"--device {name}: expected auto, cpu, cuda or mps") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def own_device(name: str) -> torch.device:
    """`pick_device`, with a GPU of its own for each rank of this machine."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and world_size() > 1:
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return device


def _pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: expected auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
