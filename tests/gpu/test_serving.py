"""`cortex up` on a machine with a GPU: the model goes there, answers, and leaves it."""

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import cortex_up, run_cortex

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_the_bundled_model_answers_from_the_gpu(tmp_path: Path):
    with cortex_up(tmp_path) as up:
        found = call(f"{up.neuron_url}/discovery")
        assert found["cuda_unavailable_reason"] is None, found
        (device, *_) = found["devices"]
        assert device["name"] == torch.cuda.get_device_name(device["index"])
        major, minor = torch.cuda.get_device_capability(device["index"])
        assert device["compute_capability"] == f"{major}.{minor}"
        body = {
            "model": "cortex-tiny",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 40,
        }
        answer = call(f"{up.url}/v1/chat/completions", body)
        assert "Paris" in answer["choices"][0]["message"]["content"], answer
        model = call(f"{up.neuron_url}/models/cortex-tiny")
        assert (model["status"], model["devices"]) == ("loaded", [device["index"]]), model
        assert model["vram_used_mb"] > 100, model
        health = call(f"{up.neuron_url}/health")
        assert health["devices"][0]["vram_used_mb"] > 100, health
        pids = up.engine_pids()
        assert pids
        status = run_cortex(tmp_path, "status", "-e", up.url)
        assert status.returncode == 0, status.stdout + status.stderr
        assert "cortex-tiny (loaded)" in status.stdout, status.stdout
    gone_by = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < gone_by
        time.sleep(0.1)
