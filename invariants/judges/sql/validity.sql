-- V01–V06: what makes a run unable to prove anything. Of most, judges compare only whether there is any.

-- name: V01
WITH wanted AS (
    SELECT op FROM operations UNION SELECT unnest(['deposit', 'bet']) UNION SELECT op FROM attempts
)
SELECT 'the run' AS subject FROM wanted w
WHERE NOT EXISTS (SELECT 1 FROM attempts a WHERE a.op = w.op AND a.cls = 'ok')

-- name: V02
SELECT 'the run' AS subject
WHERE EXISTS (SELECT 1 FROM timeline WHERE kind = 'fault_requested' AND fault_id IS NOT NULL)
    AND NOT EXISTS (
        SELECT 1 FROM attempts WHERE cls = 'info' AND family <> 'read' AND tag IS DISTINCT FROM 'impatient'
    )

-- name: V03
SELECT 'the run' AS subject FROM drifts WHERE wallet IS NULL OR within_s IS NULL
UNION ALL
SELECT 'node ' || said(node) || ' user ' || wallet FROM reported_drifts
WHERE measured IS NULL OR repaired IS NULL OR (repaired < planted + within_s AND NOT seen AND NOT blind)
UNION ALL
SELECT 'fault_id ' || fault_id
FROM timeline WHERE fault_id IS NOT NULL GROUP BY fault_id
HAVING bool_or(kind = 'fault_requested') AND NOT coalesce(
    min(t) FILTER (kind = 'fault_start') <= min(t) FILTER (kind = 'fault_end'), false
)

-- name: unknown_at_first
-- Keys that nobody had an answer for when the first snapshot was taken: what it said of them, and who was asked again.
CREATE TABLE unknown_at_first AS
WITH may AS (
    SELECT family, wallet, key FROM attempts
    WHERE family IN ('ledger', 'cancel') AND tag IS DISTINCT FROM 'final_retry'
    GROUP BY family, wallet, key HAVING bool_or(cls = 'info') AND NOT bool_or(cls = 'ok' OR refused)
),
said_yes AS (
    SELECT 'ledger' AS family, user_id, idempotent_key FROM first.ledger
    UNION
    SELECT 'cancel', user_id, idempotent_key FROM first.cancels WHERE outcome = 'ACCEPTED'
),
said_no AS (
    SELECT 'ledger' AS family, user_id, idempotent_key FROM first.refusals
    UNION
    SELECT 'cancel', user_id, idempotent_key FROM first.cancels WHERE outcome <> 'ACCEPTED'
)
SELECT
    EXISTS (SELECT 1 FROM said_yes y WHERE y.family = m.family AND y.user_id = m.wallet AND y.idempotent_key = m.key)
        AS applied,
    EXISTS (SELECT 1 FROM said_no n WHERE n.family = m.family AND n.user_id = m.wallet AND n.idempotent_key = m.key)
        AS denied,
    o.server IN (SELECT server FROM servers_read WHERE snapshot = 'first') AS was_read,
    EXISTS (
        SELECT 1 FROM attempts a
        WHERE a.tag = 'final_retry' AND a.family = m.family AND a.wallet = m.wallet AND a.key = m.key
    ) AS sent_again
FROM may m LEFT JOIN owners o ON o.shard = m.wallet % 100

-- name: V05
-- That a table is missing or lacks a column is seen when the tables are laid out.
WITH places AS (
    SELECT DISTINCT o.server FROM fates f JOIN owners o ON o.shard = f.wallet % 100
    WHERE f.family = 'ledger' AND f.fate = 'MUST'
),
partitions AS (
    SELECT min("offset") AS low, max("offset") AS high, count(DISTINCT "offset") AS records
    FROM kafka GROUP BY topic, "partition"
)
SELECT 'the run' AS subject FROM servers s
WHERE s.server IN (FROM places) AND s.server NOT IN (SELECT server FROM ledger WHERE server IS NOT NULL)
UNION ALL
SELECT 'the run' FROM servers s
WHERE (SELECT lists_servers FROM config) AND s.server NOT IN (SELECT server FROM servers_read WHERE snapshot = 'final')
UNION ALL
-- The protocol of the last reads: a random half of the unknown keys is sent again, then there is a second snapshot.
SELECT 'the run' FROM config WHERE evidence >= 2 AND snapshots < 2
UNION ALL
SELECT 'the run' FROM unknown_at_first
WHERE CASE WHEN applied OR denied THEN applied <> denied ELSE coalesce(was_read, false) END
HAVING (SELECT evidence FROM config) >= 2 AND 2 * count(*) FILTER (sent_again) < count(*)
UNION ALL
SELECT 'the run' FROM partitions WHERE low <> 0 OR high - low + 1 <> records

-- name: V06
SELECT 'the run' AS subject FROM broken_parts
UNION ALL
SELECT 'the run' FROM history GROUP BY attempt
HAVING count(*) FILTER (record = 'invoke') <> 1 OR count(*) FILTER (record <> 'invoke') > 1
UNION ALL
SELECT 'the run' FROM history WHERE record = 'invoke' HAVING min(attempt) <> 1 OR max(attempt) <> count(DISTINCT attempt)
UNION ALL
SELECT 'the run' FROM attempts WHERE end_s < begin_s
UNION ALL
SELECT 'the run' FROM history WHERE NOT coalesce(t BETWEEN 0 AND 30 * 86400, false)
