"""The tables of keys and limits: what loads, and what stops the start."""

from pathlib import Path

import pytest

from cortex.core.config import load_gateway_config
from cortex.core.entitlements import ApiKey, LimitsConfig, Window, hash_key
from cortex.core.errors import ConfigError

KEY = "[[entitlements.keys]]\naccount_id = 'a'\n"
HASH = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"


def load(path: Path, text: str):
    (path / "cortex.toml").write_text(text)
    return load_gateway_config(path / "cortex.toml")


def test_a_key_in_plain_words_is_kept_as_its_hash_only(tmp_path: Path):
    config = load(tmp_path, KEY + "key = 'secret'")
    assert config.entitlements.keys == [ApiKey(account_id="a", key_sha256=HASH)]
    assert "secret'" not in repr(config)
    assert hash_key("secret") == HASH


def test_every_limit_of_a_key_loads(tmp_path: Path):
    config = load(
        tmp_path,
        KEY
        + f"key_sha256 = '{HASH}'\nkey_id = 'k'\nmodels = ['Qwen/*']\nmax_concurrent = 1\n"
        + "requests_per_minute = 2\ntokens_per_minute = 3\ntokens_per_day = 4\nhard_cap = 5\n"
        + "window = { kind = 'balance' }\n[limits]\nstorage = 'redis://cache:6379/1'\n"
        + "on_storage_error = 'refuse'\nreserve_output_tokens = 6\nusage_log = true",
    )
    assert config.entitlements.keys == [
        ApiKey(
            account_id="a",
            key_sha256=HASH,
            key_id="k",
            models=["Qwen/*"],
            max_concurrent=1,
            requests_per_minute=2,
            tokens_per_minute=3,
            tokens_per_day=4,
            hard_cap=5,
            window=Window(kind="balance"),
        )
    ]
    assert config.limits == LimitsConfig(
        storage="redis://cache:6379/1",
        on_storage_error="refuse",
        reserve_output_tokens=6,
        usage_log=True,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[entitlements]\nrequire_auth = true", "no keys"),
        ("[entitlements]\nmetrics_require_auth = true", "no keys"),
        (KEY, "give `key` or `key_sha256`"),
        (KEY + f"key = 'x'\nkey_sha256 = '{HASH}'", "give `key` or `key_sha256`"),
        (KEY + "key_sha256 = 'x'", "key_sha256"),
        (KEY + "key = ''", "key"),
        (KEY + "key = 'x'\nhard_cap = 0", "hard_cap"),
        (KEY + "key = 'x'\nwindow = { kind = 'balance' }", "set hard_cap"),
        (KEY + "key = 'x'\nhard_cap = 1\nwindow = { kind = 'rolling' }", "seconds"),
        (KEY + "key = 'x'\nhard_cap = 1\nwindow = { seconds = 5 }", "seconds"),
        (KEY + "key = 'secret'\n" + KEY + f"key_sha256 = '{HASH}'", "is there twice"),
        (KEY + "key = 'x'\nkey_id = 'k'\n" + KEY + "key = 'y'\nkey_id = 'k'", "key_id k"),
        ("[limits]\nstorage = 'redis'", "limits.storage"),
        ("[limits]\nstorage = 'memory://'", "limits.storage"),
        ("[limits]\nstorage = 'etcd://u:password@h'", "limits.storage"),
        ("[limits]\non_storage_error = 'ask'", "on_storage_error"),
        ("[limits]\nreserve_output_tokens = 0", "reserve_output_tokens"),
    ],
)
def test_a_table_that_cannot_be_used_stops_the_start_with_the_reason(
    tmp_path: Path, text: str, words: str
):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert words in caught.value.message
    assert "password" not in caught.value.message


def test_the_same_key_id_may_stand_in_two_accounts(tmp_path: Path):
    text = KEY + "key = 'x'\nkey_id = 'k'\n" + KEY.replace("'a'", "'b'") + "key = 'y'\nkey_id = 'k'"
    assert [each.account_id for each in load(tmp_path, text).entitlements.keys] == ["a", "b"]
