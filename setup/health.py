"""Whether the service in this container is alive: asks its /healthz, and ends with 0 or 1.

Images call it as their health check, so it starts fast: the standard library alone, and no client
of HTTP.
"""

import os
import socket
import sys

_SECONDS = 4.0


def main() -> None:
    address = os.environ.get("KEEPWARM_METRICS_ADDRESS", "")
    port = address.rpartition(":")[2]
    if not port.isdecimal() or port == "0":
        sys.exit(f"KEEPWARM_METRICS_ADDRESS names no fixed port: {address or 'it is not set'}")
    try:
        with socket.create_connection(("127.0.0.1", int(port)), _SECONDS) as connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
    except OSError as error:
        sys.exit(f"no answer at port {port}: {error}")
    head, _, body = answer.decode(errors="replace").partition("\r\n\r\n")
    print(body.strip())
    sys.exit(" 200 " not in head.partition("\r\n")[0])


if __name__ == "__main__":
    main()
