-- A11, A21–A26: the way of an entry through outbox, Kafka, matcher, projection and cache.

-- name: A11
WITH told AS (
    SELECT user_id, balance, seq FROM projection
    UNION ALL SELECT user_id, balance, seq FROM redis
    UNION ALL SELECT user_id, balance, seq FROM kafka WHERE topic = (SELECT balance_topic FROM config)
),
contradicted AS (
    SELECT user_id FROM told t
    WHERE NOT (seq = 0 AND balance = 0)
        -- What the run planted itself is A35's and V03's.
        AND user_id NOT IN (SELECT wallet FROM drifts WHERE wallet IS NOT NULL)
        AND NOT EXISTS (
        SELECT 1 FROM first_entries e WHERE e.wallet = t.user_id AND e.seq = t.seq AND e.balance = t.balance
    )
),
absent AS (
    SELECT wallet FROM entries EXCEPT SELECT user_id FROM projection
)
SELECT 'user ' || said(user_id) AS subject FROM (FROM contradicted UNION ALL FROM absent)

-- name: A21
WITH telling AS (
    SELECT user_id, seq FROM outbox WHERE event_type IN ('BetCreated', 'EntryPosted')
)
SELECT entry_at(wallet, seq) AS subject
FROM entries e ANTI JOIN telling t ON t.user_id = e.wallet AND t.seq = e.seq
UNION ALL
SELECT 'event_id ' || said(event_id) FROM outbox o ANTI JOIN kafka USING (event_id)

-- name: A22
-- A bet that is ordered twice by one event is named by that event; by two events, by itself.
SELECT 'event_id ' || said(event_id) AS subject FROM orders GROUP BY event_id HAVING count(*) > 1
UNION ALL
SELECT 'bet_id ' || said(bet_id) FROM orders GROUP BY bet_id HAVING count(DISTINCT event_id) > 1
UNION ALL
SELECT 'back_bet_id ' || said(back_bet_id) || ' lay_bet_id ' || said(lay_bet_id)
FROM fills GROUP BY back_bet_id, lay_bet_id HAVING count(*) > 1
UNION ALL
SELECT fill_at(match_id, fill_no) FROM fills GROUP BY match_id, fill_no HAVING count(*) > 1
UNION ALL
SELECT 'bet_id ' || said(bet_id)
FROM entries WHERE system AND type = 'REFUND' AND version = 0 GROUP BY bet_id HAVING count(*) > 1

-- name: A23
WITH firsts AS (SELECT * FROM events WHERE is_first),
steps AS (
    SELECT
        topic, "partition", "offset", seq,
        lag(seq) OVER (PARTITION BY topic, "partition", user_id ORDER BY "offset") AS earlier
    FROM firsts
    WHERE event_type IN ('BetCreated', 'EntryPosted') AND user_id IS NOT NULL AND seq IS NOT NULL
)
SELECT 'topic ' || topic || ' partition ' || said("partition") || ' offset ' || said("offset") AS subject
FROM steps WHERE earlier >= seq
UNION ALL
SELECT 'topic ' || topic || ' record_key ' || said(key)
FROM firsts GROUP BY topic, key HAVING min("partition") <> max("partition")

-- name: A24
WITH unfounded AS (
    SELECT event_id FROM events e ANTI JOIN outbox USING (event_id)
    UNION ALL
    SELECT event_id FROM outbox o ANTI JOIN entries e ON e.wallet = o.user_id AND e.seq = o.seq
    WHERE o.event_type IN ('BetCreated', 'EntryPosted')
    UNION ALL
    SELECT event_id FROM payloads ANTI JOIN fills USING (match_id, fill_no) WHERE event_type = 'BetMatched'
    UNION ALL
    SELECT event_id FROM payloads p
    WHERE event_type = 'BetCancelled'
        AND NOT EXISTS (SELECT 1 FROM orders o WHERE o.bet_id = p.bet_id AND o.cancelled_stake > 0)
    UNION ALL
    SELECT event_id FROM payloads ANTI JOIN settlements USING (match_id, settlement_version)
    WHERE event_type = 'MatchSettled'
    UNION ALL
    SELECT e.event_id FROM events e JOIN outbox o USING (event_id)
    WHERE e.timestamp < o.created_at - (SELECT slack_s FROM clock)
)
SELECT 'event_id ' || said(event_id) AS subject FROM unfounded
UNION ALL
SELECT entry_at(user_id, seq) FROM outbox
WHERE event_type IN ('BetCreated', 'EntryPosted') AND seq IS NOT NULL
GROUP BY user_id, seq HAVING count(*) > 1

