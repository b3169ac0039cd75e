import msgspec
import pytest

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig, NeuronConfig
from cortex.core.hints import key_path, suggest


def error(tables: object, kind: type) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(tables, kind)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "tables", "key", "hint"),
    [
        (NeuronConfig, {"prot": 1}, "prot", "did you mean `port`?"),
        (
            GatewayConfig,
            {"gateway": {"listn": "x"}},
            "gateway.listn",
            "did you mean `listen`?",
        ),
        (
            GatewayConfig,
            {"neurons": [{"name": "a", "endpoint": "http://a", "dran": True}]},
            "neurons[0].dran",
            "did you mean `drain`?",
        ),
        (
            GatewayConfig,
            {"neurons": [{"name": "a", "endpoint": "http://a", "vram_mb": 1}]},
            "neurons[0].vram_mb",
            "known here: drain, endpoint, name",
        ),
        (
            GatewayConfig,
            {"entitlements": {"keys": [{"key": "x" * 20, "account_id": "a", "admn": 1}]}},
            "entitlements.keys[0].admn",
            "did you mean `admin`?",
        ),
        (NeuronConfig, {"port": "x"}, "port", None),
        (Catalogue, {"virtual": {"a": [1]}}, "virtual[...][0]", None),
        (Catalogue, {"models": [{"id": "m", "zzz": 1}]}, "models[0].zzz", None),
    ],
)
def test_an_error_tells_its_key_and_the_one_that_was_meant(
    kind: type, tables: object, key: str, hint: str | None
):
    message = error(tables, kind)
    assert (key_path(message), suggest(message, kind)) == (key, hint)


def test_an_error_about_the_whole_file_has_no_key():
    message = error({"tls_ca": "x"}, NeuronConfig)
    assert (key_path(message), suggest(message, NeuronConfig)) == (None, None)
