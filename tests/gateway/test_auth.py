"""Keys: which are known, and what they may use."""

import pytest

from cortex.core.entitlements import ApiKey, Entitlements
from cortex.core.errors import AuthenticationError
from cortex.gateway.auth import ANONYMOUS, Caller, Gatekeeper, new_key

# printf one | sha256sum
SHA256_OF_ONE = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
REQUIRED = Entitlements(
    require_auth=True,
    keys=[
        ApiKey(key_sha256=SHA256_OF_ONE, account_id="a"),
        ApiKey(key="zwei-schlüssel", account_id="b"),
    ],
)


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer one"},
        {"authorization": "bearer  one "},
        {"x-api-key": "one"},
        {"x-api-key": "zwei-schlüssel"},
        {"authorization": "Bearer placeholder", "x-api-key": "one"},
        {"x-api-key": "placeholder", "authorization": "Bearer one"},
    ],
)
def test_a_known_key_passes_as_bearer_or_x_api_key(headers: dict[str, str]) -> None:
    assert Gatekeeper(REQUIRED).check(raw(headers)).is_known


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer two"},
        {"authorization": "Basic one"},
        {"authorization": "one"},
        {"x-api-key": "on"},
        {"x-api-key": ""},
        {"x-api-key": SHA256_OF_ONE},
        {"cookie": "one"},
    ],
)
def test_a_missing_or_unknown_key_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(AuthenticationError):
        Gatekeeper(REQUIRED).check(raw(headers))


def test_without_require_auth_any_key_passes_and_a_known_one_is_counted() -> None:
    laptop = ApiKey(key="one", account_id="a", key_id="laptop")
    gatekeeper = Gatekeeper(Entitlements(keys=[laptop]))
    assert gatekeeper.check(raw({"authorization": "Bearer placeholder"})) == ANONYMOUS
    known = gatekeeper.check(raw({"authorization": "Bearer one"}))
    assert known == Caller(account_id="a", key_id="laptop", entry=laptop)


def test_a_key_without_an_id_is_named_by_the_start_of_its_hash() -> None:
    caller = Gatekeeper(REQUIRED).check(raw({"x-api-key": "one"}))
    assert (caller.account_id, caller.key_id) == ("a", "7692c3ad")


def test_a_reload_lets_new_keys_in_and_old_ones_out() -> None:
    gatekeeper = Gatekeeper(REQUIRED)
    gatekeeper.reload(Entitlements(require_auth=True, keys=[ApiKey(key="new", account_id="a")]))
    assert gatekeeper.check(raw({"x-api-key": "new"})).account_id == "a"
    with pytest.raises(AuthenticationError):
        gatekeeper.check(raw({"x-api-key": "one"}))


@pytest.mark.parametrize(
    ("models", "name", "may"),
    [
        (None, "any", True),
        ([], "any", False),
        (["small"], "small", True),
        (["small"], "smaller", False),
        (["Qwen/*"], "Qwen/Qwen3.5-4B", True),
        (["Qwen/*"], "qwen/Qwen3.5-4B", False),
        (["*-[48]B"], "Qwen/Qwen3.5-8B", True),
    ],
)
def test_a_key_may_use_the_models_that_its_globs_match(
    models: list[str] | None, name: str, may: bool
) -> None:
    caller = Caller(
        account_id="a", key_id="k", entry=ApiKey(key="k", account_id="a", models=models)
    )
    assert caller.may_use(name) is may


def test_new_keys_differ_and_have_256_bits() -> None:
    keys = {new_key() for _ in range(10)}
    assert len(keys) == 10
    assert all(key.startswith("sk-cortex-") and len(key) == 53 for key in keys)
