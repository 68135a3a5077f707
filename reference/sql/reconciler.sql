-- Statements of the reconciler. Those that look for mismatches return one row each with the columns
-- code, user_id, seq, match_id, event_id, expected, found.
-- {shard}, {fresh} and {entry_event_differs} are filled in by reconciler.py; the last is a block of this file.

-- name: clock
SELECT clock_timestamp() AS at

-- name: partitions
-- The logical shards this server holds (a partition of one that has moved is only waiting to be dropped): the file of
-- each, and its size in blocks.
SELECT substring(pg_get_expr(c.relpartbound, c.oid) FROM '\d+')::smallint AS shard, c.relfilenode::bigint AS file,
       pg_relation_size(c.oid) / current_setting('block_size')::bigint AS blocks
  FROM pg_inherits i
  JOIN pg_class c ON c.oid = i.inhrelid
  JOIN shard_routes r ON r.here AND r.shard = substring(pg_get_expr(c.relpartbound, c.oid) FROM '\d+')::smallint
 WHERE i.inhparent = 'wallet_ledger'::regclass AND NOT i.inhdetachpending
 ORDER BY 1

-- name: full_chain
-- One walk along the primary key: nothing is sorted, nothing is kept.
SELECT CASE WHEN seq <> prev_seq + 1 THEN 'LEDGER_GAP'
            WHEN balance_snapshot < 0 THEN 'LEDGER_NEGATIVE'
            ELSE 'LEDGER_CHAIN' END AS code,
       user_id, seq, NULL::text AS match_id, NULL::text AS event_id,
       CASE WHEN seq <> prev_seq + 1 THEN format('seq %s', prev_seq + 1)
            WHEN balance_snapshot < 0 THEN 'balance 0 or more'
            ELSE format('balance %s = %s + %s', prev_balance + amount, prev_balance, amount) END AS expected,
       CASE WHEN seq <> prev_seq + 1 THEN format('seq %s', seq)
            ELSE format('balance %s', balance_snapshot) END AS found
  FROM (SELECT user_id, seq, amount, balance_snapshot,
               lag(seq, 1, 0::bigint) OVER w AS prev_seq, lag(balance_snapshot, 1, 0::bigint) OVER w AS prev_balance
          FROM wallet_ledger
         WHERE shard = {shard}
        WINDOW w AS (PARTITION BY user_id ORDER BY seq)) walked
 WHERE seq <> prev_seq + 1 OR balance_snapshot < 0 OR balance_snapshot <> prev_balance + amount

-- name: full_sums
SELECT 'LEDGER_SUM' AS code, user_id, head[1] AS seq, NULL::text AS match_id, NULL::text AS event_id,
       format('sum %s', head[2]) AS expected, format('sum %s', total) AS found
  FROM (SELECT user_id, sum(amount) AS total, max(ARRAY[seq, balance_snapshot]) AS head
          FROM wallet_ledger WHERE shard = {shard} GROUP BY user_id) wallets
 WHERE total <> head[2]

-- name: full_money
-- What the newest snapshots say the users hold, and what the entries say came in from every other account.
SELECT coalesce(sum(head[2]), 0)::numeric AS users, coalesce(sum(external), 0)::numeric AS external,
       coalesce(-sum(escrow), 0)::numeric AS escrow, coalesce(-sum(house), 0)::numeric AS house,
       coalesce(sum(entries), 0)::bigint AS entries
  FROM (SELECT max(ARRAY[seq, balance_snapshot]) AS head, count(*) AS entries,
               sum(amount) FILTER (WHERE contra = 'EXTERNAL') AS external,
               sum(amount) FILTER (WHERE contra = 'ESCROW') AS escrow,
               sum(amount) FILTER (WHERE contra = 'HOUSE') AS house
          FROM wallet_ledger WHERE shard = {shard} GROUP BY user_id) wallets

