-- A14–A20: what clients saw, in real time, within their sessions, and against one another.
--
-- "Before" is told by a sweep: moments of both kinds in the order of time, and of equal times the questions first, so
-- that only what was known strictly before counts. The running maximum then says what was known.

-- name: acknowledged
-- Entries of clients whose key was sent, with when it was first sent and first acknowledged (null: never).
CREATE TABLE acknowledged AS
SELECT e.wallet, e.seq, f.begin_s, CASE WHEN isfinite(f.ack_s) THEN f.ack_s END AS ack_s
FROM entries e JOIN fates f ON f.family = 'ledger' AND f.wallet = e.wallet AND f.key = e.key
WHERE NOT e.system

-- name: acks
CREATE VIEW acks AS SELECT wallet, seq, ack_s FROM acknowledged WHERE ack_s IS NOT NULL

-- name: reads
-- Answered reads of a balance. `fresh`: the answer did not say that it is stale. `as_of_s`: the moment of the run's
-- clock from before which, so it says, it lacks nothing.
CREATE TABLE reads AS
SELECT
    attempt, client, wallet, begin_s, end_s, min_seq, seq, balance, source, strong, NOT coalesce(stale, false) AS fresh,
    begin_s - (SELECT stale_after_s FROM config) AS horizon_s,
    as_of - (SELECT origin_unix FROM clock) AS as_of_s
FROM attempts WHERE op = 'balance' AND cls = 'ok' AND seq IS NOT NULL

-- name: pages
-- Answered pages of entries; `shows` is the newest entry they show, and none behind where they were to begin.
CREATE TABLE pages AS
SELECT
    attempt, wallet, begin_s, after_seq, page_rows, page_cut, seq, balance, coalesce(seq, after_seq) AS shows,
    NOT coalesce(stale, false) AS fresh
FROM attempts WHERE op = 'entries' AND cls = 'ok'

-- name: heads_shown
-- Unflagged answers of the ledger that show where a wallet ends: balances, and pages behind which nothing is left.
CREATE TABLE heads_shown AS
SELECT attempt, wallet, begin_s, seq FROM reads WHERE fresh AND source = 'ledger'
UNION ALL
SELECT attempt, wallet, begin_s, shows FROM pages WHERE fresh AND NOT page_cut AND shows IS NOT NULL

-- name: behind
-- Those of them that lack an entry acknowledged before they were asked for.
CREATE TABLE behind AS
WITH moments AS (
    SELECT attempt, wallet, begin_s AS moment, 0 AS turn, seq, NULL AS known FROM heads_shown
    UNION ALL
    SELECT NULL, wallet, ack_s, 1, NULL, seq FROM acks
)
SELECT attempt
FROM moments
QUALIFY turn = 0
    AND seq < max(known) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)

-- name: A14
WITH moments AS (
    SELECT wallet, begin_s AS moment, 0 AS turn, seq, NULL AS known FROM acknowledged
    UNION ALL
    SELECT wallet, ack_s, 1, NULL, seq FROM acks
)
SELECT entry_at(wallet, seq) AS subject
FROM moments
QUALIFY turn = 0
    AND seq < max(known) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)

-- name: A15
WITH moments AS (
    SELECT attempt, client, wallet, horizon_s AS moment, 0 AS turn, seq, fresh, NULL AS known FROM reads
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

-- name: A17
-- An answer of the ledger is A18's, one below a min_seq A16's.
WITH others AS (
    SELECT * FROM reads
    WHERE fresh AND source IS DISTINCT FROM 'ledger' AND NOT coalesce(seq < min_seq, false)
),
moments AS (
    SELECT attempt, wallet, horizon_s AS moment, 0 AS turn, seq, NULL AS known FROM others
    UNION ALL
    SELECT NULL, wallet, ack_s, 1, NULL, seq FROM acks
),
lacking AS (
    SELECT attempt FROM moments
    QUALIFY turn = 0
        AND seq < max(known) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)
)
SELECT 'attempt ' || attempt AS subject
FROM (
    FROM lacking
    UNION ALL
    SELECT attempt FROM others WHERE as_of_s < horizon_s - (SELECT slack_s FROM clock)
)

-- name: A18
WITH moments AS (
    SELECT attempt, wallet, as_of_s - (SELECT slack_s FROM clock) AS moment, 0 AS turn, seq, NULL AS known
    FROM reads WHERE as_of_s IS NOT NULL
    UNION ALL
    SELECT NULL, wallet, ack_s, 1, NULL, seq FROM acks
),
boasting AS (
    SELECT attempt FROM moments
    QUALIFY turn = 0
        AND seq < max(known) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)
)
SELECT 'attempt ' || attempt AS subject
FROM (
    FROM behind
    UNION ALL FROM boasting
    UNION ALL SELECT attempt FROM reads WHERE strong AND source IS DISTINCT FROM 'ledger'
)

-- name: A19
WITH shown AS (
    SELECT attempt, wallet, seq, balance FROM reads WHERE NOT (seq = 0 AND coalesce(balance = 0, false))
    UNION ALL
    SELECT attempt, wallet, seq, balance FROM pages WHERE page_rows > 0
)
SELECT 'attempt ' || attempt AS subject
FROM (
    SELECT attempt FROM shown s ANTI JOIN entries e
        ON e.wallet = s.wallet AND e.seq = s.seq AND e.balance = s.balance
    UNION ALL
    SELECT attempt FROM pages WHERE page_rows > 0 AND seq - after_seq <> page_rows
)

-- name: A20
-- By when each entry was committed: who shows an entry shows all before it, and what was written by one transaction
-- was committed at once.
WITH shows AS (
    SELECT wallet, seq, min(moment) AS moment
    FROM (
        SELECT wallet, seq, ack_s AS moment FROM acks
        UNION ALL
        SELECT wallet, seq, end_s FROM attempts WHERE family = 'read' AND cls = 'ok' AND seq > 0
    )
    GROUP BY wallet, seq
),
asked_wallets AS (SELECT DISTINCT wallet FROM heads_shown),
written AS (
    SELECT e.user_id AS wallet, e.seq, e.server, e.xact, e.created_at, s.moment
    FROM ledger e LEFT JOIN shows s ON s.wallet = e.user_id AND s.seq = e.seq
),
alone AS (
    SELECT *, min(moment) OVER (PARTITION BY wallet ORDER BY seq DESC) AS by_then FROM written
),
together AS (
    SELECT
        wallet, seq,
        least(by_then, CASE WHEN xact IS NOT NULL
            THEN min(by_then) OVER (PARTITION BY server, xact, created_at) END) AS by_then
    FROM alone
),
halves AS (
    SELECT attempt FROM heads_shown h
    JOIN ledger e ON e.user_id = h.wallet AND e.seq = h.seq
    JOIN ledger n ON n.user_id = e.user_id AND n.seq = e.seq + 1
        AND n.server = e.server AND n.xact = e.xact AND n.created_at = e.created_at
),
moments AS (
    SELECT attempt, wallet, begin_s AS moment, 0 AS turn, seq, NULL AS known FROM heads_shown
    UNION ALL
    SELECT NULL, wallet, by_then, 1, NULL, seq FROM together SEMI JOIN asked_wallets USING (wallet)
    WHERE isfinite(by_then)
),
opposite AS (
    SELECT attempt FROM moments
    QUALIFY turn = 0
        AND seq < max(known) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING)
)
SELECT 'attempt ' || attempt AS subject
FROM (FROM halves UNION ALL FROM opposite ANTI JOIN behind USING (attempt))
