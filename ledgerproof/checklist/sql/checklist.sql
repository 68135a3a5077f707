-- What the checklist asks of a server: of its catalogue as the superuser, of its rows as the role that only reads.

-- name: partitions
-- The logical shards the server says it holds, and whether each has its partition, attached and with its triggers.
SELECT r.shard, r.here, part.oid IS NOT NULL AS there,
       EXISTS (SELECT FROM pg_trigger t
                WHERE t.tgrelid = part.oid AND t.tgname = 'wallet_ledger_immutable' AND t.tgenabled IN ('O', 'A'))
       AND EXISTS (SELECT FROM pg_trigger t
                    WHERE t.tgrelid = part.oid AND t.tgname = part.relname || '_no_truncate'
                      AND t.tgenabled IN ('O', 'A')) AS guarded
  FROM shard_routes r
  LEFT JOIN (SELECT c.oid, c.relname
               FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
              WHERE i.inhparent = 'wallet_ledger'::regclass) AS part ON part.relname = 'wallet_ledger_' || r.shard
 ORDER BY r.shard

-- name: partition_indexes
-- Every index of the ledger on every partition, and whether it is there and usable.
SELECT part.relname AS partition, parent.relname AS wanted,
       coalesce(bool_or(x.indisvalid AND x.indisready), false) AS usable
  FROM pg_inherits i
  JOIN pg_class part ON part.oid = i.inhrelid
  JOIN pg_index pi ON pi.indrelid = i.inhparent
  JOIN pg_class parent ON parent.oid = pi.indexrelid
  LEFT JOIN pg_inherits attached ON attached.inhparent = pi.indexrelid
  LEFT JOIN pg_index x ON x.indexrelid = attached.inhrelid AND x.indrelid = part.oid
 WHERE i.inhparent = 'wallet_ledger'::regclass
 GROUP BY part.relname, parent.relname

-- name: indexes
SELECT c.relname AS name, x.indisvalid AND x.indisready AS usable
  FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid
 WHERE c.relnamespace = 'public'::regnamespace

-- name: rights
SELECT rolname AS role, rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls AS powerful,
       has_table_privilege(oid, 'wallet_ledger', 'INSERT, UPDATE, DELETE, TRUNCATE') AS rewrites
  FROM pg_roles WHERE rolname = ANY ($1)

-- name: rewrite
UPDATE wallet_ledger SET amount = amount WHERE false

-- name: durability
SELECT current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('full_page_writes') AS full_page_writes

-- name: standbys
-- How far each standby is behind, in seconds; null while it has nothing to say, as on an idle server.
SELECT current_setting('synchronous_standby_names') AS wanted,
       (SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming') AS streaming,
       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')) AS synchronous,
       (SELECT coalesce(extract(epoch FROM max(replay_lag)), 0) FROM pg_stat_replication)::float8 AS lag_s

-- name: archive
SELECT current_setting('archive_mode') AS mode, archived_count, failed_count,
       extract(epoch FROM clock_timestamp() - last_archived_time)::float8 AS age_s,
       coalesce(last_failed_time > last_archived_time, failed_count > 0) AS failing
  FROM pg_stat_archiver

-- name: duplicates
-- Entries beyond the first of an idempotency key, or of a settlement's business key.
SELECT (SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) AS n FROM wallet_ledger
                                              GROUP BY shard, user_id, idempotent_key HAVING count(*) > 1) AS k)
     + (SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) AS n FROM wallet_ledger WHERE settlement_version IS NOT NULL
                                              GROUP BY shard, bet_id, type, contra, settlement_version
                                             HAVING count(*) > 1) AS b) AS duplicates,
       (SELECT count(*) FROM wallet_ledger) AS entries

-- name: entries_of_key
SELECT count(*) FROM wallet_ledger WHERE shard = ($1::bigint % 100)::smallint AND user_id = $1 AND idempotent_key = $2
