"""TLS to the broker: trusted authorities, our certificate, and explanations of failures."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from services.contracts import Settings
from services.contracts.errors import UsageError

# OpenSSL's name of the error. pika and httpx give it only in a text, which varies between versions.
_REASON = re.compile(r"\[SSL: ([\w/]+)\]")
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
_WANTS_CERTIFICATE = ("CERTIFICATE_REQUIRED", "ALERT_HANDSHAKE_FAILURE", "ALERT_BAD_CERTIFICATE")
_REFUSES_CERTIFICATE = {
    "ALERT_UNKNOWN_CA": "does not trust the authority that signed our certificate",
    "ALERT_CERTIFICATE_EXPIRED": "reports that our certificate has expired",
    "ALERT_CERTIFICATE_REVOKED": "reports that our certificate was revoked",
    "ALERT_CERTIFICATE_UNKNOWN": "does not accept our certificate",
    "ALERT_UNSUPPORTED_CERTIFICATE": "does not accept our certificate",
    "ALERT_DECRYPT_ERROR": "does not accept our certificate",
}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the trusted authorities (by default the system's), and our certificate and key for
    a broker that requires one.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.broker_ca_file, settings.broker_cert_file, settings.broker_key_file)


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """A context that verifies the broker's certificate and name, and presents ours if configured.

    Raises UsageError for a file that cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=files.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"KEEPWARM_BROKER_CA_FILE: cannot use {files.ca_file}: {error}; it must be a PEM bundle"
        ) from error
    # Python 3.13 requires extensions (RFC 5280) that many private authorities lack. Without this,
    # trust would depend on the version of Python.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if files.cert_file is not None:
        _show_certificate(context, files.cert_file, files.key_file)
    elif files.key_file is not None:
        raise UsageError(
            "KEEPWARM_BROKER_KEY_FILE is set and KEEPWARM_BROKER_CERT_FILE is not; set both"
        )
    return context


def _show_certificate(context: ssl.SSLContext, cert_file: Path, key_file: Path | None) -> None:
    def no_passphrase() -> str:
        raise UsageError(
            f"the key in {key_file or cert_file} is encrypted, and a service cannot ask for its "
            "passphrase; remove it, for example with openssl pkey -in KEY -out NEWKEY"
        )

    try:
        context.load_cert_chain(cert_file, key_file, no_passphrase)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"cannot use the certificate {cert_file} with the key in {key_file or cert_file}: "
            f"{error}; KEEPWARM_BROKER_CERT_FILE and …_KEY_FILE must be matching PEM files"
        ) from error


def tls_fault(error: object, host: str, *, plain: str, certificate: bool) -> str | None:
    """What is wrong with a TLS connection and what to do, if a retry cannot help; None otherwise.

    `plain` is the advice if the port does not speak TLS; `certificate`: whether we present one.
    """
    text = str(error)
    found = _REASON.search(text)
    if found is None:
        return None
    reason = found[1]
    if reason == "CERTIFICATE_VERIFY_FAILED":
        return _untrusted(text, host)
    if reason in _NO_TLS:
        return f"the port does not speak TLS. {plain}"
    for alert, what in _REFUSES_CERTIFICATE.items():
        if reason.endswith(alert):
            return f"the broker {what}. KEEPWARM_BROKER_CERT_FILE must be one that it accepts"
    if reason.endswith(_WANTS_CERTIFICATE):
        return (
            "the broker refused the certificate KEEPWARM_BROKER_CERT_FILE; its log has the reason"
            if certificate
            else "the broker requires a client certificate: set KEEPWARM_BROKER_CERT_FILE and "
            "KEEPWARM_BROKER_KEY_FILE"
        )
    if reason.endswith(("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER")):
        return "the broker offers no TLS version or cipher that this machine accepts"
    return None


def _untrusted(text: str, host: str) -> str:
    if "expired" in text:
        return "its certificate has expired. Renew it on the broker"
    if "not yet valid" in text:
        return "its certificate is not valid yet. Check this machine's clock"
    if "mismatch" in text:
        return (
            f"its certificate is not valid for the name {host}. Use a name in the broker's URL "
            "that the certificate contains"
        )
    return (
        "its certificate is not signed by an authority that this machine trusts. Set "
        "KEEPWARM_BROKER_CA_FILE to the authority's certificate"
    )
