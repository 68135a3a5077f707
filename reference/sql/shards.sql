-- Statements of a shard's move, run as the owner. {shard} is a number of 0 … 99; {names} are the
-- columns of the table and {columns} the same of its alias t.

-- name: routes
SELECT r.shard, r.server_name, r.epoch, r.here, r.prepared, r.changed_at,
       to_regclass('wallet_ledger_' || r.shard) IS NOT NULL AS copied
  FROM shard_routes r
 ORDER BY r.shard

-- name: sizes
-- Rows as the planner estimates them, and bytes with indexes: exact counts would read every entry.
SELECT r.shard, greatest(c.reltuples, 0)::bigint AS entries, pg_total_relation_size(c.oid) AS bytes
  FROM shard_routes r
  JOIN pg_class c ON c.oid = to_regclass('wallet_ledger_' || r.shard)
 WHERE r.here

-- name: mover_lock
SELECT pg_try_advisory_lock($1, $2)

-- name: columns
SELECT array_agg(attname::text ORDER BY attnum)
  FROM pg_attribute
 WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped

-- name: stage
-- A table that becomes the partition: what LIKE does not copy is the trigger against TRUNCATE (the one against UPDATE
-- and DELETE comes with ATTACH), and the CHECK that spares ATTACH a look at every row.
CREATE TABLE wallet_ledger_{shard} (LIKE wallet_ledger INCLUDING ALL,
    CONSTRAINT wallet_ledger_{shard}_only CHECK (shard = {shard}));
CREATE TRIGGER wallet_ledger_{shard}_no_truncate BEFORE TRUNCATE ON wallet_ledger_{shard}
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- name: all_ledger
SELECT {columns} FROM wallet_ledger_{shard} t

-- name: all_bets
SELECT {columns} FROM bets t WHERE t.shard = {shard}

-- name: all_refusals
SELECT {columns} FROM refusals t WHERE t.shard = {shard}

-- name: all_projection
SELECT {columns} FROM wallet_balance_projection t WHERE t.shard = {shard}

-- name: all_stats
SELECT {columns} FROM wallet_stats t WHERE t.shard = {shard}

-- name: some_projection
SELECT {columns} FROM wallet_balance_projection t WHERE t.shard = {shard} AND t.user_id = ANY ($1)

-- name: unprojected
-- Wallets whose projection is behind what the other server has of them.
SELECT count(*) FROM heads h
 WHERE NOT EXISTS (SELECT FROM wallet_balance_projection p
                    WHERE p.shard = {shard} AND p.user_id = h.user_id AND p.seq >= h.seq)

-- name: unprojected_of
SELECT count(*) FROM unnest($1::bigint[], $2::bigint[]) AS h (user_id, seq)
 WHERE NOT EXISTS (SELECT FROM wallet_balance_projection p
                    WHERE p.shard = {shard} AND p.user_id = h.user_id AND p.seq >= h.seq)

-- name: incoming_heads
SELECT user_id, max(seq) AS seq FROM incoming_ledger GROUP BY user_id

-- name: make_marks
-- What another server has already: the newest seq of each wallet, and the keys of refusals.
CREATE TEMP TABLE IF NOT EXISTS heads (user_id bigint PRIMARY KEY, seq bigint NOT NULL);
CREATE TEMP TABLE IF NOT EXISTS keys (user_id bigint, idempotent_key text, PRIMARY KEY (user_id, idempotent_key));
TRUNCATE heads, keys

-- name: read_heads
SELECT user_id, max(seq) FROM wallet_ledger_{shard} GROUP BY user_id

-- name: read_keys
SELECT user_id, idempotent_key FROM refusals WHERE shard = {shard}

-- name: new_ledger
SELECT {columns} FROM wallet_ledger_{shard} t LEFT JOIN heads h USING (user_id) WHERE t.seq > coalesce(h.seq, 0)

