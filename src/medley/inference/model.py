"""A model with its tokenizers: documents to ids, questions to answers, whole or as they come."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from medley.data.document import ContentPart, Document, ImagePart, ids_to_parts, parts_to_ids
from medley.data.vocabulary import TextTokenizer, Vocabulary
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, GenerationOutput, Request
from medley.images.preprocess import open_image
from medley.vqgan.image_tokenizer import ImageTokenizer

Prompt = Sequence["str | Path | Image.Image | ImagePart"]


@dataclass(frozen=True)
class Response:
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
class StreamEvent:
    """What `stream` yields: one of a piece of text, progress of a picture (with a preview of what
    is there, where asked for), a whole picture; at the end the whole answer."""

    text: str | None = None
    progress: float | None = None
    preview: Image.Image | None = None
    image: Image.Image | None = None
    answer: Response | None = None


class Model:
    """A decoder with its tokenizers. `decoder(input_ids).logits` is (B, S, V), images open.

    `fuse` joins the layers' weights for faster generation; not for a decoder in training.
    """

    def __init__(
        self,
        decoder: Any,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        fuse: bool = False,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        inner = decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder
        self.engine = Engine(
            inner, self.vocabulary, image_tokenizer.codes_per_image, fuse,
            codebook=image_tokenizer.vqgan.config.n_embed,
        )  # fmt: skip

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizers.Tokenizer, marks parsed as its file has them."""
        return self.tokenizer.marked

    # --- documents ------------------------------------------------------------------------

    def tokenize_image(self, picture: ImagePart) -> ImagePart:
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
        return document.map_images(self.tokenize_image).to_ids(self.tokenizer)

    def encode_prompt(self, prompt: Prompt | Document, complete: bool = False) -> list[int]:
        """Parts of a question, or a talk that ends with one -> ids of the prompt.

        `complete` leaves the end-of-turn mark out, so that the text itself is continued.
        """
        if isinstance(prompt, Document):
            ids = self.encode(prompt)[:-1]  # without </s>
        else:
            parts = [self._part(part) for part in ([prompt] if isinstance(prompt, str) else prompt)]
            ids = [self.vocabulary.bos, *parts_to_ids(parts, self.tokenizer)]
        return ids if complete else [*ids, self.vocabulary.end_turn]

    def _part(self, part: str | Path | Image.Image | ImagePart) -> ContentPart:
        if isinstance(part, Image.Image):
            part = ImagePart(image=part)
        elif isinstance(part, Path):
            part = ImagePart(path=part)
        return self.tokenize_image(part) if isinstance(part, ImagePart) else part

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
        return self.generate_responses([prompt], [chosen], complete)[0].parts

    def generate_batch(
        self, prompts: Sequence[Prompt | Document], mode: Any = "any", **options: Any
    ) -> list[list[str | Image.Image]]:
        """Answers to many prompts in one batch; `mode` is one for all, or one for each."""
        modes: list[Any] = [mode] * len(prompts) if isinstance(mode, str) else list(mode)
        chosen = [GenerationOptions(mode=m, **options) for m in modes]
        return [answer.parts for answer in self.generate_responses(prompts, chosen)]

    def generate_responses(
        self,
        prompts: Sequence[Prompt | Document],
        options: Sequence[GenerationOptions],
        complete: bool = False,
        batch_size: int = 32,
        rows: Sequence[int] | None = None,
        deterministic: bool = False,
    ) -> list[Response]:
        """Answers with their reasons.

        A row's randomness comes from its seed and its number: its place in `prompts`, unless
        `rows` gives the numbers (of a list that is answered in parts, say). With `deterministic`
        rows are worked on one after another, so that a row's logits are the same bit for bit
        whatever else is asked; else they agree to rounding.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more")
        batch_size = 1 if deterministic else batch_size
        numbers = range(len(prompts)) if rows is None else rows
        requests = [
            self._request(prompt, chosen, row, complete)
            for row, prompt, chosen in zip(numbers, prompts, options, strict=True)
        ]
        return [self.to_response(result) for result in self.engine.generate(requests, batch_size)]

    def stream(
        self,
        prompt: Prompt | Document,
        mode: Any = "any",
        complete: bool = False,
        preview_every: int = 0,
        **options: Any,
    ) -> Generator[StreamEvent, None, None]:
        """The answer as it comes: pieces of text, progress of pictures, whole pictures.

        A preview comes with every `preview_every` codes of a picture; 0 for none. Closing the
        iterator ends the work.
        """
        chosen = GenerationOptions(mode=mode, **options)
        return self.stream_request(self._request(prompt, chosen, 0, complete), preview_every)

    def stream_request(
        self, request: Request, preview_every: int = 0
    ) -> Generator[StreamEvent, None, None]:
        """`stream`, for ids that are there already."""
        telling = StreamDecoder(self, request, preview_every)
        steps = self.engine.run([request])
        with closing(steps):
            for _, token, result in steps:
                yield from telling(token, result)

    def preview(self, codes: Sequence[int]) -> Image.Image:
        """A picture that is not whole yet, grey where no code has been drawn."""
        return self.image_tokenizer.decode([[*codes, *self._grey_codes[len(codes) :]]])[0]

    @cached_property
    def _grey_codes(self) -> list[int]:
        size = (self.image_tokenizer.size, self.image_tokenizer.size)
        grey: list[int] = self.image_tokenizer.encode([Image.new("RGB", size, "gray")])[0].tolist()
        return grey

    def chat(self, mode: Any = "any", **options: Any) -> ChatSession:
        """A talk of several turns, whose earlier turns are not read again."""
        return ChatSession(self, GenerationOptions(mode=mode, **options))

    def _request(
        self, prompt: Prompt | Document, options: GenerationOptions, row: int, complete: bool
    ) -> Request:
        self.check_image_generation(options)
        return Request(self.encode_prompt(prompt, complete), options, row)

    def check_image_generation(self, options: GenerationOptions) -> None:
        """Warns of options that draw blank pictures; not a server's clients, who would not see it.

        Raises UserError where pictures are asked for and the image tokenizer has no decoder.
        """
        if options.mode == "text":
            return
        self.image_tokenizer.require_decoder()
        if options.image_greedy:
            warnings.warn(
                "greedy pictures tend to come out blank; sample them unless you test something",
                stacklevel=4,
            )

    def to_response(self, result: GenerationOutput, images: Sequence[Image.Image] = ()) -> Response:
        """The parts of what was generated: without what ended it, and without a picture that the
        limit cut short. `images` are its pictures, where they were made already."""
        ids = strip_terminators(result.ids, self.vocabulary, result.finish_reason)
        made = iter(images)
        parts: list[str | Image.Image] = []
        for part in ids_to_parts(ids, self.tokenizer):
            if isinstance(part, str):
                parts.append(part)
            else:
                assert part.codes is not None
                parts.append(next(made, None) or self.image_tokenizer.decode([part.codes])[0])
        return Response(parts, result.finish_reason, result.note, result.ids)


class StreamDecoder:
    """What a request's tokens mean, as they come: called with each of them, and with None at the
    end, it gives events."""

    def __init__(self, model: Model, request: Request, preview_every: int = 0) -> None:
        self.model, self.request, self.preview_every = model, request, preview_every
        self._text: list[int] = []
        self._shown = ""
        self._codes: list[int] = []
        self._images: list[Image.Image] = []

    def __call__(self, token: int | None, result: GenerationOutput) -> Iterator[StreamEvent]:
        model, marks = self.model, self.model.vocabulary
        if token in marks.text_tokens and token not in self.request.options.stop:
            assert token is not None
            self._text.append(token)
            decoded = model.tokenizer.decode(self._text)
            if not decoded.endswith("\ufffd"):  # half of a character comes with the next
                yield StreamEvent(text=decoded[len(self._shown) :])
                self._shown = decoded
            return
        if self._text and (rest := model.tokenizer.decode(self._text)[len(self._shown) :]):
            yield StreamEvent(text=rest)
        self._text, self._shown = [], ""
        if token is None:
            yield StreamEvent(answer=model.to_response(result, self._images))
        elif token in marks.image_codes:
            self._codes.append(marks.token_to_image_code(token))
            preview = None
            if self.preview_every and len(self._codes) % self.preview_every == 0:
                preview = model.preview(self._codes)
            done = len(self._codes) / model.image_tokenizer.codes_per_image
            yield StreamEvent(progress=done, preview=preview)
        elif token == marks.end_image:
            self._images.append(model.image_tokenizer.decode([self._codes])[0])
            self._codes = []
            yield StreamEvent(image=self._images[-1])


class ChatSession:
    """A talk. `send` gives the events of the next answer; what was said stays in the engine's
    memory, so that only what is new is read.

    Raises UserError, from `send`, where the context has no room left: begin a new talk.
    """

    def __init__(self, model: Model, options: GenerationOptions) -> None:
        self.model, self.options = model, options
        self.ids: list[int] = [model.vocabulary.bos]
        self.turns = 0

    def send(
        self, *parts: str | Path | Image.Image | ImagePart, preview_every: int = 0
    ) -> Generator[StreamEvent, None, None]:
        """The user's next turn -> the answer as it comes, the whole of it in the last event."""
        marks = self.model.vocabulary
        own = self.model.encode_prompt(list(parts))[1:]  # without <s>; the end of the turn is there
        request = Request([*self.ids, *own], self.options, self.turns, keep=True)
        try:
            self.model.engine.check(request.prompt)
        except UserError as error:
            raise UserError(f"{error}; or begin a new talk") from error
        self.model.check_image_generation(self.options)
        for event in self.model.stream_request(request, preview_every):
            if event.answer is not None:
                said = strip_terminators(event.answer.ids, marks, event.answer.finish_reason)
                self.ids = [*request.prompt, *said, marks.end_turn]
                self.turns += 1
            yield event


def strip_terminators(ids: Sequence[int], marks: Vocabulary, finish_reason: str) -> list[int]:
    """Ids of an answer without the mark or stop word that ended it, and without a picture that was
    cut short at their end."""
    found = list(ids[:-1] if finish_reason in ("end", "stop") else ids)
    if marks.begin_image in found:
        last = len(found) - 1 - found[::-1].index(marks.begin_image)
        if marks.end_image not in found[last:]:
            return found[:last]
    return found
