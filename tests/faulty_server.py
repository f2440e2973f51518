"""A real HTTP server for a folder, with range requests and faults that can be switched on."""

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("reset", "500", "truncated", "stall")


class FaultyServer(ThreadingHTTPServer):
    """An HTTP server of `folder`. `break_next(kind, name, times)` makes the next `times` answers for one file faulty.

    `gets` counts the GET requests for each file, and `sent` counts the bytes of its complete answers.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.gets: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.ignores_ranges = False
        self.released = threading.Event()  # what a stalled answer waits for
        self._faults: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def break_next(self, kind: str, name: str, times: float) -> None:
        self._faults[name] = (kind, times)

    def take_fault(self, name: str) -> str | None:
        """Return the fault of this answer, or None if the file has no fault left."""
        with self._lock:
            kind, times = self._faults.get(name, (None, 0))
            if times <= 0:
                return None
            self._faults[name] = (kind, times - 1)
            return kind

    def handle_error(self, request, client_address) -> None:
        """Print nothing: a client may give up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self.server.gets[self.path[1:]] += 1
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        name = self.path[1:]
        fault = self.server.take_fault(name) if with_body else None
        path = self.server.folder / name
        if fault == "500" or fault == "403" or not path.is_file():
            return self._refuse(int(fault) if fault else 404)
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted and not self.server.ignores_ranges:
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        if fault == "truncated":  # with the Content-Length of the half, like a cache that kept half a file
            data = data[: len(data) // 2]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not with_body:
            return
        if fault in ("reset", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait()
            else:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RD)
            self.close_connection = True
            return
        self.wfile.write(data)
        self.server.sent[name] += len(data)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """Run the server in its own thread until the end of the block."""
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
