-- What must hold on each server once everything is at rest; every block counts violations.

-- name: broken_chain
-- Each entry follows the one before it without a gap, and its balance is that one's plus its own amount.
SELECT count(*)
  FROM (SELECT seq, amount, balance_snapshot,
               lag(seq, 1, 0::bigint) OVER w AS seq_before,
               lag(balance_snapshot, 1, 0::bigint) OVER w AS balance_before
          FROM wallet_ledger
        WINDOW w AS (PARTITION BY shard, user_id ORDER BY seq)) l
 WHERE seq <> seq_before + 1 OR balance_snapshot <> balance_before + amount

-- name: bet_without_entry
SELECT count(*)
  FROM bets b
  LEFT JOIN wallet_ledger l ON l.shard = b.shard AND l.user_id = b.user_id AND l.seq = b.seq
 WHERE l.bet_id IS DISTINCT FROM b.bet_id OR l.amount <> -b.reserve OR l.type <> 'DEBIT'

-- name: stake_without_bet
SELECT count(*)
  FROM wallet_ledger l
  LEFT JOIN bets b ON b.shard = l.shard AND b.user_id = l.user_id AND b.seq = l.seq
 WHERE l.type = 'DEBIT' AND l.contra = 'ESCROW' AND b.bet_id IS NULL

-- name: entry_without_event
SELECT count(*)
  FROM wallet_ledger l
  LEFT JOIN (SELECT DISTINCT (payload ->> 'user_id')::bigint AS user_id, (payload ->> 'seq')::bigint AS seq
               FROM events WHERE payload ? 'seq') e ON e.user_id = l.user_id AND e.seq = l.seq
 WHERE e.seq IS NULL

-- name: unpublished_event
SELECT count(*) FROM events WHERE NOT published_to_kafka

-- name: projection_differs
SELECT count(*)
  FROM (SELECT DISTINCT ON (shard, user_id) shard, user_id, seq, balance_snapshot
          FROM wallet_ledger ORDER BY shard, user_id, seq DESC) h
  LEFT JOIN wallet_balance_projection p USING (shard, user_id)
 WHERE p.seq IS DISTINCT FROM h.seq OR p.balance IS DISTINCT FROM h.balance_snapshot

-- name: order_differs_from_fills
SELECT count(*)
  FROM orders o
  LEFT JOIN (SELECT bet_id, sum(stake) AS stake
               FROM (SELECT back_bet_id AS bet_id, stake FROM fills UNION ALL SELECT lay_bet_id, stake FROM fills) f
              GROUP BY bet_id) f USING (bet_id)
 WHERE o.matched_stake <> coalesce(f.stake, 0)

-- name: _bets
SELECT count(*) FROM bets

-- name: _orders
SELECT count(*) FROM orders

-- name: _acknowledged
SELECT count(*) FROM wallet_ledger WHERE starts_with(idempotent_key, $1)
