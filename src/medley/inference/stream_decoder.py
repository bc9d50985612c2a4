"""Tokens of one response -> events: text as soon as it is decodable, images as they progress."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from medley.generation import GenerationOutput, Request
from medley.inference.interface import GeneratingModel
from medley.inference.response import StreamEvent


class StreamDecoder:
    """Converts a request's token stream into events. Call it once per token, then with None.

    A preview comes with every `preview_every` image tokens; 0 for none.
    """

    def __init__(self, model: GeneratingModel, request: Request, preview_every: int = 0) -> None:
        self.model, self.request, self.preview_every = model, request, preview_every
        self._text_ids: list[int] = []
        self._emitted_text = ""
        self._codes: list[int] = []  # of the current image
        self._images: list[Image.Image] = []

    def __call__(self, token: int | None, output: GenerationOutput) -> Iterator[StreamEvent]:
        model, vocabulary = self.model, self.model.vocabulary
        if token in vocabulary.text_tokens and token not in self.request.options.stop:
            assert token is not None
            self._text_ids.append(token)
            yield from self._decode_text(is_last=False)
            return
        if self._text_ids:
            yield from self._decode_text(is_last=True)
        self._text_ids, self._emitted_text = [], ""
        if token is None:
            yield StreamEvent(response=model.to_response(output, self._images))
        elif token in vocabulary.image_codes:
            self._codes.append(vocabulary.token_to_image_code(token))
            preview = None
            if self.preview_every and len(self._codes) % self.preview_every == 0:
                preview = model.preview(self._codes)
            progress = len(self._codes) / model.image_tokenizer.codes_per_image
            yield StreamEvent(progress=progress, preview=preview)
        elif token == vocabulary.end_image:
            self._images.append(model.image_tokenizer.decode([self._codes])[0])
            codes, self._codes = tuple(self._codes), []
            yield StreamEvent(image=self._images[-1], codes=codes)

    def _decode_text(self, is_last: bool) -> Iterator[StreamEvent]:
        text = self.model.text_tokenizer.decode(self._text_ids)
        if not is_last and text.endswith("\ufffd"):
            return  # the next token completes this character
        if not is_last or len(text) > len(self._emitted_text):
            yield StreamEvent(text=text[len(self._emitted_text) :])
            self._emitted_text = text
