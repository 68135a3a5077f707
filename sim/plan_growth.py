"""A plan over the number of users: the same assumptions, from a small site to the largest that is asked for."""

from typing import Final

import msgspec
import numpy as np

from sim.demands import Demands
from sim.plan import Figures, Plan, Prices, PriceTable, calculate

USERS: Final = tuple(int(users) for users in np.round(np.geomspace(1e4, 1e7, 25), -3))
"""Users of the curve, evenly apart on a logarithmic scale."""


def growth(plan: Plan, demands: Demands, prices: Prices, users: tuple[int, ...] = USERS) -> list[tuple[int, Figures]]:
    """Return the plan's figures at each number of users, all else as the plan assumes it."""
    demand = {name: each.value for name, each in demands.demand.items()}
    price = {name: getattr(prices.price, name).value for name in PriceTable.__struct_fields__}
    return [(number, calculate(msgspec.structs.replace(plan.assume, users=number), demand, price)) for number in users]