-- name: new_bets
SELECT {columns} FROM bets t LEFT JOIN heads h USING (user_id) WHERE t.shard = {shard} AND t.seq > coalesce(h.seq, 0)

-- name: new_refusals
SELECT {columns} FROM refusals t
 WHERE t.shard = {shard} AND NOT EXISTS (
       SELECT FROM keys k WHERE k.user_id = t.user_id AND k.idempotent_key = t.idempotent_key)

-- name: make_incoming
CREATE TEMP TABLE IF NOT EXISTS incoming_ledger (LIKE wallet_ledger);
CREATE TEMP TABLE IF NOT EXISTS incoming_bets (LIKE bets);
CREATE TEMP TABLE IF NOT EXISTS incoming_refusals (LIKE refusals);
TRUNCATE incoming_ledger, incoming_bets, incoming_refusals

-- name: incoming_ledger
SELECT {columns} FROM incoming_ledger t

-- name: incoming_bets
SELECT {columns} FROM incoming_bets t

-- name: incoming_refusals
SELECT {columns} FROM incoming_refusals t

-- name: add_ledger
INSERT INTO wallet_ledger_{shard} ({names}) SELECT {columns} FROM incoming_ledger t ORDER BY t.user_id, t.seq

-- name: add_bets
INSERT INTO bets ({names}) SELECT {columns} FROM incoming_bets t

-- name: add_refusals
INSERT INTO refusals ({names}) SELECT {columns} FROM incoming_refusals t

-- name: total
-- Every byte of every row takes part in the checksum, which does not depend on the order of the rows.
SELECT count(*) AS rows, coalesce(sum(t.{amount}), 0)::bigint AS amount,
       coalesce(sum(hashtextextended(ROW({columns})::text, 0)::numeric), 0) AS checksum
  FROM ({rows}) t

-- name: count
SELECT count(*) AS rows, coalesce(sum(t.{amount}), 0)::bigint AS amount FROM ({rows}) t

-- name: breaks
-- Entries that do not continue the one before them: the chain of seq and balance of every wallet.
SELECT count(*)
  FROM (SELECT seq, amount, balance_snapshot,
               lag(seq, 1, 0::bigint) OVER w AS before_seq, lag(balance_snapshot, 1, 0::bigint) OVER w AS before_balance
          FROM wallet_ledger_{shard}
        WINDOW w AS (PARTITION BY user_id ORDER BY seq)) l
 WHERE l.seq <> l.before_seq + 1 OR l.balance_snapshot <> l.before_balance + l.amount

-- name: new_breaks
-- The same for the entries that just came.
SELECT count(*)
  FROM incoming_ledger n
  LEFT JOIN wallet_ledger_{shard} b ON b.user_id = n.user_id AND b.seq = n.seq - 1
 WHERE n.balance_snapshot <> coalesce(b.balance_snapshot, 0) + n.amount OR (b.seq IS NULL) <> (n.seq = 1)

-- name: known_ledger
-- Of the rows of this server those that the other one, whose marks these are, must have too.
SELECT {columns} FROM wallet_ledger t JOIN heads h USING (user_id) WHERE t.shard = {shard} AND t.seq <= h.seq

-- name: known_bets
SELECT {columns} FROM bets t JOIN heads h USING (user_id) WHERE t.shard = {shard} AND t.seq <= h.seq

-- name: known_refusals
SELECT {columns} FROM refusals t JOIN keys k USING (user_id, idempotent_key) WHERE t.shard = {shard}

-- name: unpublished
-- Events of this shard's wallets that are not in Kafka; keys of matches are no numbers.
SELECT count(*)
  FROM events
 WHERE NOT published_to_kafka
   AND created_at <= clock_timestamp() - $1 * interval '1 ms'
   AND CASE WHEN partition_key ~ '^[0-9]{1,19}$' THEN partition_key::numeric % 100 = {shard} ELSE false END

-- name: freeze
-- Waits for every transaction that posts to the shard, and refuses those that come until this transaction ends.
SELECT pg_advisory_xact_lock($1, $2)

