"""Stock pacing, to be shown beside ours: Locust's own `constant_throughput` users, who wait for their answers."""

from locust import FastHttpUser, constant_throughput, events, task
from locust.env import Environment

from load.freezes import STOCK_RATE_A_USER


class Paced(FastHttpUser):
    """Asks for at most STOCK_RATE_A_USER requests per second, one after the other."""

    wait_time = constant_throughput(STOCK_RATE_A_USER)

    @task
    def deposit(self) -> None:
        """Do a deposit."""
        self.client.post("/v1/wallets/1/deposits", json={"amount_minor": 100}, name="deposit")


def succeed(environment: Environment, **_: object) -> None:
    """Leave the verdict to whoever compares."""
    environment.process_exit_code = 0


events.quitting.add_listener(succeed)  # type: ignore[no-untyped-call]
