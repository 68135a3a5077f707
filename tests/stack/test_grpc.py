"""The gRPC door on the real stack: the same commands as over HTTP, its status codes, and a fuzz of every method."""

import asyncio
import time
import uuid

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reference.auth import Scope
from reference.proto import ledger_pb2 as pb
from reference.proto import ledger_pb2_grpc
from reference.routing import even_routing, shard_of
from reference.uuid7 import uuid7

Code = grpc.StatusCode


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
async def channel(stack):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stack.grpc_port('api0')}") as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return ledger_pb2_grpc.LedgerStub(channel)


@pytest.fixture
def allowed(stack):
    return metadata(stack.token())


def new_user() -> int:
    return uuid.uuid4().int % 10**15 + 1


async def new_match(stub, allowed) -> str:
    match_id = str(uuid7())
    reply = await stub.CreateMatch(
        pb.CreateMatchRequest(match_id=match_id, closes_at_ms=int(time.time() * 1000) + 3_600_000), metadata=allowed
    )
    assert (reply.outcome, reply.state) == ("ACCEPTED", "OPEN")
    return match_id


def bet(user_id: int, match_id: str, key: str, **changes) -> pb.PlaceBetRequest:
    fields = {"match_id": match_id, "outcome": "HOME", "side": pb.BACK, "odds": 250, "stake_minor": 100} | changes
    return pb.PlaceBetRequest(user_id=user_id, key=key, **fields)


async def status_of(call) -> tuple[Code, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), dict(raised.value.trailing_metadata() or ())


async def test_a_wallet_lives_through_every_command_and_agrees_with_http(stub, allowed, stack, operator) -> None:
    user_id, match_id = new_user(), await new_match(stub, allowed)
    paid = await stub.Deposit(pb.DepositRequest(user_id=user_id, key="in", amount_minor=1_000), metadata=allowed)
    assert (paid.outcome, paid.seq, paid.balance_minor, paid.replayed) == ("ACCEPTED", 1, 1_000, False)
    placed = await stub.PlaceBet(bet(user_id, match_id, "b"), metadata=allowed)
    assert (placed.outcome, placed.balance_minor) == ("ACCEPTED", 900)
    again = await stub.PlaceBet(bet(user_id, match_id, "b"), metadata=allowed)
    assert (again.replayed, again.bet_id, again.seq) == (True, placed.bet_id, placed.seq)
    other = await stub.PlaceBet(bet(user_id, match_id, "b", odds=260), metadata=allowed)
    assert (other.outcome, other.field) == ("REPLAYED_DIFFERENTLY", "odds")
    poor = await stub.Withdraw(pb.WithdrawRequest(user_id=user_id, key="w", amount_minor=901), metadata=allowed)
    assert (poor.outcome, poor.seq) == ("INSUFFICIENT_FUNDS", 0)
    view = await stub.GetBet(pb.GetBetRequest(user_id=user_id, bet_id=placed.bet_id), metadata=allowed)
    assert (view.side, view.stake_minor, view.match_id) == (pb.BACK, 100, match_id)
    done = await stub.CancelBet(pb.CancelBetRequest(user_id=user_id, key="c", bet_id=placed.bet_id), metadata=allowed)
    assert (done.outcome, done.bet_id) == ("ACCEPTED", placed.bet_id)
    back = await stub.Rollback(pb.RollbackRequest(user_id=user_id, key="never"), metadata=allowed)
    assert (back.outcome, back.bet_id) == ("ACCEPTED", "")
    late = await stub.PlaceBet(bet(user_id, match_id, "never"), metadata=allowed)
    assert late.outcome == "ROLLED_BACK"
    deadline = time.monotonic() + 20
    while True:
        balance = await stub.GetBalance(pb.GetBalanceRequest(user_id=user_id, strong=True), metadata=allowed)
        if balance.balance_minor == 1_000:
            break
        assert time.monotonic() < deadline, balance
        await asyncio.sleep(0.05)
    assert (balance.source, balance.stale) == ("ledger", False)
    closed = await stub.CloseMatch(pb.MatchRequest(match_id=match_id), metadata=allowed)
    assert closed.state == "CLOSED"
    settled = await stub.SettleMatch(pb.SettleMatchRequest(match_id=match_id, result="HOME"), metadata=allowed)
    assert settled.outcome == "ACCEPTED"
    illegal = await stub.VoidMatch(pb.MatchRequest(match_id=match_id), metadata=allowed)
    assert illegal.outcome == "ILLEGAL_TRANSITION"
    early = pb.ResettleMatchRequest(match_id=str(uuid7()), key="r", result="AWAY")
    assert (await stub.ResettleMatch(early, metadata=allowed)).outcome == "UNKNOWN_MATCH"
    match = await stub.GetMatch(pb.MatchRequest(match_id=match_id), metadata=allowed)
    assert (match.state in ("SETTLING", "SETTLED"), match.result) == (True, "HOME")


