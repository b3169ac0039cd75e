"""The connections to nodes themselves."""

import asyncio
import socket

from cortex.gateway.neuron_client import open_client
from tests.support.mock_neuron import MockModel, MockNeuron


async def test_a_connection_that_falls_silent_is_asked_after_by_the_kernel() -> None:
    gate = asyncio.Event()
    body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"a"}]}'
    model = MockModel("m", "loaded", token_gate=gate)
    async with MockNeuron(model) as neuron, open_client(1.0) as client:
        reply = await client.post("a", neuron.endpoint, "/v1/chat/completions", body)
        connection = reply._response.connection
        assert connection is not None
        assert connection.transport is not None
        own: socket.socket = connection.transport.get_extra_info("socket")
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 5
        reply.close()
