"""The wallet rules that need no database: what a command takes from or gives to a wallet."""

from reference.commands import Side


def reserve_of(side: Side, odds: int, stake_minor: int) -> int:
    """Return what a bet reserves, in minor units: the stake (BACK) or the liability (LAY), rounded up."""
    if side is Side.BACK:
        return stake_minor
    return -(-stake_minor * (odds - 100) // 100)
