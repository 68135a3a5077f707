-- Statements of the live auditor, all under the role that can only read. {shard}, {no}, {branches} are filled in by
-- server.py. A row version is *new* when its transaction is not older than a horizon: the xmin of an earlier snapshot.
-- Every transaction below that xmin was over by then, so what it wrote was seen then or never will be; everything that
-- became visible since has a number at or above it, however late it committed. (The age of the horizon is a sub-select, so
-- that it is worked out once and not for every row.)

-- name: moment
SELECT pg_snapshot_xmin(s)::text AS xmin, pg_snapshot_xmax(s)::text AS xmax FROM pg_current_snapshot() s

-- name: partitions
-- What the server has of the ledger: the file of each partition, its size in blocks, whether its shard is held here, and
-- how many rows were ever changed or removed in it (none, if all is well).
SELECT b.shard, c.relfilenode::bigint AS file,
       pg_relation_size(c.oid) / current_setting('block_size')::bigint AS blocks, coalesce(r.here, false) AS here,
       pg_stat_get_tuples_updated(c.oid) + pg_stat_get_tuples_deleted(c.oid) AS rewrites
  FROM pg_inherits i
  JOIN pg_class c ON c.oid = i.inhrelid
 CROSS JOIN LATERAL (SELECT substring(pg_get_expr(c.relpartbound, c.oid) FROM '\d+')::smallint AS shard) b
  LEFT JOIN shard_routes r ON r.shard = b.shard
 WHERE i.inhparent = 'wallet_ledger'::regclass AND NOT i.inhdetachpending
 ORDER BY 1

-- name: sizes
SELECT pg_relation_size('events') / b.size AS events, pg_relation_size('wallet_balance_projection') / b.size AS projection
  FROM (SELECT current_setting('block_size')::bigint AS size) b

-- name: tail_branch
SELECT l.shard, l.user_id, l.seq, l.type, l.amount, l.contra, l.match_id, l.bet_id, l.settlement_version,
       l.balance_snapshot, l.idempotent_key, hash_record_extended(l, 0) AS digest
  FROM wallet_ledger l
 WHERE l.shard = {shard} AND l.ctid >= (($2::text[])[{no}])::tid AND age(l.xmin) <= (SELECT age($1::text::xid8::xid))

-- name: tail
-- New row versions at the end of each partition: $1 the horizon, $2 where to begin in each.
WITH l AS MATERIALIZED ({branches})
SELECT l.shard, l.user_id, l.seq, l.type, l.amount, l.contra, l.match_id::text, l.bet_id::text, l.settlement_version,
       l.balance_snapshot, l.idempotent_key, l.digest,
       b.seq, b.reserve, b.match_id::text, b.outcome, b.side, b.odds, b.stake
  FROM l
  LEFT JOIN LATERAL (SELECT * FROM bets n
                      WHERE n.shard = l.shard AND n.user_id = l.user_id AND n.bet_id = l.bet_id LIMIT 1) b
    ON l.contra = 'ESCROW' AND l.type = 'DEBIT' AND l.settlement_version IS NULL

-- name: entry_columns
l.shard, l.user_id, l.seq, l.type, l.amount, l.contra, l.match_id::text, l.bet_id::text, l.settlement_version,
       l.balance_snapshot, l.idempotent_key, hash_record_extended(l, 0),
       b.seq, b.reserve, b.match_id::text, b.outcome, b.side, b.odds, b.stake

-- name: entries_between
-- Entries of wallets from one seq to another: $1 wallets, $2 first, $3 last seq, $4 rows at most.
SELECT {entry_columns}
  FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS k (user_id, low, high)
 CROSS JOIN LATERAL (SELECT * FROM wallet_ledger w
                      WHERE w.shard = (k.user_id % 100)::smallint AND w.user_id = k.user_id
                        AND w.seq BETWEEN k.low AND k.high ORDER BY w.seq LIMIT $4) l
  LEFT JOIN LATERAL (SELECT * FROM bets n
                      WHERE n.shard = l.shard AND n.user_id = l.user_id AND n.bet_id = l.bet_id LIMIT 1) b
    ON l.contra = 'ESCROW' AND l.type = 'DEBIT' AND l.settlement_version IS NULL
 LIMIT $4

