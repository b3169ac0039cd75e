"""The engine: takes requests, runs steps, reports tokens. Knows no sockets and no other thread."""

import logging
from collections.abc import Callable
from concurrent.futures import Executor

import torch

from cortex.core.errors import BadRequestError, CortexError
from cortex.neuron.engine.compiling import CompilingQueue
from cortex.neuron.engine.constraint import ConstraintCompiler, ConstraintError, ConstraintState
from cortex.neuron.engine.images import SequenceImage, image_problem
from cortex.neuron.engine.protocol import (
    EngineStats,
    FinishReason,
    ImagePixels,
    Logprob,
    StepDone,
    Submit,
    TokenEvent,
)
from cortex.neuron.engine.rates import RunningRate
from cortex.neuron.engine.runner import Runner
from cortex.neuron.engine.sampler import Sampled, SamplingState
from cortex.neuron.engine.scheduler import Chunk, Scheduler
from cortex.neuron.engine.sequence import Sequence

_log = logging.getLogger(__name__)

# Aimed length of a step with prefill: cancellations and other streams' tokens wait that long.
TARGET_STEP_S = 0.25
# Prefill chunks are not made smaller than this, however slow the device.
MIN_STEP_TOKENS = 64
# The first steps, before anything is measured.
FIRST_STEP_TOKENS = 128


