"""Characters to ids and back, in both vocabularies."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microgpt.data import NAMES_FILE, read_documents
from microgpt.errors import MicrogptError
from microgpt.settings import load_config
from microgpt.tokenizer import Tokenizer, build_tokenizer

pytestmark = pytest.mark.quick

PRESETS = ("microgpt", "microgpt-243")  # chars-bos, bos-eos-chars


def over(chars: str, preset: str) -> Tokenizer:
    return build_tokenizer(chars, load_config(preset))


@pytest.mark.parametrize(
    ("preset", "vocab_size", "first", "bos", "eos", "emma"),
    [
        ("microgpt", 27, 0, 26, 26, [26, 4, 12, 12, 0, 26]),
        ("microgpt-243", 28, 2, 0, 1, [0, 6, 14, 14, 2, 1]),
    ],
)
def test_the_names_have_the_ids_of_the_original(
    preset: str, vocab_size: int, first: int, bos: int, eos: int, emma: list[int]
) -> None:
    tokenizer = over("".join(read_documents(NAMES_FILE)), preset)
    assert "".join(tokenizer.chars) == string.ascii_lowercase
    assert tokenizer.encode(string.ascii_lowercase) == list(range(first, first + 26))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (vocab_size, bos, eos)
    assert tokenizer.document("emma") == emma


@pytest.mark.parametrize(
    ("longest", "kept"), [(1, "<BOS>"), (2, "<BOS>e"), (4, "<BOS>emm"), (6, "<BOS>emma<BOS>")]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_document_that_is_cropped_is_not_closed(preset: str, longest: int, kept: str) -> None:
    tokenizer = over(string.ascii_lowercase, preset)
    assert tokenizer.decode(tokenizer.document("emma", longest)) == kept


@pytest.mark.parametrize("preset", PRESETS)
def test_characters_are_in_the_order_of_their_code_points(preset: str) -> None:
    tokenizer = over("z\U0001f600\u00e9aA\uff5e\U0001f600 a", preset)
    assert "".join(tokenizer.chars) == " Aaz\u00e9\uff5e\U0001f600"
    first = tokenizer.encode(" ")[0]
    assert tokenizer.encode("\U0001f600\uff5e") == [first + 6, first + 5]


@pytest.mark.parametrize("preset", PRESETS)
@given(text=st.text(), more=st.text())
def test_decode_takes_encode_back(preset: str, text: str, more: str) -> None:
    tokenizer = over(text + more, preset)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert tokenizer.document(text) == [tokenizer.bos, *ids, tokenizer.eos]


@pytest.mark.parametrize("preset", PRESETS)
@given(chars=st.text())
def test_every_id_is_used_once(preset: str, chars: str) -> None:
    tokenizer = over(chars, preset)
    used = {*tokenizer.encode("".join(set(chars))), tokenizer.bos, tokenizer.eos}
    assert used == set(range(tokenizer.vocab_size))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_opening_token_inside_a_document_is_written_out(preset: str) -> None:
    tokenizer = over("ab", preset)
    a, b = tokenizer.encode("ab")
    assert tokenizer.decode([a, tokenizer.bos, b]) == "a<BOS>b"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("abcd", "'c' (U+0063) in 'abcd'"),
        ("a\u00e9", "'\u00e9' (U+00E9) in 'a\u00e9'"),
        ("\U0001f600", "'\U0001f600' (U+1F600)"),
        ("a\nb", "'\\n' (U+000A) in 'a\\nb'"),
        ("A", "'A' (U+0041)"),
        ("<BOS>", "'<' (U+003C)"),
    ],
)
def test_the_first_unknown_character_is_named_with_its_code_point(
    preset: str, text: str, named: str
) -> None:
    with pytest.raises(MicrogptError) as refusal:
        over("ab", preset).encode(text)
    assert named in str(refusal.value)
    assert str(refusal.value).endswith("is not in the vocabulary, which is 'ab'")


def test_a_refusal_quotes_a_long_text_in_part() -> None:
    with pytest.raises(MicrogptError) as refusal:
        over("ab", "microgpt").encode("ab" * 10_000 + "c")
    assert "'c' (U+0063)" in str(refusal.value)
    assert len(str(refusal.value)) < 200
