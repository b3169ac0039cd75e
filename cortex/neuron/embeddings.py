"""One request for embeddings on this host: admission, tokens, the engine, the answer."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from cortex.core.embeddings import EmbeddingRequest
from cortex.core.openai import Usage
from cortex.neuron.accounts import Accounts
from cortex.neuron.chat.embedding import (
    answer,
    check_answer,
    pieces,
    spec_of,
    tokenize,
    vector_of,
)
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.engine.protocol import Embed
from cortex.neuron.engine_client import EngineClient
from cortex.neuron.resident import Serving

PREPARE_THREADS = 2
# Texts of one request in the engine at a time: those of others have their turn in between, and
# what a caller who leaves has not been served is never begun.
WINDOW = 32

T = TypeVar("T")
Args = TypeVarTuple("Args")


class Embeddings:
    """Answers requests for embeddings with the models of this host."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._threads = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="embeddings")

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: EmbeddingRequest, serving: Serving) -> bytes:
        """Return the answer's JSON; raises CortexError.

        A request takes one seat, however many texts it brings.
        """
        with self._accounts.counted(serving.model_id):
            watch = self._accounts.watch()
            dimensions = check_answer(request, spec_of(serving.chat, serving.model_id))
            serving.admission.check()
            assert serving.chat is not None
            ids = await self._token_ids(request, serving.chat)
            with await serving.admission.acquire():
                vectors = await self._vectors(ids, serving)
            num_tokens = sum(map(len, ids))
            body = await self._in_thread(_answer, request, vectors, dimensions, num_tokens)
            usage = Usage(prompt_tokens=num_tokens, total_tokens=num_tokens)
            self._accounts.done(serving.model_id, watch, usage)
            return body

    async def _token_ids(self, request: EmbeddingRequest, model: ChatModel) -> list[list[int]]:
        ids: list[list[int]] = []
        for run in pieces(request):
            ids += await self._in_thread(tokenize, request, run, model)
        return ids

    async def _vectors(self, ids: list[list[int]], serving: Serving) -> list[bytes]:
        """Return the vectors of all texts; those of a like length are computed together."""
        vectors = [b""] * len(ids)
        order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
        for first in range(0, len(order), WINDOW):
            window = order[first : first + WINDOW]
            engine = serving.engine
            assert isinstance(engine, EngineClient)
            generation = engine.submit([Embed(request_id=0, prompt_ids=ids[at]) for at in window])
            try:
                async for at, event in generation:
                    vectors[window[at]] = vector_of(event)
            finally:
                generation.close()
        return vectors

    async def _in_thread(self, work: Callable[[*Args], T], *args: *Args) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _answer(
    request: EmbeddingRequest, vectors: list[bytes], dimensions: int, num_tokens: int
) -> bytes:
    return answer(request, vectors, dimensions=dimensions, num_tokens=num_tokens)
