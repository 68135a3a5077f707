-- Queries of the API, relay and projector. A read of a wallet asks shard_here: the error LP001 of a server that does
-- not hold the shard sends the reader to the one that does. From a plain table that is the first term of WHERE. From
-- wallet_ledger it must be a row of its own that the rest depends on: where there is no partition to read, nothing
-- of the WHERE is ever looked at, and a wallet that is elsewhere would look like one without entries.

-- name: routes
SELECT shard, server_name, epoch, here FROM shard_routes

-- name: accept_shard
SELECT shard_accept($1, $2)

-- name: post
SELECT command_no, status, entry_seq, entry_balance
  FROM ledger_post($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)

-- name: answers
SELECT answer_no, outcome, entry_seq, entry_balance, bet, command::text FROM ledger_answers($1, $2)

-- name: create_match
SELECT status, state, field FROM match_create($1, $2, $3)

-- name: transition_match
SELECT status, state, field FROM match_transition($1, $2, $3)

-- name: cancel_bet
SELECT status, bet, cancelled_stake, refund FROM bet_cancel($1, $2, $3, $4)

-- name: match
SELECT m.match_id, m.outcomes, (extract(epoch FROM m.closes_at) * 1000)::bigint AS closes_at_ms, m.state,
       m.settlement_version, m.result, coalesce(s.state = 'DONE', false) AS settled
  FROM matches m
  LEFT JOIN settlements s USING (match_id, settlement_version)
 WHERE m.match_id = $1

-- name: bet
SELECT match_id, outcome, side, odds, stake, reserve FROM bets
 WHERE shard_here($1) AND shard = $1 AND user_id = $2 AND bet_id = $3

-- name: order
SELECT state, matched_stake, cancelled_stake FROM orders WHERE bet_id = $1

-- name: head
SELECT l.*
  FROM (SELECT shard_here($1) AS here OFFSET 0) asked
 CROSS JOIN LATERAL (
     SELECT balance_snapshot AS balance, seq, (extract(epoch FROM created_at) * 1000)::bigint AS updated_at_ms
       FROM wallet_ledger WHERE asked.here AND shard = $1 AND user_id = $2 ORDER BY seq DESC LIMIT 1) l

-- name: as_of
SELECT now_ms, first_seq, seq, balance, updated_at_ms FROM wallet_as_of($1, $2, $3)

-- name: projected
SELECT balance, seq, (extract(epoch FROM updated_at) * 1000)::bigint AS updated_at_ms
  FROM wallet_balance_projection WHERE shard_here($1) AND shard = $1 AND user_id = $2

-- name: entries
SELECT l.*
  FROM (SELECT shard_here($1) AS here OFFSET 0) asked
 CROSS JOIN LATERAL (
     SELECT seq, type, amount, balance_snapshot, contra, match_id, bet_id, idempotent_key,
            (extract(epoch FROM created_at) * 1000)::bigint AS created_at_ms
       FROM wallet_ledger WHERE asked.here AND shard = $1 AND user_id = $2 AND seq > $3 ORDER BY seq LIMIT $4) l

-- name: unpublished
SELECT id, event_id::text AS event_id, event_type, partition_key, payload::text AS payload, created_at, traceparent
  FROM events WHERE NOT published_to_kafka ORDER BY id LIMIT $1

-- name: mark_published
UPDATE events SET published_to_kafka = true, published_at = clock_timestamp()
 WHERE id = ANY ($1::bigint[]) AND NOT published_to_kafka

-- name: count_unpublished
SELECT count(*) FROM (SELECT FROM events WHERE NOT published_to_kafka LIMIT $1) backlog

-- name: lead
SELECT pg_try_advisory_lock($1, $2)

-- name: project
INSERT INTO wallet_balance_projection AS p (shard, user_id, balance, seq, updated_at)
SELECT (n.user_id % 100)::smallint, n.user_id, n.balance, n.seq, to_timestamp(n.updated_at_ms / 1000.0)
  FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[]) AS n (user_id, balance, seq, updated_at_ms)
 WHERE shards_here($1::bigint[])
 ORDER BY n.user_id
    ON CONFLICT (shard, user_id) DO UPDATE
   SET balance = excluded.balance, seq = excluded.seq, updated_at = excluded.updated_at
 WHERE p.seq < excluded.seq
RETURNING user_id
