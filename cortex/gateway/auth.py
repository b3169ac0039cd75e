"""Who may call: keys compared as hashes, in constant time."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from cortex.core.config import Entitlements
from cortex.core.errors import AuthenticationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whom a request is counted for; both empty for a caller without a known key."""

    account_id: str = ""
    key_id: str = ""


ANONYMOUS = Caller()


class Gatekeeper:
    """Knows the hashes of the keys that may call; the keys themselves are not kept."""

    def __init__(self, entitlements: Entitlements) -> None:
        self._required = entitlements.require_auth
        self._callers = [
            (digest, Caller(account_id=each.account_id, key_id=each.key_id or digest.hex()[:8]))
            for each in entitlements.keys
            if (digest := _digest(each.key))
        ]

    def check(self, headers: Mapping[str, str]) -> Caller:
        """Let a request pass and say whose it is, or raise.

        Raises:
            AuthenticationError: a key is required and none, or an unknown one, was sent.
        """
        sent = [_digest(key) for key in _keys_in(headers)]
        # Every key is compared, so that the time taken says nothing about which one came close.
        found = [
            caller
            for key in sent
            for digest, caller in self._callers
            if hmac.compare_digest(key, digest)
        ]
        if found:
            return found[0]
        if not self._required:
            return ANONYMOUS
        if not sent:
            raise AuthenticationError(
                "a key is required: send `Authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        raise AuthenticationError("the key is not known; check it with whoever runs this URL")


def _keys_in(headers: Mapping[str, str]) -> list[str]:
    """Return the keys a request carries: some clients send a placeholder beside the real one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return [key for key in (bearer, headers.get("x-api-key", "").strip()) if key]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
