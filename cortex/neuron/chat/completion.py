"""Text completions: prompts as they are to what the engine needs, and token events to the reply."""

import codecs
from dataclasses import dataclass

from cortex.core.completions import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    TextChoice,
    TextCompletion,
    TextLogprobs,
)
from cortex.core.errors import BadRequestError
from cortex.core.openai import TokenLogprob, TopLogprob, sse_event, usage_comment
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.chat.output import ContentDelta, OutputSpec
from cortex.neuron.chat.prepare import Prepared, check_length, check_room, sampling_of
from cortex.neuron.chat.stream import Piece, Reply
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.engine.protocol import Submit, TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTexts:
    """A request for text completions that is ready for the engine.

    Attributes:
        prompts: each with all of its choices, those that `best_of` drops included.
        echoes: what the text of each begins with; empty unless the prompt is to be repeated.
        num_returned: choices of each prompt that are returned.
        logprobs: whether the answer tells them; `best_of` needs them in any case.
    """

    prompts: tuple[Prepared, ...]
    echoes: tuple[str, ...]
    num_returned: int
    include_usage: bool
    logprobs: bool

    @property
    def num_choices(self) -> int:
        """Sequences to submit."""
        return len(self.prompts) * self.num_made

    @property
    def num_made(self) -> int:
        """Sequences of each prompt."""
        return self.prompts[0].num_choices

    def submit(self, request_id: int, choice_idx: int = 0) -> Submit:
        """Return the engine's command for one choice."""
        prompt_idx, at = divmod(choice_idx, self.num_made)
        return self.prompts[prompt_idx].submit(request_id, at)


def prepare_texts(request: CompletionRequest, model: ChatModel) -> PreparedTexts:
    """Return what the engine and the reply need of a request; call it from a thread.

    Raises:
        ContextLengthExceededError: a prompt leaves no room for an answer.
        BadRequestError: a prompt is empty, or a token is none of the model's.
    """
    prompts = [_prompt_ids(each, model) for each in request.prompts]
    is_chosen = request.num_made > request.num_returned
    num_logprobs = 0 if request.logprobs is None and is_chosen else request.logprobs
    sampling = sampling_of(request, model, num_logprobs)
    asked_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
    return PreparedTexts(
        prompts=tuple(
            Prepared(
                tokenizer=model.tokenizer,
                prompt_ids=ids,
                max_tokens=min(asked_tokens, model.max_model_len - len(ids)),
                stop_ids=model.tokenizer.eos_ids,
                sampling=sampling,
                constraint=None,
                output=OutputSpec(stops=request.stops),
                num_choices=request.num_made,
                stream=bool(request.stream),
                include_usage=request.include_usage,
                logprobs=num_logprobs is not None,
                context_ids=ids,
            )
            for ids in prompts
        ),
        echoes=tuple(
            _echo(each, model.tokenizer) if request.echo else "" for each in request.prompts
        ),
        num_returned=request.num_returned,
        include_usage=request.include_usage,
        logprobs=request.logprobs is not None,
    )


def _prompt_ids(prompt: str | list[int], model: ChatModel) -> list[int]:
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        check_length(prompt, model, "prompt")
        # A prompt that brings the token that texts begin with is not given another.
        has_begin = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer.encode(prompt, add_special=not has_begin)
    else:
        ids = prompt
        unknown = next((at for at in ids if not 0 <= at < tokenizer.vocab_size), None)
        if unknown is not None:
            raise BadRequestError(
                f"prompt names token {unknown}; this model's tokens are "
                f"0 to {tokenizer.vocab_size - 1}",
                param="prompt",
            )
    if not ids:
        raise BadRequestError("prompt is empty; give at least one token", param="prompt")
    check_room(ids, model, "prompt")
    return ids


def _echo(prompt: str | list[int], tokenizer: ChatTokenizer) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, keep_special=True)


