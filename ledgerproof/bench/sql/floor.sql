-- What the ledger's rows cost without the ledger: seq and balance come from the caller, nothing is locked or looked up.

-- name: unnest
WITH entry AS (
    INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, bet_id, balance_snapshot,
                               idempotent_key, created_by, created_at)
    SELECT (r.user_id % 100)::smallint, r.user_id, r.seq, 'DEBIT', r.amount, 'ESCROW', r.match_id, r.bet_id, r.balance,
           r.key, 'bench', clock_timestamp()
      FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::uuid[], $6::uuid[], $7::text[])
           AS r (user_id, seq, amount, balance, match_id, bet_id, key)
), bet AS (
    INSERT INTO bets (shard, user_id, bet_id, seq, match_id, outcome, side, odds, stake, reserve, placed_at)
    SELECT (r.user_id % 100)::smallint, r.user_id, r.bet_id, r.seq, r.match_id, r.outcome, r.side, r.odds, r.stake,
           -r.amount, clock_timestamp()
      FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $5::uuid[], $6::uuid[], $8::text[], $9::text[],
                  $10::integer[], $11::bigint[])
           AS r (user_id, seq, amount, match_id, bet_id, outcome, side, odds, stake)
)
INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, causality_chain)
SELECT 'Bet', r.bet_id::text, 'BetCreated', r.user_id::text, r.payload::jsonb, r.bet_id
  FROM unnest($1::bigint[], $6::uuid[], $12::text[]) AS r (user_id, bet_id, payload)

-- name: pgbench
\set user random(1000000000, 9000000000000000)
INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, balance_snapshot, idempotent_key, created_by, created_at) VALUES ((:user::bigint % 100)::smallint, :user::bigint, 1, 'CREDIT', 100, 'EXTERNAL', 100, 'k', 'bench', clock_timestamp());

-- name: age
-- Entries of the past for some wallets: an opening deposit, then bets of one minor unit each, the chain as it must be.
WITH entry AS (
    INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, bet_id, balance_snapshot,
                               idempotent_key, created_by, created_at)
    SELECT (u % 100)::smallint, u, s, CASE s WHEN 1 THEN 'CREDIT' ELSE 'DEBIT' END, CASE s WHEN 1 THEN $4::bigint ELSE -1 END,
           CASE s WHEN 1 THEN 'EXTERNAL' ELSE 'ESCROW' END, CASE WHEN s > 1 THEN $5::uuid END,
           CASE WHEN s > 1 THEN gen_random_uuid() END, $4::bigint - (s - 1), 'aged-' || s, 'bench',
           now() - interval '90 days' + s * interval '1 second'
      FROM generate_series($1::bigint, $2::bigint) AS u, generate_series(1, $3::bigint) AS s
    RETURNING shard, user_id, seq, match_id, bet_id, created_at
)
INSERT INTO bets (shard, user_id, bet_id, seq, match_id, outcome, side, odds, stake, reserve, placed_at)
SELECT shard, user_id, bet_id, seq, match_id, 'HOME', 'BACK', 200, 1, 1, created_at FROM entry WHERE seq > 1

-- name: count
SELECT count(*) FROM wallet_ledger
