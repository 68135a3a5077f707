-- A06, A07, A09, A10, A12, A30, A31, A33: the ledger replayed against itself.

-- name: A06
SELECT entry_at(wallet, seq) AS subject FROM entries WHERE NOT system AND amount < 0 AND replayed < 0

-- name: A07
SELECT entry_at(wallet, seq) AS subject FROM entries WHERE least(balance, replayed) < 0

-- name: A09
SELECT entry_at(wallet, seq) AS subject
FROM entries WHERE seq - before_seq = 1 AND balance - before_balance <> amount

-- name: A10
SELECT entry_at(wallet, seq) AS subject FROM entries WHERE seq - before_seq <> 1

-- name: A12
-- Both snapshots were taken at rest, so both are cuts at which all the money must be somewhere.
WITH cuts AS (
    SELECT 1 AS cut, user_id, seq, idempotent_key, balance_snapshot, amount, contra FROM first.ledger
    UNION ALL
    SELECT 2, user_id, seq, idempotent_key, balance_snapshot, amount, contra FROM ledger
),
heads AS (
    SELECT cut, last(balance_snapshot ORDER BY seq, idempotent_key) AS balance FROM cuts GROUP BY cut, user_id
),
held AS (SELECT cut, sum(balance) AS total FROM heads GROUP BY cut),
came_in AS (
    SELECT cut, sum(amount) AS total FROM cuts WHERE contra IN ('EXTERNAL', 'ESCROW', 'HOUSE') GROUP BY cut
),
whole AS (
    SELECT coalesce(h.total, 0) - coalesce(c.total, 0) AS off FROM held h FULL JOIN came_in c USING (cut)
),
stakes AS (SELECT match_id, sum(reserve) AS reserved FROM bets GROUP BY match_id),
returns AS (SELECT match_id, sum(cancel_refund) AS returned FROM orders GROUP BY match_id),
books AS (
    SELECT
        match_id, coalesce(held, 0) AS held, coalesce(reserved, 0) - coalesce(returned, 0) AS due,
        match_id IN (SELECT match_id FROM final_matches) AS final,
        (SELECT max(settlement_version) FROM settlements s WHERE s.match_id = b.match_id) AS version
    FROM (escrow FULL JOIN stakes USING (match_id)) b LEFT JOIN returns USING (match_id)
)
SELECT 'the run' AS subject FROM whole WHERE off <> 0
UNION ALL
SELECT 'match_id ' || said(match_id)
FROM books
WHERE NOT final AND (
    (version IS NULL AND held <> due)
    -- While a match is settled again its escrow may be overdrawn for a moment.
    OR (held < 0 AND coalesce(version, 0) <= 1)
)

-- name: A30
SELECT 'match_id ' || match_id AS subject FROM escrow SEMI JOIN final_matches USING (match_id) WHERE held <> 0

-- name: A31
WITH held_by AS (
    SELECT shard, list(DISTINCT server) AS servers FROM routes WHERE here GROUP BY shard
),
claims AS (
    SELECT shard, count(*) AS claims FROM routes WHERE here GROUP BY shard
),
newest AS (SELECT shard, last(server_name ORDER BY epoch, here) AS server FROM routes GROUP BY shard),
misowned AS (
    SELECT s.shard FROM range(100) s (shard)
    LEFT JOIN held_by USING (shard) LEFT JOIN claims USING (shard) LEFT JOIN newest n USING (shard)
    WHERE NOT coalesce(claims = 1 AND servers[1] = n.server, false)
),
wallets AS (
    FROM (
        SELECT server, shard, user_id FROM ledger UNION SELECT server, shard, user_id FROM bets
        UNION SELECT server, shard, user_id FROM refusals UNION SELECT server, shard, user_id FROM projection
    )
),
stray_wallets AS (
    SELECT user_id FROM wallets w LEFT JOIN owners o ON o.shard = w.user_id % 100
    WHERE w.server IS DISTINCT FROM o.server OR w.shard <> w.user_id % 100
),
places AS (
    SELECT server, match_id FROM matches UNION SELECT server, match_id FROM orders
    UNION SELECT server, match_id FROM fills
),
-- The last sixteen digits of a UUID are its low 64 bits.
stray_matches AS (
    SELECT match_id FROM places p
    JOIN initial_routing h ON h.shard = ('0x' || right(replace(p.match_id::UUID::VARCHAR, '-', ''), 16))::UBIGINT % 100
    WHERE p.server <> h.server
)
SELECT 'user ' || said(user_id) AS subject FROM stray_wallets
UNION ALL SELECT 'match_id ' || match_id FROM stray_matches
UNION ALL SELECT 'shard ' || shard FROM misowned

-- name: A33
-- What the first snapshot held and the second does not; and what appeared in a wallet below where it then stood.
WITH gone AS (
    SELECT * EXCLUDE (line) FROM first.ledger
    EXCEPT
    SELECT * EXCLUDE (line) FROM ledger
),
prefixes AS (SELECT user_id, max(seq) AS seen FROM first.ledger GROUP BY user_id),
slipped_in AS (
    SELECT l.user_id, l.seq FROM ledger l JOIN prefixes p ON p.user_id = l.user_id AND l.seq <= p.seen
    WHERE NOT EXISTS (
        SELECT 1 FROM first.ledger f
        WHERE f.user_id = l.user_id AND f.seq = l.seq AND f.idempotent_key = l.idempotent_key
    )
)
SELECT entry_at(user_id, seq) AS subject
FROM (SELECT user_id, seq FROM gone UNION SELECT user_id, seq FROM slipped_in)

