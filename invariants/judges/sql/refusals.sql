-- A08: refusals for a reason that at no moment they may have been decided at was true.

-- name: claims
-- Every refusal once, with the window it was decided in. A refused key that was applied all the same is A04's or A05's.
CREATE TABLE claims AS
WITH refused_attempts AS (SELECT * FROM attempts WHERE cls = 'fail' AND status = 422),
stored AS (
    SELECT r.*, f.begin_s AS sent_s
    FROM refused_attempts r
    JOIN fates f ON f.family = r.family AND f.wallet IS NOT DISTINCT FROM r.wallet AND f.key IS NOT DISTINCT FROM r.key
    WHERE r.refused AND NOT EXISTS (
        SELECT 1 FROM entries e WHERE NOT e.system AND r.family = 'ledger' AND e.wallet = r.wallet AND e.key = r.key
    )
    QUALIFY row_number() OVER (PARTITION BY r.family, r.wallet, r.key, r.outcome ORDER BY r.end_s, r.attempt) = 1
)
SELECT
    attempt, op, family, wallet, key, match_id, bet_id, selection, outcome, sent_s AS begin_s, end_s AS until_s,
    CASE op
        WHEN 'deposit' THEN -amount
        WHEN 'bet' THEN CASE WHEN side = 'BACK' THEN amount ELSE ceil_div(amount * (odds::BIGINT - 100), 100) END
        ELSE amount
    END AS cost
FROM (
    FROM stored
    UNION ALL
    SELECT *, begin_s AS sent_s FROM refused_attempts WHERE family = 'match'
)

