-- A14, A15, A16, A18, A19: what clients saw, in real time and within their sessions.
--
-- "Before" is told by a sweep: moments of both kinds in the order of time, and of equal times the questions first, so
-- that only what was known strictly before counts. The running maximum then says what was known.

-- name: acknowledged
-- Entries of clients whose key was sent, with when it was first sent and first acknowledged (null: never).
CREATE TABLE acknowledged AS
SELECT e.wallet, e.seq, f.begin_s, CASE WHEN isfinite(f.ack_s) THEN f.ack_s END AS ack_s
FROM entries e JOIN fates f ON f.family = 'ledger' AND f.wallet = e.wallet AND f.key = e.key
WHERE NOT e.system

-- name: reads
-- Answered reads of a balance. `fresh`: the answer did not say that it is stale.
CREATE TABLE reads AS
SELECT attempt, client, wallet, begin_s, end_s, seq, balance, source, NOT coalesce(stale, false) AS fresh
FROM attempts WHERE op = 'balance' AND cls = 'ok' AND seq IS NOT NULL

-- name: A14
WITH moments AS (
    SELECT wallet, begin_s AS moment, 0 AS turn, seq, NULL AS known FROM acknowledged
    UNION ALL
    SELECT wallet, ack_s, 1, NULL, seq FROM acknowledged WHERE ack_s IS NOT NULL
)
SELECT entry_at(wallet, seq) AS subject
FROM moments
QUALIFY turn = 0
    AND seq < max(known) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)

-- name: A15
WITH moments AS (
    SELECT
        attempt, client, wallet, begin_s - (SELECT stale_after_s FROM config) AS moment, 0 AS turn, seq, fresh,
        NULL AS known
    FROM reads
    UNION ALL
    SELECT NULL, client, wallet, end_s, 1, NULL, NULL, seq FROM reads WHERE isfinite(end_s)
)
SELECT 'attempt ' || attempt AS subject
FROM moments
QUALIFY turn = 0 AND fresh
    AND seq < max(known) OVER (PARTITION BY client, wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)

-- name: A16
SELECT 'attempt ' || attempt AS subject
FROM attempts
WHERE op = 'balance' AND min_seq > 0
    AND (status = 404 OR (cls = 'ok' AND seq < min_seq AND NOT coalesce(stale, false)))

-- name: A18
WITH moments AS (
    SELECT attempt, wallet, begin_s AS moment, 0 AS turn, seq, NULL AS known
    FROM reads WHERE source = 'ledger' AND fresh
    UNION ALL
    SELECT NULL, wallet, ack_s, 1, NULL, seq FROM acknowledged WHERE ack_s IS NOT NULL
)
SELECT 'attempt ' || attempt AS subject
FROM moments
QUALIFY turn = 0
    AND seq < max(known) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)

-- name: A19
SELECT 'attempt ' || attempt AS subject
FROM reads r
WHERE NOT (seq = 0 AND coalesce(balance = 0, false))
    AND NOT EXISTS (
        SELECT 1 FROM entries e WHERE e.wallet = r.wallet AND e.seq = r.seq AND e.balance = r.balance
    )
