"""A34, A35: whether the service came back after what was done to it, and saw by itself what was planted in it."""

from typing import Final

import polars as pl

from invariants.anomalies.common import NOTHING, Found, found, seconds
from invariants.history import FINAL_RETRY, HUNG_UP
from invariants.run import Run

ERROR_SHARE_BOUND: Final = 0.1
"""Share of the requests of one second without an answer, or answered 5xx, up to which the service counts as back."""
BACKLOG_BOUND: Final = 1_000.0
"""Events not published, or records not consumed, up to which a backlog counts as caught up."""
BASELINE_FACTOR: Final = 2.0
"""Where it was worse than a bound before the first fault, twice as bad as then is back."""
BACKLOGS: Final = ("kafka_consumer_lag", "outbox_unpublished")
SECOND_S: Final = 1.0


def a34_no_recovery(run: Run) -> Found:
    """A34 no recovery: after a measured heal, errors or a backlog are not back under their bound in time.

    Faults that come before the earlier ones' time to recover is over are one storm; its time (`recover_within_s`)
    begins with the last measured end. Within it there must be

    - a second of requests of which no more than ERROR_SHARE_BOUND are errors (unknown, 5xx, or no connection), and
    - for each backlog (events of a server's outbox, lag of a consumer group) a sample of BACKLOG_BOUND or less. A
      backlog that was sampled before the storm and never again counts as not back.

    Where it was worse before the first fault, twice that is the bound. Where the requests or samples end before the
    time is over, nothing is said. A client that hung up on purpose is no error.
    """
    return judge_errors(run, errors_told(run)) + backlogs(run)


BEFORE: Final = 0
"""Number of no storm: the requests from before the first fault."""
_ERRORS: Final = {"storm": pl.Int64, "second": pl.Float64, "bad": pl.Int64, "requests": pl.Int64}


def _first_fault(run: Run) -> float:
    return float(str(run.requested_faults["requested"].min()))


def _storms(run: Run) -> pl.DataFrame:
    """Return the storms of measured faults: storm, faults (text), began, healed, deadline; seconds."""
    faults = run.requested_faults
    measured = faults.drop_nulls(["start", "end"]).sort("requested")
    if measured.is_empty():
        return pl.DataFrame()
    deadline = (pl.col("end") + run.config.recover_within_s).cum_max()
    storms = measured.with_columns((pl.col("requested") > deadline.shift(1)).fill_null(True).cum_sum().alias("storm"))
    return (
        storms.group_by("storm")
        .agg(
            (pl.col("fault") + " " + pl.col("node")).str.join(", ").alias("faults"),
            pl.col("requested").min().alias("began"),
            pl.col("end").max().alias("healed"),
            pl.col("fault_id").last(),
        )
        .with_columns((pl.col("healed") + run.config.recover_within_s).alias("deadline"))
        .sort("storm")
    )


def errors_told(run: Run) -> pl.DataFrame:
    """Return storm, second, bad, requests: how many requests were errors in each second after a storm (A34).

    Storm BEFORE counts the requests from before the first fault. Sums of slices add.
    """
    storms = _storms(run)
    if storms.is_empty():
        return pl.DataFrame(schema=_ERRORS)
    first_fault = _first_fault(run)
    own = run.attempts.filter(pl.col("tag").is_in([HUNG_UP, FINAL_RETRY]).fill_null(False).not_())
    bad = (
        (pl.col("cls") == "info")
        | (pl.col("status") >= 500).fill_null(False)
        | ((pl.col("cls") == "fail") & pl.col("status").is_null())
    )
    seen = own.select(pl.col("t_invoke").alias("t"), bad.alias("bad"))
    before = seen.filter(pl.col("t") < first_fault).with_columns(storm=pl.lit(BEFORE), second=pl.lit(0.0))
    after = seen.join(storms, how="cross").filter(
        (pl.col("t") >= pl.col("healed")) & (pl.col("t") < pl.col("deadline") + SECOND_S)
    )
    after = after.with_columns(((pl.col("t") - pl.col("healed")) / SECOND_S).floor().alias("second"))
    names = [pl.col(name).cast(kind) for name, kind in _ERRORS.items()]
    return pl.concat(
        [
            rows.group_by("storm", "second").agg(pl.col("bad").sum(), pl.len().alias("requests")).select(names)
            for rows in (before, after)
        ]
    )


