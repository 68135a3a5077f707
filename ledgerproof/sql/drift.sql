-- What plants a drift in the read model and takes it back, as the server's superuser: no role of the service may.
-- $1 is the wallet; the ledger is never touched.

-- name: projected
SELECT p.seq, p.balance, l.balance_snapshot AS right_balance
  FROM wallet_balance_projection p
  JOIN wallet_ledger l USING (shard, user_id, seq)
 WHERE p.shard = ($1::bigint % 100)::smallint AND p.user_id = $1

-- name: plant
UPDATE wallet_balance_projection SET balance = balance + $2
 WHERE shard = ($1::bigint % 100)::smallint AND user_id = $1
RETURNING balance

-- name: repair
UPDATE wallet_balance_projection p SET balance = l.balance_snapshot
  FROM wallet_ledger l
 WHERE p.shard = ($1::bigint % 100)::smallint AND p.user_id = $1
   AND l.shard = p.shard AND l.user_id = p.user_id AND l.seq = p.seq

-- name: passed
-- Whether a pass of $3 has reported $2 of the wallet, and whether one that began after $4 has seen everything.
SELECT EXISTS (SELECT FROM reconciliation_findings f JOIN reconciliations r USING (run_no)
                WHERE f.user_id = $1 AND f.code = $2 AND r.requested_by = $3) AS reported,
       EXISTS (SELECT FROM reconciliations r
                WHERE r.requested_by = $3 AND r.state <> 'INCOMPLETE' AND r.started_at > $4) AS due
