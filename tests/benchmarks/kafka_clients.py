"""Measures what it costs to send and receive the service's events with each Kafka client for Python.

    .venv/bin/python tests/benchmarks/kafka_clients.py [--messages 30000] [--rounds 3]

Starts one real broker. Each client, in a process of its own, sends batches of 1,000 events and waits until the
broker acknowledged all of a batch (acks=all, idempotent, as the relay does), then reads them back. The
clocks start when the producer has its id and when the first batch was received. CPU time counts all threads of the
client's process. aiokafka, which the project does not depend on, is installed, pinned, into a throw-away environment.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from statistics import median
from uuid import uuid4

from measuring import described, machine, python_with, ratios, spread

BATCH = 1000
PARTITIONS = 8
LINGER_MS = 2
TIMEOUT_S = 60.0
KEY = b"12345"
VALUE = json.dumps(
    {
        "user_id": 12345,
        "seq": 67,
        "type": "PAYOUT",
        "amount": 2500,
        "balance": 123456,
        "contra": "ESCROW",
        "match_id": "019a0000-0000-7000-8000-000000000001",
        "bet_id": "019a0000-0000-7000-8000-000000000002",
        "settlement_version": 1,
    }
).encode()
HEADERS = [("event-id", b"019a0000-0000-7000-8000-000000000003"), ("event-type", b"EntryPosted")]
PINNED = {"aiokafka": "0.14.0"}
MEASURES = ("send, CPU µs", "send, wall µs", "receive, CPU µs", "receive, wall µs")


class Clock:
    """CPU and wall time of this process since it was made."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = time.perf_counter(), time.process_time()

    def read_us(self, messages: int) -> tuple[float, float]:
        """Return CPU and wall time in µs a message."""
        return (
            1e6 * (time.process_time() - self.cpu_s) / messages,
            1e6 * (time.perf_counter() - self.wall_s) / messages,
        )


def confluent(bootstrap: str, topic: str, messages: int) -> list[float]:
    """Measure confluent-kafka; return µs an event, in the order of MEASURES."""
    kafka = import_module("confluent_kafka")
    producer = kafka.Producer(
        {"bootstrap.servers": bootstrap, "acks": "all", "enable.idempotence": True, "linger.ms": LINGER_MS}
    )
    failures: list[object] = []

    def delivered(error: object, _message: object) -> None:
        if error is not None:
            failures.append(error)

    def send(count: int = messages) -> None:
        for first in range(0, count, BATCH):
            for number in range(first, min(first + BATCH, count)):
                producer.produce(topic, VALUE, b"%d" % number, headers=HEADERS, on_delivery=delivered)
            if producer.flush(TIMEOUT_S) or failures:
                raise RuntimeError(f"not acknowledged: {failures[:1]}")

    send(1)  # connect and get a producer id before the clock runs

    consumer = kafka.Consumer(
        {"bootstrap.servers": bootstrap, "group.id": uuid4().hex, "auto.offset.reset": "earliest"}
    )

    def receive() -> tuple[float, float]:
        consumer.subscribe([topic])
        clock, before_clock, received = Clock(), 0, 0
        deadline = time.monotonic() + TIMEOUT_S
        while received < messages:
            if time.monotonic() > deadline:
                raise RuntimeError(f"received {received} of {messages}")
            received += sum(1 for message in consumer.consume(BATCH, 0.2) if message.error() is None)
            if received and not before_clock:
                clock, before_clock = Clock(), received
        spent = clock.read_us(received - before_clock)
        consumer.close()
        return spent

    clock = Clock()
    send()
    return [*clock.read_us(messages), *receive()]


