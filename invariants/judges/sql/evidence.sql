-- What several codes need, made once from the tables of the run. A row that must not count twice is made distinct
-- here; what a client said and what the service holds are not mixed before the codes themselves.

-- name: macros
CREATE MACRO said(v) AS coalesce(v::VARCHAR, 'none');
CREATE MACRO entry_at(u, s) AS 'user ' || said(u) || ' seq ' || said(s);
CREATE MACRO key_at(u, k) AS 'user ' || said(u) || ' key ' || said(k);
CREATE MACRO fill_at(m, n) AS 'match_id ' || said(m) || ' fill_no ' || said(n);
CREATE MACRO payment_at(b, t, c, v) AS
    'bet_id ' || said(b) || ' type ' || said(t) || ' contra ' || said(c) || ' settlement_version ' || said(v);
-- Integer division rounds towards zero in this dialect; money rounds by name. HUGEINT cannot overflow here.
CREATE MACRO floor_div(a, b) AS CASE
    WHEN a >= 0 THEN a::HUGEINT // b
    ELSE -((b - 1 - a::HUGEINT) // b)
END;
CREATE MACRO ceil_div(a, b) AS CASE
    WHEN a >= 0 THEN (a::HUGEINT + b - 1) // b
    ELSE -((-a::HUGEINT) // b)
END;

-- The fields of a JSON object as text, in the order of their names, without the empty ones; null for other text.
CREATE MACRO fields_of(t) AS CASE WHEN json_valid(t) THEN
    list_sort(list_filter(
        map_entries(try_cast(t::JSON AS MAP(VARCHAR, JSON))), lambda field: field.value::VARCHAR <> 'null'
    ))
END;

-- name: attempts
-- One row per attempt. Of an attempt that was recorded twice (V06) the first record counts.
CREATE TABLE attempts AS
WITH repeated AS (
    SELECT attempt FROM history GROUP BY attempt
    HAVING count(*) FILTER (record = 'invoke') > 1 OR count(*) FILTER (record <> 'invoke') > 1
),
firsts AS (
    SELECT h.* FROM history h WHERE NOT EXISTS (SELECT 1 FROM repeated r WHERE r.attempt = h.attempt)
    UNION ALL
    SELECT h.* FROM history h WHERE EXISTS (SELECT 1 FROM repeated r WHERE r.attempt = h.attempt)
    QUALIFY row_number() OVER (PARTITION BY attempt, record = 'invoke' ORDER BY part, line) = 1
),
both_ends AS (
    SELECT
        i.attempt, i.client, i.op, i.match_id, i.bet_id, i.selection, i.side, i.odds, i.amount, i.min_seq, i.tag, i.api,
        i.strong, i.after_seq,
        i.t AS begin_s,
        CASE
            WHEN i.op IN ('deposit', 'withdraw', 'bet') THEN 'ledger'
            WHEN i.op IN ('cancel', 'rollback') THEN i.op
            WHEN i.op IN ('create_match', 'close_match', 'settle_match', 'void_match', 'resettle_match') THEN 'match'
            ELSE 'read'
        END AS family,
        i."user" AS who,
        i.key AS own_key,
        hash(
            i.op || '|' || coalesce(
                i.payload_hash,
                concat_ws('|', i.match_id, i.bet_id, i.selection, i.side, i.odds::VARCHAR, i.amount::VARCHAR)
            )
        ) AS body,
        -- An attempt that never returned is unknown for ever.
        coalesce(a.record, 'info') AS cls,
        coalesce(a.t, 'Infinity'::DOUBLE) AS end_s,
        a.status, a.outcome, a.replayed, a.seq, a.balance, a.source, a.stale, a.as_of, a.page_rows, a.page_cut,
        a.bet_id AS answered_bet
    FROM (SELECT * FROM firsts WHERE record = 'invoke') i
    LEFT JOIN (SELECT * FROM firsts WHERE record <> 'invoke') a USING (attempt)
)
SELECT
    * EXCLUDE (who),
    CASE WHEN family <> 'match' THEN who END AS wallet,
    CASE
        WHEN family <> 'match' THEN own_key
        WHEN op = 'resettle_match' THEN op || ':' || match_id || ':' || coalesce(selection, 'VOID')
        ELSE op || ':' || match_id
    END AS key,
    -- A refusal that is stored under the key, and so final. That a bet is unknown (yet) is not stored.
    family <> 'match' AND cls = 'fail' AND coalesce(status = 422, false)
        AND coalesce(outcome <> 'UNKNOWN_BET', true) AS refused
FROM both_ends;

-- name: fates
-- One row per key that was ever sent: may, must or must it not have had an effect?
CREATE TABLE fates AS
SELECT
    family, wallet, key,
    CASE
        WHEN bool_or(cls = 'ok') THEN 'MUST'
        WHEN bool_or(refused) THEN 'MUST_NOT'
        WHEN bool_or(cls = 'info') THEN 'MAY'
        ELSE 'MUST_NOT'
    END AS fate,
    min(begin_s) AS begin_s,
    min(end_s) FILTER (cls = 'ok') AS ack_s
FROM attempts
WHERE family <> 'read'
GROUP BY family, wallet, key;

-- name: entries
-- The ledger in the order of each wallet, with what the rows before add up to.
CREATE TABLE entries AS
SELECT
    server, user_id AS wallet, seq, type, amount, contra, match_id, bet_id, settlement_version AS version,
    balance_snapshot AS balance, idempotent_key AS key,
    starts_with(idempotent_key, 'ledger:') AS system,
    lag(seq, 1, 0) OVER places AS before_seq,
    lag(balance_snapshot, 1, 0) OVER places AS before_balance,
    sum(amount) OVER (places ROWS UNBOUNDED PRECEDING) AS replayed
FROM ledger
WINDOW places AS (PARTITION BY user_id ORDER BY seq, idempotent_key);

-- name: clock
-- How far the service's wall clock and the run's clock may be apart: what was measured, and what is not told apart.
CREATE TABLE clock AS
SELECT
    (SELECT origin_unix FROM config) AS origin_unix,
    0.05 + coalesce((SELECT max(abs(value)) FROM series WHERE name = 'wall_clock_drift_s'), 0) AS slack_s;

-- name: drifts
-- What the run itself planted in a wallet's stored balance, and what became of it.
CREATE TABLE drifts AS
SELECT
    node, wallet,
    min(t) FILTER (kind = 'drift_planted') AS planted,
    min(t) FILTER (kind = 'drift_measured') AS measured,
    min(t) FILTER (kind = 'drift_repaired') AS repaired,
    first(code ORDER BY t) FILTER (kind = 'drift_planted') AS code,
    first(within_s ORDER BY t) FILTER (kind = 'drift_planted') AS within_s,
    first(requested_by ORDER BY t) FILTER (kind = 'drift_planted') AS requested_by
FROM (
    SELECT
        t, kind, node, (d ->> 'user')::BIGINT AS wallet, d ->> 'code' AS code, (d ->> 'within_s')::DOUBLE AS within_s,
        d ->> 'requested_by' AS requested_by
    FROM (
        SELECT t, kind, node, detail::JSON AS d FROM timeline
        WHERE kind IN ('drift_planted', 'drift_measured', 'drift_repaired')
    )
)
GROUP BY node, wallet
HAVING bool_or(kind = 'drift_planted');

-- name: effects
-- Every key that had an effect, whoever asked for it.
CREATE TABLE effects AS
SELECT 'ledger' AS family, wallet, key FROM entries WHERE NOT system
UNION
-- A cancel that still waits for its bet has had no effect once the bet's order is there.
SELECT 'cancel', user_id, idempotent_key FROM cancels
WHERE outcome = 'ACCEPTED' AND NOT starts_with(idempotent_key, 'ledger:rollback:')
    AND waiting IS NOT NULL AND NOT (waiting AND bet_id IS NOT NULL AND bet_id IN (SELECT bet_id FROM orders))
UNION
SELECT 'rollback', user_id, substr(idempotent_key, length('ledger:rollback:') + 1) FROM cancels
WHERE outcome = 'ACCEPTED' AND starts_with(idempotent_key, 'ledger:rollback:')
UNION
SELECT 'rollback', user_id, idempotent_key FROM refusals WHERE outcome = 'ROLLED_BACK'
UNION
SELECT 'match', NULL, 'create_match:' || match_id FROM matches
UNION
SELECT
    'match', NULL,
    CASE to_state
        WHEN 'OPEN' THEN 'create_match:'
        WHEN 'CLOSED' THEN 'close_match:'
        WHEN 'VOID' THEN 'void_match:'
        ELSE 'settle_match:'
    END || match_id
FROM transitions WHERE to_state IN ('OPEN', 'CLOSED', 'VOID', 'SETTLING', 'SETTLED')
UNION
SELECT 'match', NULL, 'resettle_match:' || match_id || ':' || coalesce(result, 'VOID') FROM settlements;

-- name: requests
-- Every attempt of a ledger key beside every entry of that key: does the attempt ask for this entry?
-- A bet entry without a bet row is torn (A13) and nobody's lie.
CREATE TABLE requests AS
SELECT
    e.wallet, e.key, e.seq, e.type, e.amount, a.cls,
    coalesce(
        CASE a.op
            WHEN 'deposit' THEN (e.type, e.contra, e.amount) = ('CREDIT', 'EXTERNAL', a.amount)
            WHEN 'withdraw' THEN (e.type, e.contra, -e.amount) = ('DEBIT', 'EXTERNAL', a.amount)
            ELSE (e.type, e.contra) = ('DEBIT', 'ESCROW') AND (
                b.stake IS NULL
                OR (b.match_id, b.outcome, b.side, b.odds, b.stake)
                    = (a.match_id, a.selection, a.side, a.odds, a.amount)
            )
        END, false
    ) AS fits
FROM entries e
JOIN attempts a ON a.family = 'ledger' AND a.wallet = e.wallet AND a.key = e.key
LEFT JOIN bets b ON b.user_id = e.wallet AND b.bet_id = e.bet_id
WHERE NOT e.system;

-- name: events
-- Records of the outbox's events in Kafka, each with whether it is the first of its event.
CREATE TABLE events AS
SELECT
    *,
    row_number() OVER (PARTITION BY event_id ORDER BY topic, "partition", "offset") = 1 AS is_first
FROM kafka
WHERE topic IN (SELECT topic FROM topics);

-- name: payloads
-- The fields that the events of the outbox tell, typed; null where the text is no such object.
CREATE TABLE payloads AS
SELECT
    line, event_id, event_type,
    try_cast(p ->> 'user_id' AS BIGINT) AS user_id, try_cast(p ->> 'seq' AS BIGINT) AS seq,
    try_cast(p ->> 'amount' AS BIGINT) AS amount, try_cast(p ->> 'balance' AS BIGINT) AS balance,
    p ->> 'type' AS type, p ->> 'contra' AS contra, p ->> 'match_id' AS match_id, p ->> 'bet_id' AS bet_id,
    try_cast(p ->> 'settlement_version' AS BIGINT) AS settlement_version,
    p ->> 'outcome' AS outcome, p ->> 'side' AS side, try_cast(p ->> 'odds' AS BIGINT) AS odds,
    try_cast(p ->> 'stake' AS BIGINT) AS stake, try_cast(p ->> 'reserve' AS BIGINT) AS reserve,
    try_cast(p ->> 'fill_no' AS BIGINT) AS fill_no, p ->> 'back_bet_id' AS back_bet_id,
    p ->> 'lay_bet_id' AS lay_bet_id, try_cast(p ->> 'back_user' AS BIGINT) AS back_user,
    try_cast(p ->> 'lay_user' AS BIGINT) AS lay_user, try_cast(p ->> 'liability' AS BIGINT) AS liability,
    try_cast(p ->> 'winnings' AS BIGINT) AS winnings, try_cast(p ->> 'cancelled_stake' AS BIGINT) AS cancelled_stake,
    try_cast(p ->> 'refund' AS BIGINT) AS refund, p ->> 'reason' AS reason, p ->> 'kind' AS kind,
    p ->> 'result' AS result
FROM (SELECT line, event_id, event_type, CASE WHEN json_valid(payload) THEN payload::JSON END AS p FROM outbox);

-- name: owners
-- The server that must hold each shard of wallets: the newest route's, or else the configured one.
CREATE TABLE owners AS
SELECT shard, coalesce(r.server_name, i.server) AS server
FROM initial_routing i
FULL JOIN (SELECT shard, last(server_name ORDER BY epoch, here) AS server_name FROM routes GROUP BY shard) r
    USING (shard);

-- name: final_matches
-- Matches that are settled or void and of which no settlement is under way.
CREATE TABLE final_matches AS
SELECT match_id FROM matches WHERE state IN ('SETTLED', 'VOID')
UNION
SELECT match_id FROM settlements WHERE state = 'DONE'
EXCEPT
SELECT match_id FROM settlements WHERE state <> 'DONE';

-- name: escrow
CREATE TABLE escrow AS
SELECT match_id, -sum(amount) AS held FROM entries WHERE contra = 'ESCROW' GROUP BY match_id;

-- name: matched
-- What the fills of each bet sum to.
CREATE TABLE matched AS
SELECT bet_id, sum(stake) AS stake, sum(liability) AS liability, sum(winnings) AS winnings
FROM (
    SELECT unnest([back_bet_id, lay_bet_id]) AS bet_id, stake, liability, winnings FROM fills
)
GROUP BY bet_id;

-- name: first_rows
-- Of rows that share the name they must have alone, the first counts; that there is another is a code of its own.
CREATE VIEW first_bets AS
    SELECT * FROM bets QUALIFY row_number() OVER (PARTITION BY user_id, bet_id ORDER BY line) = 1;
CREATE VIEW first_orders AS SELECT * FROM orders QUALIFY row_number() OVER (PARTITION BY bet_id ORDER BY line) = 1;
CREATE VIEW first_fills AS
    SELECT * FROM fills QUALIFY row_number() OVER (PARTITION BY match_id, fill_no ORDER BY line) = 1;
CREATE VIEW first_settlements AS
    SELECT * FROM settlements
    QUALIFY row_number() OVER (PARTITION BY match_id, settlement_version ORDER BY line) = 1;
CREATE VIEW first_entries AS SELECT * FROM entries WHERE seq IS DISTINCT FROM before_seq;

-- name: judged_bets
-- Every bet that became an order: what of it was matched, and what its cancel must return.
CREATE TABLE judged_bets AS
SELECT
    b.user_id AS wallet, b.bet_id, b.match_id, b.outcome, b.side = 'BACK' AS back, b.stake, b.reserve,
    coalesce(m.stake, 0) AS fill_stake, coalesce(m.liability, 0) AS fill_liability,
    coalesce(m.winnings, 0) AS fill_winnings,
    o.cancelled_stake, o.cancel_refund,
    CASE WHEN b.side = 'BACK' THEN b.stake - coalesce(m.stake, 0) ELSE b.reserve - coalesce(m.liability, 0) END
        AS unused,
    CASE WHEN o.cancelled_stake > 0 THEN unused ELSE 0 END AS returned
FROM bets b
JOIN first_orders o USING (bet_id)
LEFT JOIN matched m USING (bet_id);
