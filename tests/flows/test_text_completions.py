"""`client.completions` of the official openai SDK against `cortex up` with the bundled model."""

import openai
import pytest
from openai import OpenAI

MODEL = "cortex-tiny"
# What the model's own template makes of a question.
PROMPT = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def test_a_prompt_is_gone_on_from_without_a_template(openai_client: OpenAI):
    reply = openai_client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=60
    )
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert "Paris" in reply.choices[0].text
    assert reply.choices[0].finish_reason == "stop"
    chat = openai_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
    )
    assert reply.choices[0].text == chat.choices[0].message.content
    assert reply.usage.prompt_tokens == chat.usage.prompt_tokens


def test_a_stream_is_the_same_text_in_pieces_and_ends_with_usage(openai_client: OpenAI):
    asked = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 60}
    whole = openai_client.completions.create(**asked)
    chunks = list(
        openai_client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage


def test_prompts_are_answered_in_their_order_with_echo_and_a_stop(openai_client: OpenAI):
    reply = openai_client.completions.create(
        model=MODEL,
        prompt=[PROMPT, PROMPT.replace("France", "Italy")],
        temperature=0,
        max_tokens=60,
        echo=True,
        stop=["."],
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice, country in zip(reply.choices, ("France", "Italy"), strict=True):
        assert choice.text.startswith(PROMPT.replace("France", country))
        assert not choice.text.endswith(".")


def test_logprobs_add_up_to_the_text_and_point_into_it(openai_client: OpenAI):
    choice = openai_client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, logprobs=2
    ).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert all(logprob <= 0 for logprob in told.token_logprobs)
    assert [choice.text[at : at + 1] for at in told.text_offset] == [t[:1] for t in told.tokens]
    # Drawn greedily, so the token is one of the two likeliest.
    assert all(len(rivals) == 2 for rivals in told.top_logprobs)


def test_sixteen_tokens_are_the_default_and_a_seed_repeats_them(openai_client: OpenAI):
    texts = []
    for _ in range(2):
        reply = openai_client.completions.create(
            model=MODEL,
            prompt="Count from 1 to 100: 1, 2,",
            temperature=1.2,
            seed=5,
            logit_bias={"2": -100},
        )
        assert reply.usage.completion_tokens <= 16
        texts.append(reply.choices[0].text)
    assert texts[0] == texts[1]


def test_the_best_of_several_is_as_likely_as_any(openai_client: OpenAI):
    reply = openai_client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        temperature=1.5,
        seed=3,
        n=2,
        best_of=4,
        max_tokens=8,
        logprobs=0,
    )
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in reply.choices]
    assert len(means) == 2
    assert means[0] >= means[1]
    # All four were made, and are paid for.
    assert reply.usage.completion_tokens > sum(len(c.logprobs.tokens) for c in reply.choices)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stream": True, "best_of": 3}, "best_of"),
        ({"prompt": [], "stream": True}, "prompt"),
        ({"prompt": "word " * 40_000}, "prompt"),
        ({"n": 100}, "n"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_the_field(
    openai_client: OpenAI, fields: dict[str, object], param: str
):
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.completions.create(**{"model": MODEL, "prompt": "a", **fields})
    assert caught.value.param == param