-- name: full_duplicates
-- By business key: a bet is charged once, and per settlement version it is paid once for each reason.
SELECT 'LEDGER_DUPLICATE' AS code, max(user_id) AS user_id, max(seq) AS seq, max(match_id::text) AS match_id,
       NULL::text AS event_id,
       format('1 %s of bet %s against %s, version %s', type, bet_id, contra, coalesce(settlement_version::text, '-'))
           AS expected,
       format('%s of them, seqs %s', count(*), (array_agg(seq ORDER BY seq))[:10]) AS found
  FROM wallet_ledger
 WHERE shard = {shard} AND bet_id IS NOT NULL
 GROUP BY bet_id, type, contra, settlement_version
HAVING count(*) > 1

-- name: full_bets
SELECT CASE WHEN b.bet_id IS NULL THEN 'BET_MISSING' WHEN l.seq IS NULL THEN 'BET_WITHOUT_ENTRY'
            ELSE 'BET_DIFFERS' END AS code,
       coalesce(l.user_id, b.user_id) AS user_id, coalesce(l.seq, b.seq) AS seq,
       coalesce(l.match_id, b.match_id)::text AS match_id, NULL::text AS event_id,
       coalesce(format('bet %s, match %s, reserve %s', l.bet_id, l.match_id, -l.amount), 'no bet') AS expected,
       coalesce(format('bet %s, match %s, reserve %s', b.bet_id, b.match_id, b.reserve), 'no bet') AS found
  FROM (SELECT * FROM wallet_ledger
         WHERE shard = {shard} AND type = 'DEBIT' AND contra = 'ESCROW' AND settlement_version IS NULL) l
  FULL JOIN (SELECT * FROM bets WHERE shard = {shard}) b ON b.user_id = l.user_id AND b.seq = l.seq
 WHERE b.bet_id IS NULL OR l.seq IS NULL OR b.bet_id IS DISTINCT FROM l.bet_id
    OR b.match_id IS DISTINCT FROM l.match_id OR b.reserve <> -l.amount

-- name: full_projection
-- At the projection's own seq: a projection that is behind is late, not wrong. Both are read at one moment, and the
-- ledger is always written first.
SELECT CASE WHEN l.seq IS NULL AND p.seq > coalesce(h.seq, 0) THEN 'PROJECTION_AHEAD'
            ELSE 'PROJECTION_DIFFERS' END AS code,
       p.user_id, p.seq, NULL::text AS match_id, NULL::text AS event_id,
       CASE WHEN l.seq IS NULL AND p.seq > coalesce(h.seq, 0) THEN format('seq %s at most', coalesce(h.seq, 0))
            ELSE coalesce(format('balance %s', l.balance_snapshot), 'no such entry') END AS expected,
       format('seq %s, balance %s', p.seq, p.balance) AS found
  FROM wallet_balance_projection p
  LEFT JOIN wallet_ledger l ON l.shard = {shard} AND l.user_id = p.user_id AND l.seq = p.seq
  LEFT JOIN LATERAL (SELECT max(n.seq) AS seq FROM wallet_ledger n
                      WHERE n.shard = {shard} AND n.user_id = p.user_id AND l.seq IS NULL) h ON l.seq IS NULL
 WHERE p.shard = {shard} AND p.balance IS DISTINCT FROM l.balance_snapshot

-- name: entry_event_differs
(e.payload ->> 'amount') IS DISTINCT FROM l.amount::text
    OR (e.payload ->> 'balance') IS DISTINCT FROM l.balance_snapshot::text
    OR (e.payload ->> 'match_id') IS DISTINCT FROM l.match_id::text
    OR (e.payload ->> 'bet_id') IS DISTINCT FROM l.bet_id::text
    OR e.partition_key <> l.user_id::text
    OR CASE e.event_type WHEN 'EntryPosted' THEN
           (e.payload ->> 'type') IS DISTINCT FROM l.type OR (e.payload ->> 'contra') IS DISTINCT FROM l.contra
           OR (e.payload ->> 'settlement_version') IS DISTINCT FROM l.settlement_version::text
       ELSE l.type <> 'DEBIT' OR l.contra <> 'ESCROW' END

-- name: entry_text
format('%s %s against %s, balance %s, match %s, bet %s', l.type, l.amount, l.contra, l.balance_snapshot,
       coalesce(l.match_id::text, '-'), coalesce(l.bet_id::text, '-'))

