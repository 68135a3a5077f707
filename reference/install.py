"""Prepares empty servers and the broker: roles, database, schema, partitions, functions, grants, topics.

Safe to repeat: what is there already is left alone.
"""

import base64
import hashlib
import hmac
import secrets

import asyncpg

from reference.bus import create_topics
from reference.config import ROLES, ServiceConfig
from reference.routing import shards_of_server
from reference.sql import load_sql
from reference.store import connect

INSTALL_TIMEOUT_MS = 60_000
SCRAM_ITERATIONS = 4096
"""Postgres' own default; the passwords are random, so that more would protect nothing."""


async def install_server(config: ServiceConfig, index: int, superuser: str, password: str) -> None:
    """Install the schema on one server, with partitions for the logical shards it holds."""
    server = config.servers[index]
    maintenance = await connect(
        server, superuser, password, statement_timeout_ms=INSTALL_TIMEOUT_MS, database="postgres"
    )
    try:
        for role in ROLES:
            await _create_role(maintenance, role, config.passwords[role])
        if not await maintenance.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", server.database):
            await maintenance.execute(f'CREATE DATABASE "{server.database}"')
    finally:
        await maintenance.close()
    owner = await connect(server, superuser, password, statement_timeout_ms=INSTALL_TIMEOUT_MS)
    try:
        if not await owner.fetchval("SELECT to_regclass('server_identity') IS NOT NULL"):
            await _create_schema(owner, config, index)
    finally:
        await owner.close()


async def _create_role(connection: asyncpg.Connection, role: str, password: str) -> None:
    exists = await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role)
    verb = "ALTER" if exists else "CREATE"
    # Utility statements take no parameters; quote_literal makes the password safe.
    literal = await connection.fetchval("SELECT quote_literal($1::text)", scram_verifier(password))
    await connection.execute(f'{verb} ROLE "{role}" LOGIN PASSWORD {literal}')


def scram_verifier(password: str, salt: bytes | None = None) -> str:
    """Return what Postgres stores of a password (RFC 5803), so that the password itself is in no statement.

    A statement may be logged, by whom and why ever. Passwords are expected to be ASCII, as SASLprep leaves those as
    they are. Raises ValueError for others.
    """
    if not password.isascii():
        raise ValueError("passwords of database roles must be ASCII")
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, SCRAM_ITERATIONS)
    client = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    texts = [base64.b64encode(part).decode() for part in (salt, client, server)]
    return f"SCRAM-SHA-256${SCRAM_ITERATIONS}:{texts[0]}${texts[1]}:{texts[2]}"


async def _create_schema(connection: asyncpg.Connection, config: ServiceConfig, index: int) -> None:
    schema, functions, reconciliation = load_sql("schema"), load_sql("functions"), load_sql("reconciliation")
    server, shards = config.servers[index], shards_of_server(config.routing, index)
    async with connection.transaction():
        await connection.execute(schema["schema"])
        await connection.execute("INSERT INTO server_identity (server_name) VALUES ($1)", server.name)
        routes = [(shard, config.servers[holder].name, holder == index) for shard, holder in enumerate(config.routing)]
        await connection.executemany("INSERT INTO shard_routes (shard, server_name, here) VALUES ($1, $2, $3)", routes)
        for shard in shards:
            await connection.execute(schema["partition"].replace("{shard}", str(shard)))
        await connection.execute(reconciliation["schema"])
        await connection.execute(functions["functions"])
        await connection.execute(reconciliation["functions"])
        await connection.execute(functions["grants"])
        await connection.execute(reconciliation["grants"])
        await connection.execute(reconciliation["connections"].replace("{database}", f'"{server.database}"'))


async def install(config: ServiceConfig, superuser: str, password: str) -> None:
    """Install every server and create the topics."""
    for index in range(len(config.servers)):
        await install_server(config, index, superuser, password)
    create_topics(config)
