"""How gateways and neurons know each other: a shared secret, certificates, or both."""

import ssl
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from cortex.core.errors import ConfigError

# What goes into a header as it is, and is too long to be tried out.
SECRET_PATTERN = "^[!-~]{16,256}$"  # noqa: S105  the form of one, not one
MAX_SECRET_FILE_BYTES = 4096

FleetSecret = Annotated[str, Meta(pattern=SECRET_PATTERN)]
_TOO_WEAK = "a fleet secret has 16 to 256 printable ASCII characters and no spaces"


class Trust(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Keys at the top of cortex.toml and of neuron.toml.

    Attributes:
        fleet_secret: what a gateway shows and a neuron asks for; None for an open neuron.
        fleet_secret_file: a file that holds it, in place of the key above.
        tls_cert, tls_key: a neuron's server certificate; a gateway's client certificate.
        tls_ca: whose certificates a neuron takes from gateways, or a gateway from neurons.
    """

    fleet_secret: FleetSecret | None = None
    fleet_secret_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None


def settle_trust(trust: Trust, base: Path, where: str) -> dict[str, str | None]:
    """Return the fields of `trust` with the secret read and paths made absolute.

    Args:
        base: what relative paths are taken from.
        where: the configuration's name, for messages.

    Raises:
        ConfigError: they contradict each other, or a file cannot be used.
    """
    secret = trust.fleet_secret
    if trust.fleet_secret_file is not None:
        if secret is not None:
            raise ConfigError(f"{where}: give fleet_secret or fleet_secret_file, not both")
        secret = _read_secret(base / trust.fleet_secret_file, where)
    if (trust.tls_cert is None) != (trust.tls_key is None):
        raise ConfigError(f"{where}: tls_cert and tls_key go together; give both or neither")
    found = {
        name: None if path is None else str((base / path).absolute())
        for name, path in (
            ("tls_cert", trust.tls_cert),
            ("tls_key", trust.tls_key),
            ("tls_ca", trust.tls_ca),
        )
    }
    settled = Trust(fleet_secret=secret, **found)
    # Files that cannot be used stop the start and not the first connection.
    client_context(settled, where)
    return {"fleet_secret": secret, "fleet_secret_file": None, **found}


def _read_secret(path: Path, where: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SECRET_FILE_BYTES)
        return msgspec.convert(raw.decode().strip(), FleetSecret)
    except OSError as exc:
        raise ConfigError(f"{where}: fleet_secret_file: {path}: {exc.strerror or exc}") from exc
    except (UnicodeDecodeError, msgspec.ValidationError) as exc:
        # Not the exception's own words, which may quote the secret.
        raise ConfigError(f"{where}: fleet_secret_file: {path}: {_TOO_WEAK}") from exc


def client_context(trust: Trust, where: str) -> ssl.SSLContext | None:
    """Return how a gateway speaks TLS to neurons; None for the system's defaults.

    Raises:
        ConfigError: a certificate or key cannot be used.
    """
    if trust.tls_ca is None and trust.tls_cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=trust.tls_ca)
        if trust.tls_cert is not None:
            context.load_cert_chain(trust.tls_cert, trust.tls_key)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"{where}: tls_cert, tls_key, tls_ca: {exc}; they name PEM files, the key without a "
            "passphrase and the certificate's own"
        ) from exc
    return context