-- name: full_events
SELECT CASE WHEN e.id IS NULL THEN 'EVENT_MISSING' WHEN l.seq IS NULL THEN 'ENTRY_MISSING'
            ELSE 'EVENT_DIFFERS' END AS code,
       coalesce(l.user_id, e.user_id) AS user_id, coalesce(l.seq, e.seq) AS seq,
       coalesce(l.match_id::text, e.payload ->> 'match_id') AS match_id, e.event_id::text AS event_id,
       CASE WHEN l.seq IS NULL THEN 'an entry of this event' ELSE {entry_text} END AS expected,
       coalesce(left(e.payload::text, 500), 'no event') AS found
  FROM wallet_ledger l
  FULL JOIN (SELECT id, event_id, event_type, partition_key, payload,
                    CASE WHEN pg_input_is_valid(payload ->> 'user_id', 'bigint')
                         THEN (payload ->> 'user_id')::bigint END AS user_id,
                    CASE WHEN pg_input_is_valid(payload ->> 'seq', 'bigint')
                         THEN (payload ->> 'seq')::bigint END AS seq
               FROM events WHERE event_type IN ('BetCreated', 'EntryPosted')) e
    ON e.user_id = l.user_id AND e.seq = l.seq
 WHERE e.id IS NULL OR l.seq IS NULL OR {entry_event_differs}

-- name: full_bet_events
-- The terms of a bet, which its entry does not hold.
SELECT 'EVENT_DIFFERS' AS code, b.user_id, b.seq, b.match_id::text AS match_id, e.event_id::text AS event_id,
       format('%s %s at %s, stake %s', b.side, b.outcome, b.odds, b.stake) AS expected,
       left(e.payload::text, 500) AS found
  FROM events e
  JOIN bets b ON b.bet_id::text = e.payload ->> 'bet_id'
 WHERE e.event_type = 'BetCreated'
   AND ((e.payload ->> 'outcome') IS DISTINCT FROM b.outcome OR (e.payload ->> 'side') IS DISTINCT FROM b.side
        OR (e.payload ->> 'odds') IS DISTINCT FROM b.odds::text
        OR (e.payload ->> 'stake') IS DISTINCT FROM b.stake::text)

-- name: full_event_duplicates
SELECT 'EVENT_DUPLICATE' AS code,
       CASE WHEN pg_input_is_valid(user_text, 'bigint') THEN user_text::bigint END AS user_id,
       CASE WHEN pg_input_is_valid(seq_text, 'bigint') THEN seq_text::bigint END AS seq, NULL::text AS match_id,
       max(event_id::text) AS event_id, '1 event' AS expected, format('%s events', count(*)) AS found
  FROM (SELECT event_id, payload ->> 'user_id' AS user_text, payload ->> 'seq' AS seq_text
          FROM events WHERE event_type IN ('BetCreated', 'EntryPosted')) e
 GROUP BY user_text, seq_text
HAVING count(*) > 1

-- name: fresh_branch
-- Entries of one partition that lie behind what an earlier pass looked at: blocks are only ever added at the end.
SELECT shard, user_id, seq, type, amount, contra, match_id, bet_id, settlement_version, balance_snapshot, created_at
  FROM wallet_ledger
 WHERE shard = {shard} AND ctid >= '({from_block},0)'::tid AND ctid < '({to_block},0)'::tid
   AND created_at >= '{since}'::timestamptz

-- name: new_entries
-- $1 the events after this id, of which $2 are read, $3 entries since then must have theirs among those.
-- Here and below, LIMIT 1 in a look-up by a whole key keeps it one: without it, the plan may be to scan everything.
WITH l AS MATERIALIZED ({fresh}),
recent AS MATERIALIZED (
    SELECT id, event_id, event_type, partition_key, payload,
           CASE WHEN pg_input_is_valid(payload ->> 'user_id', 'bigint')
                THEN (payload ->> 'user_id')::bigint END AS user_id,
           CASE WHEN pg_input_is_valid(payload ->> 'seq', 'bigint') THEN (payload ->> 'seq')::bigint END AS seq
      FROM events WHERE id > $1 ORDER BY id LIMIT $2),
