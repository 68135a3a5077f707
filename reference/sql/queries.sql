-- Queries of the API, relay and projector. A read of a wallet asks shard_here: the error LP002 of a server that does
-- not hold the shard sends the reader to the one that does. From a plain table that is the first term of WHERE. From
-- wallet_ledger it must be a row of its own that the rest depends on: where there is no partition to read, nothing
-- of the WHERE is ever looked at, and a wallet that is elsewhere would look like one without entries.

-- name: routes
SELECT shard, server_name, epoch, here FROM shard_routes

-- name: accept_shard
SELECT shard_accept($1, $2)

-- name: post
-- Columns of text come as literals (store.text_array).
SELECT command_no, status, entry_seq, entry_balance
  FROM ledger_post($1, $2, $3::text::text[], $4::text::text[], $5, $6::text::text[], $7, $8, $9, $10::text::text[],
                   $11::text::text[], $12, $13, $14::text::text[], $15::text::text[])

-- name: answers
SELECT answer_no, outcome, entry_seq, entry_balance, bet, command::text FROM ledger_answers($1, $2)

-- name: create_match
SELECT status, state, field FROM match_create($1, $2, $3)

-- name: transition_match
SELECT status, state, field FROM match_transition($1, $2, $3)

-- name: resettle_match
SELECT status, state, field, version FROM match_resettle($1, $2, $3, $4)

-- name: advances
-- What the house has advanced on each bet of a wallet and not got back. A bet that owes has nothing else with the
-- house: its commission was given back before anything was advanced.
SELECT owing.*
  FROM (SELECT shard_here($1) AS here OFFSET 0) asked
 CROSS JOIN LATERAL (
     SELECT l.match_id, l.bet_id, sum(l.amount)::bigint AS owed
       FROM wallet_ledger l
       JOIN (SELECT DISTINCT a.bet_id FROM wallet_ledger a
              WHERE a.shard = $1 AND a.user_id = $2 AND a.contra = 'HOUSE' AND a.type = 'CREDIT') advanced USING (bet_id)
      WHERE asked.here AND l.shard = $1 AND l.contra = 'HOUSE' AND l.settlement_version IS NOT NULL
      GROUP BY l.match_id, l.bet_id
     HAVING sum(l.amount) > 0
      ORDER BY l.bet_id
      LIMIT $3) owing

-- name: cancel_bet
SELECT status, bet, cancelled_stake, refund FROM bet_cancel($1, $2, $3, $4)

-- name: match
SELECT m.match_id, m.outcomes, (extract(epoch FROM m.closes_at) * 1000)::bigint AS closes_at_ms, m.state,
       m.settlement_version, m.result, coalesce(s.state = 'DONE', false) AS settled
  FROM matches m
  LEFT JOIN settlements s USING (match_id, settlement_version)
 WHERE m.match_id = $1

-- name: bet
SELECT match_id, outcome, side, odds, stake, reserve, (extract(epoch FROM placed_at) * 1000)::bigint AS placed_at_ms
  FROM bets WHERE shard_here($1) AND shard = $1 AND user_id = $2 AND bet_id = $3

-- name: rollback
SELECT status, bet, match FROM bet_rollback($1, $2)

-- name: bets_page
-- Newest first: a bet's id begins with the time it was placed.
SELECT bet_id, match_id, outcome, side, odds, stake, reserve,
       (extract(epoch FROM placed_at) * 1000)::bigint AS placed_at_ms
  FROM bets WHERE shard_here($1) AND shard = $1 AND user_id = $2 AND bet_id < $3 ORDER BY bet_id DESC LIMIT $4

-- name: orders_of_bets
SELECT bet_id, state, matched_stake, cancelled_stake FROM orders WHERE bet_id = ANY ($1::uuid[])

-- name: statistics
SELECT seq, deposits, deposited, withdrawals, withdrawn, bets, staked, payouts, won, refunds, refunded, commission,
       complete
  FROM wallet_statistics($1, $2)

