import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cortex.neuron.engine.constraint import (
    ConstraintCompiler,
    ConstraintError,
    ConstraintState,
    apply_masks,
)
from cortex.neuron.engine.protocol import Constraint, Sampling
from tests.neuron.engine.building import Bench

# One id per byte, then: 256 <|end|>, 257 <tool_call>, 258 </tool_call>, 259 </think>.
VOCAB_SIZE = 270
END, TOOL_CALL, END_TOOL_CALL, END_THINK = 256, 257, 258, 259


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|end|>"])
    markers = ["<tool_call>", "</tool_call>", "</think>"]
    built.add_tokens([AddedToken(marker, special=False) for marker in markers])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    built.save(str(path))
    built.path = str(path)
    return built


def constraint(tokenizer, lark: str, **settings) -> Constraint:
    return Constraint(lark=lark, tokenizer_path=tokenizer.path, **settings)


def compiled(tokenizer, lark: str, **settings) -> ConstraintState:
    compiler = ConstraintCompiler(VOCAB_SIZE)
    return compiler.compile(constraint(tokenizer, lark, **settings), [END])


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def allowed(state: ConstraintState) -> set[int]:
    logits = torch.zeros(1, VOCAB_SIZE)
    apply_masks(logits, [0], [state])
    return set((logits[0] == 0).nonzero()[:, 0].tolist())


def test_a_forced_grammar_holds_from_the_first_token_to_its_end(tokenizer):
    state = compiled(tokenizer, 'start: "ab" | "ac"')
    a, b, c = ids(tokenizer, "abc")
    assert state.is_active
    assert allowed(state) == {a}
    state.accept(a)
    assert allowed(state) == {b, c}
    state.accept(c)
    assert (state.is_active, state.is_complete, state.error) == (False, True, None)


def test_the_stop_ids_are_allowed_where_a_forced_grammar_may_end(tokenizer):
    state = compiled(tokenizer, "start: /[ab]+/")
    a, b = ids(tokenizer, "ab")
    assert allowed(state) == {a, b}
    state.accept(a)
    assert allowed(state) == {a, b, END}
    assert not state.is_complete


def test_ids_beyond_the_tokenizers_are_never_allowed(tokenizer):
    assert max(allowed(compiled(tokenizer, "start: /(.|\\n)*/"))) < 260


def test_a_forced_grammar_waits_for_the_token_after_a_thinking_block(tokenizer):
    state = compiled(tokenizer, 'start: "a"', skip_until_id=END_THINK)
    (a,) = ids(tokenizer, "a")
    state.accept(ids(tokenizer, "z")[0])
    assert not state.is_active
    state.accept(END_THINK)
    assert allowed(state) == {a}
    state.accept(a)
    assert state.is_complete


def test_a_triggered_grammar_sleeps_until_its_token_and_again_after_its_end(tokenizer):
    state = compiled(tokenizer, f'start: "a" <[{END_TOOL_CALL}]>', trigger_id=TOOL_CALL)
    a, z = ids(tokenizer, "az")
    state.accept(z)
    assert not state.is_active
    for _ in range(2):
        state.accept(TOOL_CALL)
        assert allowed(state) == {a}
        state.accept(a)
        assert allowed(state) == {END_TOOL_CALL}
        state.accept(END_TOOL_CALL)
        assert (state.is_active, state.is_complete, state.error) == (False, False, None)
        state.accept(z)


def test_a_triggered_grammar_ends_at_its_first_complete_match(tokenizer):
    state = compiled(tokenizer, "start: /a+/", trigger_id=TOOL_CALL)
    state.accept(TOOL_CALL)
    state.accept(ids(tokenizer, "a")[0])
    assert not state.is_active


def test_a_token_against_the_grammar_leaves_an_error(tokenizer):
    state = compiled(tokenizer, 'start: "ab"')
    state.accept(ids(tokenizer, "z")[0])
    assert state.error.startswith("the output could not follow its grammar: ")
    assert "\n" not in state.error
    assert not state.is_active


def test_only_the_constrained_rows_are_masked(tokenizer):
    (a,) = ids(tokenizer, "a")
    (b,) = ids(tokenizer, "b")
    logits = torch.zeros(3, VOCAB_SIZE)
    apply_masks(
        logits, [2, 0], [compiled(tokenizer, 'start: "a"'), compiled(tokenizer, 'start: "b"')]
    )
    finite = [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]
    assert finite == [{b}, set(range(VOCAB_SIZE)), {a}]


def test_states_of_one_grammar_do_not_share_their_place(tokenizer):
    compiler = ConstraintCompiler(VOCAB_SIZE)
    asked = constraint(tokenizer, 'start: "ab"')
    a, b = ids(tokenizer, "ab")
    first = compiler.compile(asked, [END])
    first.accept(a)
    second = compiler.compile(asked, [END])
    assert allowed(second) == {a}
    assert allowed(first) == {b}


