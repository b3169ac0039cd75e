"""What the prefix cache has saved, as the SDKs of both vendors report it of `cortex up`."""

from anthropic import Anthropic
from openai import OpenAI

MODEL = "cortex-tiny"
SYSTEM = "You answer questions about {} in one short sentence. " * 12
GREEDY = {"temperature": 0}


def test_openai_usage_counts_cached_prompt_tokens(openai_client: OpenAI):
    messages = [
        {"role": "system", "content": SYSTEM.format(*["rivers"] * 12)},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    first = openai_client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=30, temperature=0
    )
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "What is two plus two?"},
    ]
    second = openai_client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=30, temperature=0
    )
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 48 <= cached < second.usage.prompt_tokens
    chunks = openai_client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *_, last = chunks
    responded = openai_client.responses.create(
        model=MODEL,
        instructions=messages[0]["content"],
        input=messages[1:],
        max_output_tokens=30,
        temperature=0,
    )
    assert responded.usage.input_tokens_details.cached_tokens >= cached
    assert last.usage.prompt_tokens == second.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens >= cached


def test_anthropic_usage_tells_cached_tokens_apart_from_input(anthropic_client: Anthropic):
    system = SYSTEM.format(*["mountains"] * 12)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    first = anthropic_client.messages.create(
        model=MODEL, max_tokens=30, system=system, messages=messages, extra_body=GREEDY
    )
    assert first.usage.cache_read_input_tokens == 0
    messages += [
        {"role": "assistant", "content": first.content[0].text},
        {"role": "user", "content": "What is two plus two?"},
    ]
    second = anthropic_client.messages.create(
        model=MODEL, max_tokens=30, system=system, messages=messages, extra_body=GREEDY
    )
    cached = second.usage.cache_read_input_tokens
    assert cached >= first.usage.input_tokens - 48
    counted = anthropic_client.messages.count_tokens(model=MODEL, system=system, messages=messages)
    assert cached + second.usage.input_tokens == counted.input_tokens

    with anthropic_client.messages.stream(
        model=MODEL, max_tokens=30, system=system, messages=messages, extra_body=GREEDY
    ) as stream:
        start, *_ = [event for event in stream if event.type == "message_start"]
        final = stream.get_final_message()
    for usage in (start.message.usage, final.usage):
        assert usage.cache_read_input_tokens >= cached
        assert usage.cache_read_input_tokens + usage.input_tokens == counted.input_tokens
