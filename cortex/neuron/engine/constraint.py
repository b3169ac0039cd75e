"""Output that must follow a grammar: compiling, masks and the dormant/active life of a matcher."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from cortex.core.errors import BadRequestError
from cortex.neuron.engine.protocol import INVALID_GRAMMAR, Constraint

MAX_TOKENIZERS = 4
MAX_GRAMMARS = 64

TokenizerKey = tuple[str, tuple[int, ...]]


class GrammarKey(NamedTuple):
    """What makes two grammars the same: text, and tokenizer with its stop ids."""

    lark: str
    tokenizer: TokenizerKey

    @classmethod
    def of(cls, constraint: Constraint, stop_ids: Sequence[int]) -> "GrammarKey":
        """Return the key of a constraint whose match `stop_ids` may follow."""
        return cls(constraint.lark, (constraint.tokenizer_path, tuple(stop_ids)))


class ConstraintError(BadRequestError):
    """A grammar cannot be compiled for the model's tokenizer."""

    code = INVALID_GRAMMAR


class ConstraintState:
    """One sequence's place in its grammar.

    Attributes:
        is_active: whether the next token is masked.
        is_complete: whether the grammar allows nothing more and the request ends.
        error: why the grammar could not be followed, or None.
    """

    def __init__(self, constraint: Constraint, matcher: LLMatcher) -> None:
        self._trigger_id = constraint.trigger_id
        self._start_id = (
            constraint.skip_until_id if constraint.trigger_id is None else constraint.trigger_id
        )
        self._matcher = matcher
        self._is_fresh = True
        self.is_active = self._start_id is None
        self.is_complete = False
        self.error: str | None = None

    def accept(self, token_id: int) -> None:
        """Take note of a sampled token."""
        if not self.is_active:
            if token_id == self._start_id and not self.is_complete:
                self._start()
            return
        self._is_fresh = False
        if not self._matcher.consume_token(token_id):
            self._fail()
        elif self._trigger_id is not None:
            # Free text may follow, so nothing is lost by ending at the first complete match.
            self.is_active = not (self._matcher.is_accepting() or self._matcher.is_stopped())
        elif self._matcher.is_stopped():
            self.is_active = False
            self.is_complete = True

    def fill_mask(self, row: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> None:
        """Write one bit per token id, 1 where it is allowed next; all ones after an error."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            self._fail()
            row.fill(-1)

    def _start(self) -> None:
        self.is_active = True
        if not self._is_fresh and not self._matcher.reset():
            self._fail()

    def _fail(self) -> None:
        self.is_active = False
        message = self._matcher.get_error().split("\n", 1)[0]
        self.error = f"the output could not follow its grammar: {message}"


class ConstraintCompiler:
    """Compiles constraints for one model, remembering recent tokenizers and grammars.

    `build` may run in another thread, one call at a time; the rest is for the owner's thread.

    Args:
        vocab_size: width of the model's logits; ids above the tokenizer's own are never allowed.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tokenizers: OrderedDict[TokenizerKey, LLTokenizer] = OrderedDict()
        self._matchers: OrderedDict[GrammarKey, LLMatcher] = OrderedDict()

    def compile(self, constraint: Constraint, stop_ids: Sequence[int]) -> ConstraintState:
        """Return a fresh state; `stop_ids` are what may follow a complete match.

        Raises:
            ConstraintError: the tokenizer cannot be read or the grammar is not valid.
        """
        state = self.recall(constraint, stop_ids)
        if state is None:
            key = GrammarKey.of(constraint, stop_ids)
            self.remember(key, self.build(key))
            state = self.recall(constraint, stop_ids)
            assert state is not None
        return state

    def recall(self, constraint: Constraint, stop_ids: Sequence[int]) -> ConstraintState | None:
        """Return a fresh state of a grammar that is remembered, or None."""
        key = GrammarKey.of(constraint, stop_ids)
        matcher = self._matchers.get(key)
        if matcher is None:
            return None
        self._matchers.move_to_end(key)
        return ConstraintState(constraint, matcher.deep_copy())

    def remember(self, key: GrammarKey, matcher: LLMatcher) -> None:
        """Keep a grammar that was built; the oldest beyond `MAX_GRAMMARS` goes."""
        self._matchers[key] = matcher
        self._matchers.move_to_end(key)
        _trim(self._matchers, MAX_GRAMMARS)

    def build(self, key: GrammarKey) -> LLMatcher:
        """Compile a grammar; raises as `compile`."""
        matcher = LLMatcher(self._tokenizer(key.tokenizer), key.lark, log_level=0)
        self._check(matcher)
        return matcher

    def _check(self, matcher: LLMatcher) -> None:
        """Raise what is wrong with a grammar; some faults show only with the first mask."""
        trial = matcher.deep_copy()
        if not trial.is_error():
            row = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
            trial.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if trial.is_error():
            message = trial.get_error().strip().split("\n", 1)[0]
            raise ConstraintError(f"the grammar is not valid: {message}")

    def _tokenizer(self, key: TokenizerKey) -> LLTokenizer:
        tokenizer = self._tokenizers.get(key)
        if tokenizer is None:
            path, stop_ids = key
            try:
                text = Path(path).read_text(encoding="utf-8")
                eos_token = list(stop_ids) or None
                tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos_token)
            except (OSError, ValueError, OverflowError) as exc:
                raise ConstraintError(f"tokenizer {path} cannot be used: {exc}") from exc
            self._tokenizers[key] = tokenizer
            _trim(self._tokenizers, MAX_TOKENIZERS)
        self._tokenizers.move_to_end(key)
        return tokenizer


def apply_masks(logits: Tensor, rows: list[int], states: list[ConstraintState]) -> None:
    """Set the logits a grammar forbids to -inf, in place.

    Args:
        logits: (rows, vocab) float32.
        rows: row of each state.
    """
    vocab_size = logits.shape[1]
    bits = np.zeros((len(rows), -(-vocab_size // 32)), dtype=np.int32)
    for i, state in enumerate(states):
        state.fill_mask(bits[i])
    # The words are little-endian on every platform torch runs on.
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    forbidden = torch.from_numpy(allowed == 0).to(logits.device)
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill(forbidden, -torch.inf)


def _trim(entries: OrderedDict[Any, Any], limit: int) -> None:
    while len(entries) > limit:
        entries.popitem(last=False)
