"""Who may call: keys compared as hashes, in constant time."""

import hashlib
import hmac
from collections.abc import Mapping

from cortex.core.config import Entitlements
from cortex.core.errors import AuthenticationError


class Gatekeeper:
    """Knows the hashes of the keys that may call; the keys themselves are not kept."""

    def __init__(self, entitlements: Entitlements) -> None:
        self._required = entitlements.require_auth
        self._digests = [_digest(each.key) for each in entitlements.keys]

    def check(self, headers: Mapping[str, str]) -> None:
        """Let a request pass or raise.

        Raises:
            AuthenticationError: a key is required and none, or an unknown one, was sent.
        """
        if not self._required:
            return
        sent = [_digest(key) for key in _keys_in(headers)]
        if not sent:
            raise AuthenticationError(
                "a key is required: send `Authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        # Every key is compared, so that the time taken says nothing about which one came close.
        if not sum(hmac.compare_digest(key, each) for key in sent for each in self._digests):
            raise AuthenticationError("the key is not known; check it with whoever runs this URL")


def _keys_in(headers: Mapping[str, str]) -> list[str]:
    """Return the keys a request carries: some clients send a placeholder beside the real one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return [key for key in (bearer, headers.get("x-api-key", "").strip()) if key]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
