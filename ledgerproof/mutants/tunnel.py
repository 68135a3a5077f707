"""A way to a server that can be made bad: answers that get lost, requests that never arrive, answers that are late.

The service connects to the tunnel as if it were the server. So a commit can succeed while its answer is lost, at a
moment that the scenario chooses, without a word of this in the service.
"""

import asyncio
import contextlib
from enum import Enum
from typing import Final

CHUNK: Final = 65_536


class Weather(Enum):
    """What becomes of the next bytes."""

    FAIR = "all pass"
    DEAF = "the server gets the request, and its answer is thrown away with the connection"
    CUT = "the request is thrown away with the connection"


class Tunnel:
    """Forwards connections of one local port to another."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.weather = Weather.FAIR
        self.open = asyncio.Event()
        """While it is clear, answers wait."""
        self.open.set()
        self.lost = 0
        """Requests or answers thrown away so far."""

    async def start(self) -> int:
        """Listen, and return the port. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Drop every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a server runs its callback in a task"
        self._tasks.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        ways = [
            asyncio.create_task(self._forward(reader, far_writer, answers=False)),
            asyncio.create_task(self._forward(far_reader, writer, answers=True)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.transport.abort()
            # In order towards the server: it must see an end, and what it was sent before.
            with contextlib.suppress(OSError):
                far_writer.close()
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        bad = Weather.DEAF if answers else Weather.CUT
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                if answers:
                    await self.open.wait()
                if self.weather is bad:
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()
