-- A01–A05: what the clients were told about each key against what is stored under it.

-- name: A01
-- Acknowledged keys less those that had an effect. A rollback is done too where its bet was refused for any reason.
SELECT key_at(wallet, key) AS subject
FROM (
    SELECT family, wallet, key FROM fates WHERE fate = 'MUST'
    EXCEPT
    SELECT family, wallet, key FROM effects
    EXCEPT
    SELECT 'rollback', user_id, idempotent_key FROM refusals
)

-- name: A02
SELECT key_at(wallet, key) AS subject
FROM entries WHERE NOT system
GROUP BY wallet, key HAVING count(*) > 1
UNION ALL
-- A stake posted twice under one key is a duplicate of that key.
SELECT 'bet_id ' || bet_id || ' contra ' || contra || ' settlement_version ' || said(version)
FROM entries WHERE type IN ('DEBIT', 'CREDIT') AND contra IN ('ESCROW', 'HOUSE') AND bet_id IS NOT NULL
GROUP BY bet_id, type, contra, version
HAVING count(*) > 1 AND (bool_or(system) OR min(key) <> max(key))
UNION ALL
-- Of a match and a result no more corrections than keys that asked for it; one that none asked for is a phantom (A03).
SELECT 'match_id ' || said(s.match_id) || ' settlement_version ' || said(max(s.settlement_version))
FROM settlements s
WHERE s.settlement_version > 1
GROUP BY s.match_id, s.result
HAVING count(DISTINCT s.settlement_version) > (
    SELECT count(DISTINCT a.own_key) FROM attempts a
    WHERE a.op = 'resettle_match' AND a.match_id = s.match_id AND a.selection IS NOT DISTINCT FROM s.result
) AND EXISTS (
    FROM attempts a
    WHERE a.op = 'resettle_match' AND a.match_id = s.match_id AND a.selection IS NOT DISTINCT FROM s.result
)

-- name: A03
WITH unasked AS (
    SELECT wallet, seq FROM entries e
    WHERE NOT system AND NOT EXISTS (
        SELECT 1 FROM attempts a WHERE a.family = 'ledger' AND a.wallet = e.wallet AND a.key = e.key
    )
),
differing AS (
    SELECT wallet, seq FROM requests GROUP BY wallet, key, seq, amount, type HAVING NOT bool_or(fits)
),
kinds (kind, type, contra, least_version) AS (
    VALUES ('REFUND', 'REFUND', 'ESCROW', 0), ('PAYOUT', 'PAYOUT', 'ESCROW', 1), ('COMMISSION', 'DEBIT', 'HOUSE', 1),
        ('TAKE_BACK', 'DEBIT', 'ESCROW', 2), ('COMMISSION_BACK', 'REFUND', 'HOUSE', 2),
        ('ADVANCE', 'CREDIT', 'HOUSE', 2)
),
-- Type and account say what a system entry is; its key must then be exactly the one that such an entry has.
founded AS (
    SELECT e.wallet, e.seq, e.key FROM entries e
    JOIN kinds k ON k.type = e.type AND k.contra = e.contra AND e.version >= k.least_version
    WHERE e.system
        AND e.key = concat('ledger:', k.kind, ':', e.bet_id, ':', e.version)
        AND EXISTS (
            SELECT 1 FROM bets b WHERE b.user_id = e.wallet AND b.bet_id = e.bet_id AND b.match_id = e.match_id
        )
        AND CASE WHEN e.version = 0
            THEN e.bet_id IN (SELECT bet_id FROM orders WHERE cancelled_stake > 0)
            ELSE (e.match_id, e.version) IN (SELECT (match_id, settlement_version) FROM settlements)
        END
),
unfounded AS (
    SELECT wallet, seq FROM entries e
    WHERE system AND NOT EXISTS (
        SELECT 1 FROM founded f WHERE f.wallet = e.wallet AND f.seq = e.seq AND f.key = e.key
    )
),
-- The first settlement is asked for by settle or void, the others by resettle (with no result for void).
asked AS (
    SELECT
        match_id, op = 'resettle_match' AS again,
        CASE WHEN op = 'void_match' OR (op = 'resettle_match' AND selection IS NULL) THEN 'VOID' ELSE 'SETTLE' END
            AS kind,
        selection
    FROM attempts WHERE op IN ('settle_match', 'void_match', 'resettle_match')
)
SELECT entry_at(wallet, seq) AS subject
FROM (SELECT * FROM unasked UNION ALL SELECT * FROM differing UNION ALL SELECT * FROM unfounded)
UNION ALL
SELECT 'match_id ' || said(s.match_id) || ' settlement_version ' || said(s.settlement_version)
FROM settlements s
WHERE NOT EXISTS (
    SELECT 1 FROM asked a
    WHERE a.match_id = s.match_id AND a.kind = s.kind AND a.again = (s.settlement_version > 1)
        AND (a.selection IS NULL OR a.selection = s.result)
)

