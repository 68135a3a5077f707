"""Figures and tables of the models: they show what they were given, and say it in words."""

import re

import msgspec
import numpy as np
import pytest

from reports.notebook import show
from reports.sim_plots import (
    POINTS_MAX,
    _short,
    _thinned,
    draw_growth,
    draw_policies,
    draw_recoveries,
    policy_table,
    recovery_table,
)
from sim.demands import read_demands
from sim.failures import FAILURES_TOML, Failures, simulate
from sim.plan import PLANS, read_plan, read_prices
from sim.plan_growth import USERS, growth
from sim.scaling import compare, traces
from sim.scaling_world import SCALING_TOML, World
from sim.tables import read_toml

WORLD = msgspec.structs.replace(read_toml(SCALING_TOML, World), replications=2)
FOUND = simulate(msgspec.structs.replace(read_toml(FAILURES_TOML, Failures), replications=200))


@pytest.mark.parametrize("role", ["consumers", "api"])
def test_policies_are_drawn_with_a_line_each_and_the_limit(role: str) -> None:
    drawn = traces(WORLD, role, "steady")  # type: ignore[arg-type]
    plot = draw_policies(WORLD, role, "steady", drawn)  # type: ignore[arg-type]
    assert [key.text for key in plot.legend][:-1] == list(drawn)
    assert len({(key.variable, key.dashes) for key in plot.legend}) == len(plot.legend), "told apart without colour"
    for svg in (plot.wide, plot.narrow):
        assert svg.startswith("<svg ")
        assert "#01a0" not in svg, "every colour is one of the page's"
        assert "nan" not in svg
    assert "seed peaks at" in plot.description


def test_the_table_of_policies_has_their_verdicts() -> None:
    table = policy_table(WORLD, compare(WORLD, roles=["consumers"], shapes=["steady"]))
    assert table is not None
    verdicts = {row.cells[1].text: row.cells[-1].text for row in table.rows}
    assert verdicts["seed"] == "no"
    assert verdicts["best"] == "yes"


def test_recoveries_are_drawn_and_told() -> None:
    plot = draw_recoveries(FOUND.recoveries)
    for recovery in FOUND.recoveries:
        assert recovery.name in plot.wide
        assert recovery.name in plot.narrow
    table = recovery_table(FOUND.recoveries)
    assert table is not None
    assert [row.cells[0].text for row in table.rows] == [recovery.name for recovery in FOUND.recoveries]


def test_costs_grow_with_users_and_fall_for_each() -> None:
    plan, demands, prices = read_plan(PLANS / "million.toml"), read_demands(), read_prices()
    curve = growth(plan, demands, prices)
    costs = [figures.numbers["cost"] for _, figures in curve]
    assert [users for users, _ in curve] == list(USERS)
    assert costs == sorted(costs)
    assert costs[0] / USERS[0] > costs[-1] / USERS[-1]
    (million,) = growth(plan, demands, prices, (1_000_000,))
    assert min(costs) < million[1].numbers["cost"] < max(costs)
    assert "of a month in USD" in draw_growth(curve, "USD").description


def test_thinning_keeps_peaks_and_bounds_points() -> None:
    values = np.zeros(20_000)
    values[777] = 5.0
    at, thinned = _thinned(values, np.max)
    assert len(thinned) <= POINTS_MAX
    assert thinned.max() == 5
    assert at[int(thinned.argmax())] * 60 <= 777 < at[int(thinned.argmax()) + 1] * 60


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (999, "999"), (25_000, "25\u00a0k"), (3e6, "3\u00a0M")])
def test_amounts_are_short(value: float, text: str) -> None:
    assert _short(value) == text


def test_what_is_shown_carries_its_colours_and_is_told_in_words() -> None:
    plot = draw_recoveries(FOUND.recoveries)
    shown = show("a sentence", plot, None, recovery_table(FOUND.recoveries))
    html = shown._repr_html_()
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", html))
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", html)), "every variable that is used is defined"
    assert "<p>a sentence</p>" in html
    assert html.count("<table") == 1
    assert repr(shown).startswith(f"a sentence\n{plot.description}")
    assert show("<b>")._repr_html_().count("&lt;b&gt;") == 1
