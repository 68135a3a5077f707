-- A13, A27, A28, A29: the bets, the book and the payments, against rules stated here once more.

-- name: A13
WITH stakes AS (
    SELECT wallet, bet_id, seq, -amount AS posted FROM entries WHERE NOT system AND contra = 'ESCROW'
),
unbacked AS (
    SELECT coalesce(b.bet_id, s.bet_id) AS bet_id
    FROM bets b FULL JOIN stakes s ON s.wallet = b.user_id AND s.bet_id = b.bet_id AND s.seq = b.seq
    WHERE b.user_id IS NULL OR s.wallet IS NULL OR s.posted <> b.reserve
),
legs AS (
    SELECT match_id, outcome, back_bet_id AS bet_id, back_user AS user_id, 'BACK' AS side FROM fills
    UNION
    SELECT match_id, outcome, lay_bet_id, lay_user, 'LAY' FROM fills
),
lame AS (
    SELECT bet_id FROM legs ANTI JOIN orders USING (match_id, outcome, bet_id, user_id, side)
),
missummed AS (
    SELECT o.bet_id FROM orders o LEFT JOIN matched m USING (bet_id)
    WHERE o.matched_stake <> coalesce(m.stake, 0) OR o.matched_liability <> coalesce(m.liability, 0)
        OR o.winnings <> coalesce(m.winnings, 0)
)
SELECT 'bet_id ' || said(bet_id) AS subject FROM (FROM unbacked UNION ALL FROM lame UNION ALL FROM missummed)

-- name: A27
SELECT payment_at(bet_id, type, contra, version) AS subject
FROM entries WHERE system AND type IN ('PAYOUT', 'REFUND')
GROUP BY bet_id, type, contra, version HAVING count(*) > 1

-- name: rulings
-- Every ruling on every bet: what the bet has by it in all (`due` out of escrow, `charge` to the house), and what it
-- had by the ruling before it, which is nothing before the first.
CREATE TABLE rulings AS
WITH ruled AS (
    SELECT
        b.*, s.settlement_version AS version, s.kind,
        coalesce(s.kind = 'SETTLE' AND fill_stake > 0 AND back = (outcome = s.result), false) AS wins
    FROM judged_bets b JOIN first_settlements s USING (match_id)
),
valued AS (
    SELECT
        *,
        CASE
            WHEN kind = 'VOID' THEN reserve - returned
            WHEN wins THEN unused - returned + fill_stake + fill_liability
            ELSE unused - returned
        END AS due,
        -- The backer's rounding residue is the house's.
        CASE
            WHEN NOT wins THEN 0
            WHEN back THEN ceil_div(fill_winnings * (SELECT commission_bps FROM config), 10000)
                + fill_liability - fill_winnings
            ELSE ceil_div(fill_stake * (SELECT commission_bps FROM config), 10000)
        END AS charge
    FROM ruled
)
SELECT
    *, lag(due) OVER steps AS due_before, lag(charge) OVER steps AS charge_before
FROM valued
WINDOW steps AS (PARTITION BY wallet, bet_id ORDER BY version)

