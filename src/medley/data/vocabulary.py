"""The unified vocabulary: text tokens, image tokens and special tokens share one range of ids.

All ids are read by name from `text_tokenizer.json`. A missing special token or a gap among the
image tokens is an error at load time, because a model trained with guessed ids learns nonsense.

An image code is a VQGAN codebook index (0 to 8191 in Chameleon). An image token is the id of an
image code in this vocabulary.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from medley.data.bpe_cache import CachedBPE
from medley.errors import UserError
from medley.utils.config_files import (
    integer,
    library_errors,
    one_line,
    read_json_object,
    shown,
)

_SAMPLE = "A 12 mm mass\n\U0010ffff"  # words, digits, and a character of no vocabulary
BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
BEGIN_IMAGE, END_IMAGE = "<racm3:break>", "<eoss>"
END_TURN = "<reserved08706>"
IMAGE = "<image>"
IMAGE_IN_UNMODIFIED_FILE = "<reserved08707>"
_CODE_PREFIX, _CODE_SUFFIX = "IMGIMG", "Z"
_DIGITS = str.maketrans("0123456789", "ABCDEFGHIJ")
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


class VocabularyError(UserError):
    """A tokenizer file that does not contain a valid unified vocabulary."""


def image_token_name(code: int) -> str:
    """`image_token_name(10)` is `IMGIMGBAZ`: the digits of the image code, A for 0 to J for 9."""
    return _CODE_PREFIX + str(code).translate(_DIGITS) + _CODE_SUFFIX


def _parse_image_token_name(name: str) -> int | None:
    """Name of an image token -> image code; None for other tokens."""
    digits = name[len(_CODE_PREFIX) : -len(_CODE_SUFFIX)]
    if not (name.startswith(_CODE_PREFIX) and name.endswith(_CODE_SUFFIX) and digits):
        return None
    digits = digits.translate(_LETTERS)
    return int(digits) if digits.isdecimal() else None


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the special tokens, the image tokens and the text tokens.

    Attributes:
        image_placeholder: token at the position of an image in a text
        image_codes: range of the image tokens; its item c is the token of image code c
        size: largest id of the tokenizer plus 1
        text_tokens: ids of the words and word pieces
    """

    bos: int
    pad: int
    eos: int
    unk: int
    begin_image: int
    end_image: int
    end_turn: int
    image_placeholder: int
    image_codes: range
    size: int
    text_tokens: frozenset[int]

    @classmethod
    def from_file(cls, path: str | Path) -> Vocabulary:
        return cls.from_json(_read_file(path), str(path))

    @classmethod
    def from_json(cls, parsed: Any, where: str) -> Vocabulary:
        """Reads the parsed content of `text_tokenizer.json`.

        Raises VocabularyError that names the missing or misplaced token.
        """
        try:
            ids: dict[str, int] = dict(parsed["model"]["vocab"])
            added: dict[str, int] = {t["content"]: t["id"] for t in parsed["added_tokens"]}
            ids.update(added)
        except (KeyError, TypeError, ValueError) as error:
            raise VocabularyError(
                f"{where}: Not a tokenizer file with a BPE model (invalid model.vocab or "
                f"added_tokens: {one_line(error)})."
            ) from error
        _check_ids(ids, where)

        def special(name: str) -> int:
            if name not in ids:
                raise VocabularyError(
                    f"{where}: The special token {name!r} is missing. "
                    "Use the text_tokenizer.json of a Chameleon checkpoint."
                )
            return ids[name]

        codes = {
            c: i for name, i in ids.items() if (c := _parse_image_token_name(name)) is not None
        }
        return cls(
            bos=special(BOS),
            pad=special(PAD),
            eos=special(EOS),
            unk=special(UNK),
            begin_image=special(BEGIN_IMAGE),
            end_image=special(END_IMAGE),
            end_turn=special(END_TURN),
            image_placeholder=ids[IMAGE] if IMAGE in ids else special(IMAGE_IN_UNMODIFIED_FILE),
            image_codes=_image_token_range(codes, where),
            size=max(ids.values()) + 1,
            text_tokens=frozenset(ids.values()) - set(added.values()) - set(codes.values()),
        )

    @property
    def image(self) -> int:
        """Deprecated name of `image_placeholder`."""
        warnings.warn(
            "Vocabulary.image is deprecated, use Vocabulary.image_placeholder.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.image_placeholder

    def image_code_to_token(self, code: int) -> int:
        """Image code -> image token. Raises UserError for a code outside of the codebook."""
        if not 0 <= code < len(self.image_codes):
            raise UserError(
                f"Image code {code} is out of range (expected 0 to {len(self.image_codes) - 1})."
            )
        return self.image_codes[code]

    def token_to_image_code(self, token: int) -> int:
        """Image token -> image code. Raises UserError for another kind of token."""
        if token not in self.image_codes:
            first, last = self.image_codes[0], self.image_codes[-1]
            raise UserError(f"Token {token} is not an image token (expected {first} to {last}).")
        return token - self.image_codes.start

    def image_token_ids(self, codes: Iterable[int]) -> list[int]:
        """Codes of one image in raster order -> its image tokens, with begin and end tokens."""
        codes = tuple(codes)
        if len(codes) < 2 or min(codes) < 0:  # rare; converted one by one
            return [self.begin_image, *map(self.image_code_to_token, codes), self.end_image]
        try:
            return [self.begin_image, *itemgetter(*codes)(self.image_codes), self.end_image]
        except IndexError:  # raises an error that names the code
            return [self.begin_image, *map(self.image_code_to_token, codes), self.end_image]


def _image_token_range(tokens: dict[int, int], where: str) -> range:
    """Image code -> token id, for all codes, as a range of token ids."""
    if not tokens:
        raise VocabularyError(
            f"{where}: No image tokens found (expected {image_token_name(0)} and so on)."
        )
    first = tokens.get(0)
    for code in range(max(tokens) + 1):
        if code not in tokens:
            raise VocabularyError(
                f"{where}: The image token {image_token_name(code)} is missing. "
                "Image codes must have no gaps."
            )
        if first is None or tokens[code] != first + code:
            raise VocabularyError(
                f"{where}: {image_token_name(code)} has the wrong id (got {tokens[code]}, "
                f"expected {(first or 0) + code}). Image tokens must be consecutive."
            )
    assert first is not None
    return range(first, first + len(tokens))


def _read_file(path: str | Path) -> dict[str, Any]:
    try:
        return read_json_object(Path(path))
    except UserError as error:
        raise VocabularyError(str(error)) from error


def _check_ids(ids: dict[str, Any], where: str) -> None:
    for name, value in ids.items():
        integer(where, f"id of {shown(name)}", value, low=0)


def _make_tokenizer(parsed: dict[str, Any], where: str) -> Tokenizer:
    fix = "Use the text_tokenizer.json of a Chameleon checkpoint."
    with library_errors(where, "Not a valid tokenizer file", fix):
        tokenizer = Tokenizer.from_str(json.dumps(parsed))
        tokenizer.encode(_SAMPLE)  # reports parts that are missing only when a text is encoded
        return tokenizer


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer file in two variants: without and with parsing of special tokens.

    Attributes:
        vocabulary: ids by kind
        plain: parses no special tokens, so that text typed by a user is always text
        bpe: `plain` with a cache
        parsed: content of the file
        where: name of the file
    """

    vocabulary: Vocabulary
    plain: Tokenizer
    bpe: CachedBPE
    parsed: dict[str, Any]
    where: str = ""

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        parsed = _read_file(path)
        vocabulary = Vocabulary.from_json(parsed, str(path))
        # Without added tokens, the same BPE model parses plain text only. The names of the special
        # tokens remain in its vocabulary, but no merge produces them.
        without_special = {**parsed, "added_tokens": []}
        plain = _make_tokenizer(without_special, str(path))
        return cls(vocabulary, plain, CachedBPE(plain, without_special), parsed, str(path))

    @cached_property
    def raw_tokenizer(self) -> Tokenizer:
        """The unmodified file, which parses `<reserved08706>` in a text as a special token.

        MedMax tokenizes its documents this way.
        """
        return _make_tokenizer(self.parsed, self.where)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest text token, which bounds the characters of any token."""
        names = self.parsed["model"]["vocab"].items()
        return max(len(name) for name, id_ in names if id_ in self.vocabulary.text_tokens)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without special tokens. Raises UserError for an unpaired surrogate."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"The text contains an unpaired surrogate ({text[error.start]!a} at "
                    f"position {error.start})."
                ) from error
        return self.bpe.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids of text tokens -> text. The caller must remove special tokens and image tokens."""
        return self.plain.decode(ids, skip_special_tokens=False)
