"""Token ids to text, piece by piece as they are generated."""

import codecs
from collections.abc import Iterable, Sequence

from cortex.neuron.chat.tokenizer import ChatTokenizer

# A character is at most 4 bytes; byte-fallback tokenizers spend a token on each.
_MAX_HELD_TOKENS = 8
# How much earlier text a token of a context-dependent tokenizer may depend on.
_CONTEXT_TOKENS = 4
_REPLACEMENT = "\ufffd"


class TextStream:
    """Incremental detokeniser of one sequence; constant work per token.

    Incomplete UTF-8 is held back until the rest arrives. Special tokens and ids without a
    token are dropped; added tokens that are not special (`<think>`, `<tool_call>`) stay.

    Args:
        context_ids: tokens before it, which the text goes on from.
        shown: texts of tokens that stay although they are special.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        context_ids: Sequence[int] = (),
        shown: Iterable[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = {tokenizer.marker_id(text) for text in shown} & tokenizer.special_ids
        self._hidden = tokenizer.special_ids - self._shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context = list(context_ids[-_CONTEXT_TOKENS:])
        self._pending: list[int] = []

    def feed(self, token_ids: Iterable[int]) -> str:
        """Return the text that became certain with these tokens."""
        if self._tokenizer.is_byte_level:
            spell = self._tokenizer.token_bytes
            hidden = self._hidden
            return self._utf8.decode(b"".join([spell(at) for at in token_ids if at not in hidden]))
        return "".join([self._feed_in_context(at) for at in token_ids if at not in self._hidden])

    def flush(self) -> str:
        """Return what was held back at the end of the sequence."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._take_pending() if self._pending else ""

    def _feed_in_context(self, token_id: int) -> str:
        """Decode a token beside its predecessors: a leading space may depend on them."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            return ""
        if token_id in self._shown:
            return self.flush() + self._tokenizer.token_bytes(token_id).decode()
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_HELD_TOKENS:
            return ""
        return self._take_pending()

    def _take_pending(self) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        self._context = (self._context + self._pending)[-_CONTEXT_TOKENS:]
        self._pending = []
        return text[len(before) :]
