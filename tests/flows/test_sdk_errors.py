"""Every class of error as the exception that the official SDKs have for it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anthropic
import openai
import pytest

from cortex.core.entitlements import ApiKey, Entitlements
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron

USER = [{"role": "user", "content": "Hi"}]
LARGE = [{"role": "user", "content": "x" * (1 << 21)}]


@asynccontextmanager
async def fleet(*models: MockModel, **settings: object) -> AsyncIterator[RunningGateway]:
    async with AsyncExitStack() as stack:
        nodes = {}
        if models:
            neuron = await stack.enter_async_context(MockNeuron(*models))
            nodes = {"a": neuron.endpoint}
        yield await stack.enter_async_context(run_gateway(nodes, **settings))


def openai_of(gateway: RunningGateway, key: str = "k") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def anthropic_of(gateway: RunningGateway, key: str = "k") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0)


async def openai_error(
    gateway: RunningGateway, stream: bool, **fields: object
) -> openai.APIStatusError:
    body = {"model": "m", "messages": USER, **fields}
    async with openai_of(gateway) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(**body, stream=stream)
    return caught.value


async def anthropic_error(
    gateway: RunningGateway, stream: bool, **fields: object
) -> anthropic.APIStatusError:
    body = {"model": "m", "messages": USER, "max_tokens": 9, **fields}
    async with anthropic_of(gateway) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await client.messages.create(**body, stream=stream)
    return caught.value


def refusing(status: int, code: str) -> MockModel:
    return MockModel("m", "loaded", refusal=(status, code))


def limited() -> Entitlements:
    return Entitlements(keys=[ApiKey(key="k", account_id="a", requests_per_minute=1)])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("node", "status", "theirs", "kind"),
    [
        ((400, "template_render_failed"), 400, "BadRequestError", "invalid_request_error"),
        ((422, "unreadable_checkpoint"), 422, "UnprocessableEntityError", "invalid_request_error"),
        ((500, "internal_server_error"), 500, "InternalServerError", "api_error"),
        ((501, "odd"), 501, "HTTPNotImplementedError", "api_error"),
        ((502, "engine_died"), 502, "InternalServerError", "api_error"),
        ((503, "queue_full"), 529, "OverloadedError", "overloaded_error"),
        ((504, "odd"), 504, "GatewayTimeoutError", "timeout_error"),
    ],
)
async def test_what_a_node_refuses_is_the_exception_of_its_status(
    node: tuple[int, str], status: int, theirs: str, kind: str, stream: bool
):
    async with fleet(refusing(*node)) as gateway:
        ours = await openai_error(gateway, stream)
        assert (ours.status_code, ours.code) == node
        wanted = openai.InternalServerError if node[0] >= 500 else getattr(openai, theirs)
        assert type(ours) is wanted
        error = await anthropic_error(gateway, stream)
        assert error.status_code == status
        assert isinstance(error, getattr(anthropic, theirs))
        assert error.body["type"] == "error"
        assert error.body["error"]["type"] == kind


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_field_is_a_bad_request_that_names_it(stream: bool):
    async with fleet(MockModel("m")) as gateway:
        error = await openai_error(gateway, stream, temperature=9)
        assert isinstance(error, openai.BadRequestError)
        assert (error.param, error.type) == ("temperature", "invalid_request_error")
        theirs = await anthropic_error(gateway, stream, extra_body={"container": "c"})
        assert isinstance(theirs, anthropic.BadRequestError)
        assert "container" in theirs.message


@pytest.mark.parametrize("stream", [False, True])
async def test_a_missing_key_is_an_authentication_error(stream: bool):
    async with fleet(MockModel("m", "loaded"), keys=("secret",)) as gateway:
        assert isinstance(await openai_error(gateway, stream), openai.AuthenticationError)
        theirs = await anthropic_error(gateway, stream)
        assert isinstance(theirs, anthropic.AuthenticationError)
        assert theirs.body["error"]["type"] == "authentication_error"


async def test_what_takes_another_key_is_a_permission_error():
    keys = [ApiKey(key="k", account_id="a")]
    entitlements = Entitlements(require_auth=True, keys=keys)
    async with fleet(MockModel("m", "loaded"), entitlements=entitlements) as gateway:
        async with openai_of(gateway) as client:
            with pytest.raises(openai.PermissionDeniedError):
                await client.post("../nodes/a/drain", body={}, cast_to=object)
        async with anthropic_of(gateway) as client:
            with pytest.raises(anthropic.PermissionDeniedError):
                await client.post("/nodes/a/drain", body={}, cast_to=object)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_a_not_found_error(stream: bool):
    async with fleet(MockModel("m", "loaded")) as gateway:
        error = await openai_error(gateway, stream, model="other")
        assert isinstance(error, openai.NotFoundError)
        assert (error.code, error.param) == ("model_not_found", "model")
        theirs = await anthropic_error(gateway, stream, model="other")
        assert isinstance(theirs, anthropic.NotFoundError)
        assert theirs.body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_over_the_limit_is_too_large(stream: bool):
    async with fleet(MockModel("m", "loaded"), max_body_mb=1) as gateway:
        error = await openai_error(gateway, stream, messages=LARGE)
        assert (error.status_code, error.code) == (413, "body_too_large")
        theirs = await anthropic_error(gateway, stream, messages=LARGE)
        assert isinstance(theirs, anthropic.RequestTooLargeError)
        assert theirs.body["error"]["type"] == "request_too_large"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_over_its_rate_is_a_rate_limit_error_with_the_time_to_wait(stream: bool):
    async with fleet(MockModel("m", "loaded"), entitlements=limited()) as gateway:
        async with openai_of(gateway) as client:
            await client.chat.completions.create(model="m", messages=USER)
        error = await openai_error(gateway, stream)
        assert isinstance(error, openai.RateLimitError)
        assert error.code == "rate_limit_exceeded"
        theirs = await anthropic_error(gateway, stream)
        assert isinstance(theirs, anthropic.RateLimitError)
        assert theirs.body["error"]["type"] == "rate_limit_error"
        for caught in (error, theirs):
            assert 1 <= int(caught.response.headers["retry-after"]) <= 60


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fleet_without_nodes_is_overloaded_for_the_moment(stream: bool):
    async with fleet() as gateway:
        error = await openai_error(gateway, stream)
        assert (type(error), error.status_code) == (openai.InternalServerError, 503)
        theirs = await anthropic_error(gateway, stream)
        assert isinstance(theirs, anthropic.OverloadedError)
        assert theirs.status_code == 529
        for caught in (error, theirs):
            assert caught.response.headers["retry-after"] == "5"


async def test_the_sdks_try_again_after_a_moment_of_overload():
    model = MockModel("m", "loaded", refusal=(503, "queue_full"))
    async with MockNeuron(model) as neuron, run_gateway({"a": neuron.endpoint}) as gateway:
        tried = []

        async def freed(response: object) -> None:
            tried.append(response.status_code)
            model.refusal = None

        async with anthropic_of(gateway) as client:
            # The wait that the header asks for is the SDK's; here it need not be lived through.
            client._calculate_retry_timeout = lambda *_: 0.0
            client._client.event_hooks["response"].append(freed)
            message = await client.with_options(max_retries=1).messages.create(
                model="m", max_tokens=9, messages=USER
            )
        assert message.content[0].text == "Hello world!"
        assert tried == [529, 200]


async def read_openai(gateway: RunningGateway, text: list[str]) -> None:
    async with openai_of(gateway) as client:
        stream = await client.chat.completions.create(model="m", messages=USER, stream=True)
        async for chunk in stream:
            text += [choice.delta.content or "" for choice in chunk.choices]


async def read_anthropic(gateway: RunningGateway, text: list[str]) -> None:
    async with anthropic_of(gateway) as client:
        async with client.messages.stream(model="m", max_tokens=9, messages=USER) as stream:
            text += [piece async for piece in stream.text_stream]


@pytest.mark.parametrize("fault", ["die", "no_done", "error_event"])
async def test_a_stream_that_breaks_raises_what_the_sdks_have_for_it(fault: str):
    async with fleet(MockModel("m", "loaded", fault=fault)) as gateway:
        text: list[str] = []
        with pytest.raises(openai.APIError) as caught:
            await read_openai(gateway, text)
        assert type(caught.value) is openai.APIError
        assert caught.value.code in ("upstream_connection_error", "engine_died")
        assert "".join(text).startswith("Hello")
        with pytest.raises(anthropic.APIStatusError) as told:
            await read_anthropic(gateway, text)
        assert told.value.body["error"]["type"] == "api_error"
        assert told.value.body["error"]["message"]
