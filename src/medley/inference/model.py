"""A model with its tokenizers: documents -> token ids, prompts -> responses."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from medley.data.document import ContentPart, Document, ImagePart, ids_to_parts, parts_to_ids
from medley.data.vocabulary import TextTokenizer, Vocabulary
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, GenerationOutput, Mode, Request
from medley.generation.decoder import Decoder
from medley.generation.engine import MAX_NUM_SEQS
from medley.generation.scheduler import ContextLengthError
from medley.inference.chat_session import ChatSession
from medley.inference.choice_scoring import ChoiceScore, ScoringOptions, score_prompts
from medley.inference.embeddings import check_layer, embed_sequence
from medley.inference.interface import Prompt
from medley.inference.response import Response, StreamEvent, strip_terminators
from medley.inference.stream_decoder import StreamDecoder
from medley.utils.deprecation import DeprecatedName, renamed_keywords
from medley.vqgan.image_tokenizer import ImageTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Unpack

    from medley.generation.config import GenerationKeywords
    from medley.inference.choice_scoring import ScoringKeywords


class Model:
    """A decoder with its tokenizers. `decoder(input_ids).logits` is (B, S, V).

    `text_tokenizer` encodes special tokens in a text as plain text; `raw_tokenizer` parses them.
    `fuse` joins the layers' weights for faster generation; do not use it in training.
    """

    def __init__(
        self,
        decoder: Decoder,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        fuse: bool = False,
    ) -> None:
        self.decoder = decoder
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.engine = Engine(
            _base_decoder(decoder), self.vocabulary, image_tokenizer.codes_per_image, fuse,
            codebook_size=image_tokenizer.vqgan.config.n_embed,
        )  # fmt: skip

    @property
    def vocabulary(self) -> Vocabulary:
        return self.text_tokenizer.vocabulary

    @property
    def raw_tokenizer(self) -> Tokenizer:
        """The tokenizers.Tokenizer of the checkpoint's file. It parses special tokens in a text."""
        return self.text_tokenizer.raw_tokenizer

    # --- documents ------------------------------------------------------------------------

    def tokenize_image(self, part: ImagePart) -> ImagePart:
        """The same image with its image codes. A part that has codes is returned unchanged."""
        if part.codes is not None:
            if len(part.codes) != self.image_tokenizer.codes_per_image:
                raise UserError(
                    f"An image has {len(part.codes)} image codes, expected "
                    f"{self.image_tokenizer.codes_per_image} for this checkpoint."
                )
            return part
        image = part.image
        if image is None:
            image = self.image_tokenizer.open_image(str(part.path))
        codes = tuple(self.image_tokenizer.encode([image])[0].tolist())
        return replace(part, codes=codes)

    def encode_document(self, document: Document) -> list[int]:
        """A document -> its token ids. Images without codes are opened and encoded."""
        return document.map_images(self.tokenize_image).to_ids(self.text_tokenizer)

    @renamed_keywords(complete="raw_prompt")
    def encode_prompt(self, prompt: Prompt | Document, raw_prompt: bool = False) -> list[int]:
        """Parts of a question, or a conversation that ends with one -> token ids of the prompt.

        `raw_prompt` omits the end-of-turn token, so that the model continues the prompt itself.
        """
        if isinstance(prompt, Document):
            ids = self.encode_document(prompt)[:-1]  # without </s>
        else:
            parts = [prompt] if isinstance(prompt, str) else prompt
            contents = [self._to_content(part) for part in parts]
            ids = [self.vocabulary.bos, *parts_to_ids(contents, self.text_tokenizer)]
        return ids if raw_prompt else [*ids, self.vocabulary.end_turn]

    def _to_content(self, part: str | Path | Image.Image | ImagePart) -> ContentPart:
        if isinstance(part, Image.Image):
            part = ImagePart(image=part)
        elif isinstance(part, Path):
            part = ImagePart(path=part)
        return self.tokenize_image(part) if isinstance(part, ImagePart) else part

    def embed(self, prompts: Sequence[str | Prompt | Document], layer: int | None = None) -> Tensor:
        """Embeddings of texts, images and their mixtures, for retrieval: float32 (N, D), unit norm.

        An embedding is the mean of the hidden states after `layer` layers (default: the middle
        layer; 0 for the token embeddings) over all tokens but `<s>`. Raises UserError for an empty
        prompt, an unknown layer, and a prompt that exceeds the model's context.
        """
        own = check_layer(self.engine.decoder, layer)
        sequences = (self.encode_prompt(prompt, raw_prompt=True) for prompt in prompts)
        rows = [self.embed_ids(ids, own) for ids in sequences]
        width: int = self.engine.decoder.config.hidden_size
        return torch.stack(rows) if rows else torch.zeros(0, width)

    def embed_ids(self, ids: Sequence[int], layer: int | None = None) -> Tensor:
        """The embedding (D,) of token ids that begin with `<s>`; see `embed`."""
        if len(ids) > self.engine.max_seq_len:
            raise ContextLengthError(
                f"An input has {len(ids)} tokens, but the model's context is "
                f"{self.engine.max_seq_len} tokens."
            )
        return embed_sequence(self.engine.decoder, ids, layer)

    # --- generation -----------------------------------------------------------------------

    @renamed_keywords(complete="raw_prompt")
    def generate(
        self,
        prompt: Prompt | Document,
        mode: Mode = "any",
        raw_prompt: bool = False,
        **options: Unpack[GenerationKeywords],
    ) -> list[str | Image.Image]:
        """The response to one prompt: strings and PIL images in their order.

        Options are the fields of `GenerationOptions`.
        """
        own = GenerationOptions(mode=mode, **options)
        return self.generate_responses([prompt], [own], raw_prompt)[0].parts

    def generate_batch(
        self,
        prompts: Sequence[Prompt | Document],
        mode: Mode | Sequence[Mode] = "any",
        **options: Unpack[GenerationKeywords],
    ) -> list[list[str | Image.Image]]:
        """Responses to several prompts in one batch; `mode` is one for all, or one for each."""
        modes = [mode] * len(prompts) if isinstance(mode, str) else list(mode)
        own = [GenerationOptions(mode=m, **options) for m in modes]
        return [response.parts for response in self.generate_responses(prompts, own)]

    @renamed_keywords(complete="raw_prompt", rows="indices")
    def generate_responses(
        self,
        prompts: Sequence[Prompt | Document],
        options: Sequence[GenerationOptions],
        raw_prompt: bool = False,
        batch_size: int = MAX_NUM_SEQS,
        indices: Sequence[int] | None = None,
        deterministic: bool = False,
    ) -> list[Response]:
        """Responses with their finish reasons and notes.

        The random numbers of a response depend on its seed and its index: the position in
        `prompts`, or its number in `indices` (if a list is processed in parts). With
        `deterministic` one sequence runs at a time, so that its logits do not depend on the other
        prompts at all, and its images are not speculated; otherwise they are equal up to rounding.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more.")
        own = range(len(prompts)) if indices is None else indices
        requests = [
            self._make_request(prompt, option, index, raw_prompt)
            for index, prompt, option in zip(own, prompts, options, strict=True)
        ]
        if not deterministic:
            outputs = self.engine.generate(requests, batch_size)
        else:
            with self.engine.speculation("off"):
                outputs = self.engine.generate(requests, batch_size=1)
        return [self.to_response(output) for output in outputs]

    @renamed_keywords(complete="raw_prompt")
    def stream(
        self,
        prompt: Prompt | Document,
        mode: Mode = "any",
        raw_prompt: bool = False,
        preview_every: int = 0,
        **options: Unpack[GenerationKeywords],
    ) -> Generator[StreamEvent, None, None]:
        """The response as events: pieces of text, progress of images, complete images.

        A preview comes with every `preview_every` image tokens; 0 for none. Closing the generator
        cancels the request.
        """
        own = GenerationOptions(mode=mode, **options)
        return self.stream_request(self._make_request(prompt, own, 0, raw_prompt), preview_every)

    def stream_request(
        self, request: Request, preview_every: int = 0
    ) -> Generator[StreamEvent, None, None]:
        """`stream` for a prompt that is encoded already."""
        decode = StreamDecoder(self, request, preview_every)
        steps = self.engine.run([request])
        with closing(steps):
            for _, token, output in steps:
                yield from decode(token, output)

    def preview(self, codes: Sequence[int]) -> Image.Image:
        """An incomplete image, gray where image codes are missing."""
        return self.image_tokenizer.decode([[*codes, *self._gray_codes[len(codes) :]]])[0]

    @cached_property
    def _gray_codes(self) -> list[int]:
        size = (self.image_tokenizer.size, self.image_tokenizer.size)
        codes: list[int] = self.image_tokenizer.encode([Image.new("RGB", size, "gray")])[0].tolist()
        return codes

    def chat(self, mode: Mode = "any", **options: Unpack[GenerationKeywords]) -> ChatSession:
        """A conversation of several turns. Earlier turns are not prefilled again."""
        return ChatSession(self, GenerationOptions(mode=mode, **options))

    # --- choices --------------------------------------------------------------------------

    def score(
        self,
        prompt: Prompt | Document,
        choices: Sequence[str],
        **options: Unpack[ScoringKeywords],
    ) -> list[ChoiceScore]:
        """The log-likelihood of each choice as the whole response to one prompt, in their order.

        Options are the fields of `ScoringOptions`. Raises UserError for empty choices, for two with
        the same tokens, and for a choice that does not fit into the context behind the prompt.
        """
        return score_prompts(self, [prompt], [choices], ScoringOptions(**options), 1)[0]

    def score_batch(
        self,
        prompts: Sequence[Prompt | Document],
        choices: Sequence[str] | Sequence[Sequence[str]],
        batch_size: int = MAX_NUM_SEQS,
        deterministic: bool = False,
        **options: Unpack[ScoringKeywords],
    ) -> list[list[ChoiceScore]]:
        """`score` for several prompts; `choices` are the same for all, or a list for each.

        A prompt is read once for all its choices. With `deterministic` one prompt is read at a
        time, so that its scores do not depend on the others, not even by rounding.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more.")
        is_shared = not choices or any(isinstance(choice, str) for choice in choices)
        own: Sequence[Any] = [choices] * len(prompts) if is_shared else choices
        batch_size = 1 if deterministic else batch_size
        return score_prompts(self, prompts, own, ScoringOptions(**options), batch_size)

    # --- requests and responses -----------------------------------------------------------

    def _make_request(
        self, prompt: Prompt | Document, options: GenerationOptions, index: int, raw_prompt: bool
    ) -> Request:
        self.check_image_generation(options)
        return Request(self.encode_prompt(prompt, raw_prompt), options, index)

    def check_image_generation(self, options: GenerationOptions) -> None:
        """Warns of options that generate blank images. The server does not call this.

        Raises UserError if images are requested and the image tokenizer has no decoder.
        """
        if options.mode == "text":
            return
        self.image_tokenizer.require_decoder()
        if options.image_greedy:
            warnings.warn(
                "Greedy decoding tends to generate blank images. Use image_greedy only in tests.",
                stacklevel=4,
            )

    def to_response(self, output: GenerationOutput, images: Sequence[Image.Image] = ()) -> Response:
        """The parts of an output, without its terminator and without a truncated image.

        `images` are its decoded images, if they were decoded before. Raises UserError if memory ran
        out before the output was complete.
        """
        if output.error is not None:
            raise UserError(output.error)
        ids = strip_terminators(output.ids, self.vocabulary, output.finish_reason)
        decoded = iter(images)
        parts: list[str | Image.Image] = []
        for part in ids_to_parts(ids, self.text_tokenizer):
            if isinstance(part, str):
                parts.append(part)
            else:
                assert part.codes is not None
                parts.append(next(decoded, None) or self.image_tokenizer.decode([part.codes])[0])
        return Response(parts, output.finish_reason, output.note, output.ids)

    encode = DeprecatedName("encode_document")  # alias
    prompt_ids = DeprecatedName("encode_prompt")  # alias
    answer_batch = DeprecatedName("generate_responses")  # alias
    tokenizer = DeprecatedName("text_tokenizer")  # alias
    with_codes = DeprecatedName("tokenize_image")  # alias
    events = DeprecatedName("stream_request")  # alias
    answer_of = DeprecatedName("to_response")  # alias


def _base_decoder(decoder: Decoder) -> Decoder:
    """The decoder inside of a PeftModel, or the decoder itself."""
    base: Decoder = getattr(decoder, "get_base_model", lambda: decoder)()
    return base
