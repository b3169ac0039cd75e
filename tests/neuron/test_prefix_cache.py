"""The prefix cache of a real engine over HTTP, as a chat's next turn meets it."""

import pytest

from cortex.core.openai import read_usage_comment
from cortex.neuron.app import ENGINE_COMMAND
from tests.support.neuron_http import Api, neuron

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MODEL = "cortex-tiny"
# Some 300 tokens for a model of few words.
SYSTEM = "You answer questions about capitals, sums and colours in one short sentence. " * 8


def turn(*texts: str, **fields: object) -> dict[str, object]:
    roles = ["system", *("user", "assistant") * len(texts)]
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, (SYSTEM, *texts), strict=False)
    ]
    return {
        "model": MODEL,
        "messages": messages,
        "max_tokens": 24,
        "temperature": 0,
        "stream_options": {"include_usage": True} if fields.get("stream") else None,
        **fields,
    }


async def ask(api: Api, *texts: str) -> tuple[str, dict[str, int]]:
    """Return the answer and its counts."""
    reply = await api.post("/v1/chat/completions", turn(*texts))
    assert reply.status == 200, reply.body
    usage = reply.json["usage"]
    counts = {"prompt": usage["prompt_tokens"], **usage["prompt_tokens_details"]}
    return reply.json["choices"][0]["message"]["content"], counts


async def test_the_next_turn_of_a_chat_is_served_from_the_cache_and_reported(tmp_path):
    async with neuron(tmp_path, engine_command=ENGINE_COMMAND) as api:
        await api.load(MODEL)
        info = (await api.get(f"/models/{MODEL}")).json
        assert info["prefix_match"] == "snapshot"
        answer, first = await ask(api, "What is the capital of France?")
        assert first["cached_tokens"] == 0
        _, second = await ask(
            api, "What is the capital of France?", answer, "And what is two plus two?"
        )
        # All of the first prompt but what a template may change at its end.
        assert first["prompt"] - 16 - 32 <= second["cached_tokens"] <= second["prompt"] - 1

        body = turn("What is the capital of France?", answer, "And two plus three?", stream=True)
        reply = await api.post("/v1/chat/completions", body)
        # The first of all tells it already, for whoever opens an Anthropic stream with it.
        told = read_usage_comment(reply.body.splitlines()[0])
        events = reply.events
        streamed = events[-2]["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert told is not None
        assert told.prompt_tokens_details is not None
        assert told.prompt_tokens_details.cached_tokens == streamed
        assert streamed >= first["prompt"] - 16 - 32
        metrics = (await api.get("/metrics")).body.decode().splitlines()
        total = float(second["cached_tokens"] + streamed)
        assert f'cortex_neuron_cached_prompt_tokens_total{{model="{MODEL}"}} {total}' in metrics
        assert f'cortex_neuron_prefix_hits_total{{model="{MODEL}"}} 2.0' in metrics
        gauges = {line.split("{")[0]: float(line.split()[-1]) for line in metrics if "{" in line}
        assert gauges["cortex_neuron_kept_states"] >= 1
        assert gauges["cortex_neuron_cached_kv_blocks"] >= first["prompt"] // 32


async def test_a_cache_that_is_switched_off_changes_no_answer(tmp_path):
    texts = ("What is the capital of France?", "Paris.", "And what is two plus two?")
    async with neuron(tmp_path, engine_command=ENGINE_COMMAND) as api:
        await api.load(MODEL)
        await ask(api, *texts[:1])
        cached_answer, counts = await ask(api, *texts)
        assert counts["cached_tokens"] > 0
    async with neuron(tmp_path, engine_command=ENGINE_COMMAND, prefix_cache=False) as api:
        await api.load(MODEL)
        assert (await api.get(f"/models/{MODEL}")).json.get("prefix_match") is None
        await ask(api, *texts[:1])
        answer, counts = await ask(api, *texts)
        assert (answer, counts["cached_tokens"]) == (cached_answer, 0)
