"""What `cortex status` is told: rows, exit codes, reasons."""

import msgspec
import pytest

from cortex.core.openai import ModelCard
from cortex.gateway.status import StatusReport, fetch_status, print_status
from cortex.gateway.views import HealthReport, ModelState, NodeCount, NodeReport
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


async def test_a_healthy_fleet_gives_rows_and_exit_code_0() -> None:
    async with MockNeuron(MockModel("m", "loaded", reported_in_flight=2), MockModel("n")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            report = await fetch_status(gateway.url + "/")
            assert report.exit_code == 0
            assert report.summary == f"{gateway.url}: ok, 1/1 nodes healthy"
            assert report.node_rows == [("a", "healthy", "2", "0", "m (loaded), n (unloaded)")]
            assert report.model_rows == [
                ("m", "loaded", "a (loaded)", "-"),
                ("n", "unloaded", "-", "-"),
            ]
            decoded = msgspec.json.decode(report.to_json())
            assert decoded["status"] == "ok"
            assert decoded["nodes"] == {"healthy": 1, "total": 1}
            assert [card["id"] for card in decoded["models"]] == ["m", "n"]


async def test_a_degraded_fleet_gives_exit_code_1_and_says_which_node_is_down() -> None:
    async with run_gateway({"a": "http://127.0.0.1:9"}) as gateway:
        report = await fetch_status(gateway.url)
        assert report.exit_code == 1
        assert report.summary == f"{gateway.url}: degraded, 0/1 nodes healthy"
        assert report.node_rows[0][1].startswith("down: node a cannot be reached")


async def test_an_unreachable_gateway_gives_exit_code_2_and_the_reason() -> None:
    report = await fetch_status("http://127.0.0.1:9")
    assert report.exit_code == 2
    assert report.health is None
    assert report.summary.startswith("http://127.0.0.1:9: unreachable: ")


async def test_something_else_on_the_port_is_not_a_gateway() -> None:
    async with MockNeuron() as neuron:
        report = await fetch_status(neuron.endpoint)
        assert report.exit_code == 2
        assert report.error is not None
        assert report.error.startswith("not a gateway's answer")


async def test_a_gateway_that_wants_a_key_shows_its_health_and_with_it_its_models() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keys=("secret",)) as gateway:
            report = await fetch_status(gateway.url)
            assert (report.exit_code, report.models) == (0, [])
            assert report.error == f"{gateway.url}/v1/models answered 401"
            report = await fetch_status(gateway.url, key="secret")
            assert [card.id for card in report.models] == ["m"]


def healthy() -> StatusReport:
    name = "org/a-model-with-a-long-name-[bold]" + "x" * 40
    node = NodeReport(
        name="box",
        endpoint="http://box",
        healthy=True,
        models=[ModelState(id=name, state="loaded")],
    )
    return StatusReport(
        endpoint="http://gateway",
        exit_code=0,
        health=HealthReport(status="ok", nodes=NodeCount(healthy=1, total=1), details=[node]),
        models=[ModelCard(id=name, status="loaded", max_model_len=4096)],
    )


def test_tables_show_whole_names_even_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(healthy(), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "http://gateway: ok, 1/1 nodes healthy"
    name = "org/a-model-with-a-long-name-[bold]" + "x" * 40
    assert [line.split() for line in lines if line.startswith(name)] == [
        [name, "loaded", "-", "4096"]
    ]


def test_json_is_one_object_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(healthy(), as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert msgspec.json.decode(line)["details"][0]["name"] == "box"


def test_an_unreachable_gateway_is_reported_on_stderr_and_as_json_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = StatusReport(endpoint="http://gone", exit_code=2, error="refused")
    print_status(report, as_json=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "http://gone: unreachable: refused\n")
    print_status(report, as_json=True)
    assert msgspec.json.decode(capsys.readouterr().out)["status"] == "unreachable"
