"""The closed loop over gRPC: so many calls under way at any time, each timed from sending to its whole answer.

The client is grpc.aio with the requests serialised beforehand. It costs several times what the service's own
side of a call does, so the row says which share of a core it used: near 1, it is the client that was measured.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import grpc

from ledgerproof.bench.plan import Plan, Window
from ledgerproof.bench.requests import draw_bets
from reference.proto import ledger_pb2 as pb

METHOD: Final = "/ledgerproof.v1.Ledger/PlaceBet"
CHANNELS_A_PORT: Final = 4
CALL_TIMEOUT_S: Final = 5.0
READY_TIMEOUT_S: Final = 5.0


class GrpcLoad:
    """One window. `run` plays it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._requests = [
            pb.PlaceBetRequest(
                user_id=bet.user_id,
                key=f"{plan.run}-{number}",
                match_id=bet.match_id,
                outcome=bet.outcome,
                side=bet.side,
                odds=bet.odds,
                stake_minor=bet.stake_minor,
            ).SerializeToString()
            for number, bet in enumerate(draw_bets(plan, plan.requests_max))
        ]
        self._metadata = (("authorization", f"Bearer {plan.token}"),)
        # A pool of its own for each: channels to one address would otherwise share a connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        places = [f"127.0.0.1:{port}" for port in plan.ports for _ in range(CHANNELS_A_PORT)]
        self._channels = [grpc.aio.insecure_channel(place, options) for place in places]
        self._sent = 0
        self._latencies: list[float] = []
        self._codes: Counter[str] = Counter()
        self._accepted = 0
        self._problem = ""
        self._ended = 0.0

    async def connect(self) -> None:
        """Open every channel. Raises TimeoutError."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def run(self) -> Window:
        """Play the window and return what was measured."""
        began, cpu = time.perf_counter(), time.process_time()
        requests = iter(self._requests)
        calls = [
            self._calls(self._channels[number % len(self._channels)].unary_unary(METHOD), requests, began)
            for number in range(self._plan.connections)
        ]
        await asyncio.gather(*calls)
        cpu_s = time.process_time() - cpu
        await asyncio.gather(*(channel.close() for channel in self._channels))
        return self._window(cpu_s)

    async def _calls(self, place: Any, requests: Iterator[bytes], began: float) -> None:
        for request in requests:
            sent = time.perf_counter()
            if sent - began >= self._plan.duration_s:
                return
            self._sent += 1
            try:
                answer = await place(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                self._codes[error.code().name] += 1
                self._problem = self._problem or f"{error.code().name}: {error.details()}"
                continue
            now = time.perf_counter()
            self._ended = now - began
            self._latencies.append(now - sent)
            outcome = pb.CommandReply.FromString(answer).outcome
            self._codes["OK" if outcome == "ACCEPTED" else outcome] += 1
            self._accepted += outcome == "ACCEPTED"

    def _window(self, cpu_s: float) -> Window:
        ordered = sorted(self._latencies)
        ordered += [float("inf")] * (self._sent - len(ordered))
        answered = len(self._latencies)
        return Window(
            loop="closed",
            duration_s=self._ended or self._plan.duration_s,
            due=self._sent,
            answered=answered,
            accepted=self._accepted,
            statuses=dict(self._codes),
            p50_ms=_quantile_ms(ordered, 0.5),
            p99_ms=_quantile_ms(ordered, 0.99),
            max_ms=_quantile_ms(ordered, 1.0),
            accepted_p50_ms=_quantile_ms(ordered, 0.5),
            accepted_p99_ms=_quantile_ms(ordered, 0.99),
            lag_p99_ms=0.0,
            lag_max_ms=0.0,
            queued=0,
            connections=len(self._channels),
            lost=self._sent - answered,
            unreadable=0,
            marks={},
            counted=0,
            cpu_s=cpu_s,
            priority="as every process",
            first_problem=self._problem,
        )


def _quantile_ms(ordered: list[float], share: float) -> float | None:
    if not ordered:
        return None
    value = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return None if value == float("inf") else round(value * 1000, 3)
