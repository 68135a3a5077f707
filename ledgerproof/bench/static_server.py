"""A responder that does nothing: what the generator reaches against it is the generator's own ceiling.

`python -m ledgerproof.bench.static_server` prints the port it listens on and answers every request with the same
bytes until its standard input ends.
"""

import asyncio
import os
import sys

import uvloop

ANSWER = b"HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Responder(asyncio.Protocol):
    """Answers each request; requests without a body, or with one that comes in the same piece."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Answer."""
        if self._transport is not None:
            self._transport.write(ANSWER * max(1, data.count(b"\r\n\r\n")))


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Responder, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 1) else ended.set())
    await ended.wait()
    server.close()


def main() -> int:
    """Serve until standard input ends."""
    uvloop.run(_serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
