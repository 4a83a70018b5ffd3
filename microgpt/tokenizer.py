"""Characters to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from microgpt.config import Config
from microgpt.errors import MicrogptError, shortened


@dataclass(frozen=True)
class Tokenizer:
    """One token per character (a Unicode code point), plus BOS and the closing token.

    chars-bos        the characters from 0 on, then BOS, which is the closing token too
    bos-eos-chars    BOS 0, EOS 1, then the characters
    """

    chars: tuple[str, ...]
    ids: dict[str, int]
    bos: int
    eos: int

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens: {shortened(''.join(self.chars))})"

    @property
    def vocab_size(self) -> int:
        """V: the number of characters, plus BOS and the closing token."""
        return len(self.chars) + len({self.bos, self.eos})

    def encode(self, text: str) -> list[int]:
        """The ids of a document's characters.

        Raises MicrogptError naming the first character that is not in the vocabulary.
        """
        try:
            return list(map(self.ids.__getitem__, text))
        except KeyError as unknown:
            char = unknown.args[0]
            raise MicrogptError(
                f"the character {char!r} (U+{ord(char):04X}) in {shortened(text)} is not in the"
                f" vocabulary, which is {shortened(''.join(self.chars))}"
            ) from None

    def document(self, text: str, longest: int | None = None) -> list[int]:
        """BOS, the characters and the closing token, cropped to the first `longest` tokens.

        Characters after the crop are not encoded, so a book takes no longer than its beginning.
        """
        kept = text if longest is None else text[: longest - 1]
        return [self.bos, *self.encode(kept), self.eos][:longest]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. BOS, where it does not close a document, is written <BOS>.

        Raises MicrogptError naming the first id that is not in the vocabulary.
        """
        text = {i: char for char, i in self.ids.items()} | {self.eos: "<BOS>", self.bos: "<BOS>"}
        try:
            return "".join([text[i] for i in ids])
        except KeyError as unknown:
            raise MicrogptError(
                f"decode: the token id {shortened(unknown.args[0])} is outside the vocabulary,"
                f" which has 0 to {self.vocab_size - 1}"
            ) from None
        except TypeError:
            raise MicrogptError(f"decode: expected token ids, got {shortened(ids)}") from None


def prompt_ids(prompt: str, tokenizer: Tokenizer, config: Config, where: str) -> list[int]:
    """The ids of a prompt; MicrogptError if the prompt leaves no room in the context."""
    ids = tokenizer.encode(prompt)
    if len(ids) >= config.block_size:
        raise MicrogptError(
            f"{where}: {len(ids)} characters leave no room in a context of {config.block_size}"
            f" positions, of which BOS takes one; {config.block_size - 1 or 'none'} would do"
        )
    return ids


def build_tokenizer(chars: Iterable[str], config: Config) -> Tokenizer:
    """The tokenizer over these characters, sorted by code point."""
    ordered = tuple(sorted(set(chars)))
    if config.vocabulary == "chars-bos":
        first, bos, eos = 0, len(ordered), len(ordered)
    else:
        first, bos, eos = 2, 0, 1
    return Tokenizer(ordered, {char: first + i for i, char in enumerate(ordered)}, bos, eos)