e AS (SELECT * FROM recent WHERE event_type IN ('BetCreated', 'EntryPosted')),
-- Most entries follow one that is new as well; only what was there before is looked up.
walked AS (
    SELECT l.*, lag(seq) OVER w AS prev_seq, lag(balance_snapshot) OVER w AS prev_balance
      FROM l WINDOW w AS (PARTITION BY shard, user_id ORDER BY seq)),
chained AS (
    SELECT c.*, CASE WHEN c.prev_seq = c.seq - 1 THEN c.prev_seq ELSE p.seq END AS before_seq,
           CASE WHEN c.prev_seq = c.seq - 1 THEN c.prev_balance ELSE p.balance_snapshot END AS before_balance
      FROM walked c
      LEFT JOIN LATERAL (SELECT w.seq, w.balance_snapshot FROM wallet_ledger w
                          WHERE c.prev_seq IS DISTINCT FROM c.seq - 1
                            AND w.shard = c.shard AND w.user_id = c.user_id AND w.seq = c.seq - 1 LIMIT 1) p ON true)
SELECT CASE WHEN c.seq > 1 AND c.before_seq IS NULL THEN 'LEDGER_GAP'
            WHEN c.balance_snapshot < 0 THEN 'LEDGER_NEGATIVE' ELSE 'LEDGER_CHAIN' END AS code,
       c.user_id, c.seq, c.match_id::text AS match_id, NULL::text AS event_id,
       CASE WHEN c.seq > 1 AND c.before_seq IS NULL THEN format('seq %s', c.seq - 1)
            WHEN c.balance_snapshot < 0 THEN 'balance 0 or more'
            ELSE format('balance %s = %s + %s', coalesce(c.before_balance, 0) + c.amount,
                        coalesce(c.before_balance, 0), c.amount) END AS expected,
       CASE WHEN c.seq > 1 AND c.before_seq IS NULL THEN 'no such entry' ELSE format('balance %s', c.balance_snapshot)
            END AS found
  FROM chained c
 WHERE (c.seq > 1 AND c.before_seq IS NULL) OR c.balance_snapshot < 0
    OR c.balance_snapshot <> coalesce(c.before_balance, 0) + c.amount
UNION ALL
SELECT 'EVENT_MISSING', l.user_id, l.seq, l.match_id::text, NULL, {entry_text}, 'no event'
  FROM l
 WHERE l.created_at >= $3 AND NOT EXISTS (SELECT FROM e WHERE e.user_id = l.user_id AND e.seq = l.seq)
UNION ALL
SELECT 'EVENT_DIFFERS', e.user_id, e.seq, e.payload ->> 'match_id', e.event_id::text, {entry_text},
       left(e.payload::text, 500)
  FROM e
  JOIN l ON l.shard = (e.user_id % 100)::smallint AND l.user_id = e.user_id AND l.seq = e.seq
 WHERE {entry_event_differs}
UNION ALL
-- Events of entries that are not new.
SELECT CASE WHEN l.seq IS NULL THEN 'ENTRY_MISSING' ELSE 'EVENT_DIFFERS' END, e.user_id, e.seq,
       e.payload ->> 'match_id', e.event_id::text,
       CASE WHEN l.seq IS NULL THEN 'an entry of this event' ELSE {entry_text} END, left(e.payload::text, 500)
  FROM e
  LEFT JOIN LATERAL (SELECT * FROM wallet_ledger w
                      WHERE w.shard = (e.user_id % 100)::smallint AND w.user_id = e.user_id AND w.seq = e.seq
                      LIMIT 1) l ON true
 WHERE NOT EXISTS (SELECT FROM l AS n
                    WHERE n.shard = (e.user_id % 100)::smallint AND n.user_id = e.user_id AND n.seq = e.seq)
   AND (l.seq IS NULL OR {entry_event_differs})
