"""Token ids of any kind as text, and token ids of requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from medley.data.vocabulary import IMAGE, TextTokenizer
from medley.serving.limits import RequestError
from medley.serving.worker import EngineWorker, TokenIds


def token_text(token: int, tokenizer: TextTokenizer) -> str:
    """One token as text: the name of a special token or an image token."""
    if token in tokenizer.vocabulary.text_tokens:
        return tokenizer.decode([token])
    return tokenizer.raw_tokenizer.id_to_token(token) or ""


def ids_to_text(ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """Ids -> text. A complete image is `<image>`, other tokens that are no text have their names.

    `<s>` at the beginning is left out: it is added to each prompt.
    """
    vocabulary = tokenizer.vocabulary
    rest = list(ids[1:] if ids[:1] and ids[0] == vocabulary.bos else ids)
    pieces: list[str] = []
    for is_text, run in groupby(_join_images(rest, tokenizer), vocabulary.text_tokens.__contains__):
        tokens = list(run)
        if is_text:
            pieces.append(tokenizer.decode(tokens))
        else:
            pieces += [
                IMAGE if token == vocabulary.image_placeholder else token_text(token, tokenizer)
                for token in tokens
            ]
    return "".join(pieces)


def _join_images(ids: list[int], tokenizer: TextTokenizer) -> list[int]:
    """Ids with the image placeholder for each complete image."""
    vocabulary = tokenizer.vocabulary
    joined: list[int] = []
    begin: int | None = None  # of the current image in `joined`
    for token in ids:
        joined.append(token)
        if token == vocabulary.begin_image:
            begin = len(joined) - 1
        elif token == vocabulary.end_image and begin is not None:
            joined[begin:] = [vocabulary.image_placeholder]
            begin = None
        elif token not in vocabulary.image_codes:
            begin = None
    return joined


def check_ids(ids: Sequence[int], where: str, worker: EngineWorker) -> TokenIds:
    """Token ids of a request as a prompt, which begins with `<s>`.

    Raises RequestError for an id that the model does not have.
    """
    size = worker.model.text_tokenizer.raw_tokenizer.get_vocab_size()
    for position, token in enumerate(ids):
        if not 0 <= token < size:
            raise RequestError(
                f"{where}[{position}]: Unknown token id (got {token}, expected 0 to {size - 1}).",
                param=f"{where}[{position}]",
            )
    bos = worker.model.vocabulary.bos
    return TokenIds(tuple(ids) if ids[:1] and ids[0] == bos else (bos, *ids))