-- name: A28
WITH first_orders AS (
    SELECT * FROM orders QUALIFY row_number() OVER (PARTITION BY bet_id ORDER BY line) = 1
),
unruly_reserves AS (
    SELECT bet_id FROM bets
    WHERE reserve <> CASE WHEN side = 'BACK' THEN stake ELSE ceil_div(stake * (odds - 100), 100) END
),
-- The exact liability of a lay order, in hundredths of a minor unit, grows with each fill and is rounded up as a whole.
book AS (
    SELECT
        *, stake * (odds - 100) AS step,
        sum(step) OVER (PARTITION BY lay_bet_id ORDER BY match_id, fill_no, line ROWS UNBOUNDED PRECEDING) AS after
    FROM first_fills
),
unruly_fills AS (
    SELECT f.match_id, f.fill_no
    FROM book f
    JOIN first_orders back ON back.bet_id = f.back_bet_id
    JOIN first_orders lay ON lay.bet_id = f.lay_bet_id
    WHERE f.liability <> ceil_div(after, 100) - ceil_div(after - step, 100)
        OR f.winnings <> floor_div(step, 100)
        OR f.odds <> CASE WHEN back.arrival < lay.arrival THEN back.odds ELSE lay.odds END
        OR back.odds > lay.odds
),
-- Among the orders that rest at the same odds the first trades first: `until` is the last fill before which an order
-- still had stake to trade.
first_fills AS (
    SELECT * FROM fills QUALIFY row_number() OVER (PARTITION BY match_id, fill_no ORDER BY line) = 1
),
queue AS (
    SELECT
        o.bet_id, o.match_id, o.outcome, o.side, o.odds, o.arrival, o.user_id,
        CASE
            WHEN o.stake > o.matched_stake + o.cancelled_stake THEN 9223372036854775807 ELSE coalesce(l.fill_no, 0)
        END AS until
    FROM first_orders o
    LEFT JOIN (
        SELECT bet_id, max(fill_no) AS fill_no
        FROM (
            SELECT back_bet_id AS bet_id, fill_no FROM first_fills
            UNION ALL
            SELECT lay_bet_id, fill_no FROM first_fills
        )
        GROUP BY bet_id
    ) l ON l.bet_id = o.bet_id
),
waiting AS (
    SELECT
        *, max(until) OVER (
            PARTITION BY match_id, outcome, side, odds ORDER BY arrival
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS waited
    FROM queue
),
suspects AS (
    SELECT
        f.match_id, f.fill_no, r.match_id AS level_match, r.outcome, r.side, r.odds, r.arrival,
        CASE WHEN back.arrival < lay.arrival THEN lay.user_id ELSE back.user_id END AS incoming
    FROM first_fills f JOIN queue back ON back.bet_id = f.back_bet_id JOIN queue lay ON lay.bet_id = f.lay_bet_id
    JOIN waiting r ON r.bet_id = CASE WHEN back.arrival < lay.arrival THEN back.bet_id ELSE lay.bet_id END
    WHERE r.waited > f.fill_no
),
passed_over AS (
    SELECT DISTINCT s.match_id, s.fill_no
    FROM suspects s JOIN queue q
        ON q.match_id = s.level_match AND q.outcome = s.outcome AND q.side = s.side AND q.odds = s.odds
    WHERE q.arrival < s.arrival AND q.until > s.fill_no AND q.user_id <> s.incoming
),
unruly_cancels AS (
    SELECT bet_id FROM judged_bets
    WHERE cancel_refund <> returned OR (cancelled_stake > 0 AND cancelled_stake <> stake - fill_stake)
),
-- What the house advanced on a bet and has not got back, before each ruling.
debts AS (
    SELECT r.wallet, r.bet_id, r.version, greatest(sum(e.amount), 0) AS owed
    FROM rulings r
    JOIN entries e ON e.bet_id = r.bet_id AND e.system AND e.contra = 'HOUSE' AND e.version < r.version
    WHERE r.due_before IS NOT NULL
    GROUP BY r.wallet, r.bet_id, r.version
),
advances AS (
    SELECT bet_id, version, min(balance - amount) AS held
    FROM entries WHERE system AND contra = 'HOUSE' AND type = 'CREDIT' GROUP BY bet_id, version
),
corrections AS (
    SELECT
        r.wallet, r.bet_id, r.version, r.kind, a.held,
        due - due_before AS more, charge - charge_before AS dearer,
        greatest(dearer, 0) + least(coalesce(owed, 0), greatest(more - greatest(dearer, 0), 0)) AS to_house
    FROM rulings r
    LEFT JOIN debts d ON d.wallet = r.wallet AND d.bet_id = r.bet_id AND d.version = r.version
    LEFT JOIN advances a ON a.bet_id = r.bet_id AND a.version = r.version
    WHERE due_before IS NOT NULL AND (due <> due_before OR charge <> charge_before)
),
demanded AS (
    SELECT wallet, bet_id, 'REFUND' AS type, 'ESCROW' AS contra, 0 AS version, returned AS amount FROM judged_bets
    UNION ALL
    SELECT wallet, bet_id, 'REFUND', 'ESCROW', version, CASE kind WHEN 'VOID' THEN due WHEN 'SETTLE' THEN unused - returned END
    FROM rulings WHERE due_before IS NULL
    UNION ALL
    SELECT wallet, bet_id, 'PAYOUT', 'ESCROW', version, fill_stake + fill_liability
    FROM rulings WHERE due_before IS NULL AND wins
    UNION ALL
    SELECT wallet, bet_id, 'DEBIT', 'HOUSE', version, -charge FROM rulings WHERE due_before IS NULL
    UNION ALL
    SELECT
        wallet, bet_id, CASE WHEN more < 0 THEN 'DEBIT' WHEN kind = 'VOID' THEN 'REFUND' ELSE 'PAYOUT' END, 'ESCROW',
        version, more
    FROM corrections
    UNION ALL
    SELECT wallet, bet_id, 'REFUND', 'HOUSE', version, greatest(-dearer, 0) FROM corrections
    UNION ALL
    SELECT wallet, bet_id, 'DEBIT', 'HOUSE', version, -to_house FROM corrections
    UNION ALL
    SELECT wallet, bet_id, 'CREDIT', 'HOUSE', version, greatest(-more - held, 0) FROM corrections WHERE held IS NOT NULL
),
-- Of a payment made twice (A27) the first counts; one without a cancel or settlement is a phantom (A03).
paid AS (
    SELECT wallet, bet_id, type, contra, version, first(amount ORDER BY seq, key) AS amount
    FROM entries e
    WHERE system AND bet_id IN (SELECT bet_id FROM orders) AND CASE
        WHEN version = 0 THEN bet_id IN (SELECT bet_id FROM orders WHERE cancelled_stake > 0)
        ELSE (match_id, version) IN (SELECT (match_id, settlement_version) FROM settlements)
    END
    GROUP BY wallet, bet_id, type, contra, version
),
mispaid AS (
    SELECT bet_id, type, contra, version
    FROM (SELECT * FROM demanded WHERE amount <> 0) d FULL JOIN paid p USING (wallet, bet_id, type, contra, version)
    WHERE d.amount IS DISTINCT FROM p.amount
)
SELECT 'bet_id ' || said(bet_id) AS subject FROM (FROM unruly_reserves UNION ALL FROM unruly_cancels)
UNION ALL SELECT fill_at(match_id, fill_no) FROM (FROM unruly_fills UNION FROM passed_over)
UNION ALL SELECT payment_at(bet_id, type, contra, version) FROM mispaid

-- name: A29
-- A match's life is a word over O(pen), C(losed), S(ettling), D (settled), V(oid), and the legal ones are a language.
WITH steps AS (
    SELECT
        match_id, from_state, to_state, transition_no, settlement_version,
        lag(to_state) OVER life AS stood,
        lag(transition_no) OVER life AS number_before,
        count(*) FILTER (to_state = 'SETTLING' OR (to_state = 'VOID' AND from_state IS DISTINCT FROM 'SETTLING'))
            OVER (life ROWS UNBOUNDED PRECEDING) AS version
    FROM transitions
    WINDOW life AS (PARTITION BY match_id ORDER BY transition_no)
),
lives AS (
    SELECT
        match_id,
        string_agg(
            CASE to_state WHEN 'OPEN' THEN 'O' WHEN 'CLOSED' THEN 'C' WHEN 'SETTLING' THEN 'S' WHEN 'SETTLED' THEN 'D'
                WHEN 'VOID' THEN 'V' ELSE '?' END,
            '' ORDER BY transition_no
        ) AS word,
        last(to_state ORDER BY transition_no) AS stands,
        bool_or(
            stood IS DISTINCT FROM from_state OR coalesce(number_before + 1 <> transition_no, false)
            OR settlement_version <> version
        ) AS broken
    FROM steps GROUP BY match_id
),
verdicts AS (
    SELECT
        match_id, kind, result, settlement_version AS version, lag(settlement_version, 1, 0) OVER turns AS version_before,
        lag(kind) OVER turns AS kind_before, lag(result) OVER turns AS result_before
    FROM settlements
    WINDOW turns AS (PARTITION BY match_id ORDER BY settlement_version)
),
closes AS (
    SELECT match_id, min("at") AS closed_at FROM transitions WHERE to_state IN ('CLOSED', 'VOID') GROUP BY match_id
),
unruly_matches AS (
    SELECT match_id FROM lives
    WHERE broken OR NOT regexp_full_match(word, 'O(C|CS|(C?V|CSD)(S[DV])*S?)?')
    UNION ALL
    SELECT m.match_id FROM matches m LEFT JOIN lives l USING (match_id) WHERE m.state IS DISTINCT FROM l.stands
    UNION ALL
    SELECT match_id FROM verdicts
    WHERE version <> version_before + 1 OR (kind, result) IS NOT DISTINCT FROM (kind_before, result_before)
),
unruly_orders AS (
    SELECT o.bet_id FROM orders o LEFT JOIN matches m USING (match_id)
    WHERE NOT coalesce(
        CASE o.state
            WHEN 'PENDING' THEN matched_stake = 0 AND cancelled_stake = 0
            WHEN 'PART_MATCHED' THEN matched_stake > 0 AND matched_stake < stake AND cancelled_stake = 0
            WHEN 'MATCHED' THEN matched_stake > 0 AND matched_stake + cancelled_stake = stake
            WHEN 'CANCELLED' THEN cancelled_stake > 0 AND matched_stake + cancelled_stake = stake
            WHEN 'SETTLED' THEN m.state IN ('SETTLING', 'SETTLED')
            WHEN 'VOID' THEN m.state IN ('SETTLING', 'VOID')
        END, false
    )
    UNION ALL
    SELECT bet_id FROM orders JOIN closes USING (match_id) WHERE arrived_at > closed_at AND cancelled_stake = 0
),
unruly_fills AS (
    SELECT match_id, fill_no FROM fills WHERE back_user = lay_user
    UNION ALL
    SELECT match_id, fill_no FROM fills JOIN closes USING (match_id) WHERE filled_at > closed_at
)
SELECT 'match_id ' || said(match_id) AS subject FROM unruly_matches
UNION ALL SELECT 'bet_id ' || said(bet_id) FROM unruly_orders
UNION ALL SELECT fill_at(match_id, fill_no) FROM unruly_fills