def aiokafka(bootstrap: str, topic: str, messages: int) -> list[float]:
    """Measure aiokafka; return µs an event, in the order of MEASURES."""
    kafka = import_module("aiokafka")

    async def send() -> tuple[float, float]:
        producer = kafka.AIOKafkaProducer(
            bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=LINGER_MS
        )
        await producer.start()
        await producer.send_and_wait(topic, VALUE, b"0", headers=HEADERS)
        clock = Clock()
        for first in range(0, messages, BATCH):
            numbers = range(first, min(first + BATCH, messages))
            sent = [await producer.send(topic, VALUE, b"%d" % number, headers=HEADERS) for number in numbers]
            await asyncio.gather(*sent)
        spent = clock.read_us(messages)
        await producer.stop()
        return spent

    async def receive() -> tuple[float, float]:
        consumer = kafka.AIOKafkaConsumer(
            topic, bootstrap_servers=bootstrap, group_id=uuid4().hex, auto_offset_reset="earliest"
        )
        await consumer.start()
        clock, before_clock, received = Clock(), 0, 0
        async with asyncio.timeout(TIMEOUT_S):
            while received < messages:
                batches = await consumer.getmany(timeout_ms=200, max_records=BATCH)
                received += sum(len(batch) for batch in batches.values())
                if received and not before_clock:
                    clock, before_clock = Clock(), received
        spent = clock.read_us(received - before_clock)
        await consumer.stop()
        return spent

    uvloop = import_module("uvloop")
    return [*uvloop.run(send()), *uvloop.run(receive())]


CLIENTS: dict[str, Callable[[str, str, int], list[float]]] = {"confluent-kafka": confluent, "aiokafka": aiokafka}


def create_topic(bootstrap: str, topic: str) -> None:
    """Create a topic; raises KafkaException if the broker refuses."""
    admin = import_module("confluent_kafka.admin")
    client = admin.AdminClient({"bootstrap.servers": bootstrap})
    client.create_topics([admin.NewTopic(topic, PARTITIONS, 1)])[topic].result(TIMEOUT_S)


def measure(bootstrap: str, messages: int, rounds: int) -> dict[str, list[list[float]]]:
    """Return for each client one list of MEASURES a round."""
    samples: dict[str, list[list[float]]] = {name: [] for name in CLIENTS}
    extra = [f"{package}=={pin}" for package, pin in PINNED.items()]
    with python_with(extra, ["confluent-kafka", "uvloop"]) as python:
        for round_no in range(rounds):
            for name in CLIENTS:
                topic = f"bench.{name}.{round_no}"
                create_topic(bootstrap, topic)
                command = [str(python), __file__, "--client", name, "--bootstrap", bootstrap, "--topic", topic]
                command += ["--messages", str(messages)]
                child = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=4 * TIMEOUT_S)
                samples[name].append(json.loads(child.stdout))
            print(f"round {round_no + 1} of {rounds} done", file=sys.stderr, flush=True)
    return samples


def table(samples: dict[str, list[list[float]]]) -> str:
    """Return a Markdown table: medians in µs an event, with the ratio to the first client."""
    lines = ["| client | " + " | ".join(f"{measure} | ratio (range)" for measure in MEASURES) + " |"]
    lines.append("|---|" + "---|---|" * len(MEASURES))
    first = samples[next(iter(CLIENTS))]
    for name, rounds in samples.items():
        row = f"| {name} |"
        for number in range(len(MEASURES)):
            own, base = [r[number] for r in rounds], [r[number] for r in first]
            row += f" {median(own):.1f} | {spread(ratios(own, base))} |"
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    """Start a broker, measure both clients in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bootstrap", help="address of a running broker; without it one is started")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--topic", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        json.dump(CLIENTS[args.client](args.bootstrap, args.topic, args.messages), sys.stdout)
        return
    if args.bootstrap:
        samples = measure(args.bootstrap, args.messages, args.rounds)
    else:
        stack = import_module("compose.stack").Stack
        spec = import_module("compose.state").StackSpec(servers=1, only="infra")
        with stack.start(spec) as started:
            samples = measure(f"127.0.0.1:{started.port('kafka')}", args.messages, args.rounds)
    print(f"{described(machine())}  {args.messages:,} events of {len(VALUE)} bytes a round, {args.rounds} rounds")
    print(table(samples))


if __name__ == "__main__":
    main()
