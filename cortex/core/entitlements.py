"""`[entitlements]` and `[limits]` of cortex.toml: who may call, for what, and how much."""

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(gt=0)]
Name = Annotated[str, Meta(min_length=1)]
KeyHash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

STORAGE_SCHEMES = ("redis", "rediss", "redis+unix", "valkey", "valkeys", "valkey+unix")


class _Config(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of these tables: a typo stops the start."""


class Window(_Config, frozen=True):
    """`window` of a key's `hard_cap`: spent for good, or free again as time passes."""

    kind: Literal["balance", "rolling"] = "balance"
    seconds: Count | None = None

    def __post_init__(self) -> None:
        if (self.kind == "rolling") != (self.seconds is not None):
            raise ValueError("window: `seconds` goes with kind = 'rolling' and only with it")


class ApiKey(_Config, frozen=True):
    """`[[entitlements.keys]]`: one key that may call the API, what for, and how much.

    Attributes:
        key, key_sha256: the key itself, or the SHA-256 of it in hex; one of the two.
        admin: whether it may change the fleet, such as drain a node, and see all of it.
        models: names and globs of the models it may use; None for all.
        max_concurrent: requests at once, in each gateway.
        hard_cap: tokens within `window`.
    """

    account_id: Name
    key: Name | None = None
    key_sha256: KeyHash | None = None
    key_id: Name | None = None
    admin: bool = False
    models: list[Name] | None = None
    max_concurrent: Count | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    hard_cap: Count | None = None
    window: Window | None = None

    def __post_init__(self) -> None:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError(
                f"a key of account {self.account_id}: give `key` or `key_sha256`, one of the two "
                "(`cortex keys new` makes one and prints its entry)"
            )
        if self.window is not None and self.hard_cap is None:
            raise ValueError(
                f"a key of account {self.account_id}: `window` says when `hard_cap` is free again; "
                "set hard_cap or remove window"
            )

    @property
    def sha256(self) -> str:
        """The SHA-256 of the key in hex."""
        return self.key_sha256 or hash_key(self.key or "")

    @property
    def id(self) -> str:
        """What the key is called in metrics and budgets: its `key_id` or the start of its hash."""
        return self.key_id or self.sha256[:8]


class Entitlements(_Config, frozen=True):
    """`[entitlements]`: whether callers need a key, and which keys there are."""

    require_auth: bool = False
    metrics_require_auth: bool = False  # the metrics port asks for a key, too
    keys: list[ApiKey] = []

    def __post_init__(self) -> None:
        if (self.require_auth or self.metrics_require_auth) and not self.keys:
            raise ValueError(
                "require_auth or metrics_require_auth is set but there are no keys: "
                "nobody could call"
            )
        seen: set[tuple[str, str]] = set()
        hashes: set[str] = set()
        for each in self.keys:
            if each.sha256 in hashes:
                raise ValueError(f"a key of account {each.account_id} is there twice; remove one")
            if (each.account_id, each.id) in seen:
                raise ValueError(
                    f"two keys of account {each.account_id} have the key_id {each.id}; budgets and "
                    "metrics go by it, so give each its own"
                )
            seen.add((each.account_id, each.id))
            hashes.add(each.sha256)

    def without_plain_keys(self) -> "Entitlements":
        """Return the same with every `key` replaced by its hash."""
        keys = [
            msgspec.structs.replace(each, key=None, key_sha256=each.sha256) for each in self.keys
        ]
        return msgspec.structs.replace(self, keys=keys)


class LimitsConfig(_Config, frozen=True):
    """`[limits]`: where the counters of rates and budgets are kept.

    Attributes:
        storage: `memory` (this gateway alone), or the URL of a Redis or Valkey server.
        on_storage_error: whether requests pass uncounted while the server does not answer.
        reserve_output_tokens: the most that is set aside for an answer before its length is known.
        usage_log: log a line for each finished request of a known key.
    """

    storage: str = "memory"
    on_storage_error: Literal["allow", "refuse"] = "allow"
    reserve_output_tokens: Count = 4096
    usage_log: bool = False

    def __post_init__(self) -> None:
        scheme, separator, _ = self.storage.partition("://")
        if self.storage != "memory" and not (separator and scheme in STORAGE_SCHEMES):
            # The URL may hold a password, so it is not quoted.
            raise ValueError(
                "limits.storage: `memory`, or the URL of a Redis or Valkey server such as "
                "redis://host:6379/0"
            )


def hash_key(key: str) -> str:
    """Return what stands for a key in the configuration."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