UNION ALL
SELECT CASE WHEN b.bet_id IS NULL THEN 'BET_MISSING' ELSE 'BET_DIFFERS' END, l.user_id, l.seq, l.match_id::text,
       NULL, format('bet %s, match %s, reserve %s', l.bet_id, l.match_id, -l.amount),
       coalesce(format('bet %s, match %s, reserve %s', b.bet_id, b.match_id, b.reserve), 'no bet')
  FROM l
  LEFT JOIN LATERAL (SELECT * FROM bets n
                      WHERE n.shard = l.shard AND n.user_id = l.user_id AND n.bet_id = l.bet_id LIMIT 1) b ON true
 WHERE l.type = 'DEBIT' AND l.contra = 'ESCROW' AND l.settlement_version IS NULL
   AND (b.bet_id IS NULL OR b.seq <> l.seq OR b.match_id IS DISTINCT FROM l.match_id OR b.reserve <> -l.amount)
UNION ALL
SELECT CASE WHEN w.seq IS NULL THEN 'PROJECTION_AHEAD' ELSE 'PROJECTION_DIFFERS' END, p.user_id, p.seq, NULL, NULL,
       coalesce(format('balance %s', w.balance_snapshot), 'no such entry'),
       format('seq %s, balance %s', p.seq, p.balance)
  FROM (SELECT DISTINCT shard, user_id FROM l) d
  CROSS JOIN LATERAL (SELECT * FROM wallet_balance_projection n
                       WHERE n.shard = d.shard AND n.user_id = d.user_id LIMIT 1) p
  LEFT JOIN LATERAL (SELECT n.seq, n.balance_snapshot FROM wallet_ledger n
                      WHERE n.shard = p.shard AND n.user_id = p.user_id AND n.seq = p.seq LIMIT 1) w ON true
 WHERE p.balance IS DISTINCT FROM w.balance_snapshot

-- name: count_fresh
SELECT count(*) FROM ({fresh}) l

-- name: entries_of
-- Of (user, seq): which the ledger holds, and their balances.
SELECT k.user_id, k.seq, l.balance_snapshot AS balance
  FROM unnest($1::bigint[], $2::bigint[]) AS k (user_id, seq)
 CROSS JOIN LATERAL (SELECT w.balance_snapshot FROM wallet_ledger w
                      WHERE w.shard = (k.user_id % 100)::smallint AND w.user_id = k.user_id AND w.seq = k.seq
                      LIMIT 1) l

-- name: heads_of
SELECT k.user_id, coalesce(l.seq, 0) AS seq
  FROM unnest($1::bigint[]) AS k (user_id)
  LEFT JOIN LATERAL (SELECT w.seq FROM wallet_ledger w
                      WHERE w.shard = (k.user_id % 100)::smallint AND w.user_id = k.user_id
                      ORDER BY w.seq DESC LIMIT 1) l ON true

-- name: events_of_entries
-- Read from the beginning: there is no index by entry, and only suspects are looked for.
SELECT DISTINCT k.user_id, k.seq
  FROM unnest($1::bigint[], $2::bigint[]) AS k (user_id, seq)
  JOIN events e ON e.payload ->> 'user_id' = k.user_id::text AND e.payload ->> 'seq' = k.seq::text
 WHERE e.event_type IN ('BetCreated', 'EntryPosted')

-- name: events_known
-- Events by id; $2 is where to begin, for an id that is known to be new.
SELECT e.event_id::text AS event_id, e.event_type, e.partition_key, md5(e.payload::text) AS digest
  FROM unnest($1::text[]) AS k (event_id)
  JOIN events e ON e.event_id::text = k.event_id
 WHERE e.id > $2

-- name: events_after
-- $1 id, $2 created at or after, $3 at most so many.
SELECT id, event_id::text AS event_id, event_type, partition_key, published_to_kafka AS published,
       md5(payload::text) AS digest, created_at
  FROM events
 WHERE id > $1 AND created_at >= $2
 ORDER BY id
 LIMIT $3

-- name: first_unpublished
SELECT min(id) AS id FROM events WHERE NOT published_to_kafka

-- name: last_event_before
-- $1 where to begin, $2 how many to look at, $3 created before.
SELECT max(id) FILTER (WHERE created_at < $3) AS id
  FROM (SELECT id, created_at FROM events WHERE id > $1 ORDER BY id LIMIT $2) e