@pytest.mark.parametrize(
    ("lark", "words"),
    [("start: bogus", "the grammar is not valid"), ("start: (", "the grammar is not valid")],
)
def test_a_bad_grammar_is_named(tokenizer, lark, words):
    with pytest.raises(ConstraintError, match=words):
        compiled(tokenizer, lark)


def test_an_unreadable_tokenizer_is_named(tmp_path):
    missing = tmp_path / "tokenizer.json"
    compiler = ConstraintCompiler(VOCAB_SIZE)
    with pytest.raises(ConstraintError, match="cannot be used"):
        compiler.compile(Constraint(lark='start: "a"', tokenizer_path=str(missing)), [END])
    missing.write_text("{}")
    with pytest.raises(ConstraintError, match="cannot be used"):
        compiler.compile(Constraint(lark='start: "a"', tokenizer_path=str(missing)), [END])


def test_a_tokenizer_wider_than_the_model_is_refused(tokenizer):
    compiler = ConstraintCompiler(100)
    with pytest.raises(ConstraintError, match="vocab size too small"):
        compiler.compile(constraint(tokenizer, 'start: "a"'), [END])


def test_a_stop_id_that_no_tokenizer_has_is_refused(tokenizer):
    compiler = ConstraintCompiler(VOCAB_SIZE)
    with pytest.raises(ConstraintError, match="cannot be used"):
        compiler.compile(constraint(tokenizer, 'start: "a"'), [-1])


# Through the engine; the fake model's own ids stay below 97.


def test_the_engine_stops_a_request_whose_forced_grammar_is_complete(tokenizer):
    bench = Bench(vocab_size=VOCAB_SIZE)
    bench.submit(1, [1, 2], 50, constraint=constraint(tokenizer, 'start: "Paris" | "Rome"'))
    bench.submit(2, [1, 2], 5)
    bench.run()
    assert tokenizer.decode(bench.tokens(1)) in {"Paris", "Rome"}
    assert bench.finishes(1) == ["stop"]
    assert bench.finishes(2) == ["length"]


def test_sampled_output_follows_the_grammar_at_any_temperature(tokenizer):
    bench = Bench(vocab_size=VOCAB_SIZE, num_slots=8)
    lark = 'start: "x" DIGITS "y"\nDIGITS: /[0-9]{3}/'
    for request_id in range(8):
        sampling = Sampling(temperature=50.0, top_p=0.95, seed=request_id)
        asked = constraint(tokenizer, lark)
        bench.submit(request_id, [1], 50, sampling=sampling, constraint=asked)
    bench.run()
    for request_id in range(8):
        text = tokenizer.decode(bench.tokens(request_id))
        assert (text[0], text[1:4].isdigit(), text[4:]) == ("x", True, "y")


def test_the_engine_goes_back_to_free_text_after_a_triggered_match(tokenizer):
    bench = Bench(vocab_size=VOCAB_SIZE)
    asked = constraint(tokenizer, f'start: "ok" <[{END_TOOL_CALL}]>', trigger_id=TOOL_CALL)
    # Nothing but the trigger is likely in free text.
    sampling = Sampling(logit_bias={TOOL_CALL: 1000.0})
    bench.submit(1, [1], 9, sampling=sampling, constraint=asked)
    bench.run()
    call = [TOOL_CALL, *ids(tokenizer, "ok"), END_TOOL_CALL]
    assert bench.tokens(1) == [*call, *call, TOOL_CALL]
    assert bench.finishes(1) == ["length"]


def test_a_constrained_request_goes_on_after_preemption(tokenizer):
    bench = Bench(vocab_size=VOCAB_SIZE, num_blocks=6)
    lark = "start: /[ab]{12}c/"
    for request_id in (1, 2, 3):
        bench.submit(request_id, [9] * 6, 50, constraint=constraint(tokenizer, lark))
    preempted = False
    while bench.engine.has_work:
        preempted |= bench.step().stats.num_waiting > 1
    assert preempted
    for request_id in (1, 2, 3):
        text = tokenizer.decode(bench.tokens(request_id))
        assert (len(text), set(text[:12]) <= {"a", "b"}, text[12:]) == (13, True, "c")


def test_a_bad_grammar_ends_its_own_request_only(tokenizer):
    bench = Bench(vocab_size=VOCAB_SIZE)
    bench.submit(1, [1], 5, constraint=constraint(tokenizer, "start: bogus"))
    bench.submit(2, [1], 5)
    bench.run()
    assert "the grammar is not valid" in bench.error(1)
    assert bench.finishes(1) == ["error"]
    assert bench.finishes(2) == ["length"]


def test_output_that_cannot_follow_the_grammar_ends_with_an_error(tokenizer):
    bench = Bench(vocab_size=VOCAB_SIZE)
    # Written as text, the marker is one token to the tokenizer but not to the grammar.
    asked = constraint(tokenizer, 'start: "a" "</tool_call>"')
    bench.submit(1, [1], 5, constraint=asked)
    bench.run()
    assert bench.finishes(1) == ["error"]
    assert "could not follow its grammar" in bench.error(1)
    bench.assert_all_is_free()
