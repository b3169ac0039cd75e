"""One request on this host: admission, the prompt, the engine, the reply.

Blocking work (templates, tokenization) runs in a few threads of its own, so that the event loop
goes on while a long prompt is prepared.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

from cortex.core.completions import CompletionRequest, TextCompletion
from cortex.core.embeddings import TEXT, cannot
from cortex.core.errors import BadRequestError, CortexError
from cortex.core.openai import (
    SSE_DONE,
    ChatCompletion,
    ChatRequest,
)
from cortex.neuron.accounts import Accounts
from cortex.neuron.chat.completion import (
    CompletionCollector,
    CompletionStream,
    PreparedTexts,
    prepare_texts,
)
from cortex.neuron.chat.images import ImageData, find_images
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.chat.prepare import Prepared, prepare, prompt_ids, prompt_text
from cortex.neuron.chat.stream import ChatCollector, ChatStream
from cortex.neuron.engine_client import EngineClient, Generation
from cortex.neuron.fetch import ImageFetcher
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.models.source import ModelSource
from cortex.neuron.native import OpenChat
from cortex.neuron.resident import Serving
from cortex.neuron.tokenize import TokenizeRequest, TokenizeResponse

PREPARE_THREADS = 4
# Tokenizers of models that are not loaded, kept for counting.
MAX_IDLE_CHAT_MODELS = 4

T = TypeVar("T")
Args = TypeVarTuple("Args")


class Inference:
    """Answers requests for chat and for text completions with the models of a lifecycle.

    Args:
        fetcher: gets images that are elsewhere.
        wall_clock: Unix seconds.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        accounts: Accounts,
        *,
        open_chat: OpenChat,
        fetcher: ImageFetcher,
        wall_clock: Callable[[], float],
    ) -> None:
        self._lifecycle = lifecycle
        self._accounts = accounts
        self._open_chat = open_chat
        self._fetcher = fetcher
        self._wall_clock = wall_clock
        self._idle_chats: OrderedDict[ModelSource, asyncio.Future[ChatModel]] = OrderedDict()
        self._threads = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def serving(self, model_id: str) -> Serving:
        """Return a loaded model; raises as `Lifecycle.serving`."""
        return self._lifecycle.serving(model_id)

    async def stream(
        self, request: ChatRequest | CompletionRequest, serving: Serving
    ) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a streamed reply.

        Raises:
            CortexError: before the first chunk or after it; then without `[DONE]`.
        """
        with self._accounts.counted(serving.model_id):
            watch = self._accounts.watch()
            prepared = await self._prepare(request, serving)
            with await serving.admission.acquire(prepared.num_choices):
                reply = _stream_of(prepared, request.model, int(self._wall_clock()))
                with _generation(prepared, serving) as generation:
                    is_begun = False
                    async for choice_idx, event in generation:
                        chunk = reply.feed(choice_idx, event)
                        if not is_begun:
                            # Only an engine that is at work knows what of the prompt was cached;
                            # and one that has gone, or refuses, is told by a status.
                            yield reply.start()
                            is_begun = True
                        if reply.is_finished(choice_idx):
                            generation.cancel(choice_idx)
                        if chunk:
                            watch.token()
                            yield chunk
            yield reply.end() + SSE_DONE
            self._accounts.done(serving.model_id, watch, reply.usage())

    async def complete(
        self, request: ChatRequest | CompletionRequest, serving: Serving
    ) -> ChatCompletion | TextCompletion:
        """Return a whole reply; raises CortexError."""
        with self._accounts.counted(serving.model_id):
            watch = self._accounts.watch()
            prepared = await self._prepare(request, serving)
            with await serving.admission.acquire(prepared.num_choices):
                reply = _collector_of(prepared, request.model, int(self._wall_clock()))
                with _generation(prepared, serving) as generation:
                    async for choice_idx, event in generation:
                        reply.feed(choice_idx, event)
                        if event.token_ids:
                            watch.token()
                        if reply.is_finished(choice_idx):
                            generation.cancel(choice_idx)
            completion = reply.completion()
            self._accounts.done(serving.model_id, watch, reply.usage())
            return completion

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Count a prompt's tokens; the model need not be loaded.

        Raises:
            ModelNotFoundError: this host knows no such model.
            BadRequestError: neither or both of messages and prompt are given.
        """
        if (request.messages is None) == (request.prompt is None):
            raise BadRequestError("give either messages or prompt", param="messages")
        chat = await self._chat_model(request.model)
        if request.prompt is not None:
            count, ids = await self._in_thread(_tokens, request.prompt, request, chat, {})
        else:
            assert request.messages is not None
            if not request.messages:
                raise BadRequestError("messages must hold at least one message", param="messages")
            chat_request = ChatRequest(
                model=request.model,
                messages=request.messages,
                tools=request.tools,
                tool_choice=request.tool_choice,
                chat_template_kwargs=request.chat_template_kwargs,
            )
            fetched = await self._fetch(chat_request, chat)
            count, ids = await self._in_thread(_tokens, chat_request, request, chat, fetched)
        return TokenizeResponse(count=count, tokens=ids, max_model_len=chat.max_model_len)

    async def _prepare(
        self, request: ChatRequest | CompletionRequest, serving: Serving
    ) -> Prepared | PreparedTexts:
        assert serving.chat is not None
        if serving.chat.embedding is not None:
            raise cannot(serving.model_id, TEXT)
        # A full queue is told before any work is done on the prompt.
        serving.admission.check(request.num_choices)
        if isinstance(request, CompletionRequest):
            return await self._in_thread(prepare_texts, request, serving.chat)
        fetched = await self._fetch(request, serving.chat)
        return await self._in_thread(prepare, request, serving.chat, fetched)

    async def _fetch(self, request: ChatRequest, chat: ChatModel) -> dict[str, ImageData]:
        """Return the images that are elsewhere; for a model without eyes none is asked for."""
        if chat.images is None:
            return {}
        return await self._fetcher.fetch(find_images(request.messages))

    async def _chat_model(self, model_id: str) -> ChatModel:
        model = self._lifecycle.model(model_id)
        if model is not None and model.chat is not None:
            return model.chat
        entry = await self._lifecycle.find(model_id)
        loading = self._idle_chats.get(entry.source)
        if loading is None:
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(self._threads, self._open_chat, entry)
            self._idle_chats[entry.source] = loading
            if len(self._idle_chats) > MAX_IDLE_CHAT_MODELS:
                self._idle_chats.popitem(last=False)
        self._idle_chats.move_to_end(entry.source)
        try:
            # Others may wait for the same file: who leaves does not take it from them.
            await asyncio.wait([loading])
            return loading.result()
        except CortexError:
            self._idle_chats.pop(entry.source, None)
            raise

    async def _in_thread(self, work: Callable[[*Args], T], *args: *Args) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _tokens(
    prompt: str | ChatRequest,
    asked: TokenizeRequest,
    chat: ChatModel,
    fetched: dict[str, ImageData],
) -> tuple[int, list[int] | None]:
    """Return how many tokens a prompt has, and which, if they are asked for."""
    if not isinstance(prompt, str) and find_images(prompt.messages):
        ids = prompt_ids(prompt, chat, fetched)
        return len(ids), ids if asked.return_tokens else None
    text = prompt if isinstance(prompt, str) else prompt_text(prompt, chat)
    if not asked.return_tokens:
        return chat.tokenizer.count(text), None
    ids = chat.tokenizer.encode(text)
    return len(ids), ids