-- name: A25
WITH differing AS (
    SELECT p.event_id FROM payloads p JOIN first_entries e ON e.wallet = p.user_id AND e.seq = p.seq
    WHERE event_type = 'EntryPosted' AND (
        (p.type, p.amount, p.contra, p.match_id, p.bet_id, p.settlement_version, p.balance)
        IS DISTINCT FROM (e.type, e.amount, e.contra, e.match_id, e.bet_id, e.version, e.balance)
    )
    UNION ALL
    SELECT p.event_id FROM payloads p JOIN first_entries e ON e.wallet = p.user_id AND e.seq = p.seq
    WHERE event_type = 'BetCreated'
        AND (p.amount, p.balance, p.bet_id) IS DISTINCT FROM (e.amount, e.balance, e.bet_id)
    UNION ALL
    SELECT p.event_id FROM payloads p JOIN first_bets b USING (user_id, bet_id)
    WHERE event_type = 'BetCreated' AND (
        (p.match_id, p.outcome, p.side, p.odds, p.stake, p.reserve)
        IS DISTINCT FROM (b.match_id, b.outcome, b.side, b.odds, b.stake, b.reserve)
    )
    UNION ALL
    SELECT p.event_id FROM payloads p JOIN first_fills f USING (match_id, fill_no)
    WHERE event_type = 'BetMatched' AND (
        (p.outcome, p.back_bet_id, p.back_user, p.lay_bet_id, p.lay_user, p.odds, p.stake, p.liability, p.winnings)
        IS DISTINCT FROM
        (f.outcome, f.back_bet_id, f.back_user, f.lay_bet_id, f.lay_user, f.odds, f.stake, f.liability, f.winnings)
    )
    UNION ALL
    SELECT p.event_id FROM payloads p JOIN first_orders o USING (bet_id)
    WHERE event_type = 'BetCancelled' AND (
        (p.match_id, p.user_id, p.cancelled_stake, p.refund, p.reason)
        IS DISTINCT FROM (o.match_id, o.user_id, o.cancelled_stake, o.cancel_refund, o.cancel_reason)
    )
    UNION ALL
    SELECT p.event_id FROM payloads p JOIN first_settlements s USING (match_id, settlement_version)
    WHERE event_type = 'MatchSettled' AND (p.kind, p.result) IS DISTINCT FROM (s.kind, s.result)
),
misplaced AS (
    SELECT e.event_id FROM events e JOIN outbox o USING (event_id)
    LEFT JOIN topics t ON t.event_type = o.event_type
    WHERE e.topic IS DISTINCT FROM t.topic OR e.key IS DISTINCT FROM o.partition_key
),
-- Text that is equal needs no parsing, and nearly all of it is.
altered AS (
    SELECT e.event_id FROM events e JOIN outbox o USING (event_id)
    WHERE e.payload IS DISTINCT FROM o.payload AND fields_of(e.payload) IS DISTINCT FROM fields_of(o.payload)
)
SELECT 'event_id ' || said(event_id) AS subject
FROM (FROM differing UNION ALL FROM misplaced UNION ALL FROM altered)

-- name: A26
WITH alive AS (
    SELECT event_id, event_type, user_id, seq FROM events e
    WHERE NOT EXISTS (SELECT 1 FROM kafka d WHERE d.topic = 'events.dlq' AND d.event_id = e.event_id)
),
newest AS (
    SELECT user_id, max(seq) AS seq FROM alive WHERE event_type IN ('BetCreated', 'EntryPosted') GROUP BY user_id
)
SELECT 'user ' || user_id AS subject
FROM projection p JOIN newest n USING (user_id) WHERE p.seq < n.seq
UNION ALL
SELECT 'event_id ' || event_id
FROM payloads SEMI JOIN alive USING (event_id) ANTI JOIN orders USING (bet_id)
WHERE event_type = 'BetCreated'
