"""Requests whose grammars are compiled beside the steps; the other thread is turned by hand."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cortex.core.errors import CortexError
from cortex.neuron.engine import compiling
from cortex.neuron.engine.protocol import Constraint
from tests.neuron.engine.building import Bench

VOCAB_SIZE = 260


class Crank(Executor):
    """Does the work it was given when it is turned."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.num_done = 0
        self.num_wakes = 0

    def submit(self, fn, /, *args, **kwargs) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, lambda: fn(*args, **kwargs)))
        return future

    def wake(self) -> None:
        self.num_wakes += 1

    def turn(self) -> None:
        work, self.work = self.work, []
        for future, compute in work:
            if future.set_running_or_notify_cancel():
                self.num_done += 1
                try:
                    future.set_result(compute())
                except CortexError as exc:
                    future.set_exception(exc)


class Panic(BaseException):
    """What a crash inside the grammar library looks like here."""


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    built.save(str(path))
    return str(path)


@pytest.fixture
def crank() -> Crank:
    return Crank()


@pytest.fixture
def bench(crank) -> Bench:
    built = Bench(vocab_size=VOCAB_SIZE)
    built.engine.compile_in(crank, crank.wake)
    return built


@pytest.fixture
def grammar(tokenizer_path) -> Constraint:
    return Constraint(lark="start: /[ab]{3}/", tokenizer_path=tokenizer_path)


def test_other_requests_have_their_tokens_while_a_grammar_is_compiled(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    bench.submit(2, [1], 3)
    bench.run()
    assert bench.finishes(2) == ["length"]
    assert bench.finishes(1) == []
    assert bench.engine.report().stats.num_waiting == 1
    crank.turn()
    assert crank.num_wakes == 1
    assert not bench.engine.has_work
    bench.engine.admit_ready()
    assert bench.engine.has_work
    bench.run()
    assert (len(bench.tokens(1)), bench.finishes(1)) == (3, ["stop"])
    bench.assert_all_is_free()


def test_a_step_admits_what_became_ready_during_the_one_before(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    bench.submit(2, [1], 9)
    bench.step()
    crank.turn()
    bench.run()
    assert (bench.finishes(1), bench.finishes(2)) == (["stop"], ["length"])


def test_a_known_grammar_is_admitted_at_once(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    crank.turn()
    bench.engine.admit_ready()
    bench.submit(2, [1], 9, constraint=grammar)
    assert crank.work == []
    bench.run()
    assert (bench.finishes(1), bench.finishes(2)) == (["stop"], ["stop"])


def test_the_choices_of_one_request_are_compiled_once(bench, crank, grammar):
    for request_id in (1, 2, 3):
        bench.submit(request_id, [1], 9, constraint=grammar)
    crank.turn()
    assert crank.num_done == 1
    bench.engine.admit_ready()
    bench.run()
    assert [bench.finishes(each) for each in (1, 2, 3)] == [["stop"]] * 3


def test_a_request_cancelled_while_its_grammar_waits_is_never_compiled(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    bench.engine.cancel(1)
    crank.turn()
    bench.step()
    assert crank.num_done == 0
    assert bench.finishes(1) == ["cancelled"]
    bench.assert_all_is_free()


def test_a_request_cancelled_while_its_grammar_is_compiled_is_not_admitted(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    ((future, _),) = crank.work
    assert future.set_running_or_notify_cancel()
    bench.engine.cancel(1)
    future.set_result("a grammar nobody waits for")
    bench.step()
    assert bench.finishes(1) == ["cancelled"]
    assert not bench.engine.has_work
    bench.assert_all_is_free()


def test_cancelling_one_choice_leaves_the_grammar_to_the_others(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    bench.submit(2, [1], 9, constraint=grammar)
    bench.engine.cancel(1)
    crank.turn()
    bench.engine.admit_ready()
    bench.run()
    assert (bench.finishes(1), bench.finishes(2)) == (["cancelled"], ["stop"])


def test_a_bad_grammar_ends_its_own_request_with_its_cause(bench, crank, tokenizer_path):
    bad = Constraint(lark="start: bogus", tokenizer_path=tokenizer_path)
    bench.submit(1, [1], 9, constraint=bad)
    bench.submit(2, [1], 3)
    crank.turn()
    bench.run()
    assert "the grammar is not valid" in bench.error(1)
    (event,) = [each for each in bench.events if each.request_id == 1]
    assert (event.finish, event.is_refusal, event.code) == ("error", True, "invalid_grammar")
    assert bench.finishes(2) == ["length"]


def test_a_crash_in_the_compiler_ends_its_own_request_only(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    bench.submit(2, [1], 3)
    ((future, _),) = crank.work
    future.set_exception(Panic())
    bench.run()
    assert bench.error(1) == "the grammar broke the compiler: Panic"
    assert bench.finishes(2) == ["length"]


def test_grammars_beyond_the_queues_bound_are_refused(bench, crank, grammar, monkeypatch):
    monkeypatch.setattr(compiling, "MAX_COMPILING", 1)
    bench.submit(1, [1], 9, constraint=grammar)
    bench.submit(2, [1], 9, constraint=grammar)
    crank.turn()
    bench.engine.admit_ready()
    bench.run()
    assert bench.error(2) == "1 grammars are being compiled; retry later"
    assert bench.finishes(1) == ["stop"]


def test_a_second_request_of_a_compiling_ones_number_is_ignored(bench, crank, grammar):
    bench.submit(1, [1], 9, constraint=grammar)
    bench.submit(1, [1], 2)
    crank.turn()
    bench.engine.admit_ready()
    bench.run()
    assert bench.finishes(1) == ["stop"]
