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
SELECT 'fault_id ' || fault_id AS subject
FROM timeline WHERE fault_id IS NOT NULL GROUP BY fault_id
HAVING bool_or(kind = 'fault_requested') AND NOT coalesce(
    min(t) FILTER (kind = 'fault_start') <= min(t) FILTER (kind = 'fault_end'), false
)

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
WHERE (SELECT lists_servers FROM config) AND s.server NOT IN (SELECT server FROM servers_read)
UNION ALL
SELECT 'the run' FROM partitions WHERE low <> 0 OR high - low + 1 <> records

-- name: V06
SELECT 'the run' AS subject FROM broken_parts
UNION ALL
SELECT 'the run' FROM history GROUP BY attempt
HAVING count(*) FILTER (record = 'invoke') <> 1 OR count(*) FILTER (record <> 'invoke') > 1
UNION ALL
SELECT 'the run' FROM attempts WHERE end_s < begin_s
UNION ALL
SELECT 'the run' FROM history WHERE NOT coalesce(t BETWEEN 0 AND 30 * 86400, false)
