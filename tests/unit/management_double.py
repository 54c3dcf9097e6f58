"""RabbitMQ's management API as far as a set-up uses it, behind a real socket."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import unquote

Answer = tuple[int, Any]


class ManagementDouble:
    def __init__(self) -> None:
        self.admin = ("guest", "guest")
        self.tags: list[str] = ["administrator"]
        self.things: dict[str, Any] = {}
        self.listeners = [{"protocol": "amqp", "port": 5672}]
        self.puts: list[str] = []
        self.always: Answer | None = None
        """What every request is answered with instead, where set: a status and a body."""
        self.url = ""

    def answer(self, method: str, path: str, sent: str, authorization: str) -> Answer:
        if self.always is not None:
            return self.always
        expected = base64.b64encode(":".join(self.admin).encode()).decode()
        if authorization != f"Basic {expected}":
            return 401, {"error": "not_authorized", "reason": "Login failed"}
        if not self.tags:
            return 401, {"error": "not_authorised", "reason": "Not management user"}
        if path == "/api/whoami":
            return 200, {"name": self.admin[0], "tags": self.tags}
        if path == "/api/overview":
            return 200, {"listeners": self.listeners}
        if method == "PUT":
            self.puts.append(path)
            self.things[path] = json.loads(sent)
            return 201, None
        if path not in self.things:
            return 404, {"error": "Object Not Found", "reason": "Not Found"}
        thing = self.things[path]
        if "tags" in thing:
            return 200, thing | {"tags": [tag for tag in thing["tags"].split(",") if tag]}
        return 200, thing


@contextmanager
def management_double() -> Iterator[ManagementDouble]:
    double = ManagementDouble()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            status, body = double.answer(
                self.command,
                unquote(self.path.partition("?")[0]),
                sent,
                self.headers.get("Authorization", ""),
            )
            content = b"" if body is None else body if isinstance(body, bytes) else _json(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = _serve  # noqa: N815  (the names that http.server looks for)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()