-- name: book
-- The best levels of each side: BACKs from the lowest odds, LAYs from the highest.
SELECT outcome, side, odds, stake, bets
  FROM (SELECT outcome, side, odds, sum(stake - matched_stake - cancelled_stake)::bigint AS stake, count(*) AS bets,
               row_number() OVER (PARTITION BY outcome, side
                                  ORDER BY CASE side WHEN 'BACK' THEN odds ELSE -odds END) AS level
          FROM orders WHERE match_id = $1 AND state IN ('PENDING', 'PART_MATCHED')
         GROUP BY outcome, side, odds) levels
 WHERE level <= $2
 ORDER BY outcome, side, level

-- name: matches_page
SELECT m.match_id, m.outcomes, (extract(epoch FROM m.closes_at) * 1000)::bigint AS closes_at_ms, m.state,
       m.settlement_version, m.result, coalesce(s.state = 'DONE', false) AS settled,
       (extract(epoch FROM m.created_at) * 1000000)::bigint AS created_at_us
  FROM matches m
  LEFT JOIN settlements s USING (match_id, settlement_version)
 WHERE (m.created_at, m.match_id) < ('epoch'::timestamptz + $1::bigint * interval '1 microsecond', $2::uuid)
 ORDER BY m.created_at DESC, m.match_id DESC
 LIMIT $3

-- name: matches_page_of_state
SELECT m.match_id, m.outcomes, (extract(epoch FROM m.closes_at) * 1000)::bigint AS closes_at_ms, m.state,
       m.settlement_version, m.result, coalesce(s.state = 'DONE', false) AS settled,
       (extract(epoch FROM m.created_at) * 1000000)::bigint AS created_at_us
  FROM matches m
  LEFT JOIN settlements s USING (match_id, settlement_version)
 WHERE m.state = $4
   AND (m.created_at, m.match_id) < ('epoch'::timestamptz + $1::bigint * interval '1 microsecond', $2::uuid)
 ORDER BY m.created_at DESC, m.match_id DESC
 LIMIT $3

-- name: order
SELECT state, matched_stake, cancelled_stake FROM orders WHERE bet_id = $1

-- name: head
SELECT l.*, floor(extract(epoch FROM now()) * 1000)::bigint AS now_ms
  FROM (SELECT shard_here($1) AS here OFFSET 0) asked
 CROSS JOIN LATERAL (
     SELECT balance_snapshot AS balance, seq, (extract(epoch FROM created_at) * 1000)::bigint AS updated_at_ms
       FROM wallet_ledger WHERE asked.here AND shard = $1 AND user_id = $2 ORDER BY seq DESC LIMIT 1) l

-- name: projected
SELECT balance, seq, (extract(epoch FROM updated_at) * 1000)::bigint AS updated_at_ms,
       (SELECT complete_at_ms FROM projection_progress) AS complete_at_ms,
       floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now_ms
  FROM wallet_balance_projection WHERE shard_here($1) AND shard = $1 AND user_id = $2

-- name: entries
SELECT l.*
  FROM (SELECT shard_here($1) AS here OFFSET 0) asked
 CROSS JOIN LATERAL (
     SELECT seq, type, amount, balance_snapshot, contra, match_id, bet_id, idempotent_key,
            (extract(epoch FROM created_at) * 1000)::bigint AS created_at_ms
       FROM wallet_ledger WHERE asked.here AND shard = $1 AND user_id = $2 AND seq > $3 ORDER BY seq LIMIT $4) l

-- name: newest_entries
SELECT l.*
  FROM (SELECT shard_here($1) AS here OFFSET 0) asked
 CROSS JOIN LATERAL (
     SELECT seq, type, amount, balance_snapshot, contra, match_id, bet_id, idempotent_key,
            (extract(epoch FROM created_at) * 1000)::bigint AS created_at_ms
       FROM wallet_ledger WHERE asked.here AND shard = $1 AND user_id = $2 AND seq < $3 ORDER BY seq DESC LIMIT $4) l

-- name: as_of
SELECT now_ms, first_seq, seq, balance, updated_at_ms FROM wallet_as_of($1, $2, $3)