def judge_errors(run: Run, sums: pl.DataFrame) -> Found:
    """Judge by `errors_told` whether the errors came back under their bound (A34)."""
    storms = _storms(run)
    if storms.is_empty():
        return NOTHING
    share = pl.col("bad") / pl.col("requests")
    summed = sums.group_by("storm", "second").agg(pl.col("bad").sum(), pl.col("requests").sum())
    before = summed.filter(pl.col("storm") == BEFORE).select(share).to_series().max()
    bound = max(ERROR_SHARE_BOUND, BASELINE_FACTOR * (float(before) if isinstance(before, float) else 0.0))
    by_second = summed.filter(pl.col("storm") != BEFORE).with_columns(share.alias("share"))
    judged = by_second.group_by("storm").agg(
        pl.col("share").min().alias("least"), pl.col("second").max().alias("last"), pl.col("requests").sum()
    )
    rows = (
        storms.with_columns(pl.col("storm").cast(pl.Int64))
        .join(judged, on="storm")
        .filter((pl.col("least") > bound) & (pl.col("last") * SECOND_S >= run.config.recover_within_s))
    )
    return found(
        "A34",
        rows,
        lambda row: (
            f"after {row['faults']} was healed at {seconds(row['healed'])}, in no second until"
            f" {seconds(row['deadline'])} were less than {row['least']:.0%} of the requests ({row['requests']} in all)"
            f" errors; the bound is {bound:.0%}"
        ),
    )


def backlogs(run: Run) -> Found:
    """Find the backlogs that did not come back under their bound (A34)."""
    storms = _storms(run)
    if storms.is_empty():
        return NOTHING
    first_fault = _first_fault(run)
    samples = run.series.filter(pl.col("name").is_in(BACKLOGS)).select("t", "name", "node", "value")
    if samples.is_empty():
        return NOTHING
    end = float(str(run.series["t"].max()))
    before = (
        samples.filter(pl.col("t") < first_fault)
        .group_by("name", "node")
        .agg((pl.col("value").max() * BASELINE_FACTOR).alias("baseline"))
    )
    pairs = samples.join(storms, how="cross")
    known = pairs.filter(pl.col("t") < pl.col("began")).select("storm", "name", "node").unique()
    within = (
        pairs.filter((pl.col("t") >= pl.col("healed")) & (pl.col("t") <= pl.col("deadline")))
        .group_by("storm", "name", "node")
        .agg(pl.col("value").min().alias("least"))
    )
    rows = (
        known.join(within, on=["storm", "name", "node"], how="full", coalesce=True, nulls_equal=True)
        .join(before, on=["name", "node"], how="left", nulls_equal=True)
        .join(storms, on="storm")
        .with_columns(pl.max_horizontal(pl.lit(BACKLOG_BOUND), "baseline").alias("bound"))
        # Samples that end before the time is over say nothing.
        .filter((pl.col("deadline") <= end) & (pl.col("least").is_null() | (pl.col("least") > pl.col("bound"))))
    )
    return found(
        "A34",
        rows.sort("storm", "name", "node"),
        lambda row: (
            f"after {row['faults']} was healed at {seconds(row['healed'])}, {row['name']} of {row['node']} "
            + ("was not reported any more" if row["least"] is None else f"did not fall below {row['least']:.0f}")
            + f" until {seconds(row['deadline'])}; the bound is {row['bound']:.0f}"
        ),
    )


