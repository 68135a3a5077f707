-- What the ledger takes on disk, by table and index; partitions of one table count together.

-- name: sizes
SELECT regexp_replace(t.relname, '_\d+$', '') AS relation,
       coalesce((SELECT string_agg(a.attname, ', ' ORDER BY k.position)
                   FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, position)
                   JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = k.attnum), '') AS index_columns,
       sum(pg_total_relation_size(coalesce(i.indexrelid, t.oid)) - CASE WHEN i.indexrelid IS NULL
           THEN pg_indexes_size(t.oid) ELSE 0 END)::bigint AS bytes
  FROM pg_class t
  JOIN pg_namespace n ON n.oid = t.relnamespace AND n.nspname = 'public'
  LEFT JOIN LATERAL (
      SELECT NULL::oid AS indexrelid, NULL::int2vector AS indkey
       UNION ALL
      SELECT x.indexrelid, x.indkey FROM pg_index x WHERE x.indrelid = t.oid) i ON true
 WHERE t.relkind = 'r'
 GROUP BY 1, 2

-- name: wal
SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint AS bytes

-- name: settlement
SELECT last_arrival, state FROM settlements WHERE match_id = $1 ORDER BY settlement_version DESC LIMIT 1

-- name: unpublished
SELECT count(*) FROM events WHERE NOT published_to_kafka