class Engine:
    """Serves many sequences at once on one runner.

    Call `submit`, `cancel` and `admit_ready` between steps and `step` while `has_work`. Each
    sequence ends with exactly one event that has a finish reason.

    Args:
        clock: monotonic seconds.
        max_model_len: longest sequence, prompt and answer together.

    Attributes:
        is_lost: the device answers no more; only a new process can help.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        # A sequence that outgrew all blocks there are could never run.
        capacity = scheduler.blocks.num_blocks * scheduler.block_size
        self._max_model_len = min(max_model_len, capacity)
        self._clock = clock
        self._vocab_size = runner.model.vocab_size
        self._compiler = ConstraintCompiler(self._vocab_size)
        self._compiling: CompilingQueue | None = None
        self._sequences: dict[int, Sequence] = {}
        # Of requests that have no sequence yet.
        self._pixels: dict[int, list[bytes]] = {}
        self._events: list[TokenEvent] = []
        self._prefill_rate = RunningRate()
        self._decode_rate = RunningRate()
        self.is_lost = False

    def compile_in(self, executor: Executor, wake: Callable[[], object]) -> None:
        """Have grammars compiled elsewhere; without this, `submit` itself compiles them.

        Args:
            executor: runs one piece of work at a time.
            wake: called from any thread when `admit_ready` may have something to do.
        """
        self._compiling = CompilingQueue(self._compiler, executor, wake)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._sequences)

    @property
    def has_news(self) -> bool:
        """Whether events are waiting to be reported without a step."""
        return bool(self._events)

    def take_pixels(self, image: ImagePixels) -> None:
        """Keep an image for the request that is going to be submitted."""
        self._pixels.setdefault(image.request_id, []).append(image.pixels)

    def submit(self, submit: Submit) -> None:
        """Queue a request; one that cannot be served ends at once with an error event."""
        request_id = submit.request_id
        if request_id in self._sequences or self._is_compiling(request_id):
            # An event would end the running sequence of that number at the other side.
            _log.error("request %d is running already: ignored", request_id)
            return
        pixels = self._pixels.get(request_id, [])
        problem = self._problem(submit) or image_problem(submit, pixels, self._runner.model.vision)
        if problem is not None:
            self._refuse(request_id, BadRequestError(problem))
            return
        try:
            state = self._constraint(submit)
            if state is None and submit.constraint is not None:
                return
            self._admit(submit, state)
        except CortexError as exc:
            self._refuse(request_id, exc)

    def admit_ready(self) -> None:
        """Queue the requests whose grammars are compiled, and end those whose cannot be."""
        if self._compiling is None:
            return
        for compiled in self._compiling.take_ready():
            request_id, failure = compiled.submit.request_id, compiled.failure
            if failure is None:
                try:
                    self._admit(compiled.submit, compiled.state)
                except CortexError as exc:
                    self._refuse(request_id, exc)
            elif isinstance(failure, CortexError):
                self._refuse(request_id, failure)
            else:
                _log.error("a grammar cannot be compiled", exc_info=failure)
                error = ConstraintError(f"the grammar broke the compiler: {type(failure).__name__}")
                self._refuse(request_id, error)

    def cancel(self, request_id: int) -> None:
        """End a sequence and free what it holds; an unknown one is ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._keep(sequence, is_leaving=True)
            self._remove(sequence)
        elif self._compiling is not None and request_id in self._compiling:
            self._compiling.discard(request_id)
            self._pixels.pop(request_id, None)
        else:
            return
        self._events.append(TokenEvent(request_id=request_id, finish="cancelled"))

    def step(self) -> StepDone:
        """Compute one step, if there is work, and report everything since the last report."""
        self.admit_ready()
        chunks = self._seen(self._restored(self._scheduler.schedule(self._step_tokens())))
        if chunks:
            start_s = self._clock()
            try:
                sampled = self._runner.step(chunks)
            except Exception as exc:  # noqa: BLE001  one step's failure must not end the others
                self._fail(chunks, exc)
            else:
                self._advance(chunks, sampled)
                self._measure(chunks, self._clock() - start_s)
        return self.report()

    def _restored(self, chunks: list[Chunk]) -> list[Chunk]:
        """Copy what the sequences of a step go on from, before anything else is written."""
        try:
            self._runner.restore(chunks)
        except Exception as exc:  # noqa: BLE001  as with the step itself
            self._fail(chunks, exc)
            return []
        return chunks

    def _seen(self, chunks: list[Chunk]) -> list[Chunk]:
        """Look at the images of a step, and end the sequences for which that fails."""
        seen: list[Chunk] = []
        for chunk in chunks:
            try:
                self._runner.look(chunk)
            except Exception as exc:  # noqa: BLE001  one image's failure must not end the others
                self._fail([chunk], exc)
            else:
                seen.append(chunk)
        return [] if self.is_lost else seen

    def report(self) -> StepDone:
        """Return the events since the last report and fresh stats, without computing."""
        events, self._events = self._events, []
        prefix = self._scheduler.prefix
        stats = EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._compiling or ()),
            free_slots=self._scheduler.slots.num_free,
            free_blocks=self._scheduler.blocks.num_free,
            cached_blocks=self._scheduler.blocks.num_idle,
            num_snapshots=0 if prefix is None else prefix.num_snapshots,
            tok_s_prefill=self._prefill_rate.tok_s,
            tok_s_decode=self._decode_rate.tok_s,
        )
        return StepDone(events=events, stats=stats)

    def _problem(self, submit: Submit) -> str | None:
        """Say why a request can never be served, if so."""
        vocab_size = self._vocab_size
        if not submit.prompt_ids:
            return "the prompt is empty"
        if submit.max_tokens < 1:
            return f"max_tokens must be at least 1, not {submit.max_tokens}"
        if len(submit.prompt_ids) >= self._max_model_len:
            return (
                f"the prompt has {len(submit.prompt_ids)} tokens and the model holds "
                f"{self._max_model_len}, answer included; shorten the prompt"
            )
        if min(submit.prompt_ids) < 0 or max(submit.prompt_ids) >= vocab_size:
            return f"the prompt has token ids outside the vocabulary of {vocab_size}"
        bias_ids = submit.sampling.logit_bias
        if bias_ids and (min(bias_ids) < 0 or max(bias_ids) >= vocab_size):
            return f"logit_bias has token ids outside the vocabulary of {vocab_size}"
        return None

    def _constraint(self, submit: Submit) -> ConstraintState | None:
        """Return the state of a request's constraint; None if it has none, or not yet."""
        if submit.constraint is None:
            return None
        if self._compiling is None:
            return self._compiler.compile(submit.constraint, submit.stop_ids)
        state = self._compiler.recall(submit.constraint, submit.stop_ids)
        if state is None:
            self._compiling.add(submit)
        return state

    def _is_compiling(self, request_id: int) -> bool:
        return self._compiling is not None and request_id in self._compiling

    def _admit(self, submit: Submit, constraint: ConstraintState | None) -> None:
        sampling = SamplingState(
            submit.sampling,
            prompt_ids=submit.prompt_ids,
            vocab_size=self._vocab_size,
            device=self._runner.device,
        )
        pixels, vision = self._pixels.pop(submit.request_id, []), self._runner.model.vision
        sequence = Sequence(
            submit,
            max_model_len=self._max_model_len,
            sampling=sampling,
            constraint=constraint,
            images=[
                SequenceImage(span, data, vision.token_side)
                for span, data in zip(submit.images, pixels, strict=True)
                if vision is not None
            ],
        )
        self._scheduler.add(sequence)
        self._sequences[submit.request_id] = sequence

    def _refuse(self, request_id: int, error: CortexError) -> None:
        self._pixels.pop(request_id, None)
        self._events.append(
            TokenEvent(
                request_id=request_id,
                finish="error",
                error=error.message,
                is_refusal=isinstance(error, BadRequestError),
                code=error.code,
            )
        )

    def _step_tokens(self) -> int:
        rate = self._prefill_rate.tok_s
        if rate == 0:
            return FIRST_STEP_TOKENS
        return max(MIN_STEP_TOKENS, int(rate * TARGET_STEP_S))

    def _advance(self, chunks: list[Chunk], sampled: Sampled | None) -> None:
        """Give the sequences their new tokens, and end those that are done."""
        ready = [chunk.sequence for chunk in chunks if chunk.is_last]
        self._scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.sequence.num_pending:
                self._keep(chunk.sequence)
                self._announce(chunk.sequence)
        if sampled is None:
            return
        for row, sequence in enumerate(ready):
            if not sampled.is_valid[row]:
                _log.error("request %d: logits are not finite", sequence.request_id)
                self._scrub(sequence)
                self._end(sequence, "error", error="the model computed no finite logits")
                continue
            self._keep(sequence, is_sound=True)
            token_id = sampled.token_ids[row]
            finish = sequence.append(token_id)
            constraint = sequence.constraint
            if constraint is not None and constraint.error is not None:
                self._remove(sequence)
                self._refuse(sequence.request_id, ConstraintError(constraint.error))
                continue
            logprob = sampled.logprobs.get(row)
            self._emit(sequence, token_id, finish, logprob)
            if finish is not None:
                self._keep(sequence, is_leaving=True, is_sound=True)
                self._remove(sequence)

    def _announce(self, sequence: Sequence) -> None:
        """Tell what was cached of a prompt as soon as its computation has begun."""
        if not sequence.is_announced:
            sequence.is_announced = True
            self._events.append(
                TokenEvent(
                    request_id=sequence.request_id, cached_tokens=sequence.cached_tokens or 0
                )
            )

    def _keep(
        self, sequence: Sequence, *, is_leaving: bool = False, is_sound: bool = False
    ) -> None:
        """Leave what was computed of a sequence to those that begin like it.

        Args:
            is_sound: its last logits were finite. They depend on all that it holds, so there is
                no need to look at that.
        """
        prefix = self._scheduler.prefix
        due = None if prefix is None else prefix.due(sequence, is_leaving=is_leaving)
        if prefix is None or due is None:
            return
        slot = sequence.slot if due.snapshot else None
        if is_sound or self._runner.is_finite(due.blocks, slot):
            snapshot_slot = prefix.keep(sequence, due)
            if snapshot_slot is not None:
                self._runner.keep_state(sequence.slot, snapshot_slot)

    def _scrub(self, sequence: Sequence) -> None:
        """Leave nothing of a sequence whose numbers are in doubt."""
        blocks = self._scheduler.blocks
        if self._scheduler.prefix is not None:
            self._scheduler.prefix.forget(sequence)
        self._runner.scrub(sequence, [b for b in sequence.blocks if blocks.num_holders(b) == 1])

    def _emit(
        self,
        sequence: Sequence,
        token_id: int,
        finish: FinishReason | None,
        logprob: Logprob | None,
    ) -> None:
        sequence.is_announced = True
        self._events.append(
            TokenEvent(
                request_id=sequence.request_id,
                token_ids=[token_id],
                finish=finish,
                cached_tokens=sequence.cached_tokens or 0,
                logprobs=None if logprob is None else [logprob],
            )
        )

    def _fail(self, chunks: list[Chunk], exc: Exception) -> None:
        """End every sequence of a failed step; the others go on if the device still can."""
        _log.error("a step of %d sequences failed", len(chunks), exc_info=exc)
        self.is_lost = not self._runner.is_healthy()
        if isinstance(exc, torch.OutOfMemoryError):
            error = "the device ran out of memory; lower max_num_seqs or max_batched_tokens"
        else:
            error = f"the step failed: {type(exc).__name__}"
        for chunk in chunks:
            if not self.is_lost:
                self._scrub(chunk.sequence)
            self._end(chunk.sequence, "error", error=error)

    def _end(self, sequence: Sequence, finish: FinishReason, *, error: str) -> None:
        self._remove(sequence)
        self._events.append(TokenEvent(request_id=sequence.request_id, finish=finish, error=error))

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._scheduler.remove(sequence)

    def _measure(self, chunks: list[Chunk], busy_s: float) -> None:
        # Called after the commit, so a chunk's size alone tells prefill from decode.
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        if num_tokens > len(chunks):
            self._prefill_rate.add(num_tokens, busy_s)
        num_decoded = sum(chunk.num_tokens == 1 for chunk in chunks)
        if num_decoded:
            self._decode_rate.add(num_decoded, busy_s)
