"""Every database role does its own work and nothing else: each test tries, on a real server."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from reference.config import ROLES, ServiceConfig
from reference.errors import ServerUnavailable
from reference.store import Store, connect

SERVER = 0

NOBODY_MAY = (
    "INSERT INTO wallet_ledger SELECT * FROM wallet_ledger LIMIT 0",
    "INSERT INTO wallet_ledger_0 SELECT * FROM wallet_ledger_0 LIMIT 0",
    "UPDATE wallet_ledger SET amount = 1",
    "UPDATE wallet_ledger_0 SET amount = 1",
    "DELETE FROM wallet_ledger",
    "DELETE FROM wallet_ledger_0",
    "TRUNCATE wallet_ledger",
    "TRUNCATE wallet_ledger_0",
    "DROP TABLE wallet_ledger",
    "DROP TRIGGER wallet_ledger_immutable ON wallet_ledger",
    "ALTER TABLE wallet_ledger DISABLE TRIGGER ALL",
    "ALTER TABLE wallet_ledger_0 DISABLE TRIGGER ALL",
    "ALTER TABLE wallet_ledger DROP CONSTRAINT wallet_ledger_funds",
    "SET session_replication_role = replica",
    "LOCK TABLE wallet_ledger IN ACCESS EXCLUSIVE MODE",
    "UPDATE bets SET stake = 1",
    "DELETE FROM bets",
    "DELETE FROM refusals",
    "UPDATE refusals SET outcome = 'ACCEPTED'",
    "DELETE FROM events",
    "UPDATE events SET payload = '{}'",
    "UPDATE events SET partition_key = '1'",
    "DELETE FROM match_transitions",
    "DELETE FROM settlements",
    "UPDATE fills SET odds = 101",
    "DELETE FROM orders",
    "DELETE FROM wallet_balance_projection",
    "UPDATE payout_gate SET paused = false",
    "DELETE FROM payout_changes",
    "UPDATE payout_changes SET changed_by = 'somebody else'",
    "UPDATE server_identity SET server_name = 'another'",
    "CREATE TABLE public.mine (a integer)",
    "CREATE TEMP TABLE mine (a integer)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION public.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION public.payouts_open() RETURNS void LANGUAGE sql AS ''",
    "CREATE VIEW public.mine AS SELECT 1",
    "CREATE DATABASE mine",
    "CREATE ROLE mine",
    "DROP EXTENSION plpgsql",
    "ALTER ROLE postgres PASSWORD 'mine'",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
    "ALTER SYSTEM SET fsync = off",
    "SELECT pg_reload_conf()",
    "SELECT rolpassword FROM pg_authid",
    "SELECT passwd FROM pg_shadow",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_ls_dir('.')",
    "SELECT lo_import('/etc/passwd')",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY (SELECT 1) TO '/tmp/ledger-roles'",
    "SELECT pg_switch_wal()",
    "SELECT pg_create_physical_replication_slot('mine')",
)

MAY_CALL = {
    "ledger_post": {"ledger_api", "ledger_settler"},
    "ledger_answers": {"ledger_api"},
    "match_create": {"ledger_api"},
    "match_transition": {"ledger_api"},
    "bet_cancel": {"ledger_api"},
    "shard_accept": {"ledger_api"},
    "payouts_open": set(),
    "payouts_pause": {"ledger_reconciler", "ledger_operator"},
    "payouts_resume": {"ledger_operator"},
}
"""Who may call what; a function that is not here may be nobody's but still not everybody's."""

MAY_WRITE = {
    "ledger_api": set(),
    "ledger_relay": {"events"},
    "ledger_matcher": {"matches", "orders", "cancels", "fills", "events"},
    "ledger_settler": {"matches", "orders", "settlements", "match_transitions"},
    "ledger_projector": {"wallet_balance_projection"},
    "ledger_auditor": set(),
    "ledger_reconciler": {
        "reconciliations",
        "reconciliation_findings",
        "reconciliation_positions",
        "reconciliation_marks",
    },
    "ledger_operator": set(),
}

MUST = {
    "ledger_api": ("SELECT count(*) FROM wallet_ledger", "SELECT * FROM ledger_answers('{}', '{}')"),
    "ledger_relay": (
        "SELECT * FROM events WHERE NOT published_to_kafka LIMIT 1",
        "UPDATE events SET published_to_kafka = true, published_at = now() WHERE false",
    ),
    "ledger_matcher": ("SELECT * FROM matches LIMIT 1 FOR UPDATE", "INSERT INTO fills SELECT * FROM fills WHERE false"),
    "ledger_settler": (
        "UPDATE settlements SET last_arrival = last_arrival WHERE false",
        "SELECT * FROM ledger_post('Settler', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', "
        "'{}', '{}')",
    ),
    "ledger_projector": (
        "UPDATE wallet_balance_projection SET balance = balance WHERE false",
        "INSERT INTO wallet_balance_projection SELECT * FROM wallet_balance_projection WHERE false",
    ),
    "ledger_auditor": ("SELECT count(*) FROM wallet_ledger", "SELECT count(*) FROM payout_changes"),
    "ledger_reconciler": (
        "SELECT count(*) FROM wallet_ledger",
        "SELECT count(*) FROM events",
        "DELETE FROM reconciliations WHERE false",
        "SELECT payouts_pause('reconciler', 'tried by a test', NULL)",
    ),
    "ledger_operator": (
        "SELECT payouts_pause('operator', 'tried by a test', NULL)",
        "SELECT payouts_resume('operator', 'tried by a test')",
        "SELECT * FROM reconciliation_findings",
    ),
}


@pytest.fixture
async def owner(superuser_dsn: list[str]) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(superuser_dsn[SERVER])
    yield connection
    await connection.close()


def test_every_role_has_its_rows_in_these_tables() -> None:
    assert set(MAY_WRITE) == set(MUST) == set(ROLES)


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_cannot_do_what_nobody_may(service_config: ServiceConfig, role: str) -> None:
    connection = await Store(service_config, role).connect(SERVER)
    try:
        for statement in NOBODY_MAY:
            # Undone at once, should it go through; the two that no transaction may hold are only tried.
            alone = statement.startswith(("CREATE DATABASE", "ALTER SYSTEM"))
            done = connection.transaction()
            if not alone:
                await done.start()
            try:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
                    pytest.fail(f"{role} could: {statement}")
            finally:
                if not alone:
                    await done.rollback()
    finally:
        await connection.close()


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_can_do_its_own_work(service_config: ServiceConfig, role: str) -> None:
    connection = await Store(service_config, role).connect(SERVER)
    try:
        for statement in MUST[role]:
            done = connection.transaction()
            await done.start()
            await connection.execute(statement)
            await done.rollback()
    finally:
        await connection.close()


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_writes_only_its_own_tables(owner: asyncpg.Connection, role: str) -> None:
    query = """SELECT c.relname FROM pg_class c
                WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
                  AND (has_table_privilege($1, c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
                       OR has_any_column_privilege($1, c.oid, 'INSERT, UPDATE'))"""
    written = {row["relname"] for row in await owner.fetch(query, role)}
    assert MAY_WRITE[role] <= written
    forbidden = {"wallet_ledger", "bets", "refusals", "payout_gate", "payout_changes", "server_identity"}
    assert not {name for name in written if name in forbidden or name.startswith("wallet_ledger_")}
    others = set().union(*MAY_WRITE.values()) - MAY_WRITE[role]
    assert not written & others


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_calls_only_its_own_functions(owner: asyncpg.Connection, role: str) -> None:
    query = """SELECT p.proname FROM pg_proc p
                WHERE p.pronamespace = 'public'::regnamespace AND has_function_privilege($1, p.oid, 'EXECUTE')"""
    callable_ = {row["proname"] for row in await owner.fetch(query, role)}
    assert callable_ & set(MAY_CALL) == {name for name, roles in MAY_CALL.items() if role in roles}


async def test_the_owner_runs_functions_for_roles_only_with_a_fixed_search_path(owner: asyncpg.Connection) -> None:
    rows = await owner.fetch(
        "SELECT proname, proconfig FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace"
    )
    assert {row["proname"] for row in rows} >= set(MAY_CALL)
    for row in rows:
        assert row["proconfig"], row["proname"]
        assert any(setting == "search_path=pg_catalog, public" for setting in row["proconfig"]), row["proname"]


async def test_public_has_nothing(owner: asyncpg.Connection) -> None:
    for query in (
        """SELECT relname FROM pg_class, aclexplode(relacl) a
            WHERE relnamespace = 'public'::regnamespace AND a.grantee = 0""",
        """SELECT proname FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner))) a
            WHERE pronamespace = 'public'::regnamespace AND a.grantee = 0""",
        """SELECT nspname FROM pg_namespace, aclexplode(nspacl) a WHERE nspname = 'public' AND a.grantee = 0""",
        """SELECT datname FROM pg_database, aclexplode(coalesce(datacl, acldefault('d', datdba))) a
            WHERE a.grantee = 0 AND datallowconn""",
    ):
        assert await owner.fetch(query) == []
    later = owner.transaction()
    await later.start()
    await owner.execute("CREATE FUNCTION made_later() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
    assert not await owner.fetchval("SELECT has_function_privilege('ledger_api', 'made_later()', 'EXECUTE')")
    await later.rollback()


async def test_roles_have_no_attribute_and_no_membership(owner: asyncpg.Connection) -> None:
    rows = await owner.fetch(
        """SELECT rolname FROM pg_roles WHERE rolname = ANY ($1)
              AND (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls)""",
        list(ROLES),
    )
    assert rows == []
    assert await owner.fetch("SELECT FROM pg_auth_members WHERE member::regrole::text = ANY ($1)", list(ROLES)) == []


@pytest.mark.parametrize("database", ["postgres", "template1"])
async def test_a_role_connects_to_no_other_database(service_config: ServiceConfig, database: str) -> None:
    for role in ROLES:
        with pytest.raises(ServerUnavailable, match="permission denied"):
            await connect(
                service_config.servers[SERVER],
                role,
                service_config.passwords[role],
                statement_timeout_ms=1_000,
                database=database,
            )


async def test_a_role_does_not_get_in_with_anothers_password(service_config: ServiceConfig) -> None:
    for role, other in zip(ROLES, (*ROLES[1:], ROLES[0]), strict=True):
        with pytest.raises(ServerUnavailable, match="password authentication failed"):
            await connect(
                service_config.servers[SERVER], role, service_config.passwords[other], statement_timeout_ms=1_000
            )


async def test_stored_passwords_are_verifiers(owner: asyncpg.Connection, service_config: ServiceConfig) -> None:
    for row in await owner.fetch("SELECT rolname, rolpassword FROM pg_authid WHERE rolname = ANY ($1)", list(ROLES)):
        assert row["rolpassword"].startswith("SCRAM-SHA-256$4096:")
        assert service_config.passwords[row["rolname"]] not in row["rolpassword"]
