"""Reads what a broker wants to see: passwords and certificates, from files that the config names."""

from __future__ import annotations

import ssl
from pathlib import Path

from runtime.config import BrokerConfig
from runtime.errors import ConfigError


def read_password(broker: BrokerConfig) -> str | None:
    """The password, or None when there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if broker.password_file is None:
        return None
    try:
        return Path(broker.password_file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"password_file {broker.password_file} cannot be read: {reason}") from error


def tls_context(broker: BrokerConfig) -> ssl.SSLContext | None:
    """The TLS settings, or None for a connection in the clear. Read at the start, where a mistake can still be told.

    Raises:
        ConfigError: a file cannot be read or is no certificate or key.
    """
    if broker.ca_file is None:
        return None
    try:
        context = ssl.create_default_context(cafile=broker.ca_file)
        if broker.cert_file is not None:
            context.load_cert_chain(broker.cert_file, broker.key_file)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(file for file in (broker.ca_file, broker.cert_file, broker.key_file) if file is not None)
        raise ConfigError(f"TLS cannot be set up with {files}: {error.strerror or error}") from error
    return context