-- name: escrow_totals
-- By match, in the order of the id as text: the same on every server. $1 and below the shards that count here: a
-- shard that has moved away may still lie here for a while.
SELECT match_id::text AS match_id, sum(amount)::numeric AS total, max(user_id) AS user_id
  FROM wallet_ledger WHERE contra = 'ESCROW' AND shard = ANY ($1::smallint[]) GROUP BY match_id ORDER BY match_id::text COLLATE "C"

-- name: settled
SELECT m.match_id::text AS match_id, m.settlement_version AS version,
       m.state IN ('SETTLED', 'VOID') AND coalesce(s.state = 'DONE', false) AS settled
  FROM matches m
  LEFT JOIN settlements s USING (match_id, settlement_version)
 WHERE m.match_id = ANY ($1::uuid[])

-- name: unrefunded_bets
-- Bets of a match without the refund that a bet gets which came too late.
SELECT b.bet_id::text AS bet_id, b.reserve
  FROM bets b
 WHERE b.match_id = $1 AND b.shard = ANY ($2::smallint[])
   AND NOT EXISTS (SELECT FROM wallet_ledger l
                    WHERE l.shard = b.shard AND l.bet_id = b.bet_id AND l.type = 'REFUND' AND l.contra = 'ESCROW'
                      AND l.settlement_version = 0)

-- name: orders_in_time
-- Of these bets, those that the match's settlement went through. How a bet was cancelled does not say it: a cancel
-- may have waited for a bet that came too late.
SELECT o.bet_id::text AS bet_id
  FROM orders o
  JOIN matches m USING (match_id)
  JOIN settlements s USING (match_id, settlement_version)
 WHERE o.bet_id = ANY ($1::uuid[]) AND o.arrival <= s.last_arrival

-- name: settled_since
SELECT s.match_id::text AS match_id, (extract(epoch FROM s.finished_at) * 1000000)::bigint AS finished_us
  FROM settlements s
 WHERE s.state = 'DONE' AND s.finished_at >= to_timestamp($1::bigint / 1000000.0)
 ORDER BY s.finished_at
 LIMIT $2

-- name: orders_of
-- Those that the settlement went through; later ones are refunded by events of their own.
SELECT o.user_id, o.bet_id::text AS bet_id
  FROM orders o
  JOIN matches m USING (match_id)
  JOIN settlements s USING (match_id, settlement_version)
 WHERE o.match_id = $1::uuid AND o.arrival <= s.last_arrival ORDER BY o.arrival

-- name: escrow_of_bets
-- What these bets have put into escrow and not taken out, by the indexes on bets and on business keys.
SELECT coalesce(-sum(e.amount), 0)::numeric AS held
  FROM unnest($1::bigint[], $2::uuid[]) AS k (user_id, bet_id)
 CROSS JOIN LATERAL (
     SELECT n.shard, n.user_id, n.seq, n.bet_id FROM bets n
      WHERE n.shard = (k.user_id % 100)::smallint AND n.user_id = k.user_id AND n.bet_id = k.bet_id
        AND n.shard = ANY ($3::smallint[]) LIMIT 1) b
 CROSS JOIN LATERAL (
     SELECT l.amount FROM wallet_ledger l WHERE l.shard = b.shard AND l.user_id = b.user_id AND l.seq = b.seq
     UNION ALL
     SELECT l.amount FROM wallet_ledger l
      WHERE l.shard = b.shard AND l.bet_id = b.bet_id AND l.contra = 'ESCROW' AND l.settlement_version IS NOT NULL) e

-- name: positions
SELECT shard, file, blocks, verified_at FROM reconciliation_positions

-- name: save_positions
INSERT INTO reconciliation_positions AS p (shard, file, blocks, verified_at)
SELECT * FROM unnest($1::smallint[], $2::bigint[], $3::bigint[], $4::timestamptz[])
    ON CONFLICT (shard) DO UPDATE SET file = excluded.file, blocks = excluded.blocks, verified_at = excluded.verified_at

