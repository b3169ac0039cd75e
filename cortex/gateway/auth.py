"""Who may call: keys known by their hashes, and what each of them may use."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from cortex.core.entitlements import ApiKey, Entitlements, hash_key
from cortex.core.errors import AuthenticationError, PermissionDeniedError
from cortex.gateway.windows import Rule, rules_of

KEY_PREFIX = "sk-cortex-"
KEY_BYTES = 32
# A shorter key can be found by trying, once its hash is known.
MIN_KEY_CHARACTERS = 20

_KEY_HEADERS = frozenset([b"authorization", b"x-api-key"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whom a request is counted for; both ids are empty for a caller without a known key.

    Attributes:
        entry: what the configuration says of the key.
        rules: its rates and budgets.
    """

    account_id: str = ""
    key_id: str = ""
    entry: ApiKey | None = None
    rules: tuple[Rule, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether a known key was sent."""
        return self.entry is not None

    @property
    def is_limited(self) -> bool:
        """Whether anything bounds how much it may use."""
        return bool(self.rules) or (
            self.entry is not None and self.entry.max_concurrent is not None
        )

    @property
    def is_admin(self) -> bool:
        """Whether it may do what is for those who run the fleet."""
        return self.entry is not None and self.entry.admin

    @property
    def sees_all(self) -> bool:
        """Whether no list of models bounds what it may use."""
        return self.entry is None or self.entry.models is None

    def may_use(self, name: str) -> bool:
        """Whether a name is on the key's list of models, or there is no list."""
        if self.entry is None or self.entry.models is None:
            return True
        return any(fnmatchcase(name, pattern) for pattern in self.entry.models)


ANONYMOUS = Caller()


class Gatekeeper:
    """Knows the hashes of the keys that may call; the keys themselves are not kept.

    Keys are looked up by a keyed hash of their hash, so that the time a look takes says nothing
    about how close a wrong key came, and one look does however many keys there are.
    """

    def __init__(self, entitlements: Entitlements) -> None:
        self._secret = secrets.token_bytes(KEY_BYTES)
        self.reload(entitlements)

    def reload(self, entitlements: Entitlements) -> None:
        """Take the keys of a new configuration; requests that were let in go on."""
        self._required = entitlements.require_auth
        self._metrics_required = entitlements.metrics_require_auth
        self._has_admins = any(each.admin for each in entitlements.keys)
        self._callers = {
            self._place(each.sha256): Caller(
                account_id=each.account_id, key_id=each.id, entry=each, rules=rules_of(each)
            )
            for each in entitlements.keys
        }

    @property
    def metrics_required(self) -> bool:
        """Whether the metrics port asks for a key."""
        return self._metrics_required

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Return whose key a request carries; ANONYMOUS without a known one."""
        # Some clients send a placeholder beside the real one.
        for key in keys_in(headers):
            caller = self._callers.get(self._place(hash_key(key)))
            if caller is not None:
                return caller
        return ANONYMOUS

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Let a request pass and say whose it is, or raise.

        Raises:
            AuthenticationError: a key is required and none, or an unknown one, was sent.
        """
        caller = self.find(headers)
        if caller.is_known or not self._required:
            return caller
        raise refusal(headers)

    def check_admin(self, caller: Caller) -> None:
        """Let a caller do what is for those who run the fleet, or raise.

        Raises:
            PermissionDeniedError: keys are required, or some have `admin`, and this one has not.
        """
        if caller.is_admin:
            return
        if self._required or self._has_admins:
            raise PermissionDeniedError("this takes a key with `admin = true` in cortex.toml")

    def _place(self, sha256: str) -> bytes:
        return hmac.digest(self._secret, sha256.encode(), hashlib.sha256)


def refusal(headers: Iterable[tuple[bytes, bytes]]) -> AuthenticationError:
    """Return the error of a request that carries no known key."""
    if not keys_in(headers):
        return AuthenticationError(
            "a key is required: send `Authorization: Bearer KEY` or `x-api-key: KEY`"
        )
    return AuthenticationError("the key is not known; check it with whoever runs this URL")


def keys_in(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """Return the keys that a request's raw headers carry."""
    found = []
    for name, value in headers:
        if name in _KEY_HEADERS:
            text = value.decode("utf-8", "surrogateescape").strip()
            if name == b"authorization":
                scheme, _, token = text.partition(" ")
                text = token.strip() if scheme.lower() == "bearer" else ""
            if text:
                found.append(text)
    return found


def new_key() -> str:
    """Return a key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def toml_entry(key: str, account_id: str, key_id: str | None) -> str:
    """Return the table of cortex.toml that lets a key in."""
    lines = [
        "[[entitlements.keys]]",
        f'key_sha256 = "{hash_key(key)}"',
        f"account_id = {_toml_string(account_id)}",
    ]
    if key_id is not None:
        lines.append(f"key_id = {_toml_string(key_id)}")
    return "\n".join(lines)


def _toml_string(text: str) -> str:
    # Every JSON string is a TOML basic string.
    return msgspec.json.encode(text).decode()
