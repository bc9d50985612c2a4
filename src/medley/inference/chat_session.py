"""A conversation of several turns with one model."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from PIL import Image

from medley.data.document import ImagePart
from medley.errors import UserError
from medley.generation import GenerationOptions, Request
from medley.inference.interface import GeneratingModel
from medley.inference.response import StreamEvent, strip_terminators
from medley.utils.deprecation import DeprecatedName


class ChatSession:
    """A conversation. `send` yields the events of the next response.

    The engine keeps the keys and values of earlier turns, so that only the new turn is prefilled.
    """

    def __init__(self, model: GeneratingModel, options: GenerationOptions) -> None:
        self.model, self.options = model, options
        self.ids: list[int] = [model.vocabulary.bos]  # of all complete turns
        self.num_responses = 0

    def send(
        self, *parts: str | Path | Image.Image | ImagePart, preview_every: int = 0
    ) -> Generator[StreamEvent, None, None]:
        """The user's next turn -> events; the last one contains the complete response.

        Raises UserError if the context has no room left. Start a new conversation then.
        """
        vocabulary = self.model.vocabulary
        turn = self.model.encode_prompt(list(parts))[1:]  # without <s>, with the end of the turn
        request = Request([*self.ids, *turn], self.options, self.num_responses, cache_prefix=True)
        try:
            self.model.engine.check(request)
        except UserError as error:
            raise UserError(f"{error} Or start a new conversation.") from error
        self.model.check_image_generation(self.options)
        for event in self.model.stream_request(request, preview_every):
            if event.response is not None:
                ids = strip_terminators(
                    event.response.ids, vocabulary, event.response.finish_reason
                )
                self.ids = [*request.prompt, *ids, vocabulary.end_turn]
                self.num_responses += 1
            yield event

    say = DeprecatedName("send")  # alias
