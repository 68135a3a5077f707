"""The service's pure rules do what the model of the exchange says, whatever is asked of them in whatever order."""

from tests.depth import depth
from tests.machine.exchange_machine import ExchangeMachine
from tests.machine.pure_exchange import PureExchange


class PureRules(ExchangeMachine):
    """Posting, order book and settlement in memory."""

    def open_system(self, commission_bps: int) -> PureExchange:
        return PureExchange(commission_bps)


TestPureRules = PureRules.TestCase
TestPureRules.settings = depth(ci=80, nightly=3_000)
