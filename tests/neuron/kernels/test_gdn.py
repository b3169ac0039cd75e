import logging

import pytest
import torch

from cortex.neuron.kernels import extension, gdn, gdn_torch
from cortex.neuron.kernels.chunks import plan_prefill


@pytest.fixture
def without_extension(monkeypatch):
    """The library is not there."""
    extension.is_loaded.cache_clear()
    extension.serves.cache_clear()
    monkeypatch.setattr(extension, "_LIBRARY", extension._LIBRARY.with_name("absent.so"))
    yield
    extension.is_loaded.cache_clear()
    extension.serves.cache_clear()


def step_inputs(rows: int, k_heads: int = 2, v_heads: int = 4, dim: int = 8):
    generator = torch.Generator().manual_seed(rows)
    conv_dim = 2 * k_heads * dim + v_heads * dim

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "mixed": draw(rows, conv_dim),
        "z": draw(rows, v_heads * dim),
        "b": draw(rows, v_heads),
        "a": draw(rows, v_heads),
        "conv_weight": draw(conv_dim, 4),
        "a_log": draw(v_heads),
        "dt_bias": draw(v_heads),
        "norm_weight": draw(dim),
        "norm_eps": 1e-6,
        "windows": draw(5, 3, conv_dim),
        "states": draw(5, v_heads, dim, dim),
        "slots": torch.tensor([4, 1, -1][:rows]),
    }


def decode(inputs):
    pools = {name: inputs[name].clone() for name in ("windows", "states")}
    out = gdn.gdn_decode_step(**{**inputs, **pools})
    return out, pools["windows"], pools["states"]


def test_the_extension_is_built_and_serves_cpus():
    assert extension.serves(torch.device("cpu")), "build it: pip install --no-build-isolation -e ."


def test_without_the_extension_plain_torch_serves_and_says_so_once(without_extension, caplog):
    inputs = step_inputs(3)
    with caplog.at_level(logging.WARNING):
        first = decode(inputs)
        decode(inputs)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install --no-build-isolation" in caplog.text
    assert torch.equal(first[0][2], torch.zeros_like(first[0][2]))


def test_the_operators_and_plain_torch_agree(without_extension):
    inputs = step_inputs(3)
    want = decode(inputs)
    extension.is_loaded.cache_clear()
    extension.serves.cache_clear()
    extension._LIBRARY = extension._LIBRARY.with_name("_C.abi3.so")
    for got, expected in zip(decode(inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_library_that_does_not_load_is_told_and_plain_torch_serves(
    without_extension, caplog, tmp_path, monkeypatch
):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(extension, "_LIBRARY", broken)
    assert not extension.serves(torch.device("cpu"))
    assert "do not load" in caplog.text


def test_a_prefill_fills_the_snapshots_it_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(100, 2 * 2 * 8 + 4 * 8, generator=generator)
    g, beta = -torch.rand(100, 4, generator=generator), torch.rand(100, 4, generator=generator)
    states = torch.zeros(2, 4, 8, 8)
    slots = torch.tensor([1])
    tables = plan_prefill([100], snapshots_at=[(0, 70), (0, 100)])
    snapshots = torch.full((2, 4, 8, 8), torch.nan)
    out = gdn.gdn_prefill(qkv, g, beta, tables, states=states, slots=slots, snapshots=snapshots)
    assert torch.equal(snapshots[1], states[1])
    resumed = torch.zeros(2, 4, 8, 8)
    resumed[1] = snapshots[0]
    rest = gdn.gdn_prefill(
        qkv[70:], g[70:], beta[70:], plan_prefill([30]), states=resumed, slots=slots
    )
    torch.testing.assert_close(rest, out[70:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resumed[1], states[1], rtol=1e-4, atol=1e-5)


def test_a_pool_of_another_type_is_refused_with_what_came():
    inputs = step_inputs(1)
    inputs["states"] = inputs["states"].half()
    with pytest.raises(RuntimeError, match=r"^gdn_decode_step: states must be .* torch\.float16"):
        gdn.gdn_decode_step(**inputs)


def test_the_gated_norm_multiplies_by_silu_of_the_gate():
    x, gate = torch.tensor([[[5.0, -5.0]]]), torch.tensor([[[1.0, 0.0]]])
    for operators in (gdn, gdn_torch):
        out = operators.gdn_gated_norm(x, gate, torch.tensor([2.0, 2.0]), 0.0)
        assert out.flatten().tolist() == [pytest.approx(1.4621172), 0.0]


@pytest.mark.parametrize(
    ("archs", "card", "runs"),
    [
        (("80", "86"), (8, 0), True),
        (("80", "86"), (8, 9), True),
        (("90a",), (9, 0), True),
        (("90a",), (10, 0), False),
        (("89",), (8, 6), False),
        (("89",), (9, 0), True),  # by its PTX
        (("80", "90a"), (12, 0), False),
        ((), (9, 0), False),
    ],
)
def test_code_runs_on_its_own_generation_and_by_ptx_on_later_cards(archs, card, runs):
    assert extension.runs_on(archs, *card) is runs