-- name: balances_at
SELECT l.user_id, l.seq, l.balance_snapshot AS balance
  FROM unnest($1::bigint[], $2::bigint[]) AS k (user_id, seq)
 CROSS JOIN LATERAL (SELECT w.user_id, w.seq, w.balance_snapshot FROM wallet_ledger w
                      WHERE w.shard = (k.user_id % 100)::smallint AND w.user_id = k.user_id AND w.seq = k.seq
                      LIMIT 1) l

-- name: wallet_sums
-- Wallets of a shard as wholes, in the order of their number: $1 shard, $2 after this wallet, $3 rows at most (the last
-- wallet may be cut then).
SELECT user_id, count(*) AS rows, max(seq) AS seq, (max(ARRAY[seq, balance_snapshot]))[2] AS balance,
       sum(amount)::text AS total, sum(digest)::text AS digest,
       count(*) FILTER (WHERE seq <> prev_seq + 1 OR balance_snapshot <> prev_balance + amount OR balance_snapshot < 0)
           + count(*) - count(DISTINCT idempotent_key) AS broken
  FROM (SELECT l.user_id, l.seq, l.amount, l.balance_snapshot, l.idempotent_key, hash_record_extended(l, 0) AS digest,
               lag(l.seq, 1, 0::bigint) OVER w AS prev_seq, lag(l.balance_snapshot, 1, 0::bigint) OVER w AS prev_balance
          FROM (SELECT * FROM wallet_ledger n WHERE n.shard = $1::smallint AND n.user_id > $2
                 ORDER BY n.user_id, n.seq LIMIT $3) l
        WINDOW w AS (PARTITION BY l.user_id ORDER BY l.seq)) walked
 GROUP BY user_id
 ORDER BY user_id

-- name: prefix_sums
-- The same of the first entries of single wallets: $1 wallets, $2 up to which seq each.
SELECT k.user_id, s.rows, k.upto AS seq, coalesce(s.balance, 0) AS balance, s.total, s.digest, 0 AS broken
  FROM unnest($1::bigint[], $2::bigint[]) AS k (user_id, upto)
 CROSS JOIN LATERAL (SELECT count(*) AS rows, (max(ARRAY[l.seq, l.balance_snapshot]))[2] AS balance,
                            coalesce(sum(l.amount), 0)::text AS total,
                            coalesce(sum(hash_record_extended(l, 0)), 0)::text AS digest
                       FROM wallet_ledger l
                      WHERE l.shard = (k.user_id % 100)::smallint AND l.user_id = k.user_id AND l.seq <= k.upto) s

-- name: rewritten_rows
-- Which rows of a wallet were written after the horizon $3 although it had them before: $1 wallet, $2 up to which seq.
SELECT l.seq, l.type, l.amount, l.balance_snapshot AS balance, l.idempotent_key AS key
  FROM wallet_ledger l
 WHERE l.shard = ($1::bigint % 100)::smallint AND l.user_id = $1::bigint AND l.seq <= $2 AND age(l.xmin) <= (SELECT age($3::text::xid8::xid))
 ORDER BY l.seq LIMIT 5

-- name: accounts
-- What all entries of these shards moved, by contra account and match.
SELECT contra, match_id::text AS match_id, sum(amount)::text AS amount
  FROM wallet_ledger WHERE shard = ANY ($1::smallint[]) GROUP BY contra, match_id

-- name: event_columns
e.id, e.event_id::text, e.event_type, e.partition_key, e.payload::text,
       hash_record_extended(ROW(e.event_id, e.aggregate_type, e.aggregate_id, e.event_type, e.partition_key, e.payload), 0)