-- name: unpublished
SELECT id, event_id::text AS event_id, event_type, partition_key, payload::text AS payload, created_at, traceparent
  FROM events WHERE NOT published_to_kafka AND id <> ALL ($2::bigint[]) ORDER BY id LIMIT $1

-- name: newest_unpublished
SELECT max(id) FROM events WHERE NOT published_to_kafka

-- Marks what is in Kafka, says how far the relay is, and returns a moment for the next reading: now() is taken when
-- the transaction begins, so whatever was committed before it is seen by every later statement.
-- name: advance_relay
WITH marked AS (
    UPDATE events SET published_to_kafka = true, published_at = clock_timestamp()
     WHERE id = ANY ($1::bigint[]) AND NOT published_to_kafka)
UPDATE relay_progress SET complete_at_ms = greatest(complete_at_ms, $2), offsets = coalesce($3::jsonb, offsets),
       broker_losses = $4
RETURNING floor(extract(epoch FROM now()) * 1000)::bigint

-- name: relay_progress
-- With the shards that are here as of the same moment: an event that these offsets tell of is of one of them.
SELECT complete_at_ms, offsets::text AS offsets, broker_losses, floor(extract(epoch FROM now()) * 1000)::bigint AS now_ms,
       ARRAY(SELECT shard::integer FROM shard_routes WHERE here ORDER BY shard) AS held
  FROM relay_progress

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

-- name: projections
SELECT user_id, balance, seq, (extract(epoch FROM updated_at) * 1000)::bigint AS updated_at_ms
  FROM unnest($1::bigint[]) AS u (user_id)
  JOIN wallet_balance_projection USING (user_id)
 WHERE shard = (u.user_id % 100)::smallint

-- Says up to when each partition of this projector is applied, in the projection and in the cache; the whole is
-- complete up to the oldest of them once every partition ($3 of them) was heard of. A crash may take the newest
-- saying back, which only makes readers careful: the commit is not waited for.
-- name: report_projected
UPDATE projection_progress AS p
   SET projected = p.projected || $1::jsonb,
       cached = p.cached || $2::jsonb,
       complete_at_ms = greatest(p.complete_at_ms, (
           SELECT CASE WHEN count(*) >= $3 THEN min(said.at::bigint) END
             FROM jsonb_each_text(p.projected || $1::jsonb) AS said (partition, at))),
       cached_at_ms = greatest(p.cached_at_ms, (
           SELECT CASE WHEN count(*) >= $3 THEN min(said.at::bigint) END
             FROM jsonb_each_text(p.cached || $2::jsonb) AS said (partition, at)))
 WHERE set_config('synchronous_commit', 'off', true) = 'off'
RETURNING complete_at_ms, cached_at_ms, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now_ms

-- name: begin_rebuild
INSERT INTO projection_rebuilds AS b (shard, from_zero)
SELECT shard, $2 FROM unnest($1::smallint[]) AS s (shard)
    ON CONFLICT (shard) DO UPDATE
   SET from_zero = $2, after_user = 0, wallets = 0, wrong = 0, started_at = clock_timestamp(), finished_at = NULL
 WHERE $3 OR NOT EXISTS (SELECT FROM projection_rebuilds u
                          WHERE u.shard = ANY ($1::smallint[]) AND u.finished_at IS NULL AND u.from_zero = $2)

-- name: rebuilds
SELECT shard, after_user, wallets, wrong FROM projection_rebuilds
 WHERE shard = ANY ($1::smallint[]) AND finished_at IS NULL ORDER BY shard

-- name: rebuild_page
SELECT rebuilt, wrong_rows, last FROM projection_rebuild_page($1, $2)

-- name: event_from
SELECT id, created_at FROM events WHERE id >= $1 ORDER BY id LIMIT 1

-- name: newest_event
SELECT coalesce(max(id), 0) FROM events

-- name: published
SELECT id, event_id::text AS event_id, event_type, partition_key, payload::text AS payload, created_at, traceparent
  FROM events
 WHERE id > $1 AND id <= $2 AND published_to_kafka AND created_at >= $3 AND event_type = ANY ($4::text[])
 ORDER BY id LIMIT $5
