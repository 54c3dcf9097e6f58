"""What OpenSSL says, in the spellings of its versions, in words that name the next step."""

import ssl

import pytest

from services.broker.tls import TlsFiles, tls_context, tls_fault


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "PLAIN"),
        ("[SSL: RECORD_LAYER_FAILURE] record layer failure (_ssl.c:1032)", "PLAIN"),
        (
            "StreamLostError: (\"…SSLError(1, '[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 …",
            "requires a client certificate",
        ),
        (
            "[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE] sslv3 alert handshake failure",
            "requires a client cert",
        ),
        ("[SSL: SSL/TLS_ALERT_HANDSHAKE_FAILURE] ssl/tls alert", "requires a client cert"),
        ("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca", "does not trust the authority"),
        ("[SSL: SSLV3_ALERT_CERTIFICATE_EXPIRED] sslv3 alert", "our certificate has expired"),
        ("[SSL: TLSV1_ALERT_PROTOCOL_VERSION] tlsv1 alert", "no TLS version"),
    ],
)
def test_a_permanent_tls_error_is_explained(error: str, says: str) -> None:
    assert says in str(tls_fault(error, "h", plain="PLAIN", certificate=False))


@pytest.mark.parametrize(
    "error",
    [
        "StreamLostError: ('Stream connection lost: ConnectionResetError(104, …)',)",
        "SSLEOFError(8, 'EOF occurred in violation of protocol (_ssl.c:2427)')",
        "[SSL: TLSV1_ALERT_INTERNAL_ERROR] tlsv1 alert internal error",
    ],
)
def test_what_may_pass_is_no_such_fault(error: str) -> None:
    assert tls_fault(error, "h", plain="PLAIN", certificate=False) is None


def test_a_certificate_that_was_shown_and_refused_is_not_asked_for() -> None:
    error = "[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE] sslv3 alert handshake failure"
    said = tls_fault(error, "h", plain="PLAIN", certificate=True)
    assert said is not None and "refused the certificate KEEPWARM_BROKER_CERT_FILE" in said


def test_an_authority_without_the_newer_extensions_is_trusted_by_every_python() -> None:
    assert not tls_context(TlsFiles()).verify_flags & ssl.VERIFY_X509_STRICT