@contextmanager
def _generation(prepared: Prepared | PreparedTexts, serving: Serving) -> Iterator[Generation]:
    """Submit every choice; whatever is unfinished at the end is cancelled at once."""
    requests = [prepared.submit(0, choice_idx) for choice_idx in range(prepared.num_choices)]
    engine = serving.engine
    assert isinstance(engine, EngineClient)
    pixels = prepared.pixels if isinstance(prepared, Prepared) else []
    generation = engine.submit(requests, pixels)
    # The engine has them; the answer may take long, and images are large.
    pixels.clear()
    try:
        yield generation
    finally:
        generation.close()


def _stream_of(
    prepared: Prepared | PreparedTexts, model: str, created: int
) -> ChatStream | CompletionStream:
    if isinstance(prepared, Prepared):
        return ChatStream(prepared, completion_id=_new_id("chatcmpl"), created=created, model=model)
    return CompletionStream(prepared, completion_id=_new_id("cmpl"), created=created, model=model)


def _collector_of(
    prepared: Prepared | PreparedTexts, model: str, created: int
) -> ChatCollector | CompletionCollector:
    if isinstance(prepared, Prepared):
        return ChatCollector(
            prepared, completion_id=_new_id("chatcmpl"), created=created, model=model
        )
    return CompletionCollector(
        prepared, completion_id=_new_id("cmpl"), created=created, model=model
    )


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
