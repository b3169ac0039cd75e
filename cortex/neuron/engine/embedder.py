"""The engine of a model that makes vectors: takes texts, runs steps, reports vectors."""

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

import torch
from torch import Tensor

from cortex.neuron.engine.protocol import Embed, EngineStats, StepDone, Submit, TokenEvent
from cortex.neuron.engine.rates import RunningRate
from cortex.neuron.models.embedding_config import EmbeddingSpec
from cortex.neuron.models.pooling import Pool

_log = logging.getLogger(__name__)

# Bound of the queue. The neuron sends far fewer at a time; this only stops a flood.
MAX_WAITING = 4096


class Text:
    """One text inside the engine.

    Attributes:
        num_computed: leading tokens that are pooled already.
    """

    __slots__ = ("num_computed", "pool", "request_id", "token_ids")

    def __init__(self, embed: Embed, spec: EmbeddingSpec) -> None:
        self.request_id = embed.request_id
        self.token_ids = embed.prompt_ids
        self.num_computed = 0
        self.pool = Pool(spec)


class Encoder(Protocol):
    """A model that makes hidden states, with what it needs to run.

    Attributes:
        can_split: whether a text may come in pieces, over several steps.
        max_texts: texts of one step.
    """

    max_model_len: int
    max_texts: int
    vocab_size: int
    can_split: bool

    def encode(self, pieces: list[list[int]], start: int) -> list[Tensor]:
        """Return the hidden states of some pieces, (tokens, hidden) each.

        Args:
            start: tokens of the text that came before; over 0 for a single piece alone.
        """

    def is_healthy(self) -> bool:
        """Whether the device still computes."""


class Embedder:
    """Makes vectors of many texts at once; its calls are those of `engine.Engine`.

    A step takes whole texts in the order of their arrival, under `max_batched_tokens`, or a piece
    of a single longer one where the model can go on from it.

    Args:
        clock: monotonic seconds.

    Attributes:
        is_lost: the device answers no more; only a new process can help.
    """

    def __init__(
        self,
        encoder: Encoder,
        spec: EmbeddingSpec,
        *,
        max_batched_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._encoder = encoder
        self._spec = spec
        self._max_batched_tokens = max_batched_tokens
        self._clock = clock
        self._texts: dict[int, Text] = {}
        self._events: list[TokenEvent] = []
        self._rate = RunningRate()
        self.is_lost = False

    def compile_in(self, executor: Executor, wake: Callable[[], object]) -> None:
        """Do nothing: no grammar is ever asked for."""

    def admit_ready(self) -> None:
        """Do nothing: as above."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._texts)

    @property
    def has_news(self) -> bool:
        """Whether events are waiting to be reported without a step."""
        return bool(self._events)

    def submit(self, asked: Submit) -> None:
        """End a request for text at once, with an error event."""
        self._refuse(asked.request_id, "this model makes vectors and writes no text")

    def embed(self, asked: Embed) -> None:
        """Queue a text; one that cannot be served ends at once with an error event."""
        if asked.request_id in self._texts:
            # An event would end the text of that number at the other side.
            _log.error("request %d is in hand already: ignored", asked.request_id)
            return
        problem = self._problem(asked)
        if problem is not None:
            self._refuse(asked.request_id, problem)
            return
        self._texts[asked.request_id] = Text(asked, self._spec)

    def cancel(self, request_id: int) -> None:
        """Drop a text; an unknown one is ignored."""
        if self._texts.pop(request_id, None) is not None:
            self._events.append(TokenEvent(request_id=request_id, finish="cancelled"))

    def step(self) -> StepDone:
        """Compute one step, if there is work, and report everything since the last report."""
        texts = self._next()
        if texts:
            start_s = self._clock()
            try:
                num_tokens = self._compute(texts)
            except Exception as exc:  # noqa: BLE001  one step's failure must not end the others
                self._fail(texts, exc)
            else:
                self._rate.add(num_tokens, self._clock() - start_s)
        return self.report()

    def report(self) -> StepDone:
        """Return the events since the last report and fresh stats, without computing."""
        events, self._events = self._events, []
        num_running = min(len(self._texts), self._encoder.max_texts)
        stats = EngineStats(
            num_running=num_running,
            num_waiting=len(self._texts) - num_running,
            free_slots=self._encoder.max_texts - num_running,
            tok_s_prefill=self._rate.tok_s,
        )
        return StepDone(events=events, stats=stats)

    def _problem(self, asked: Embed) -> str | None:
        """Say why a text can never be served, if so."""
        ids, limit = asked.prompt_ids, self._encoder.max_model_len
        if not ids:
            return "the text is empty"
        if len(ids) > limit:
            return f"the text has {len(ids)} tokens and the model takes {limit}; shorten it"
        if min(ids) < 0 or max(ids) >= self._encoder.vocab_size:
            return f"a token is outside the vocabulary of {self._encoder.vocab_size}"
        if len(self._texts) >= MAX_WAITING:
            return f"{MAX_WAITING} texts wait already"
        return None

    def _next(self) -> list[Text]:
        """Return the texts of the next step."""
        chosen: list[Text] = []
        left = self._max_batched_tokens
        for text in self._texts.values():
            size = len(text.token_ids)
            if chosen and (size > left or len(chosen) == self._encoder.max_texts):
                break
            chosen.append(text)
            left -= size
            if left <= 0:
                break
        return chosen

    @torch.inference_mode()
    def _compute(self, texts: list[Text]) -> int:
        """Pool what a step makes of some texts, and report those that are whole; return tokens."""
        start, stop = texts[0].num_computed, None
        if self._encoder.can_split and len(texts) == 1:
            stop = start + self._max_batched_tokens
        pieces = [text.token_ids[start:stop] for text in texts]
        hidden = self._encoder.encode(pieces, start)
        whole: list[Text] = []
        for text, piece, states in zip(texts, pieces, hidden, strict=True):
            text.pool.add(states)
            text.num_computed += len(piece)
            if text.num_computed == len(text.token_ids):
                whole.append(text)
        if whole:
            # One copy from the device for all of them.
            vectors = torch.stack([text.pool.vector() for text in whole]).cpu()
            for text, vector in zip(whole, vectors, strict=True):
                self._finish(text, vector)
        return sum(map(len, pieces))

    def _finish(self, text: Text, vector: Tensor) -> None:
        del self._texts[text.request_id]
        if not bool(torch.isfinite(vector).all()):
            _log.error("request %d: the vector is not finite", text.request_id)
            error = "the model computed no finite vector"
            self._events.append(TokenEvent(request_id=text.request_id, finish="error", error=error))
            return
        data = vector.contiguous().numpy().astype("<f4").tobytes()
        self._events.append(TokenEvent(request_id=text.request_id, finish="stop", vector=data))

    def _fail(self, texts: list[Text], exc: Exception) -> None:
        """End every text of a failed step; the others go on if the device still can."""
        _log.error("a step of %d texts failed", len(texts), exc_info=exc)
        self.is_lost = not self._encoder.is_healthy()
        if isinstance(exc, torch.OutOfMemoryError):
            error = "the device ran out of memory; lower max_batched_tokens"
        else:
            error = f"the step failed: {type(exc).__name__}"
        for text in texts:
            # Some may have been reported before the others failed.
            if self._texts.pop(text.request_id, None) is not None:
                self._events.append(
                    TokenEvent(request_id=text.request_id, finish="error", error=error)
                )

    def _refuse(self, request_id: int, problem: str) -> None:
        self._events.append(
            TokenEvent(request_id=request_id, finish="error", error=problem, is_refusal=True)
        )