def a35_blind_reconciliation(run: Run) -> Found:
    """A35 blind reconciliation: a planted drift that the service's own reconciliation did not report in time.

    The timeline says what was planted (`drift_planted`): in whose balance, how the reconciler names such a mismatch, by
    when, and whose passes count. It is blind when

    - a pass on that server that began after the drift was measured, saw everything (it is not INCOMPLETE) and ended
      before the repair did not report that name of that wallet, or
    - no pass had reported it when its time (`within_s`) was over.

    A drift that was repaired before either happened is V03's.
    """
    drifts = run.drifts
    if drifts.is_empty():
        return NOTHING
    over = pl.col("repaired").is_null() | (pl.col("repaired") >= pl.col("planted") + pl.col("within_s"))
    judged = drift_reports(run)
    return found(
        "A35",
        judged.filter(pl.col("blind") | (~pl.col("seen") & over)).sort("planted"),
        lambda row: (
            f"the balance of user {row['user']} on {row['node']} was made wrong at {seconds(row['planted'])}; "
            + (
                f"a later pass (run {row['blind_run']}) saw everything and did not report {row['code']} for it"
                if row["blind"]
                else f"within {row['within_s']:.0f} s no pass reported {row['code']} for it"
            )
            + (f" (other findings: {', '.join(row['found_code'])})" if row["found_code"] else "")
        ),
    )


def drift_reports(run: Run) -> pl.DataFrame:
    """Return the planted drifts (`Run.drifts`) with `seen`, `blind`, `blind_run` and `found_code`.

    `seen`: a pass that counts reported it in time. `blind`: one that should have reported it did not; `blind_run` is
    the first of these. `found_code`: everything that was reported of the wallet on that server. Raises MissingEvidence
    without the reconciler's findings.
    """
    drifts = run.drifts.drop_nulls(["user", "within_s"])
    origin, slack = run.config.origin_unix, run.clock_slack_s
    passes = run.table("reconciliations").select(
        pl.col("server").alias("node"),
        "run_id",
        "state",
        pl.col("requested_by").alias("by"),
        pl.col("user_id").alias("found_user"),
        pl.col("code").alias("found_code"),
        "started_at",
        "finished_at",
    )
    pairs = drifts.join(passes, on="node", how="left")
    own = pl.col("found_user") == pl.col("user")
    counts = pl.col("requested_by").is_null() | (pl.col("requested_by") == pl.col("by"))
    if origin is None:
        began_after, ended_before, in_time = pl.lit(False), pl.lit(False), pl.lit(True)
    else:
        began_after = pl.col("started_at") - origin > pl.col("measured") + slack
        ended_before = pl.col("repaired").is_null() | (pl.col("finished_at") - origin < pl.col("repaired") - slack)
        in_time = (pl.col("finished_at") - origin).is_between(
            pl.col("planted") - slack, pl.col("planted") + pl.col("within_s") + slack
        )
    names = ["node", "user", "code", "planted", "measured", "repaired", "within_s"]
    by_pass = pairs.group_by(*names, "run_id", maintain_order=True).agg(
        (own & (pl.col("found_code") == pl.col("code"))).fill_null(False).any().alias("reported"),
        pl.col("found_code").filter(own).drop_nulls().alias("found_code"),
        (counts & in_time).fill_null(False).any().alias("in_time"),
        (counts & began_after & ended_before & (pl.col("state") != "INCOMPLETE")).fill_null(False).any().alias("due"),
        pl.col("finished_at").first(),
    )
    missed = pl.col("due") & ~pl.col("reported")
    return by_pass.group_by(names).agg(
        (pl.col("reported") & pl.col("in_time")).any().alias("seen"),
        missed.any().alias("blind"),
        pl.col("run_id").sort_by("finished_at").filter(missed.sort_by("finished_at")).first().alias("blind_run"),
        pl.col("found_code").list.explode(keep_nulls=False, empty_as_null=False).unique().sort(),
    )
