-- A32: writes of those who were not to write any more.

-- name: A32
WITH given_up AS (
    SELECT server, shard, changed_at FROM routes WHERE NOT here AND epoch > 0 AND changed_at IS NOT NULL
),
writes AS (
    SELECT server, user_id, seq, created_at AS moment FROM ledger
    UNION ALL SELECT server, user_id, seq, placed_at FROM bets
    UNION ALL SELECT server, user_id, NULL, created_at FROM refusals
    UNION ALL SELECT server, user_id, seq, created_at FROM outbox WHERE event_type IN ('BetCreated', 'EntryPosted')
),
terms AS (
    SELECT t, kind, node, d ->> 'member' AS member, (d ->> 'term')::BIGINT AS term
    FROM (SELECT t, kind, node, detail::JSON AS d FROM timeline WHERE kind IN ('primary', 'primary_write'))
)
SELECT 'server ' || server || ' user ' || said(user_id) || ' seq ' || said(seq) AS subject
FROM writes w JOIN given_up g USING (server) WHERE g.shard = w.user_id % 100 AND w.moment > g.changed_at
UNION ALL
SELECT 'node ' || said(w.node) || ' term ' || said(w.term)
FROM terms w JOIN terms p ON p.node = w.node AND p.term > w.term AND p.t < w.t
WHERE w.kind = 'primary_write' AND p.kind = 'primary'
UNION ALL
SELECT 'node ' || said(node) || ' term ' || said(term)
FROM terms WHERE kind = 'primary' GROUP BY node, term HAVING min(member) <> max(member)
