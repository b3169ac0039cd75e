"""What `cortex up` shows: the first load's progress, then how to call the service."""

import asyncio
import sys

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cortex.core.embeddings import EMBEDDINGS, EMBEDDINGS_PATH
from cortex.core.errors import LoadFailedError, UpstreamConnectionError
from cortex.core.neuron_api import ModelInfo

POLL_S = 0.2
REQUEST_S = 5.0
MAX_LISTED = 20

_model = msgspec.json.Decoder(ModelInfo)
_models = msgspec.json.Decoder(list[ModelInfo])


async def guide(model_id: str, gateway_url: str, neuron_url: str) -> None:
    """Follow the load of `model_id`, then print the URL and commands that work.

    Raises:
        LoadFailedError: the model cannot be loaded; the message carries the cause.
        UpstreamConnectionError: the neuron does not answer.
    """
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    try:
        async with aiohttp.ClientSession(base_url=neuron_url, timeout=timeout) as session:
            await _follow_load(session, model_id)
            async with session.get("/models") as reply:
                models = _models.decode(await reply.read())
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise UpstreamConnectionError(f"the neuron at {neuron_url} does not answer") from exc
    sys.stdout.write(greeting(gateway_url, model_id, models))
    sys.stdout.flush()


async def _follow_load(session: aiohttp.ClientSession, model_id: str) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"loading {model_id}", total=None)
        while True:
            async with session.get(f"/models/{model_id}") as reply:
                if reply.status == 404:
                    raise LoadFailedError(
                        f"model {model_id} is not known here; name a checkpoint directory, a "
                        ".gguf file or a hub repository such as org/name"
                    )
                info = _model.decode(await reply.read())
            if info.status == "loaded":
                return
            if info.status == "failed":
                raise LoadFailedError(f"{model_id}: {info.error or 'the load failed'}")
            if info.progress is not None and info.progress.bytes_total:
                bar.update(
                    task,
                    description=f"loading {model_id}: {info.progress.phase}",
                    completed=info.progress.bytes_done,
                    total=info.progress.bytes_total,
                )
            await asyncio.sleep(POLL_S)


def greeting(gateway_url: str, model_id: str, models: list[ModelInfo]) -> str:
    """Return what is printed once the service answers."""
    cold = [model.id for model in models if model.status == "unloaded"]
    lines = [f"cortex is ready: {gateway_url}/v1", "", f"  {model_id:<28} loaded"]
    lines += [f"  {each:<28} loads on its first request" for each in cold[:MAX_LISTED]]
    if len(cold) > MAX_LISTED:
        lines.append(f"  ... and {len(cold) - MAX_LISTED} more: {gateway_url}/v1/models")
    embedders = {model.id for model in models if EMBEDDINGS in model.capabilities}
    writers = [each for each in (*cold, model_id) if each not in embedders]
    if model_id in embedders:
        lines += ["", *_embedding_example(gateway_url, model_id)]
    else:
        lines += ["", *_chat_examples(gateway_url, writers[0], model_id)]
    return "\n".join([*lines, "", "Ctrl-C ends it.", ""])


def _embedding_example(gateway_url: str, model_id: str) -> list[str]:
    return [
        "Ask for embeddings:",
        "",
        f"  curl {gateway_url}{EMBEDDINGS_PATH} -H 'content-type: application/json' -d \\",
        f'    \'{{"model": "{model_id}", "input": ["What is the capital of France?", "Paris"]}}\'',
    ]


def _chat_examples(gateway_url: str, talkative: str, model_id: str) -> list[str]:
    return [
        "Ask in either dialect:",
        "",
        f"  curl {gateway_url}/v1/chat/completions -H 'content-type: application/json' -d \\",
        f'    \'{{"model": "{talkative}", "temperature": 0, "messages": '
        '[{"role": "user", "content": "What is the capital of France?"}]}\'',
        "",
        f"  curl {gateway_url}/v1/messages -H 'content-type: application/json' -d \\",
        f'    \'{{"model": "{model_id}", "max_tokens": 200, "stream": true, "messages": '
        '[{"role": "user", "content": "Who are you?"}]}\'',
    ]
