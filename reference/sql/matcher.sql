-- Statements of the matcher, all on the home server of the matches. Arrays run in parallel, one element a row; those of
-- text that are written come as literals (store.text_array).

-- name: lock_matches
-- In ascending order, so that two matchers, or a matcher and a command on a match, never wait in a circle. What
-- it returns is the row after the lock was granted.
SELECT match_id, outcomes, closes_at, state, book_version, arrivals, fills
  FROM matches
 WHERE match_id = ANY ($1::uuid[])
 ORDER BY match_id
   FOR UPDATE

-- name: read_marks
-- A statement of its own, begun under the locks: it sees every order that an earlier holder stored, and the
-- clock it reads is later than the moment the locks were granted.
SELECT clock_timestamp() AS at,
       ARRAY(SELECT o.bet_id FROM orders o WHERE o.bet_id = ANY ($1::uuid[])) AS stored,
       ARRAY(SELECT c.bet_id
               FROM unnest($1::uuid[], $2::bigint[]) AS n (bet_id, user_id)
               JOIN cancels c ON c.bet_id = n.bet_id AND c.user_id = n.user_id
              WHERE c.waiting) AS cancelled

-- name: open_orders
-- Here and below, the first 16 columns are the fields of orderbook.Order in their order.
SELECT bet_id, match_id, user_id, outcome, side, odds, stake, reserve, arrival, matched_stake, matched_liability,
       winnings, liability_hundredths, cancelled_stake, cancel_refund, cancel_reason
  FROM orders
 WHERE match_id = $1 AND state IN ('PENDING', 'PART_MATCHED')

-- name: changed_orders
-- Match by match and limited, so that the plan is a walk over the end of orders_changed however many orders there are.
SELECT o.*
  FROM unnest($1::uuid[], $2::bigint[]) AS known (match_id, book_version)
 CROSS JOIN LATERAL (
     SELECT bet_id, match_id, user_id, outcome, side, odds, stake, reserve, arrival, matched_stake, matched_liability,
            winnings, liability_hundredths, cancelled_stake, cancel_refund, cancel_reason, book_version
       FROM orders
      WHERE orders.match_id = known.match_id AND orders.book_version > known.book_version
      ORDER BY orders.match_id, orders.book_version
      LIMIT $3) o

-- name: insert_orders
INSERT INTO orders (bet_id, match_id, user_id, outcome, side, odds, stake, reserve, arrival, state, matched_stake,
                    matched_liability, winnings, liability_hundredths, cancelled_stake, cancel_refund,
                    cancel_reason, event_id, book_version, traceparent)
SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::text::text[], $5::text::text[], $6::integer[], $7::bigint[],
                     $8::bigint[], $9::bigint[], $10::text::text[], $11::bigint[], $12::bigint[], $13::bigint[],
                     $14::bigint[], $15::bigint[], $16::bigint[], $17::text::text[], $18::uuid[], $19::bigint[],
                     $20::text::text[])

-- name: update_orders
UPDATE orders o
   SET state = n.state, matched_stake = n.matched_stake, matched_liability = n.matched_liability,
       winnings = n.winnings, liability_hundredths = n.liability_hundredths, book_version = n.book_version
  FROM unnest($1::uuid[], $2::text::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])
       AS n (bet_id, state, matched_stake, matched_liability, winnings, liability_hundredths, book_version)
 WHERE o.bet_id = n.bet_id

-- name: insert_fills
INSERT INTO fills (match_id, fill_no, outcome, back_bet_id, back_user, lay_bet_id, lay_user, odds, stake, liability,
                   winnings)
SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text::text[], $4::uuid[], $5::bigint[], $6::uuid[], $7::bigint[],
                     $8::integer[], $9::bigint[], $10::bigint[], $11::bigint[])

-- name: insert_events
INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, causality_chain, traceparent)
SELECT e.aggregate_type, e.aggregate_id, e.event_type, e.partition_key, e.payload::jsonb, e.cause, e.traceparent
  FROM unnest($1::text::text[], $2::text::text[], $3::text::text[], $4::text::text[], $5::text::text[], $6::uuid[], $7::text::text[])
       WITH ORDINALITY AS e (aggregate_type, aggregate_id, event_type, partition_key, payload, cause, traceparent, no)
 ORDER BY e.no

-- name: update_matches
UPDATE matches m
   SET book_version = n.book_version, arrivals = n.arrivals, fills = coalesce(n.fills, m.fills)
  FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[]) AS n (match_id, book_version, arrivals, fills)
 WHERE m.match_id = n.match_id

-- name: finish_cancels
-- The request is done; what was answered to it stays as it was answered.
UPDATE cancels c SET waiting = false
  FROM orders o
 WHERE o.bet_id = ANY ($1::uuid[]) AND c.bet_id = o.bet_id AND c.user_id = o.user_id AND c.waiting