-- name: A04
-- A match closes by itself, and a result that it had from the first was made true by no resettle.
WITH had_from_the_first AS (
    SELECT 'resettle_match:' || match_id || ':' || coalesce(result, 'VOID') AS key
    FROM settlements GROUP BY ALL HAVING max(settlement_version) = 1
)
SELECT key_at(wallet, key) AS subject
FROM (
    SELECT family, wallet, key FROM fates WHERE fate = 'MUST_NOT'
    INTERSECT
    SELECT family, wallet, key FROM effects
)
WHERE family <> 'match'
    OR (NOT starts_with(key, 'close_match:') AND key NOT IN (SELECT key FROM had_from_the_first))
UNION ALL
SELECT key_at(wallet, key)
FROM entries e
WHERE NOT system AND EXISTS (SELECT 1 FROM refusals r WHERE r.user_id = e.wallet AND r.idempotent_key = e.key)

-- name: A05
WITH answers AS (
    SELECT * FROM attempts WHERE family IN ('ledger', 'cancel') AND (cls = 'ok' OR refused)
),
contradictory AS (
    SELECT wallet, key FROM answers GROUP BY family, wallet, key
    HAVING min(seq) FILTER (cls = 'ok') <> max(seq) FILTER (cls = 'ok')
        OR min(balance) FILTER (cls = 'ok') <> max(balance) FILTER (cls = 'ok')
        OR min(answered_bet) FILTER (cls = 'ok') <> max(answered_bet) FILTER (cls = 'ok')
        OR min(body) FILTER (cls = 'ok') <> max(body) FILTER (cls = 'ok')
        OR (bool_or(cls = 'ok') AND bool_or(refused))
        OR min(outcome) FILTER (refused) <> max(outcome) FILTER (refused)
        OR count(*) FILTER (cls = 'ok' AND NOT replayed) > 1
),
-- A key with two entries is A02; which of them was answered cannot be said.
single AS (
    SELECT wallet, key, any_value(seq) AS seq, any_value(balance) AS balance
    FROM entries WHERE NOT system GROUP BY wallet, key HAVING count(*) = 1
),
another_entry AS (
    SELECT a.wallet, a.key FROM attempts a JOIN single e USING (wallet, key)
    WHERE a.family = 'ledger' AND a.cls = 'ok' AND (a.seq <> e.seq OR a.balance <> e.balance)
),
another_bet AS (
    SELECT a.wallet, a.key FROM attempts a JOIN cancels c ON c.user_id = a.wallet AND c.idempotent_key = a.key
    WHERE a.family = 'cancel' AND a.cls = 'ok' AND a.bet_id <> c.bet_id
),
-- An entry that no attempt at all asked for is a phantom (A03).
another_body AS (
    SELECT wallet, key FROM requests GROUP BY wallet, key, seq, amount, type
    HAVING bool_or(fits) AND bool_or(cls = 'ok') AND NOT bool_or(fits AND cls = 'ok')
),
claimed_late AS (
    SELECT a.wallet, a.key FROM attempts a
    JOIN (
        SELECT 'ledger' AS family, user_id, idempotent_key FROM first.ledger
        UNION ALL
        SELECT 'cancel', user_id, idempotent_key FROM first.cancels WHERE outcome = 'ACCEPTED'
    ) held ON held.family = a.family AND held.user_id = a.wallet AND held.idempotent_key = a.key
    WHERE a.tag = 'final_retry' AND a.cls = 'ok' AND NOT a.replayed AND (SELECT snapshots FROM config) > 1
),
wrongly_accused AS (
    SELECT a.wallet, a.key FROM attempts a
    WHERE a.family IN ('ledger', 'cancel') AND a.status = 409 AND NOT EXISTS (
        SELECT 1 FROM attempts o
        WHERE o.family = a.family AND o.wallet = a.wallet AND o.key = a.key
            AND o.body <> a.body AND o.begin_s < a.end_s
    )
)
SELECT key_at(wallet, key) AS subject
FROM (
    FROM contradictory UNION ALL FROM another_entry UNION ALL FROM another_bet UNION ALL FROM another_body
    UNION ALL FROM claimed_late UNION ALL FROM wrongly_accused
)