-- name: drop_positions
DELETE FROM reconciliation_positions WHERE NOT shard = ANY ($1::smallint[])

-- name: marks
SELECT name, position FROM reconciliation_marks

-- name: save_marks
INSERT INTO reconciliation_marks (name, position) SELECT * FROM unnest($1::text[], $2::bigint[])
    ON CONFLICT (name) DO UPDATE SET position = excluded.position

-- name: store_run
INSERT INTO reconciliations (run_id, kind, requested_by, state, findings, duplicates, entries, events, records,
                             problems, started_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING run_no

-- name: store_findings
INSERT INTO reconciliation_findings (run_no, finding_no, code, user_id, seq, match_id, event_id, topic, partition,
                                     kafka_offset, expected, found)
SELECT $1, f.* FROM unnest($2::integer[], $3::text[], $4::bigint[], $5::bigint[], $6::text[], $7::text[], $8::text[],
                           $9::integer[], $10::bigint[], $11::text[], $12::text[]) f

-- name: forget_runs
-- Keeps the newest $1 of those without and of those with findings.
DELETE FROM reconciliations r
 USING (SELECT run_no, row_number() OVER (PARTITION BY state = 'FINDINGS' ORDER BY run_no DESC) AS age
          FROM reconciliations) old
 WHERE r.run_no = old.run_no AND old.age > $1

-- name: pause
SELECT payouts_pause($1, $2, $3)

-- name: resume
SELECT payouts_resume($1, $2)

-- name: gate
SELECT paused, changed_by, reason, run_id::text AS run_id, changed_at FROM payout_gate

-- name: changes
SELECT paused, changed_by, reason, login, run_id::text AS run_id, changed_at
  FROM payout_changes ORDER BY change_no DESC LIMIT $1

-- name: runs
SELECT run_no, run_id::text AS run_id, kind, requested_by, state, findings, duplicates, entries, events, records,
       problems, started_at, finished_at
  FROM reconciliations ORDER BY run_no DESC LIMIT $1

-- name: findings
SELECT r.run_id::text AS run_id, r.kind, r.started_at, f.code, f.user_id, f.seq, f.match_id, f.event_id, f.topic,
       f.partition, f.kafka_offset, f.expected, f.found
  FROM reconciliation_findings f
  JOIN reconciliations r USING (run_no)
 WHERE $1::text IS NULL OR r.run_id::text = $1
 ORDER BY f.run_no DESC, f.finding_no
 LIMIT $2

-- name: summary
-- What the metrics say of this server: findings since the last full pass that saw everything, and the times.
SELECT coalesce(sum(r.findings) FILTER (WHERE r.run_no >= coalesce(f.last_full, 0)), 0)::bigint AS mismatches,
       coalesce(sum(r.duplicates) FILTER (WHERE r.run_no >= coalesce(f.last_full, 0)), 0)::bigint AS duplicates,
       coalesce(extract(epoch FROM max(r.started_at) FILTER (WHERE r.kind = 'FULL' AND r.state <> 'INCOMPLETE')), 0)
           ::float8 AS full_at,
       coalesce(extract(epoch FROM max(r.started_at) FILTER (WHERE r.kind = 'INCREMENTAL' AND r.state <> 'INCOMPLETE')),
                0)::float8 AS incremental_at,
       (SELECT paused FROM payout_gate) AS paused,
       (SELECT numbackends FROM pg_stat_database WHERE datname = current_database()) AS connections,
       (SELECT count(*) FROM pg_locks WHERE granted) AS locks_held,
       (SELECT count(*) FROM pg_locks WHERE NOT granted) AS locks_awaited
  FROM (SELECT max(run_no) AS last_full FROM reconciliations WHERE kind = 'FULL' AND state <> 'INCOMPLETE') f
  LEFT JOIN reconciliations r ON true

-- name: events_window
SELECT count(*) AS events, min(created_at) AS since, coalesce(max(id), 0) AS newest
  FROM (SELECT id, created_at FROM events WHERE id > $1 ORDER BY id LIMIT $2) e

-- name: newest_event
SELECT coalesce(max(id), 0) AS id FROM events
