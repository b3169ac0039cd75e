from collections.abc import Iterator
from pathlib import Path

import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.support.processes import Cortex, cortex_up


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cortex]:
    """One `cortex up` with the bundled model, for all tests that leave it as they found it."""
    tmp: Path = tmp_path_factory.mktemp("cache")
    with cortex_up(tmp) as running:
        yield running


@pytest.fixture(scope="session")
def openai_client(up: Cortex) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def anthropic_client(up: Cortex) -> Iterator[Anthropic]:
    with Anthropic(base_url=up.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client