async def test_a_bulk_answers_each_command_with_its_own_code(stub, allowed) -> None:
    user_id, match_id = new_user(), await new_match(stub, allowed)
    commands = [
        pb.BulkCommand(deposit=pb.DepositRequest(user_id=user_id, key="in", amount_minor=150)),
        pb.BulkCommand(bet=bet(user_id, match_id, "b1")),
        pb.BulkCommand(bet=bet(user_id, match_id, "b2")),
        pb.BulkCommand(bet=bet(user_id, "not-a-match", "b3")),
        pb.BulkCommand(),
        pb.BulkCommand(deposit=pb.DepositRequest(user_id=user_id, key="in", amount_minor=150)),
    ]
    reply = await stub.Bulk(pb.BulkRequest(commands=commands), metadata=allowed)
    assert [result.code for result in reply.results] == [0, 0, 0, 3, 3, 0]
    assert [result.reply.outcome for result in reply.results[:3]] == ["ACCEPTED", "ACCEPTED", "INSUFFICIENT_FUNDS"]
    assert reply.results[5].reply.replayed
    code, _ = await status_of(stub.Bulk(pb.BulkRequest(), metadata=allowed))
    assert code is Code.INVALID_ARGUMENT


async def test_status_codes_say_who_may_what(stub, stack) -> None:
    user_id = new_user()
    request = pb.DepositRequest(user_id=user_id, key="k", amount_minor=5)
    assert (await status_of(stub.Deposit(request)))[0] is Code.UNAUTHENTICATED
    assert (await status_of(stub.Deposit(request, metadata=metadata("forged"))))[0] is Code.UNAUTHENTICATED
    expired = metadata(stack.token(Scope.SERVICE, ttl_s=-60))
    assert (await status_of(stub.Deposit(request, metadata=expired)))[0] is Code.UNAUTHENTICATED
    own = metadata(stack.token(Scope.WALLET, user_id=user_id))
    assert (await stub.Deposit(request, metadata=own)).outcome == "ACCEPTED"
    stranger = metadata(stack.token(Scope.WALLET, user_id=user_id + 1))
    assert (await status_of(stub.Deposit(request, metadata=stranger)))[0] is Code.PERMISSION_DENIED
    create = pb.CreateMatchRequest(match_id=str(uuid7()), closes_at_ms=1)
    assert (await status_of(stub.CreateMatch(create, metadata=own)))[0] is Code.PERMISSION_DENIED
    bulk = pb.BulkRequest(commands=[pb.BulkCommand(deposit=request)])
    assert (await stub.Bulk(bulk, metadata=stranger)).results[0].code == Code.PERMISSION_DENIED.value[0]
    code, trailing = await status_of(
        stub.Deposit(pb.DepositRequest(user_id=user_id, key="k2", amount_minor=0), metadata=own)
    )
    assert (code, trailing["field"]) == (Code.INVALID_ARGUMENT, "amount_minor")
    missing = pb.GetBalanceRequest(user_id=user_id + 1, as_of_ms=0)
    assert (await status_of(stub.GetBalance(missing, metadata=stranger)))[0] is Code.NOT_FOUND


