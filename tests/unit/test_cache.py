"""A Redis that hangs costs a call one short wait."""

import asyncio

from reference.cache import Balance, Cache
from reference.config import ServerConfig, ServiceConfig


async def test_a_redis_that_hangs_is_asked_once_and_then_left_alone() -> None:
    connections = 0
    over = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await over.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    cache = Cache(
        ServiceConfig(
            servers=[ServerConfig(name="pg0", host="127.0.0.1", port=1, database="ledger")],
            routing=[0] * 100,
            passwords={},
            kafka_bootstrap="",
            redis_host="127.0.0.1",
            redis_port=port,
            redis_password="secret",
        )
    )
    try:
        found = await cache.get("pg0", 7)
        assert (found.balance, found.epoch) == (None, None)
        assert not cache.available
        assert await cache.put("pg0", "epoch", [Balance(7, 1, 1, 1)], 0.0) is None
        assert connections == 1
    finally:
        over.set()
        await cache.close()
        server.close()
