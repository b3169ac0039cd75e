"""Prompts encoded piece by piece, each piece once: a conversation is sent again with every turn.

A tokenizer takes added tokens out of a text before anything else, so what stands on one side of
such a token has no bearing on the other side. Prompts are cut before turns' own tokens.
"""

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator

import msgspec
from tokenizers import AddedToken, Tokenizer

MAX_PIECES = 4096
MAX_CHARS = 8 << 20  # of the pieces remembered for one tokenizer
# Shorter pieces go together with the next one: so few are looked up, however a text is made.
MIN_PIECE_CHARS = 512


class SegmentedEncoder:
    """Encodes texts like its tokenizer does, and remembers the ids of recent pieces.

    May be used by several threads.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        cuts = _cuts(tokenizer)
        self._cut = re.compile("|".join(map(re.escape, cuts))) if cuts else None
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = []
        for piece in self._encoded(text):
            ids += piece
        return ids

    def count(self, text: str) -> int:
        """Return how many ids a text has."""
        return sum(map(len, self._encoded(text)))

    def _encoded(self, text: str) -> "list[array[int]]":
        pieces = list(self._pieces(text))
        with self._lock:
            found = {piece: ids for piece in pieces if (ids := self._recall(piece)) is not None}
        new = [piece for piece in dict.fromkeys(pieces) if piece not in found]
        if new:
            # The batch call lets other threads run meanwhile; the single one holds the
            # interpreter, for seconds with a prompt of megabytes.
            batch = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
            made = {piece: array("I", each.ids) for piece, each in zip(new, batch, strict=True)}
            found |= made
            if self._cut is not None:
                with self._lock:
                    self._remember(made)
        return [found[piece] for piece in pieces]

    def _pieces(self, text: str) -> Iterator[str]:
        begin = 0
        for cut in self._cut.finditer(text) if self._cut is not None else ():
            if cut.start() - begin >= MIN_PIECE_CHARS:
                yield text[begin : cut.start()]
                begin = cut.start()
        yield text[begin:]

    def _recall(self, piece: str) -> "array[int] | None":
        ids = self._known.get(piece)
        if ids is not None:
            self._known.move_to_end(piece)
        return ids

    def _remember(self, made: "dict[str, array[int]]") -> None:
        for piece, ids in made.items():
            if piece not in self._known:
                self._known[piece] = ids
                self._num_chars += len(piece)
        while self._num_chars > MAX_CHARS or len(self._known) > MAX_PIECES:
            piece, _ = self._known.popitem(last=False)
            self._num_chars -= len(piece)


class _Splitter(msgspec.Struct, kw_only=True, frozen=True):
    """A pre-tokenizer as its library describes it."""

    type: str
    add_prefix_space: bool = False
    pretokenizers: "list[_Splitter]" = []


_decoder = msgspec.json.Decoder(_Splitter)


def _cuts(tokenizer: Tokenizer) -> list[str]:
    """Return the added tokens before which a text may be cut without any change of its ids."""
    splitter = tokenizer.pre_tokenizer
    if splitter is None or not _is_position_free(_decoder.decode(splitter.__getstate__())):
        return []
    added: list[AddedToken] = list(tokenizer.get_added_tokens_decoder().values())
    texts = [token.content for token in added]
    return [
        token.content
        for token in added
        if token.special
        and token.content
        and not (token.lstrip or token.single_word or token.normalized)
        and not any(_may_overlap(other, token.content) for other in texts)
    ]


def _is_position_free(splitter: _Splitter) -> bool:
    """Whether a text is split alike wherever it stands: nothing is put before its first word."""
    if splitter.type == "Sequence":
        return all(map(_is_position_free, splitter.pretokenizers))
    if splitter.type == "ByteLevel":
        return not splitter.add_prefix_space
    return splitter.type in ("Split", "Digits")


def _may_overlap(token: str, cut: str) -> bool:
    """Whether `cut` may begin inside an occurrence of `token`."""
    return any(
        token[at:].startswith(cut) or cut.startswith(token[at:]) for at in range(1, len(token))
    )
