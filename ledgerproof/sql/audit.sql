-- What the harness reads from a server, always as the role that can only read. Timestamps are Unix seconds.

-- name: progress
SELECT (SELECT count(*) FROM events WHERE NOT published_to_kafka) AS unpublished,
       (SELECT count(*) FROM settlements WHERE state <> 'DONE') AS unsettled,
       (SELECT coalesce(max(id), 0) FROM events) AS newest_event

-- name: unprojected
SELECT count(*)
  FROM (SELECT shard, user_id, max(seq) AS seq FROM wallet_ledger GROUP BY shard, user_id) AS head
  LEFT JOIN wallet_balance_projection AS p USING (shard, user_id)
 WHERE p.seq IS DISTINCT FROM head.seq

-- name: ledger
SELECT shard, user_id, seq, type, amount, contra, match_id, bet_id, settlement_version, balance_snapshot,
       idempotent_key, reference_id, created_by, extract(epoch FROM created_at) AS created_at,
       xmin::text::bigint AS xact
  FROM wallet_ledger

-- name: bets
SELECT shard, user_id, bet_id, seq, match_id, outcome, side, odds, stake, reserve,
       extract(epoch FROM placed_at) AS placed_at
  FROM bets

-- name: refusals
SELECT shard, user_id, idempotent_key, outcome, command::text AS command,
       extract(epoch FROM created_at) AS created_at
  FROM refusals

-- name: outbox
SELECT id, event_id, aggregate_type, aggregate_id, event_type, partition_key, payload::text AS payload,
       (payload ->> 'user_id')::bigint AS user_id, (payload ->> 'seq')::bigint AS seq,
       (payload ->> 'amount')::bigint AS amount, (payload ->> 'balance')::bigint AS balance,
       published_to_kafka::text AS published_to_kafka,
       extract(epoch FROM created_at) AS created_at, extract(epoch FROM published_at) AS published_at
  FROM events

-- name: projection
SELECT shard, user_id, balance, seq, extract(epoch FROM updated_at) AS updated_at
  FROM wallet_balance_projection

-- name: matches
SELECT match_id, array_to_string(outcomes, ',') AS outcomes, extract(epoch FROM closes_at) AS closes_at, state,
       settlement_version, result, book_version, arrivals, fills, extract(epoch FROM created_at) AS created_at
  FROM matches

-- name: transitions
SELECT match_id, transition_no, from_state, to_state, settlement_version, result, extract(epoch FROM at) AS at
  FROM match_transitions

-- name: orders
SELECT bet_id, match_id, user_id, outcome, side, odds, stake, reserve, arrival, state, matched_stake,
       matched_liability, winnings, cancelled_stake, cancel_refund, cancel_reason, event_id,
       extract(epoch FROM arrived_at) AS arrived_at
  FROM orders

-- name: fills
SELECT match_id, fill_no, outcome, back_bet_id, back_user, lay_bet_id, lay_user, odds, stake, liability, winnings,
       extract(epoch FROM filled_at) AS filled_at
  FROM fills

-- name: routes
SELECT shard, server_name, epoch, here::text AS here, extract(epoch FROM changed_at) AS changed_at FROM shard_routes

-- name: cancels
SELECT user_id, idempotent_key, bet_id, match_id, outcome, cancelled_stake, refund, waiting::text AS waiting,
       extract(epoch FROM created_at) AS created_at
  FROM cancels

-- name: settlements
SELECT match_id, settlement_version, kind, result, state, last_arrival,
       extract(epoch FROM started_at) AS started_at, extract(epoch FROM finished_at) AS finished_at
  FROM settlements

-- name: reconciliations
-- One row for each finding of each pass, and one without a code for a pass without findings.
SELECT r.run_id, r.kind, r.requested_by, r.state, extract(epoch FROM r.started_at) AS started_at,
       extract(epoch FROM r.finished_at) AS finished_at, f.code, f.user_id, f.seq, f.match_id, f.event_id,
       f.expected, f.found
  FROM reconciliations r
  LEFT JOIN reconciliation_findings f USING (run_no)