class _Reply(Reply):
    """What both kinds of reply share."""

    def __init__(
        self, prepared: PreparedTexts, *, completion_id: str, created: int, model: str
    ) -> None:
        super().__init__(
            *prepared.prompts, completion_id=completion_id, created=created, model=model
        )
        self._texts = prepared
        self._spellers = [
            _Speller(prompt.tokenizer, len(echo))
            for prompt, echo in zip(prepared.prompts, prepared.echoes, strict=True)
            for _ in range(prompt.num_choices)
        ]

    def _echo(self, choice_idx: int) -> str:
        return self._texts.echoes[choice_idx // self._texts.num_made]

    def _logprobs(self, choice_idx: int, piece: Piece) -> TextLogprobs | None:
        if not self._texts.logprobs:
            return None
        return self._spellers[choice_idx].spell(piece.logprobs)


class CompletionStream(_Reply):
    """Makes the events of a streamed reply; the caller sends keep-alives and `[DONE]`.

    Args:
        completion_id, created, model: as they stand in every event; `created` in Unix seconds.
    """

    def start(self) -> bytes:
        """Return the usage so far and the first events, one per choice: its prompt, or nothing."""
        first = [
            self._event(TextChoice(index=at, text=self._echo(at)))
            for at in range(len(self._readers))
        ]
        return b"".join([usage_comment(self.usage()), *first])

    def feed(self, choice_idx: int, event: TokenEvent) -> bytes:
        """Return the event that tokens make certain, perhaps none; raises as `ChatStream.feed`."""
        if self.is_finished(choice_idx):
            return b""
        reader = self._readers[choice_idx]
        piece = reader.read(event)
        text = _text(piece)
        if not text and not piece.logprobs and reader.finish_reason is None:
            return b""
        return self._event(
            TextChoice(
                index=choice_idx,
                text=text,
                logprobs=self._logprobs(choice_idx, piece) if piece.logprobs else None,
                finish_reason=reader.finish_reason,
                stop_reason=reader.stop_reason,
            )
        )

    def end(self) -> bytes:
        """Return the final usage, as an event too if the request asked for one."""
        usage = self.usage()
        if not self._texts.include_usage:
            return usage_comment(usage)
        last = TextCompletion(
            id=self._id, created=self._created, model=self._model, choices=[], usage=usage
        )
        return usage_comment(usage) + sse_event(last)

    def _event(self, choice: TextChoice) -> bytes:
        return sse_event(
            TextCompletion(id=self._id, created=self._created, model=self._model, choices=[choice])
        )


class CompletionCollector(_Reply):
    """Collects a reply that does not stream; takes the same arguments as `CompletionStream`."""

    def __init__(
        self, prepared: PreparedTexts, *, completion_id: str, created: int, model: str
    ) -> None:
        super().__init__(prepared, completion_id=completion_id, created=created, model=model)
        self._pieces = [Piece() for _ in self._readers]

    def feed(self, choice_idx: int, event: TokenEvent) -> None:
        """Take an event; raises as `CompletionStream.feed`."""
        piece = self._readers[choice_idx].read(event)
        self._pieces[choice_idx].events += piece.events
        self._pieces[choice_idx].logprobs += piece.logprobs

    def completion(self) -> TextCompletion:
        """Return the reply, once every choice is finished: of each prompt the likeliest ones."""
        step = self._texts.num_made
        chosen = [at for begin in range(0, len(self._pieces), step) for at in self._best(begin)]
        return TextCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(index, at) for index, at in enumerate(chosen)],
            usage=self.usage(),
        )

    def _best(self, begin: int) -> list[int]:
        """Return which choices of the prompt whose first one is `begin` are returned."""
        made = range(begin, begin + self._texts.num_made)
        if self._texts.num_made == self._texts.num_returned:
            return list(made)
        ranked = sorted(made, key=lambda at: _mean_logprob(self._pieces[at]), reverse=True)
        return ranked[: self._texts.num_returned]

    def _choice(self, index: int, at: int) -> TextChoice:
        reader, piece = self._readers[at], self._pieces[at]
        return TextChoice(
            index=index,
            text=self._echo(at) + _text(piece),
            logprobs=self._logprobs(at, piece),
            finish_reason=reader.finish_reason,
            stop_reason=reader.stop_reason,
        )


class _Speller:
    """Writes one choice's log probabilities in this dialect.

    Args:
        begin: where in the text the first token stands.
    """

    def __init__(self, tokenizer: ChatTokenizer, begin: int) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = begin

    def spell(self, entries: list[TokenLogprob]) -> TextLogprobs:
        """Return the next tokens' log probabilities."""
        offsets: list[int] = []
        for entry in entries:
            offsets.append(self._at)
            # Special tokens are told, but do not stand in the text.
            if self._tokenizer.token_id(entry.token) not in self._tokenizer.special_ids:
                self._at += len(self._utf8.decode(bytes(entry.bytes or ())))
        return TextLogprobs(
            tokens=[_name(entry) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[
                {_name(each): each.logprob for each in entry.top_logprobs}
                | {_name(entry): entry.logprob}
                for entry in entries
            ],
            text_offset=offsets,
        )


def _name(token: TokenLogprob | TopLogprob) -> str:
    """Return a token's text; one that is part of a character is told byte by byte."""
    raw = bytes(token.bytes or ())
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _text(piece: Piece) -> str:
    return "".join(each.text for each in piece.events if isinstance(each, ContentDelta))


def _mean_logprob(piece: Piece) -> float:
    """Return how likely the tokens are on average; an answer without any is nobody's best."""
    values = [each.logprob for each in piece.logprobs]
    return sum(values) / len(values) if values else float("-inf")