-- name: A08
WITH penniless AS (
    SELECT attempt, wallet, begin_s, until_s, cost FROM claims
    WHERE outcome = 'INSUFFICIENT_FUNDS' AND family = 'ledger' AND cost IS NOT NULL
),
wallets AS (SELECT DISTINCT wallet FROM penniless),
-- After which seq at least: the highest that was acknowledged or shown before the window.
earlier AS (
    SELECT wallet, begin_s AS moment, 0 AS turn, attempt, NULL AS seq FROM penniless
    UNION ALL
    SELECT wallet, ack_s, 1, NULL, seq FROM acks SEMI JOIN wallets USING (wallet)
    UNION ALL
    SELECT wallet, end_s, 1, NULL, seq FROM attempts SEMI JOIN wallets USING (wallet)
    WHERE family = 'read' AND cls = 'ok' AND seq IS NOT NULL
),
lows AS (
    SELECT attempt, max(seq) OVER (PARTITION BY wallet ORDER BY moment, turn ROWS UNBOUNDED PRECEDING) AS low
    FROM earlier QUALIFY turn = 0
),
-- After which at most: the one before the lowest that was first sent after the window.
later AS (
    SELECT wallet, until_s AS moment, 0 AS turn, attempt, NULL AS seq FROM penniless
    UNION ALL
    SELECT wallet, begin_s, 1, NULL, seq FROM acknowledged SEMI JOIN wallets USING (wallet)
),
highs AS (
    SELECT attempt, min(seq) OVER (PARTITION BY wallet ORDER BY moment DESC, turn ROWS UNBOUNDED PRECEDING) - 1 AS high
    FROM later QUALIFY turn = 0
),
-- Where a wallet can stand: empty at first, then after each of its entries.
stands AS (
    SELECT wallet, seq, replayed, row_number() OVER (PARTITION BY wallet ORDER BY seq, turn) AS place
    FROM (
        SELECT wallet, 0 AS seq, 0 AS turn, 0 AS replayed FROM wallets
        UNION ALL
        SELECT wallet, seq, 1, replayed FROM entries SEMI JOIN wallets USING (wallet)
    )
),
places AS (SELECT wallet, seq, max(place) AS place FROM stands GROUP BY wallet, seq),
ends AS (SELECT wallet, max(place) AS place FROM stands GROUP BY wallet),
spans AS (
    SELECT
        p.attempt, p.wallet, p.cost,
        coalesce(l.place, 1) AS from_place, coalesce(h.place, e.place) AS to_place
    FROM penniless p
    JOIN lows USING (attempt) JOIN highs USING (attempt)
    JOIN ends e ON e.wallet = p.wallet
    LEFT JOIN places l ON l.wallet = p.wallet AND l.seq = coalesce(low, 0)
    LEFT JOIN places h ON h.wallet = p.wallet AND h.seq = high
),
moments AS (SELECT attempt, wallet, cost, unnest(range(from_place, to_place + 1)) AS place FROM spans),
had_the_funds AS (
    SELECT attempt FROM moments JOIN stands USING (wallet, place) GROUP BY attempt, cost HAVING min(replayed) >= cost
),
reasons (op, outcome, true_in) AS (
    VALUES
        ('bet', 'MATCH_CLOSED', ['CLOSED', 'SETTLING', 'SETTLED', 'VOID']),
        ('cancel', 'MATCH_CLOSED', ['CLOSED', 'SETTLING', 'SETTLED', 'VOID']),
        ('close_match', 'ILLEGAL_TRANSITION', ['VOID']),
        ('settle_match', 'ILLEGAL_TRANSITION', ['OPEN', 'VOID']),
        ('void_match', 'ILLEGAL_TRANSITION', ['SETTLING', 'SETTLED']),
        ('bet', 'UNKNOWN_MATCH', ['ABSENT']), ('cancel', 'UNKNOWN_MATCH', ['ABSENT']),
        ('close_match', 'UNKNOWN_MATCH', ['ABSENT']), ('settle_match', 'UNKNOWN_MATCH', ['ABSENT']),
        ('void_match', 'UNKNOWN_MATCH', ['ABSENT']), ('resettle_match', 'UNKNOWN_MATCH', ['ABSENT'])
),
-- A match closes by itself when its time has come; without the wall clock nobody can say whether it had.
about_states AS (
    SELECT c.attempt, c.match_id, c.begin_s, c.until_s, r.true_in
    FROM claims c JOIN reasons r USING (op, outcome)
    LEFT JOIN (SELECT match_id, min(closes_at) AS closes_at FROM matches GROUP BY match_id) m USING (match_id)
    WHERE c.match_id IS NOT NULL AND (
        c.outcome <> 'MATCH_CLOSED'
        OR NOT coalesce(
            m.closes_at - (SELECT origin_unix FROM clock) <= c.until_s + (SELECT slack_s FROM clock),
            (SELECT origin_unix FROM clock) IS NULL
        )
    )
),
led (op, state, again) AS (
    VALUES ('create_match', 'OPEN', false), ('close_match', 'CLOSED', false), ('settle_match', 'SETTLING', false),
        ('void_match', 'VOID', false), ('resettle_match', 'SETTLING', true)
),
commands AS (
    SELECT match_id, state, again, min(begin_s) AS asked_s, min(end_s) FILTER (cls = 'ok') AS done_s
    FROM attempts JOIN led USING (op) GROUP BY match_id, state, again
),
-- The states of each match in order: asked for not before, done not after. What nobody asked for came by itself.
steps AS (
    SELECT match_id, 0 AS step, 'ABSENT' AS state, '-Infinity'::DOUBLE AS asked_s, '-Infinity'::DOUBLE AS done_s
    FROM transitions GROUP BY match_id
    UNION ALL
    SELECT
        t.match_id, t.transition_no, t.to_state, coalesce(c.asked_s, '-Infinity'::DOUBLE),
        -- Of several corrections it is not known which was answered when.
        CASE WHEN c.again THEN 'Infinity'::DOUBLE ELSE coalesce(c.done_s, 'Infinity'::DOUBLE) END
    FROM transitions t
    LEFT JOIN commands c
        ON c.match_id = t.match_id AND c.state = t.to_state AND c.again = (t.settlement_version > 1)
),
bounds AS (
    SELECT
        a.attempt, coalesce(max(step) FILTER (done_s < a.begin_s), 0) AS low,
        min(step) FILTER (asked_s > a.until_s) AS next
    FROM about_states a JOIN steps s USING (match_id) GROUP BY a.attempt
),
possible AS (
    SELECT a.attempt, a.true_in, s.state
    FROM about_states a JOIN bounds b USING (attempt) JOIN steps s USING (match_id)
    WHERE s.step >= b.low AND coalesce(s.step < b.next, true)
    UNION ALL
    -- A match without any row never was.
    SELECT attempt, true_in, 'ABSENT' FROM about_states ANTI JOIN steps USING (match_id)
),
never_so AS (
    SELECT attempt FROM possible GROUP BY attempt HAVING NOT bool_or(list_contains(true_in, state))
),
known_outcome AS (
    SELECT attempt FROM claims c JOIN matches m USING (match_id)
    WHERE c.outcome = 'UNKNOWN_OUTCOME' AND list_contains(string_split(m.outcomes, ','), c.selection)
),
within_the_limit AS (
    SELECT attempt FROM claims
    WHERE outcome = 'LIMIT_EXCEEDED' AND op = 'bet' AND cost <= (SELECT max_amount_minor FROM config)
),
not_rolled_back AS (
    SELECT attempt FROM claims c
    WHERE outcome = 'ROLLED_BACK' AND family = 'ledger' AND NOT EXISTS (
        SELECT 1 FROM attempts a
        WHERE a.family = 'rollback' AND a.wallet = c.wallet AND a.key = c.key AND a.begin_s < c.until_s
    )
),
cancelled_later AS (
    SELECT attempt FROM claims c
    JOIN cancels d ON d.user_id = c.wallet AND d.bet_id = c.bet_id AND d.outcome = 'ACCEPTED' AND d.cancelled_stake > 0
    JOIN fates f ON f.family = 'cancel' AND f.wallet = d.user_id AND f.key = d.idempotent_key
    WHERE c.outcome = 'NOTHING_TO_CANCEL' AND c.family = 'cancel' AND f.begin_s > c.until_s
)
SELECT 'attempt ' || attempt AS subject
FROM (
    FROM had_the_funds UNION ALL FROM never_so UNION ALL FROM known_outcome UNION ALL FROM within_the_limit
    UNION ALL FROM not_rolled_back UNION ALL FROM cancelled_later
)