-- name: prepare
UPDATE shard_routes SET prepared = $2 WHERE shard = $1 AND NOT here AND epoch < $2

-- name: unprepare
UPDATE shard_routes SET prepared = NULL WHERE shard = $1 AND NOT here

-- name: give_up
UPDATE shard_routes SET here = false, server_name = $2, epoch = $3 + 1, changed_at = clock_timestamp()
 WHERE shard = $1 AND here AND epoch = $3

-- name: accept
SELECT shard_accept($1, $2)

-- name: tell
UPDATE shard_routes SET server_name = $2, epoch = $3, changed_at = clock_timestamp()
 WHERE shard = $1 AND NOT here AND epoch < $3

-- name: projection_barrier
-- Waits for every projector that began before the shard was given up; those that begin later see that it is gone.
LOCK TABLE wallet_balance_projection IN SHARE MODE

-- name: make_incoming_projection
CREATE TEMP TABLE IF NOT EXISTS incoming_projection (LIKE wallet_balance_projection);
CREATE TEMP TABLE IF NOT EXISTS incoming_stats (LIKE wallet_stats);
TRUNCATE incoming_projection, incoming_stats

-- name: merge_projection
INSERT INTO wallet_balance_projection AS p ({names})
SELECT {columns} FROM incoming_projection t ORDER BY t.user_id
    ON CONFLICT (shard, user_id) DO UPDATE
   SET balance = excluded.balance, seq = excluded.seq, updated_at = excluded.updated_at
 WHERE p.seq < excluded.seq

-- name: merge_stats
-- Sums over a wallet's first entries are never wrong, only behind.
INSERT INTO wallet_stats ({names}) SELECT {columns} FROM incoming_stats t ON CONFLICT (shard, user_id) DO NOTHING

-- name: attachment
-- NULL: no such partition; otherwise whether it is attached ('yes', 'no') or its DETACH was interrupted ('pending').
SELECT CASE WHEN i.inhrelid IS NULL THEN 'no' WHEN i.inhdetachpending THEN 'pending' ELSE 'yes' END
  FROM (SELECT to_regclass('wallet_ledger_{shard}') AS oid) c
  LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
 WHERE c.oid IS NOT NULL

-- name: detach
ALTER TABLE wallet_ledger DETACH PARTITION wallet_ledger_{shard} CONCURRENTLY

-- name: finish_detach
ALTER TABLE wallet_ledger DETACH PARTITION wallet_ledger_{shard} FINALIZE

-- name: drop
DROP TABLE wallet_ledger_{shard}

-- name: remains
SELECT EXISTS (SELECT FROM bets WHERE shard = {shard})
    OR EXISTS (SELECT FROM refusals WHERE shard = {shard})
    OR EXISTS (SELECT FROM wallet_balance_projection WHERE shard = {shard})
    OR EXISTS (SELECT FROM wallet_stats WHERE shard = {shard})

-- name: delete_bets
DELETE FROM bets WHERE ctid = ANY (ARRAY(SELECT ctid FROM bets WHERE shard = {shard} LIMIT $1))

-- name: delete_refusals
DELETE FROM refusals WHERE ctid = ANY (ARRAY(SELECT ctid FROM refusals WHERE shard = {shard} LIMIT $1))

-- name: delete_projection
DELETE FROM wallet_balance_projection
 WHERE ctid = ANY (ARRAY(SELECT ctid FROM wallet_balance_projection WHERE shard = {shard} LIMIT $1))

-- name: delete_stats
DELETE FROM wallet_stats WHERE ctid = ANY (ARRAY(SELECT ctid FROM wallet_stats WHERE shard = {shard} LIMIT $1))

-- name: delete_rebuilds
DELETE FROM projection_rebuilds
 WHERE ctid = ANY (ARRAY(SELECT ctid FROM projection_rebuilds WHERE shard = {shard} LIMIT $1))
