-- A34, A35: whether the service came back after what was done to it, and saw by itself what was planted in it.

-- name: faults
-- Requested faults and their measured edges (null: not measured).
CREATE TABLE faults AS
SELECT
    fault_id,
    min(t) FILTER (kind = 'fault_requested') AS requested,
    min(t) FILTER (kind = 'fault_start') AS began,
    min(t) FILTER (kind = 'fault_end') AS ended
FROM timeline WHERE fault_id IS NOT NULL
GROUP BY fault_id HAVING bool_or(kind = 'fault_requested')

-- name: storms
-- Faults that come before the earlier ones' time to recover is over are one storm.
CREATE TABLE storms AS
WITH measured AS (
    SELECT *, ended + (SELECT recover_within_s FROM config) AS due
    FROM faults WHERE began IS NOT NULL AND ended IS NOT NULL
),
opened AS (
    SELECT
        *,
        coalesce(
            requested > max(due) OVER (
                ORDER BY requested, fault_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ), true
        ) AS opens
    FROM measured
),
numbered AS (
    SELECT *, count(*) FILTER (opens) OVER (ORDER BY requested, fault_id ROWS UNBOUNDED PRECEDING) AS storm FROM opened
)
SELECT
    storm, last(fault_id ORDER BY requested, fault_id) AS fault_id, min(requested) AS began, max(ended) AS healed, healed + (SELECT recover_within_s FROM config) AS deadline
FROM numbered GROUP BY storm

-- name: A34
WITH first_fault AS (SELECT min(requested) AS t FROM faults),
requests AS (
    SELECT
        begin_s AS t,
        cls = 'info' OR coalesce(status >= 500, false) OR (cls = 'fail' AND status IS NULL) AS bad
    FROM attempts WHERE coalesce(tag NOT IN ('impatient', 'final_retry'), true)
),
usual AS (
    SELECT greatest(0.1, 2 * coalesce(avg(bad::INTEGER), 0)) AS bound FROM requests, first_fault f WHERE requests.t < f.t
),
by_second AS (
    SELECT fault_id, floor(r.t - healed) AS after_s, avg(bad::INTEGER) AS share
    FROM requests r JOIN storms s ON r.t >= s.healed AND r.t < s.deadline + 1
    GROUP BY ALL
),
never_answered AS (
    SELECT fault_id FROM by_second GROUP BY fault_id
    HAVING min(share) > (SELECT bound FROM usual)
        -- Requests that end before the time is over say nothing.
        AND max(after_s) >= (SELECT recover_within_s FROM config)
),
samples AS (
    SELECT t, name, node, value FROM series WHERE name IN ('kafka_consumer_lag', 'outbox_unpublished')
),
backlogs AS (
    SELECT
        fault_id, name, node, any_value(deadline) AS deadline,
        bool_or(t < began) AS known, min(value) FILTER (t BETWEEN healed AND deadline) AS least,
        2 * max(value) FILTER (t < (SELECT t FROM first_fault)) AS usual
    FROM samples CROSS JOIN storms GROUP BY fault_id, name, node
),
never_caught_up AS (
    SELECT fault_id, name, node FROM backlogs
    WHERE deadline <= (SELECT max(t) FROM series) AND (known OR least IS NOT NULL)
        AND (least IS NULL OR least > greatest(1000, coalesce(usual, 0)))
)
SELECT 'fault_id ' || fault_id AS subject FROM never_answered
UNION ALL
SELECT 'fault_id ' || fault_id || ' name ' || name || ' node ' || said(node) FROM never_caught_up

-- name: reported_drifts
-- Planted drifts: whether a pass of the service's own reconciliation reported each in time (`seen`), and whether one
-- that began after the drift was measured, and saw everything before it was repaired, did not (`blind`).
CREATE TABLE reported_drifts AS
WITH passes AS (
    SELECT
        d.node, d.wallet, r.run_id,
        bool_or(r.user_id = d.wallet AND r.code = d.code) AS reported,
        bool_or(
            origin_unix IS NULL
            OR r.finished_at - origin_unix BETWEEN d.planted - slack_s AND d.planted + d.within_s + slack_s
        ) AS in_time,
        bool_or(
            r.state <> 'INCOMPLETE' AND r.started_at - origin_unix > d.measured + slack_s
            AND coalesce(r.finished_at - origin_unix < d.repaired - slack_s, d.repaired IS NULL)
        ) AS due
    FROM drifts d JOIN reconciliations r ON r.server = d.node CROSS JOIN clock
    WHERE d.requested_by IS NULL OR d.requested_by = r.requested_by
    GROUP BY d.node, d.wallet, r.run_id
)
SELECT
    d.*,
    EXISTS (SELECT 1 FROM passes p WHERE p.node = d.node AND p.wallet = d.wallet AND reported AND in_time) AS seen,
    EXISTS (
        SELECT 1 FROM passes p WHERE p.node = d.node AND p.wallet = d.wallet AND due AND NOT coalesce(reported, false)
    ) AS blind
FROM drifts d WHERE wallet IS NOT NULL AND within_s IS NOT NULL

-- name: A35
SELECT 'node ' || said(node) || ' user ' || wallet AS subject
FROM reported_drifts WHERE blind OR (NOT seen AND coalesce(repaired >= planted + within_s, true))