async def test_a_deadline_ends_a_call_and_its_repetition_learns_the_outcome(stub, allowed, superuser_dsn) -> None:
    user_id = new_user()
    request = pb.DepositRequest(user_id=user_id, key="k", amount_minor=5)
    server = even_routing(len(superuser_dsn))[shard_of(user_id)]
    holder = await asyncpg.connect(superuser_dsn[server])
    try:
        # Whoever posts to the wallet waits for this lock.
        await holder.execute("SELECT pg_advisory_lock($1)", user_id)
        call = stub.Deposit(request, metadata=allowed, timeout=1, wait_for_ready=True)
        assert (await status_of(call))[0] is Code.DEADLINE_EXCEEDED
    finally:
        await holder.close()
    again = await stub.Deposit(request, metadata=allowed)
    assert (again.outcome, again.seq, again.balance_minor) == ("ACCEPTED", 1, 5)


async def test_health_and_reflection_answer(channel, stack) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="ledgerproof.v1.Ledger"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await status_of(health.Check(health_pb2.HealthCheckRequest(service="x"))))[0] is Code.NOT_FOUND
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
    async for said in call:
        services = {service.name for service in said.list_services_response.service}
        break
    assert {"ledgerproof.v1.Ledger", "grpc.health.v1.Health"} <= services


# -- fuzz ------------------------------------------------------------------------------------------------

TEXT = st.one_of(
    st.text(max_size=300), st.sampled_from(["", "HOME", "k", "\x00", "'; DROP TABLE bets; --"]), st.uuids().map(str)
)
NUMBER = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 1000))
SMALL = st.integers(-(2**31), 2**31 - 1)


def of(message):
    """A strategy of messages of a type, by the types of its fields."""
    fields = {}
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            inner = of(getattr(pb, field.message_type.name))
        elif field.enum_type is not None:
            inner = st.integers(0, 5)
        elif field.cpp_type == field.CPPTYPE_STRING:
            inner = TEXT
        elif field.cpp_type == field.CPPTYPE_BOOL:
            inner = st.booleans()
        else:
            inner = SMALL if field.cpp_type == field.CPPTYPE_INT32 else NUMBER
        fields[field.name] = st.lists(inner, max_size=4) if field.is_repeated else inner
    if message is pb.BulkCommand:
        return st.one_of(
            st.just({}), *(inner.map(lambda value, n=name: {n: value}) for name, inner in fields.items())
        ).map(lambda said: message(**said))
    return st.fixed_dictionaries({}, optional=fields).map(lambda said: message(**said))


REQUESTS = {
    method.name: getattr(pb, method.input_type.name) for method in pb.DESCRIPTOR.services_by_name["Ledger"].methods
}
ACCEPTABLE = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.PERMISSION_DENIED,
    Code.NOT_FOUND,
    Code.UNAVAILABLE,
}


@pytest.mark.parametrize("method", REQUESTS)
def test_no_message_makes_a_method_fail(stack, method) -> None:
    allowed = metadata(stack.token())
    with grpc.insecure_channel(f"127.0.0.1:{stack.grpc_port('api0')}") as channel:
        call = getattr(ledger_pb2_grpc.LedgerStub(channel), method)

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(of(REQUESTS[method]))
        def fuzz(message) -> None:
            try:
                call(message, metadata=allowed, timeout=20)
            except grpc.RpcError as error:
                assert error.code() in ACCEPTABLE, (error.code(), error.details(), message)

        fuzz()
        raw = channel.unary_unary(f"/ledgerproof.v1.Ledger/{method}", request_serializer=bytes)
        with pytest.raises(grpc.RpcError) as raised:
            raw(b"\xff\xff\xff", metadata=allowed, timeout=20)
        assert raised.value.code() is Code.INVALID_ARGUMENT
