-- Statements of the settler on the home server of a match. Entries are posted by `post` in queries.sql.

-- name: running
SELECT match_id, settlement_version, kind, result, last_arrival
  FROM settlements
 WHERE state = 'RUNNING' AND NOT match_id = ANY ($1::uuid[])
 ORDER BY started_at
 LIMIT $2

-- name: try_lock
SELECT pg_try_advisory_lock($1, $2) AS granted

-- name: settlement
-- The running settlement and the ruling that it corrects, if there is one. The first settlement of a match writes down
-- the rate under which its winnings are charged.
UPDATE settlements s SET commission_bps = coalesce(s.commission_bps, $2)
 WHERE s.match_id = $1 AND s.state = 'RUNNING'
RETURNING s.settlement_version, s.kind, s.result, s.last_arrival, s.commission_bps,
          (SELECT b.kind FROM settlements b
            WHERE b.match_id = $1 AND b.settlement_version = s.settlement_version - 1) AS corrected_kind,
          (SELECT b.result FROM settlements b
            WHERE b.match_id = $1 AND b.settlement_version = s.settlement_version - 1) AS corrected_result

-- name: lock
SELECT posted, owed, balance FROM ledger_lock($1, $2, $3) ORDER BY correction_no

-- name: page
-- The first 16 columns are the fields of orderbook.Order in their order.
SELECT bet_id, match_id, user_id, outcome, side, odds, stake, reserve, arrival, matched_stake, matched_liability,
       winnings, liability_hundredths, cancelled_stake, cancel_refund, cancel_reason, traceparent
  FROM orders
 WHERE match_id = $1 AND arrival > $2
 ORDER BY arrival
 LIMIT $3

-- name: mark_page
-- Compare-and-set on the position, so that of two settlers that both think they hold the match one stops here.
-- A bet that was cancelled before anything of it matched keeps that state: nothing of it was settled.
WITH moved AS (
    UPDATE settlements SET last_arrival = $4
     WHERE match_id = $1 AND settlement_version = $2 AND state = 'RUNNING' AND last_arrival = $3
    RETURNING match_id, CASE kind WHEN 'VOID' THEN 'VOID' ELSE 'SETTLED' END AS bet_state
), marked AS (
    UPDATE orders o SET state = m.bet_state
      FROM moved m
     WHERE o.match_id = m.match_id AND o.arrival > $3 AND o.arrival <= $4
       AND o.state NOT IN ('CANCELLED', m.bet_state)
)
SELECT match_id FROM moved

-- name: finish
-- A match that was voided at once is VOID already; one in SETTLING moves on, once, with its row in match_transitions.
WITH done AS (
    UPDATE settlements SET state = 'DONE', finished_at = clock_timestamp()
     WHERE match_id = $1 AND settlement_version = $2 AND state = 'RUNNING' AND last_arrival = $3
    RETURNING match_id, settlement_version, kind, result
), moved AS (
    UPDATE matches m SET state = CASE d.kind WHEN 'VOID' THEN 'VOID' ELSE 'SETTLED' END
      FROM done d
     WHERE m.match_id = d.match_id AND m.settlement_version = d.settlement_version AND m.state = 'SETTLING'
    RETURNING m.match_id, m.state, m.settlement_version, m.result
), noted AS (
    INSERT INTO match_transitions (match_id, transition_no, from_state, to_state, settlement_version, result)
    SELECT m.match_id, (SELECT max(t.transition_no) + 1 FROM match_transitions t WHERE t.match_id = m.match_id),
           'SETTLING', m.state, m.settlement_version, m.result
      FROM moved m
)
SELECT match_id FROM done