-- name: first_event
-- Where to begin: before the oldest event that is not published, else behind the newest.
SELECT coalesce((SELECT min(id) - 1 FROM events WHERE NOT published_to_kafka), (SELECT max(id) FROM events), 0) AS first,
       coalesce((SELECT max(id) FROM events), 0) AS newest

-- name: new_events
-- $1 after this id, $2 at most so many.
SELECT {event_columns} FROM events e WHERE e.id > $1 ORDER BY e.id LIMIT $2

-- name: late_events
SELECT {event_columns} FROM events e WHERE e.id = ANY ($1::bigint[]) ORDER BY e.id

-- name: changed_events
-- New versions of outbox rows in a stretch of blocks: most of them are only marked as published. $1 horizon, $2 and $3
-- the stretch, $4 the newest id that was read before.
SELECT array_agg(e.id) AS ids,
       array_agg(hash_record_extended(
           ROW(e.event_id, e.aggregate_type, e.aggregate_id, e.event_type, e.partition_key, e.payload), 0)) AS digests
  FROM events e
 WHERE e.ctid >= $2::text::tid AND e.ctid < $3::text::tid AND age(e.xmin) <= (SELECT age($1::text::xid8::xid)) AND e.id <= $4

-- name: published
-- Which of these outbox rows are marked.
SELECT id FROM events WHERE id = ANY ($1::bigint[]) AND published_to_kafka

-- name: events_of_entries
-- There is no index by entry; only suspects are looked for. $3 where to begin.
SELECT {event_columns}
  FROM events e
  JOIN unnest($1::bigint[], $2::bigint[]) AS k (user_id, seq)
    ON e.payload ->> 'user_id' = k.user_id::text AND e.payload ->> 'seq' = k.seq::text
 WHERE e.id > $3 AND e.event_type IN ('BetCreated', 'EntryPosted')

-- name: events_by_id
-- Nor by event id. $2 where to begin.
SELECT {event_columns} FROM events e JOIN unnest($1::text[]) AS k (event_id) ON e.event_id::text = k.event_id
 WHERE e.id > $2

-- name: changed_projection
SELECT array_agg(p.user_id) AS users, array_agg(p.seq) AS seqs, array_agg(p.balance) AS balances
  FROM wallet_balance_projection p
 WHERE p.ctid >= $2::text::tid AND p.ctid < $3::text::tid AND age(p.xmin) <= (SELECT age($1::text::xid8::xid))
   AND p.shard = ANY ($4::smallint[])

-- name: settlements
SELECT match_id::text AS match_id, settlement_version AS version, state FROM settlements

-- name: in_flight
-- Bets of a match without the refund that a bet gets which came too late, or was cancelled.
SELECT b.bet_id::text AS bet_id, b.reserve
  FROM bets b
 WHERE b.match_id = $1::text::uuid AND b.shard = ANY ($2::smallint[])
   AND NOT EXISTS (SELECT FROM wallet_ledger l
                    WHERE l.shard = b.shard AND l.user_id = b.user_id AND l.bet_id = b.bet_id AND l.type = 'REFUND'
                      AND l.contra = 'ESCROW' AND l.settlement_version = 0)
 LIMIT $3

-- name: settled_orders
-- Of these bets those that a settlement of the match went through.
SELECT o.bet_id::text AS bet_id
  FROM orders o
  JOIN (SELECT match_id, max(last_arrival) AS last_arrival FROM settlements WHERE state = 'DONE' GROUP BY 1) s USING (match_id)
 WHERE o.bet_id = ANY ($1::text[]::uuid[]) AND o.arrival <= s.last_arrival

-- name: escrow_of_match
SELECT coalesce(-sum(amount), 0)::text AS held FROM wallet_ledger
 WHERE contra = 'ESCROW' AND match_id = $1::text::uuid AND shard = ANY ($2::smallint[])

-- name: head
SELECT l.seq, l.balance_snapshot AS balance FROM wallet_ledger l
 WHERE l.shard = ($1::bigint % 100)::smallint AND l.user_id = $1::bigint ORDER BY l.seq DESC LIMIT 1
