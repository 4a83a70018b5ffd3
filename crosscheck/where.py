"""Where the wrong elements of a tensor lie, in words: in head 2, at all positions but the first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import Array, axes, split_key

MOST = 3  # up to so many indices are listed one by one


def where(case: Case, key: str, wrong: Array, live: Array, tokens: Array) -> str:
    """The smallest region with a name that holds all wrong elements; "" if all elements are wrong.

    wrong    which elements are wrong
    live     which elements could be wrong: not padding, and not 0 on both sides
    tokens   (B, T + 1) token ids of the batch, -1 where a document has ended

    An axis with only one live index is not named.
    """
    letters = axes(key)
    wrong = wrong & live
    if not wrong.any() or len(letters) != wrong.ndim or (wrong == live).all():
        return ""
    found: list[str] = []
    if letters[:1] == ("B",):
        found += _documents_and_positions(letters, wrong, live, tokens)
    for axis, letter in enumerate(letters):
        others = tuple(i for i in range(wrong.ndim) if i != axis)
        bad = np.flatnonzero(wrong.any(axis=others))
        all_of_them = np.flatnonzero(live.any(axis=others))
        if len(bad) == len(all_of_them):
            continue
        words = _along(case, key, letter, axis, bad, all_of_them, tokens)
        found += [words] if words else []
    return ", ".join(words for words in found if words)


def _documents_and_positions(
    letters: tuple[str, ...], wrong: Array, live: Array, tokens: Array
) -> Iterator[str]:
    """The wrong documents and positions in words, if not all of them are wrong."""
    if "T" not in letters:
        return
    keep = (0, letters.index("T"))
    others = tuple(i for i in range(wrong.ndim) if i not in keep)
    bad: Array = np.asarray(wrong.any(axis=others))  # (B, T)
    there: Array = np.asarray(live.any(axis=others))  # (B, T)
    B, T = bad.shape
    n = (tokens >= 0).sum(axis=1) - 1
    docs, all_docs = (np.flatnonzero(x.any(axis=1)) for x in (bad, there))
    if len(docs) < len(all_docs):
        padded = np.flatnonzero(n < n.max())
        if len(padded) < B and set(docs) <= set(padded):
            yield "in documents that are padded"
        else:
            yield _listed("in", "document", docs, all_docs)
        there = there & bad.any(axis=1, keepdims=True)
    if (bad != there).any() and there.sum(axis=1).max() > 1:
        yield _positions(bad, there, n, _repeated(tokens)[:, :T])
    if "U" in letters:
        u_is_t = np.eye(wrong.shape[-1], dtype=bool)
        if not wrong[..., ~u_is_t].any() and live[..., ~u_is_t].any():
            yield "where a position looks at itself"
        elif not wrong[..., u_is_t].any() and live[..., u_is_t].any():
            yield "where a position looks at earlier ones"


def _positions(bad: Array, there: Array, n: Array, repeated: Array) -> str:
    """The wrong positions in words; "" if there is no short way to name them.

    bad, there   (B, T): which positions are wrong, and which could be
    n            (B,): how many positions each document has
    repeated     (B, T): which positions have a token that occurs more than once
    """
    t = np.arange(bad.shape[1])
    ends = {"first": np.broadcast_to(t == 0, bad.shape), "last": t == n[:, None] - 1}
    ends = ends if len(t) > 2 else {}  # of two positions, the number is clearer
    places = {f"at the {words} position": place for words, place in ends.items()}
    places["at positions whose token occurs more than once"] = repeated
    for words, place in places.items():
        if not bad[~place].any() and there[~place].any():
            return words
    for words, place in ends.items():
        if (bad == (there & ~place)).all():
            return f"at all positions but the {words}"
    columns, every = (np.flatnonzero(x.any(axis=0)) for x in (bad, there))
    return _listed("at", "position", columns, every) if len(columns) < len(every) else ""


def _repeated(tokens: Array) -> Array:
    """(B, T): which positions have a token that occurs more than once in the batch."""
    inputs = np.where(tokens[:, 1:] >= 0, tokens[:, :-1], -1)
    ids, counts = np.unique(inputs[inputs >= 0], return_counts=True)
    return np.isin(inputs, ids[counts > 1])


def _along(
    case: Case, key: str, letter: str, axis: int, bad: Array, every: Array, tokens: Array
) -> str:
    """The wrong indices of one axis in words; "" if there is no short way to name them."""
    phase, name = split_key(key)
    of_weights = phase not in ("forward", "backward", "eval", "read")
    if letter in ("B", "T", "U") and not (letter == "T" and phase == "read"):
        return ""
    if letter == "T":
        return _listed("at", "position", bad, every)
    if letter == "H":
        return _listed("in", "head", bad, every)
    if letter == "V" and of_weights:
        return _token_rows(case, bad, every, tokens)
    if letter == "block_size":
        used = tokens.shape[1] - 1
        if bad.min() >= used:
            return "in rows beyond the last position"
        return _listed("in", "row", bad, every)
    D = case.config.head_dim
    tap = name.removeprefix("d").rpartition(".")[2]
    by_head = tap in ("q", "k", "v", "attn_out") or (tap, axis) in HEADS
    if by_head and D > 1 and case.config.n_head > 1:
        heads, all_heads = np.unique(bad // D), np.unique(every // D)
        if len(heads) < len(all_heads):
            return _listed("in", "head", heads, all_heads)
    word = ("row", "column")[axis] if of_weights else "channel"
    return _listed("in", word, bad, every)


HEADS = {("attn_wq", 0), ("attn_wk", 0), ("attn_wv", 0), ("attn_wo", 1)}  # axes split into heads


def _token_rows(case: Case, bad: Array, every: Array, tokens: Array) -> str:
    """The wrong rows of an embedding or output matrix in words, by the tokens of the batch."""
    inputs = tokens[:, :-1][tokens[:, 1:] >= 0]
    ids, counts = np.unique(inputs, return_counts=True)
    if set(bad) <= set(ids[counts > 1]) and len(ids[counts > 1]) < len(every):
        return "in rows of tokens that occur more than once"
    if set(bad) <= set(ids) and len(ids) < len(every):
        return "in rows of tokens that are in the batch"
    if not set(bad) & set(ids):
        return "in rows of tokens that are not in the batch"
    return _listed("in", "row", bad, every)


def _listed(preposition: str, word: str, bad: Array, every: Array) -> str:
    """Indices in words: few, all but one, a range; "" if there is no short way to name them."""
    rest = [i for i in every.tolist() if i not in set(bad.tolist())]
    first, last = int(bad[0]), int(bad[-1])
    if len(bad) == 1:
        return f"{preposition} {word} {first}"
    if len(rest) == 1:
        return f"{preposition} all {word}s but {rest[0]}"
    if len(bad) <= MOST:
        return f"{preposition} {word}s {', '.join(map(str, bad[:-1]))} and {last}"
    if last - first + 1 == len(bad):
        if last == every[-1]:
            return f"{preposition} {word}s from {first} on"
        return f"{preposition} {word}s {first} to {last}"
    for parity, name in ((0, "even"), (1, "odd")):
        if (bad % 2 == parity).all() and len(bad) == (every % 2 == parity).sum():
            return f"{preposition} {name} {word}s"
    return ""
