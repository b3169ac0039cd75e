"""Requests to what the engine is given."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cortex.core.errors import (
    BadRequestError,
    ContextLengthExceededError,
    InvalidImageError,
    TemplateRenderError,
    UnsupportedFieldError,
)
from cortex.neuron.chat.model import ChatModel, GenerationDefaults, load_chat_model
from cortex.neuron.chat.prepare import prepare, prompt_ids, prompt_text
from cortex.neuron.engine.protocol import Sampling, ThinkBudget
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints
from tests.support.chat_models import (
    JSON_CALL_TEMPLATE,
    PLAIN_TEMPLATE,
    WEATHER,
    chat_request,
    make_chat_model,
    tool,
    train_tokenizer,
)
from tests.support.pictures import encoded, image, image_part, png

# Tokens of the one question that `chat_request` asks.
NUM_PROMPT = len(
    train_tokenizer().encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n").ids
)
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return make_chat_model(tmp_path_factory.mktemp("plain"), template=PLAIN_TEMPLATE)


def test_the_prompt_is_the_rendered_template(model: ChatModel) -> None:
    prepared = prepare(chat_request(), model)
    assert model.tokenizer.decode(prepared.prompt_ids, keep_special=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert model.tokenizer.encode(prompt_text(chat_request(), model)) == prepared.prompt_ids
    assert prepared.stop_ids == (0, 2)


def test_sampling_defaults_are_those_openai_documents(model: ChatModel) -> None:
    assert prepare(chat_request(), model).sampling == Sampling(temperature=1.0)


def test_the_checkpoint_s_own_defaults_go_before(model: ChatModel) -> None:
    tuned = replace(
        model, defaults=GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)
    )
    sampling = prepare(chat_request(), tuned).sampling
    assert sampling == Sampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)


def test_the_request_goes_before_everything(model: ChatModel) -> None:
    tuned = replace(
        model, defaults=GenerationDefaults(temperature=0.6, top_k=20, repetition_penalty=1.1)
    )
    request = chat_request(
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.2,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        repetition_penalty=1.0,
        logit_bias={5: -100},
        seed=7,
        logprobs=True,
        top_logprobs=3,
    )
    assert prepare(request, tuned).sampling == Sampling(
        temperature=0.0,
        top_k=0,
        top_p=0.5,
        min_p=0.2,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        repetition_penalty=1.0,
        logit_bias={5: -100.0},
        seed=7,
        num_logprobs=3,
    )


def test_logprobs_without_rivals_ask_for_the_chosen_token_only(model: ChatModel) -> None:
    prepared = prepare(chat_request(logprobs=True), model)
    assert prepared.sampling.num_logprobs == 0
    assert prepared.logprobs


def test_bias_on_a_token_that_does_not_exist_is_refused(model: ChatModel) -> None:
    with pytest.raises(BadRequestError, match="token 9999") as caught:
        prepare(chat_request(logit_bias={9999: 1}), model)
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6),
        ({}, 50),
        ({"max_tokens": 32_000}, 4096 - NUM_PROMPT),
    ],
)
def test_the_answer_s_length_is_bounded(
    model: ChatModel, fields: dict[str, Any], max_tokens: int
) -> None:
    prepared = prepare(chat_request(**fields), replace(model, default_max_tokens=50))
    assert prepared.max_tokens == max_tokens


def test_without_limits_an_answer_takes_what_the_context_leaves(model: ChatModel) -> None:
    assert prepare(chat_request(), model).max_tokens == 4096 - NUM_PROMPT


def test_a_prompt_that_fills_the_context_is_refused(model: ChatModel) -> None:
    with pytest.raises(
        ContextLengthExceededError, match=f"maximum context length is {NUM_PROMPT} tokens"
    ) as e:
        prepare(chat_request(), replace(model, max_model_len=NUM_PROMPT))
    assert e.value.extras == {"max": NUM_PROMPT, "prompt_len": NUM_PROMPT}
    assert e.value.code == "context_length_exceeded"
    assert prepare(chat_request(), replace(model, max_model_len=NUM_PROMPT + 1)).max_tokens == 1


def test_a_hopelessly_long_prompt_is_refused_unread(model: ChatModel) -> None:
    request = chat_request(messages=[{"role": "user", "content": "x" * 1_000_000}])
    with pytest.raises(ContextLengthExceededError, match="maximum context length is 4096 tokens"):
        prepare(request, model)


@pytest.mark.parametrize(
    ("stop", "stops"),
    [(None, ()), ("", ()), ("END", ("END",)), (["a", "", "b", "a"], ("a", "b")), ([], ())],
)
def test_stops_are_texts_without_doubles(model: ChatModel, stop: Any, stops: Any) -> None:
    assert prepare(chat_request(stop=stop), model).output.stops == stops


def test_an_open_thought_in_the_prompt_seeds_the_output(model: ChatModel) -> None:
    assert prepare(chat_request(), model).output.starts_thinking
    closed = chat_request(chat_template_kwargs={"enable_thinking": False})
    output = prepare(closed, model).output
    assert (output.starts_thinking, output.knows_thinking) == (False, True)


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
)
def test_template_kwargs_go_before_reasoning_effort(
    model: ChatModel, fields: dict[str, Any], thinks: bool
) -> None:
    assert prepare(chat_request(**fields), model).output.starts_thinking is thinks


def test_tools_that_may_be_called_are_constrained_from_the_marker_on(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER]), model)
    assert prepared.constraint is not None
    assert prepared.constraint.trigger_id == model.tokenizer.marker_id("<tool_call>")
    assert prepared.output.tools is not None
    assert prepared.output.tools.names == ["weather"]
    assert not prepared.output.is_single_call
    assert "<tools>" in model.tokenizer.decode(prepared.prompt_ids)


def test_tool_choice_none_hides_the_tools(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER], tool_choice="none"), model)
    assert prepared.constraint is None
    assert prepared.output.tools is None
    assert "<tools>" not in model.tokenizer.decode(prepared.prompt_ids)


def test_required_calls_are_forced_after_the_thought(model: ChatModel) -> None:
    prepared = prepare(chat_request(tools=[WEATHER], tool_choice="required"), model)
    assert prepared.constraint is not None
    assert prepared.constraint.trigger_id is None
    assert prepared.constraint.skip_until_id == model.tokenizer.marker_id("</think>")
    assert not prepared.output.is_single_call


def test_a_named_tool_is_the_only_one_allowed(model: ChatModel) -> None:
    request = chat_request(tools=[WEATHER, tool("now")], tool_choice=NAMED)
    prepared = prepare(request, model)
    assert prepared.constraint is not None
    assert "<function=weather>" in prepared.constraint.lark
    assert "<function=now>" not in prepared.constraint.lark
    assert prepared.output.is_single_call


def test_calls_one_at_a_time_end_the_output(model: ChatModel) -> None:
    request = chat_request(tools=[WEATHER], parallel_tool_calls=False)
    assert prepare(request, model).output.is_single_call


def test_a_json_style_template_gets_json_style_calls(tmp_path: Path) -> None:
    model = make_chat_model(tmp_path, template=JSON_CALL_TEMPLATE)
    prepared = prepare(chat_request(tools=[WEATHER]), model)
    assert prepared.constraint is not None
    assert "%json" in prepared.constraint.lark
    assert "<function=" not in prepared.constraint.lark


def test_a_model_that_may_think_first_may_do_so_before_a_forced_call(tmp_path: Path) -> None:
    model = make_chat_model(tmp_path, template=JSON_CALL_TEMPLATE)
    prepared = prepare(chat_request(tools=[WEATHER], tool_choice="required"), model)
    assert prepared.constraint is not None
    assert f"<[{model.tokenizer.marker_id('<think>')}]> thought" in prepared.constraint.lark
    assert prepared.output.knows_thinking
    assert not prepared.output.starts_thinking


def test_json_formats_force_the_answer(plain: ChatModel) -> None:
    prepared = prepare(chat_request(response_format={"type": "json_object"}), plain)
    assert prepared.constraint is not None
    assert prepared.constraint.trigger_id is None
    assert prepare(chat_request(response_format={"type": "text"}), plain).constraint is None


def test_a_json_schema_is_part_of_the_grammar(plain: ChatModel) -> None:
    schema = {"type": "object", "properties": {"only_here": {"type": "string"}}}
    request = chat_request(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    prepared = prepare(request, plain)
    assert prepared.constraint is not None
    assert "only_here" in prepared.constraint.lark


def test_json_beside_tools_allows_either(model: ChatModel) -> None:
    request = chat_request(tools=[WEATHER], response_format={"type": "json_object"})
    prepared = prepare(request, model)
    assert prepared.constraint is not None
    assert "(block" in prepared.constraint.lark
    assert "| answer)" in prepared.constraint.lark


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    model: ChatModel, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        prepare(chat_request(**fields), model)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_fields_without_effect_are_accepted(model: ChatModel) -> None:
    request = chat_request(
        store=False, user="u", metadata={"a": "b"}, service_tier="auto", modalities=["text"]
    )
    assert prepare(request, model).num_choices == 1


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(("mode", "is_forced"), [("auto", False), ("required", True)])
def test_allowed_tools_narrow_the_calls_and_leave_the_prompt(
    model: ChatModel, mode: str, is_forced: bool
) -> None:
    tools = [WEATHER, tool("now")]
    prepared = prepare(chat_request(tools=tools, tool_choice=allowed(mode, "now")), model)
    assert prepared.prompt_ids == prepare(chat_request(tools=tools), model).prompt_ids
    assert prepared.constraint is not None
    assert '"<function=now>' in prepared.constraint.lark
    assert "weather" not in prepared.constraint.lark
    assert (prepared.constraint.trigger_id is None) == is_forced


def test_an_allowed_tool_must_be_declared(model: ChatModel) -> None:
    with pytest.raises(BadRequestError, match="allows 'later', which tools") as caught:
        prepare(chat_request(tools=[WEATHER], tool_choice=allowed("auto", "later")), model)
    assert caught.value.param == "tool_choice.allowed_tools.tools[0]"


def test_effort_and_verbosity_are_told_to_the_template(tmp_path: Path) -> None:
    source = "{{ reasoning_effort }} {{ verbosity }} {{ enable_thinking }}"
    model = make_chat_model(tmp_path, template=source)
    request = chat_request(reasoning_effort="low", verbosity="high")
    assert prompt_text(request, model) == "low high True"


def test_a_budget_of_thinking_ends_an_open_thought_by_its_token(model: ChatModel) -> None:
    end_id = model.tokenizer.marker_id("</think>")
    think = prepare(chat_request(thinking_budget=7), model).sampling.think
    assert think == ThinkBudget(max_tokens=7, begin_id=None, end_id=end_id)
    assert prepare(chat_request(), model).sampling.think is None
    off = chat_request(thinking_budget=7, reasoning_effort="none")
    assert prepare(off, model).sampling.think is None


def test_two_tools_of_one_name_are_refused(model: ChatModel) -> None:
    with pytest.raises(BadRequestError, match="'weather' twice"):
        prepare(chat_request(tools=[WEATHER, WEATHER]), model)


def test_a_named_tool_must_be_declared(model: ChatModel) -> None:
    with pytest.raises(BadRequestError, match="'weather', which tools does not declare"):
        prepare(chat_request(tools=[tool("now")], tool_choice=NAMED), model)


def test_tools_for_a_model_without_tools_are_refused(plain: ChatModel) -> None:
    with pytest.raises(UnsupportedFieldError, match="'test-model' cannot use tools"):
        prepare(chat_request(tools=[WEATHER]), plain)


def test_a_model_without_template_cannot_chat(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="has no chat template"):
        prepare(chat_request(), make_chat_model(tmp_path, template=None))


def test_what_the_template_refuses_is_a_400(model: ChatModel) -> None:
    with pytest.raises(TemplateRenderError, match="No user query"):
        prepare(chat_request(messages=[{"role": "assistant", "content": "a"}]), model)


def test_submissions_share_all_but_the_seed(model: ChatModel) -> None:
    prepared = prepare(chat_request(n=3, seed=(1 << 63) - 1, max_tokens=9), model)
    assert prepared.num_choices == 3
    first, second = prepared.submit(10, 0), prepared.submit(11, 1)
    assert (first.request_id, first.max_tokens, first.stop_ids) == (10, 9, [0, 2])
    assert first.prompt_ids == second.prompt_ids
    assert first.sampling.seed == (1 << 63) - 1
    assert second.sampling.seed == -(1 << 63)
    assert prepare(chat_request(n=2), model).submit(1, 1).sampling.seed is None


def test_stream_options_are_carried(model: ChatModel) -> None:
    request = chat_request(stream=True, stream_options={"include_usage": True})
    prepared = prepare(request, model)
    assert (prepared.stream, prepared.include_usage) == (True, True)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    directory = tmp_path_factory.mktemp("eyes")
    checkpoints.qwen3_5_wrapper(directory)
    checkpoints.write_image_rules(directory, min_pixels=64, max_pixels=64 * 64)
    checkpoints.write_tokenizer(directory, has_vision=True)
    source = ModelSource(kind="hf", path=str(directory))
    return load_chat_model(source, model_id="eyes", cache_dir=directory / "cache")


def look(*parts: Any, **fields: Any) -> Any:
    content = [{"type": "text", "text": "a"}, *parts, {"type": "text", "text": "b"}]
    return chat_request(messages=[{"role": "user", "content": content}], **fields)


def test_an_image_has_its_tokens_in_the_prompt_and_its_pixels_beside_it(seeing: ChatModel) -> None:
    request = look(image_part(png(24, 16)), image_part(png(8, 8, 5)))
    prepared = prepare(request, seeing)
    ids = prepared.prompt_ids
    text = seeing.tokenizer.decode(ids, keep_special=True)
    assert "a<|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|><|vision_start|>" in text
    first, second = prepared.submit(1).images
    assert (first.width, first.height, second.width) == (24, 16, 8)
    pad = checkpoints.IMAGE_TOKEN_ID
    assert ids[first.start - 1 : first.start + 7] == [pad - 1, *[pad] * 6, pad + 1]
    assert ids[second.start : second.start + 2] == [pad, pad + 1]
    assert [len(each) for each in prepared.pixels] == [24 * 16 * 3, 8 * 8 * 3]
    assert first.digest != second.digest
    assert prompt_ids(request, seeing) == ids


def test_images_count_for_the_context(seeing: ChatModel) -> None:
    small = replace(seeing, max_model_len=60)
    with pytest.raises(ContextLengthExceededError, match="have 87 tokens"):
        prepare(look(image_part(png(64, 64))), small)
    assert prepare(look(image_part(png(8, 8))), small).max_tokens == 60 - 24


def test_an_image_is_decoded_only_when_all_else_is_right(seeing: ChatModel) -> None:
    cut = image_part(encoded(image(64, 64), "JPEG")[:-900], "image/jpeg")
    with pytest.raises(ContextLengthExceededError):
        prepare(look(cut), replace(seeing, max_model_len=60))
    with pytest.raises(InvalidImageError, match="image 1: the file is damaged"):
        prepare(look(cut), seeing)


def test_the_token_of_images_in_a_text_is_none_of_them(seeing: ChatModel) -> None:
    mark = {"type": "text", "text": "<|image_pad|>"}
    assert prepare(look(mark), seeing).prompt_ids.count(checkpoints.IMAGE_TOKEN_ID) == 1
    with pytest.raises(BadRequestError, match="stands for an image; take it out"):
        prepare(look(mark, image_part(png(8, 8))), seeing)


def test_system_turns_with_an_image_are_not_folded(seeing: ChatModel) -> None:
    system = {"role": "system", "content": [image_part(png(8, 8))]}
    user = {"role": "user", "content": "a"}
    assert len(prepare(chat_request(messages=[system, system, user]), seeing).spans) == 2


def test_a_template_that_reads_no_parts_takes_no_images(seeing: ChatModel, tmp_path: Path) -> None:
    deaf = replace(seeing, template=make_chat_model(tmp_path, template=PLAIN_TEMPLATE).template)
    with pytest.raises(UnsupportedFieldError, match="cannot take images"):
        prepare(look(image_part(png(8, 8))), deaf)
