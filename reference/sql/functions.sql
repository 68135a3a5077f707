-- Functions of the write path. Owned by the schema's owner and SECURITY DEFINER: the service's roles may call
-- them but cannot write the tables behind them any other way.

-- name: functions
-- Post a batch of commands, all of wallets this server holds, in one transaction. Arrays run in parallel, one
-- element a command. Returns one row a command: its status (ACCEPTED, REPLAYED, a refusal, or NOT_HERE for a wallet
-- whose shard is being moved or is on another server: nothing happened to it) and, when accepted, the entry's seq and
-- the balance after it. The caller never puts one (user, key) twice into one batch.
--
-- Keys are hardly ever repeated, so an accepted command's key is not looked up: the unique key refuses a repeated
-- one, and the batch is then decided once more with every key looked up. A refusal needs the look-up at once,
-- because refusing what was accepted before would be a wrong answer that no constraint sees.
CREATE FUNCTION ledger_post(
    p_created_by  text,
    p_user        bigint[],
    p_key         text[],
    p_type        text[],
    p_amount      bigint[],
    p_contra      text[],
    p_match       uuid[],
    p_bet         uuid[],
    p_version     smallint[],
    p_outcome     text[],
    p_side        text[],
    p_odds        integer[],
    p_stake       bigint[],
    p_refusal     text[],
    p_traceparent text[]
) RETURNS TABLE (command_no integer, status text, entry_seq bigint, entry_balance bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    commands     CONSTANT integer := cardinality(p_user);
    wallets      bigint[];
    first_seq    bigint[];
    first_balance bigint[];
    head_seq     bigint[];
    head_balance bigint[];
    known        boolean[];
    statuses     text[];
    seqs         bigint[];
    balances     bigint[];
    posted_at    timestamptz;
    slot         integer;
    one_seq      bigint;
    one_balance  bigint;
    shards       integer[];
    held         integer[];
    elsewhere    boolean;
    replayed     boolean;
    status_now   text;
    accepted     integer;
    bets_placed  integer;
    refused      integer;
BEGIN
    -- By the login and not by an argument: the settler cannot pay past a closed gate.
    IF session_user = 'ledger_settler' THEN
        PERFORM payouts_open();
    END IF;

    -- A shard that is being moved is locked by its mover, and one that was moved is not here: its commands are not
    -- decided, not even refused, and their status is NOT_HERE. Neither lock waits, so that no other wallet does. The
    -- second statement begins under the locks: it sees a move that ended just before.
    shards := ARRAY(SELECT DISTINCT (u % 100)::integer FROM unnest(p_user) AS u);
    held := ARRAY(SELECT s FROM unnest(shards) AS s WHERE pg_try_advisory_xact_lock_shared(9, s));
    held := ARRAY(SELECT r.shard::integer FROM shard_routes r WHERE r.here AND r.shard = ANY (held));
    elsewhere := cardinality(held) < cardinality(shards);

    -- Lock the wallets in ascending order, so that no two batches can wait for each other.
    IF commands = 1 THEN
        wallets := p_user;
    ELSE
        wallets := ARRAY(SELECT DISTINCT u FROM unnest(p_user) AS u ORDER BY u);
    END IF;
    PERFORM pg_advisory_xact_lock(u) FROM unnest(wallets) AS u;

    -- Only a statement begun after the locks were granted sees what the previous holders committed. One look-up a
    -- wallet opens one partition but locks all of them; one statement for all wallets opens all of them, once.
    IF cardinality(wallets) > 48 THEN
        SELECT array_agg(coalesce(h.seq, 0) ORDER BY w.no), array_agg(coalesce(h.balance_snapshot, 0) ORDER BY w.no)
          INTO first_seq, first_balance
          FROM unnest(wallets) WITH ORDINALITY AS w (user_id, no)
          LEFT JOIN LATERAL (SELECT l.seq, l.balance_snapshot FROM wallet_ledger l
                              WHERE l.shard = (w.user_id % 100)::smallint AND l.user_id = w.user_id
                              ORDER BY l.seq DESC LIMIT 1) h ON true;
    ELSE
        FOR slot IN 1 .. cardinality(wallets) LOOP
            SELECT l.seq, l.balance_snapshot INTO one_seq, one_balance FROM wallet_ledger l
             WHERE l.shard = (wallets[slot] % 100)::smallint AND l.user_id = wallets[slot] ORDER BY l.seq DESC LIMIT 1;
            first_seq[slot] := coalesce(one_seq, 0);
            first_balance[slot] := coalesce(one_balance, 0);
        END LOOP;
    END IF;
    IF EXISTS (SELECT FROM unnest(p_user, p_key) AS c (user_id, key)
                 JOIN refusals r ON r.shard = (c.user_id % 100)::smallint AND r.user_id = c.user_id
                                AND r.idempotent_key = c.key) THEN
        known := ledger_known(p_user, p_key);
    END IF;

    LOOP
        -- Decide one command after the other: a command sees the funds that those before it left.
        head_seq := first_seq;
        head_balance := first_balance;
        statuses := array_fill(NULL::text, ARRAY[commands]);
        seqs := array_fill(NULL::bigint, ARRAY[commands]);
        balances := array_fill(NULL::bigint, ARRAY[commands]);
        accepted := 0;
        bets_placed := 0;
        refused := 0;
        FOR i IN 1 .. commands LOOP
            slot := array_position(wallets, p_user[i]);
            IF elsewhere AND NOT (p_user[i] % 100)::integer = ANY (held) THEN
                statuses[i] := 'NOT_HERE';
                CONTINUE;
            END IF;
            status_now := CASE WHEN known[i] THEN 'REPLAYED'
                               WHEN p_refusal[i] IS NOT NULL THEN p_refusal[i]
                               WHEN head_balance[slot] + p_amount[i] < 0 THEN 'INSUFFICIENT_FUNDS'
                               ELSE 'ACCEPTED' END;
            IF status_now = 'ACCEPTED' THEN
                head_seq[slot] := head_seq[slot] + 1;
                head_balance[slot] := head_balance[slot] + p_amount[i];
                seqs[i] := head_seq[slot];
                balances[i] := head_balance[slot];
                accepted := accepted + 1;
                IF p_side[i] IS NOT NULL THEN
                    bets_placed := bets_placed + 1;
                END IF;
            ELSIF status_now <> 'REPLAYED' THEN
                IF known IS NULL THEN
                    SELECT EXISTS (SELECT FROM wallet_ledger l
                                    WHERE l.shard = (p_user[i] % 100)::smallint AND l.user_id = p_user[i]
                                      AND l.idempotent_key = p_key[i]) INTO replayed;
                    IF replayed THEN
                        status_now := 'REPLAYED';
                    END IF;
                END IF;
                IF status_now <> 'REPLAYED' THEN
                    refused := refused + 1;
                END IF;
            END IF;
            statuses[i] := status_now;
        END LOOP;

        posted_at := clock_timestamp();
        BEGIN
            IF accepted > 0 THEN
                INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, bet_id,
                                           settlement_version, balance_snapshot, idempotent_key, created_by, created_at)
                SELECT (c.user_id % 100)::smallint, c.user_id, c.seq, c.type, c.amount, c.contra, c.match_id, c.bet_id,
                       c.version, c.balance, c.key, p_created_by, posted_at
                  FROM unnest(p_user, seqs, p_type, p_amount, p_contra, p_match, p_bet, p_version, balances, p_key)
                       AS c (user_id, seq, type, amount, contra, match_id, bet_id, version, balance, key)
                 WHERE c.seq IS NOT NULL;
            END IF;
            EXIT;
        EXCEPTION WHEN unique_violation THEN
            IF known IS NOT NULL THEN
                RAISE;
            END IF;
            known := ledger_known(p_user, p_key);
        END;
    END LOOP;

    IF bets_placed > 0 THEN
        INSERT INTO bets (shard, user_id, bet_id, seq, match_id, outcome, side, odds, stake, reserve, placed_at)
        SELECT (c.user_id % 100)::smallint, c.user_id, c.bet_id, c.seq, c.match_id, c.outcome, c.side, c.odds,
               c.stake, -c.amount, posted_at
          FROM unnest(p_user, p_bet, seqs, p_match, p_outcome, p_side, p_odds, p_stake, p_amount)
               AS c (user_id, bet_id, seq, match_id, outcome, side, odds, stake, amount)
         WHERE c.seq IS NOT NULL AND c.side IS NOT NULL;
    END IF;
    IF accepted > 0 THEN
        INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, causality_chain,
                            traceparent, created_at)
        SELECT CASE WHEN c.side IS NULL THEN 'Wallet' ELSE 'Bet' END,
               CASE WHEN c.side IS NULL THEN c.user_id::text ELSE c.bet_id::text END,
               CASE WHEN c.side IS NULL THEN 'EntryPosted' ELSE 'BetCreated' END,
               c.user_id::text,
               CASE WHEN c.side IS NULL THEN
                   jsonb_build_object('user_id', c.user_id, 'seq', c.seq, 'type', c.type, 'amount', c.amount,
                       'balance', c.balance, 'contra', c.contra, 'match_id', c.match_id, 'bet_id', c.bet_id,
                       'settlement_version', c.version)
               ELSE
                   jsonb_build_object('bet_id', c.bet_id, 'user_id', c.user_id, 'seq', c.seq, 'amount', c.amount,
                       'balance', c.balance, 'match_id', c.match_id, 'outcome', c.outcome, 'side', c.side,
                       'odds', c.odds, 'stake', c.stake, 'reserve', -c.amount)
               END,
               c.bet_id, c.traceparent, posted_at
          FROM unnest(p_user, seqs, p_type, p_amount, p_contra, p_match, p_bet, p_version, balances, p_outcome,
                      p_side, p_odds, p_stake, p_traceparent)
               AS c (user_id, seq, type, amount, contra, match_id, bet_id, version, balance, outcome, side, odds,
                     stake, traceparent)
         WHERE c.seq IS NOT NULL;
    END IF;
    IF refused > 0 THEN
        -- With the command itself, in the words of ledger_answers: a later one under the key is compared with it.
        INSERT INTO refusals (shard, user_id, idempotent_key, outcome, command, created_at)
        SELECT (c.user_id % 100)::smallint, c.user_id, c.key, c.status,
               CASE WHEN c.side IS NOT NULL THEN
                   jsonb_build_object('op', 'bet', 'match_id', c.match_id, 'outcome', c.outcome, 'side', c.side,
                       'odds', c.odds, 'stake_minor', c.stake)
               ELSE
                   jsonb_build_object('op', CASE c.type WHEN 'CREDIT' THEN 'deposit' WHEN 'DEBIT' THEN 'withdraw'
                                                        ELSE lower(c.type) END, 'amount_minor', abs(c.amount))
               END, posted_at
          FROM unnest(p_user, p_key, statuses, p_type, p_amount, p_match, p_outcome, p_side, p_odds, p_stake)
               AS c (user_id, key, status, type, amount, match_id, outcome, side, odds, stake)
         WHERE c.status NOT IN ('ACCEPTED', 'REPLAYED', 'NOT_HERE');
    END IF;
    RETURN QUERY SELECT c.no::integer, c.status, c.seq, c.balance
                   FROM unnest(statuses, seqs, balances) WITH ORDINALITY AS c (status, seq, balance, no);
END $$;

-- Which of these keys were answered before, by an entry or by a refusal; one element a key.
CREATE FUNCTION ledger_known(p_user bigint[], p_key text[]) RETURNS boolean[]
LANGUAGE sql STABLE SET search_path = pg_catalog, public AS $$
    SELECT array_agg(EXISTS (SELECT FROM wallet_ledger l
                              WHERE l.shard = (c.user_id % 100)::smallint AND l.user_id = c.user_id
                                AND l.idempotent_key = c.key)
                  OR EXISTS (SELECT FROM refusals r
                              WHERE r.shard = (c.user_id % 100)::smallint AND r.user_id = c.user_id
                                AND r.idempotent_key = c.key)
                     ORDER BY c.no)
      FROM unnest(p_user, p_key) WITH ORDINALITY AS c (user_id, key, no)
$$;

-- What was answered under keys that were seen before: the entry and its bet, or the refusal; NOT_HERE if the wallet
-- moved away in between.
CREATE FUNCTION ledger_answers(p_user bigint[], p_key text[])
RETURNS TABLE (answer_no integer, outcome text, entry_seq bigint, entry_balance bigint, bet uuid, command jsonb)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
    SELECT c.no::integer, coalesce(r.outcome, CASE WHEN l.seq IS NULL THEN 'NOT_HERE' ELSE 'ACCEPTED' END), l.seq, l.balance_snapshot, l.bet_id,
           CASE WHEN r.outcome IS NOT NULL THEN r.command
                WHEN b.bet_id IS NOT NULL THEN jsonb_build_object('op', 'bet', 'match_id', b.match_id,
                    'outcome', b.outcome, 'side', b.side, 'odds', b.odds, 'stake_minor', b.stake)
                ELSE jsonb_build_object('op', CASE l.type WHEN 'CREDIT' THEN 'deposit' WHEN 'DEBIT' THEN 'withdraw'
                                                   ELSE lower(l.type) END,
                    'amount_minor', abs(l.amount)) END
      FROM unnest(p_user, p_key) WITH ORDINALITY AS c (user_id, key, no)
      -- LIMIT 1 keeps the look-ups what they are: without it, the plan may be to scan everything.
      LEFT JOIN LATERAL (SELECT * FROM wallet_ledger w
                          WHERE w.shard = (c.user_id % 100)::smallint AND w.user_id = c.user_id
                            AND w.idempotent_key = c.key LIMIT 1) l ON true
      LEFT JOIN LATERAL (SELECT * FROM bets n
                          WHERE n.shard = l.shard AND n.user_id = l.user_id AND n.bet_id = l.bet_id
                            AND n.seq = l.seq LIMIT 1) b ON true
      LEFT JOIN LATERAL (SELECT * FROM refusals n
                          WHERE n.shard = (c.user_id % 100)::smallint AND n.user_id = c.user_id
                            AND n.idempotent_key = c.key LIMIT 1) r ON true
$$;

-- True, or the error LP002: a read of a wallet whose shard is not here must not look like a wallet without entries.
-- It stands first in the WHERE of every such read; being STABLE, it is asked once, before a row is looked for.
CREATE FUNCTION shard_here(p_shard smallint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM shard_routes r WHERE r.shard = p_shard AND r.here) THEN
        RAISE EXCEPTION 'shard % is not on this server', p_shard USING ERRCODE = 'LP002';
    END IF;
    RETURN true;
END $$;

-- The same for a batch of wallets.
CREATE FUNCTION shards_here(p_user bigint[]) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public AS $$
DECLARE
    missing bigint;
BEGIN
    SELECT u % 100 INTO missing FROM unnest(p_user) AS u
     WHERE NOT EXISTS (SELECT FROM shard_routes r WHERE r.shard = u % 100 AND r.here) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'shard % is not on this server', missing USING ERRCODE = 'LP002';
    END IF;
    RETURN true;
END $$;

-- Keep the shards of these wallets here until the transaction ends, or the error LP002. Never waits.
CREATE FUNCTION shards_hold(p_user bigint[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, public AS $$
BEGIN
    PERFORM FROM (SELECT DISTINCT (u % 100)::integer AS shard FROM unnest(p_user) AS u) s
      WHERE NOT pg_try_advisory_xact_lock_shared(9, s.shard);
    IF FOUND THEN
        RAISE EXCEPTION 'a shard is being moved' USING ERRCODE = 'LP002';
    END IF;
    PERFORM shards_here(p_user);
END $$;

-- Take a shard over whose complete copy waits here for this very epoch. The caller has seen that the old server gave
-- it up: its row names this server and this epoch, and only the transaction that gave it up wrote that. Whoever sees
-- it may call, so that a mover killed at that moment keeps no wallet waiting. Returns whether the shard is here now.
CREATE FUNCTION shard_accept(p_shard smallint, p_epoch bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    r shard_routes;
BEGIN
    -- In this order everywhere: the table before the row.
    LOCK TABLE wallet_ledger IN SHARE UPDATE EXCLUSIVE MODE;
    SELECT * INTO r FROM shard_routes WHERE shard = p_shard FOR UPDATE;
    IF r.prepared IS DISTINCT FROM p_epoch THEN
        RETURN r.here AND r.epoch >= p_epoch;
    END IF;
    EXECUTE format('ALTER TABLE wallet_ledger ATTACH PARTITION wallet_ledger_%s FOR VALUES IN (%s)', p_shard, p_shard);
    UPDATE shard_routes SET server_name = (SELECT i.server_name FROM server_identity i), epoch = p_epoch, here = true,
                            prepared = NULL, changed_at = clock_timestamp()
     WHERE shard = p_shard;
    RETURN true;
END $$;

-- The balance after the last entry that was written at a time or before it, by the milliseconds that every view shows.
-- Within a wallet created_at never falls as seq grows (it is read under the wallet's lock), so the entry is found by
-- halving: some twenty looks into the primary key of a wallet with a million entries, and no index of its own.
-- An entry that is being written now may bear an earlier time than its commit. Near the present the wallet's lock is
-- therefore waited for; what is answered for a time that has passed never changes afterwards.
CREATE FUNCTION wallet_as_of(p_shard smallint, p_user bigint, p_at_ms bigint)
RETURNS TABLE (now_ms bigint, first_seq bigint, seq bigint, balance bigint, updated_at_ms bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, public AS $$
DECLARE
    low   bigint := 0;
    high  bigint;
    half  bigint;
    at_ms bigint;
BEGIN
    PERFORM shard_here(p_shard);
    IF p_at_ms > (extract(epoch FROM clock_timestamp()) * 1000)::bigint - 60000 THEN
        PERFORM pg_advisory_xact_lock_shared(p_user);
        -- The shard may have been given up while this waited.
        PERFORM shard_here(p_shard);
    END IF;
    now_ms := (extract(epoch FROM clock_timestamp()) * 1000)::bigint;
    -- In the order of the primary key and limited: without statistics a plain condition might take another index of
    -- the wallet, and read all of it.
    SELECT l.seq INTO first_seq
      FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id = p_user ORDER BY l.seq LIMIT 1;
    SELECT l.seq INTO high
      FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id = p_user ORDER BY l.seq DESC LIMIT 1;
    seq := 0;
    balance := 0;
    WHILE low < coalesce(high, 0) LOOP
        half := (low + high + 1) / 2;
        SELECT (extract(epoch FROM l.created_at) * 1000)::bigint INTO at_ms
          FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id = p_user AND l.seq <= half
         ORDER BY l.seq DESC LIMIT 1;
        IF at_ms <= p_at_ms THEN
            low := half;
        ELSE
            high := half - 1;
        END IF;
    END LOOP;
    IF low > 0 THEN
        SELECT l.seq, l.balance_snapshot, (extract(epoch FROM l.created_at) * 1000)::bigint
          INTO seq, balance, updated_at_ms
          FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id = p_user AND l.seq <= low
         ORDER BY l.seq DESC LIMIT 1;
    END IF;
    RETURN NEXT;
END $$;

-- Create a match. Status ACCEPTED, REPLAYED (same terms) or REPLAYED_DIFFERENTLY with the field that differs.
CREATE FUNCTION match_create(p_match uuid, p_outcomes text[], p_closes_at timestamptz)
RETURNS TABLE (status text, state text, field text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    m matches;
BEGIN
    INSERT INTO matches (match_id, outcomes, closes_at) VALUES (p_match, p_outcomes, p_closes_at)
        ON CONFLICT (match_id) DO NOTHING RETURNING * INTO m;
    IF FOUND THEN
        INSERT INTO match_transitions (match_id, transition_no, to_state, settlement_version)
            VALUES (p_match, 1, 'OPEN', 0);
        RETURN QUERY SELECT 'ACCEPTED', m.state, NULL::text;
        RETURN;
    END IF;
    SELECT * INTO m FROM matches WHERE match_id = p_match;
    RETURN QUERY SELECT
        CASE WHEN m.outcomes = p_outcomes AND m.closes_at = p_closes_at THEN 'REPLAYED' ELSE 'REPLAYED_DIFFERENTLY' END,
        m.state,
        CASE WHEN m.outcomes <> p_outcomes THEN 'outcomes' WHEN m.closes_at <> p_closes_at THEN 'closes_at_ms' END;
END $$;

-- Move a match on: to CLOSED, to SETTLING (with a result) or to VOID. Compare-and-set under the match's row lock;
-- asking again for the state a match already reached is a replay.
CREATE FUNCTION match_transition(p_match uuid, p_to text, p_result text)
RETURNS TABLE (status text, state text, field text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    m       matches;
    version smallint;
    settled text;
BEGIN
    SELECT * INTO m FROM matches WHERE match_id = p_match FOR UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'UNKNOWN_MATCH', NULL::text, NULL::text;
        RETURN;
    END IF;
    IF p_to = 'SETTLING' THEN
        -- A settle is answered from the settlement it made, also after that one was corrected.
        SELECT s.result INTO settled FROM settlements s
         WHERE s.match_id = p_match AND s.kind = 'SETTLE' ORDER BY s.settlement_version LIMIT 1;
    END IF;
    IF m.state = p_to OR (p_to = 'CLOSED' AND m.state IN ('SETTLING', 'SETTLED')) OR settled IS NOT NULL THEN
        RETURN QUERY SELECT
            CASE WHEN settled <> p_result THEN 'REPLAYED_DIFFERENTLY' ELSE 'REPLAYED' END,
            m.state, CASE WHEN settled <> p_result THEN 'result' END;
        RETURN;
    END IF;
    IF p_to = 'SETTLING' AND NOT p_result = ANY (m.outcomes) THEN
        RETURN QUERY SELECT 'UNKNOWN_OUTCOME', m.state, 'result'::text;
        RETURN;
    END IF;
    IF NOT ((p_to = 'CLOSED' AND m.state = 'OPEN') OR (p_to = 'SETTLING' AND m.state = 'CLOSED')
            OR (p_to = 'VOID' AND m.state IN ('OPEN', 'CLOSED'))) THEN
        RETURN QUERY SELECT 'ILLEGAL_TRANSITION', m.state, NULL::text;
        RETURN;
    END IF;
    version := m.settlement_version + CASE WHEN p_to = 'CLOSED' THEN 0 ELSE 1 END;
    UPDATE matches SET state = p_to, settlement_version = version, book_version = book_version + 1,
                       result = coalesce(p_result, result) WHERE match_id = p_match;
    INSERT INTO match_transitions (match_id, transition_no, from_state, to_state, settlement_version, result)
        SELECT p_match, max(transition_no) + 1, m.state, p_to, version, p_result
          FROM match_transitions WHERE match_id = p_match;
    IF p_to <> 'CLOSED' THEN
        INSERT INTO settlements (match_id, settlement_version, kind, result)
            VALUES (p_match, version, CASE p_to WHEN 'VOID' THEN 'VOID' ELSE 'SETTLE' END, p_result);
        INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, causality_chain)
            VALUES ('Match', p_match::text, 'MatchSettled', p_match::text,
                    jsonb_build_object('match_id', p_match, 'settlement_version', version,
                        'kind', CASE p_to WHEN 'VOID' THEN 'VOID' ELSE 'SETTLE' END, 'result', p_result), p_match);
    END IF;
    RETURN QUERY SELECT 'ACCEPTED', p_to, NULL::text;
END $$;

-- Settle a settled or void match again, with another result (NULL: void) under the next version. Compare-and-set under
-- the match's row lock: refused while a settlement runs, and if the caller names the version to correct (p_corrects) and
-- it is not the present one. To ask for what stands already is a replay. Every answer but UNKNOWN_MATCH is kept.
CREATE FUNCTION match_resettle(p_match uuid, p_result text, p_corrects smallint, p_key text)
RETURNS TABLE (status text, state text, field text, version smallint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    m      matches;
    last   settlements;
    kept   resettles;
    answer text;
    kind   text := CASE WHEN p_result IS NULL THEN 'VOID' ELSE 'SETTLE' END;
BEGIN
    SELECT * INTO m FROM matches WHERE match_id = p_match FOR UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'UNKNOWN_MATCH', NULL::text, NULL::text, NULL::smallint;
        RETURN;
    END IF;
    SELECT * INTO kept FROM resettles r WHERE r.match_id = p_match AND r.idempotent_key = p_key;
    IF FOUND THEN
        RETURN QUERY SELECT
            CASE WHEN differs.field IS NOT NULL THEN 'REPLAYED_DIFFERENTLY'
                 WHEN kept.outcome = 'ACCEPTED' THEN 'REPLAYED' ELSE kept.outcome END,
            m.state, differs.field, kept.settlement_version
          FROM (SELECT CASE WHEN kept.result IS DISTINCT FROM p_result THEN 'result'
                            WHEN kept.corrects IS DISTINCT FROM p_corrects THEN 'corrects_version' END) AS differs (field);
        RETURN;
    END IF;
    SELECT * INTO last FROM settlements s
     WHERE s.match_id = p_match AND s.settlement_version = m.settlement_version;
    answer := CASE WHEN NOT p_result = ANY (m.outcomes) THEN 'UNKNOWN_OUTCOME'
                   WHEN last.match_id IS NULL THEN 'ILLEGAL_TRANSITION'
                   WHEN last.result IS NOT DISTINCT FROM p_result THEN 'REPLAYED'
                   WHEN last.state <> 'DONE' OR p_corrects <> m.settlement_version THEN 'ILLEGAL_TRANSITION'
                   ELSE 'ACCEPTED' END;
    IF answer = 'ACCEPTED' THEN
        m.settlement_version := m.settlement_version + 1;
        UPDATE matches SET state = 'SETTLING', settlement_version = m.settlement_version, result = p_result
         WHERE match_id = p_match;
        INSERT INTO match_transitions (match_id, transition_no, from_state, to_state, settlement_version, result)
            SELECT p_match, max(transition_no) + 1, m.state, 'SETTLING', m.settlement_version, p_result
              FROM match_transitions WHERE match_id = p_match;
        INSERT INTO settlements (match_id, settlement_version, kind, result, commission_bps)
            VALUES (p_match, m.settlement_version, kind, p_result, last.commission_bps);
        INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, causality_chain)
            VALUES ('Match', p_match::text, 'MatchSettled', p_match::text,
                    jsonb_build_object('match_id', p_match, 'settlement_version', m.settlement_version,
                        'kind', kind, 'result', p_result), p_match);
        m.state := 'SETTLING';
    END IF;
    INSERT INTO resettles (match_id, idempotent_key, result, corrects, outcome, settlement_version)
        VALUES (p_match, p_key, p_result, p_corrects, CASE answer WHEN 'REPLAYED' THEN 'ACCEPTED' ELSE answer END,
                m.settlement_version);
    RETURN QUERY SELECT answer, m.state, CASE answer WHEN 'UNKNOWN_OUTCOME' THEN 'result' END, m.settlement_version;
END $$;

-- Lock the wallets of corrections as ledger_post locks them, and return per correction what decides it: whether its
-- entries are there already, what the house has advanced on the bet and not got back, and the wallet's balance. To be
-- followed by ledger_post in the same transaction.
CREATE FUNCTION ledger_lock(p_user bigint[], p_bet uuid[], p_version smallint)
RETURNS TABLE (correction_no integer, posted boolean, owed bigint, balance bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
BEGIN
    PERFORM shards_hold(p_user);
    PERFORM pg_advisory_xact_lock(w.u) FROM (SELECT DISTINCT u FROM unnest(p_user) AS u ORDER BY u) AS w;

    -- Only a statement begun after the locks were granted sees what the previous holders committed.
    RETURN QUERY
    SELECT c.no::integer,
           EXISTS (SELECT FROM wallet_ledger l
                    WHERE l.shard = (c.user_id % 100)::smallint AND l.bet_id = c.bet_id
                      AND l.settlement_version = p_version),
           -- A bet that owes has nothing else with the house: commission is given back before anything is advanced.
           (SELECT greatest(coalesce(sum(l.amount), 0), 0)::bigint FROM wallet_ledger l
             WHERE l.shard = (c.user_id % 100)::smallint AND l.bet_id = c.bet_id AND l.contra = 'HOUSE'
               AND l.settlement_version < p_version),
           coalesce(h.balance_snapshot, 0)
      FROM unnest(p_user, p_bet) WITH ORDINALITY AS c (user_id, bet_id, no)
      LEFT JOIN LATERAL (
          SELECT l.balance_snapshot FROM wallet_ledger l
           WHERE l.shard = (c.user_id % 100)::smallint AND l.user_id = c.user_id
           ORDER BY l.seq DESC LIMIT 1) h ON true
     ORDER BY c.no;
END $$;

-- Cancel the unmatched part of a bet. If the bet has not reached the book yet, the request waits for it there.
CREATE FUNCTION bet_cancel(p_match uuid, p_bet uuid, p_user bigint, p_key text)
RETURNS TABLE (status text, bet uuid, cancelled_stake bigint, refund bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    c       cancels;
    o       orders;
    m_state text;
    amount  bigint;
BEGIN
    -- The match's row lock orders this against the matcher and against closing and settling.
    SELECT m.state INTO m_state FROM matches m WHERE m.match_id = p_match FOR UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'UNKNOWN_MATCH', p_bet, 0::bigint, 0::bigint;
        RETURN;
    END IF;
    SELECT * INTO c FROM cancels k WHERE k.user_id = p_user AND k.idempotent_key = p_key;
    IF FOUND THEN
        RETURN QUERY SELECT CASE WHEN c.bet_id <> p_bet THEN 'REPLAYED_DIFFERENTLY'
                                 WHEN c.outcome = 'ACCEPTED' THEN 'REPLAYED' ELSE c.outcome END,
                            c.bet_id, c.cancelled_stake, c.refund;
        RETURN;
    END IF;
    SELECT * INTO o FROM orders r WHERE r.bet_id = p_bet FOR UPDATE;
    IF NOT FOUND THEN
        c.outcome := CASE WHEN m_state = 'OPEN' THEN 'ACCEPTED' ELSE 'MATCH_CLOSED' END;
        INSERT INTO cancels (user_id, idempotent_key, bet_id, match_id, outcome, waiting)
            VALUES (p_user, p_key, p_bet, p_match, c.outcome, c.outcome = 'ACCEPTED');
        RETURN QUERY SELECT c.outcome, p_bet, 0::bigint, 0::bigint;
        RETURN;
    END IF;
    c.outcome := CASE WHEN m_state <> 'OPEN' THEN 'MATCH_CLOSED'
                      WHEN o.matched_stake + o.cancelled_stake >= o.stake THEN 'NOTHING_TO_CANCEL'
                      ELSE 'ACCEPTED' END;
    amount := 0;
    IF c.outcome = 'ACCEPTED' THEN
        amount := CASE o.side WHEN 'BACK' THEN o.stake - o.matched_stake ELSE o.reserve - o.matched_liability END;
        UPDATE orders SET cancelled_stake = o.stake - o.matched_stake, cancel_refund = amount,
                          cancel_reason = 'REQUESTED',
                          state = CASE WHEN o.matched_stake = 0 THEN 'CANCELLED' ELSE 'MATCHED' END,
                          book_version = (SELECT m.book_version + 1 FROM matches m WHERE m.match_id = p_match)
         WHERE orders.bet_id = p_bet;
        UPDATE matches SET book_version = book_version + 1 WHERE matches.match_id = p_match;
        INSERT INTO events (aggregate_type, aggregate_id, event_type, partition_key, payload, causality_chain)
            VALUES ('Bet', p_bet::text, 'BetCancelled', p_user::text,
                    jsonb_build_object('match_id', p_match, 'bet_id', p_bet, 'user_id', p_user, 'refund', amount,
                        'cancelled_stake', o.stake - o.matched_stake, 'reason', 'REQUESTED'), p_bet);
    END IF;
    INSERT INTO cancels (user_id, idempotent_key, bet_id, match_id, outcome, cancelled_stake, refund, waiting)
        VALUES (p_user, p_key, p_bet, p_match, c.outcome,
                CASE c.outcome WHEN 'ACCEPTED' THEN o.stake - o.matched_stake ELSE 0 END, amount, false);
    RETURN QUERY SELECT c.outcome, p_bet,
                        CASE c.outcome WHEN 'ACCEPTED' THEN o.stake - o.matched_stake ELSE 0 END, amount;
END $$;

-- Roll back the bet that was, or will be, placed under a key. The wallet's lock decides between a bet and its
-- rollback that arrive together. Status: ROLLED_BACK or REPLAYED (there was no such bet; a tombstone makes sure that
-- there never will be), NOTHING (the bet was refused), PLACED (it stands, with its match: cancel it there), or
-- REPLAYED_DIFFERENTLY (the key belongs to a command that is no bet).
CREATE FUNCTION bet_rollback(p_user bigint, p_key text)
RETURNS TABLE (status text, bet uuid, match uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    placed  record;
    refused record;
BEGIN
    PERFORM shards_hold(ARRAY[p_user]);
    PERFORM pg_advisory_xact_lock(p_user);
    SELECT l.bet_id, l.match_id, b.bet_id IS NOT NULL AS is_bet INTO placed
      FROM wallet_ledger l
      LEFT JOIN bets b ON b.shard = l.shard AND b.user_id = l.user_id AND b.bet_id = l.bet_id AND b.seq = l.seq
     WHERE l.shard = (p_user % 100)::smallint AND l.user_id = p_user AND l.idempotent_key = p_key;
    IF FOUND THEN
        RETURN QUERY SELECT CASE WHEN placed.is_bet THEN 'PLACED' ELSE 'REPLAYED_DIFFERENTLY' END,
                            placed.bet_id, placed.match_id;
        RETURN;
    END IF;
    SELECT r.outcome, r.command ->> 'op' AS op INTO refused
      FROM refusals r
     WHERE r.shard = (p_user % 100)::smallint AND r.user_id = p_user AND r.idempotent_key = p_key;
    IF FOUND THEN
        RETURN QUERY SELECT CASE WHEN refused.outcome = 'ROLLED_BACK' THEN 'REPLAYED'
                                 WHEN refused.op = 'bet' THEN 'NOTHING' ELSE 'REPLAYED_DIFFERENTLY' END,
                            NULL::uuid, NULL::uuid;
        RETURN;
    END IF;
    INSERT INTO refusals (shard, user_id, idempotent_key, outcome, command, created_at)
        VALUES ((p_user % 100)::smallint, p_user, p_key, 'ROLLED_BACK', '{"op": "rollback"}', clock_timestamp());
    RETURN QUERY SELECT 'ROLLED_BACK', NULL::uuid, NULL::uuid;
END $$;

-- Sums over a wallet's entries: those of its row in wallet_stats and at most p_limit that follow it. `complete` is
-- false while there are more; asking again goes on from there.
CREATE FUNCTION wallet_statistics(p_user bigint, p_limit integer)
RETURNS TABLE (seq bigint, deposits bigint, deposited bigint, withdrawals bigint, withdrawn bigint, bets bigint,
               staked bigint, payouts bigint, won bigint, refunds bigint, refunded bigint, commission bigint,
               complete boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    known  wallet_stats;
    fresh  wallet_stats;
    shard_ smallint := (p_user % 100)::smallint;
BEGIN
    PERFORM shard_here(shard_);
    SELECT * INTO known FROM wallet_stats w WHERE w.shard = shard_ AND w.user_id = p_user;
    IF NOT FOUND THEN
        known := ROW(shard_, p_user, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)::wallet_stats;
    END IF;
    SELECT shard_, p_user, known.seq + count(*),
           known.deposits + count(*) FILTER (WHERE e.contra = 'EXTERNAL' AND e.type = 'CREDIT'),
           known.deposited + coalesce(sum(e.amount) FILTER (WHERE e.contra = 'EXTERNAL' AND e.type = 'CREDIT'), 0),
           known.withdrawals + count(*) FILTER (WHERE e.contra = 'EXTERNAL' AND e.type = 'DEBIT'),
           known.withdrawn - coalesce(sum(e.amount) FILTER (WHERE e.contra = 'EXTERNAL' AND e.type = 'DEBIT'), 0),
           known.bets + count(*) FILTER (WHERE e.placed),
           known.staked - coalesce(sum(e.amount) FILTER (WHERE e.placed), 0),
           known.payouts + count(*) FILTER (WHERE e.type = 'PAYOUT'),
           known.won + coalesce(sum(e.amount) FILTER (WHERE e.type = 'PAYOUT' OR e.taken_back), 0),
           known.refunds + count(*) FILTER (WHERE e.type = 'REFUND'),
           known.refunded + coalesce(sum(e.amount) FILTER (WHERE e.type = 'REFUND'), 0),
           known.commission - coalesce(sum(e.amount) FILTER (WHERE e.contra = 'HOUSE'), 0)
      INTO fresh
      FROM (SELECT l.type, l.contra, l.amount,
                   l.type = 'DEBIT' AND l.contra = 'ESCROW' AND l.settlement_version IS NULL AS placed,
                   l.type = 'DEBIT' AND l.contra = 'ESCROW' AND l.settlement_version IS NOT NULL AS taken_back
              FROM wallet_ledger l
             WHERE l.shard = shard_ AND l.user_id = p_user AND l.seq > known.seq
             ORDER BY l.seq LIMIT p_limit) e;
    -- A write for every few hundred entries, never one for every read.
    IF fresh.seq >= known.seq + 256 THEN
        INSERT INTO wallet_stats AS w SELECT fresh.*
            ON CONFLICT (shard, user_id) DO UPDATE
           SET seq = excluded.seq, deposits = excluded.deposits, deposited = excluded.deposited,
               withdrawals = excluded.withdrawals, withdrawn = excluded.withdrawn, bets = excluded.bets,
               staked = excluded.staked, payouts = excluded.payouts, won = excluded.won,
               refunds = excluded.refunds, refunded = excluded.refunded, commission = excluded.commission
         WHERE w.seq < excluded.seq;
    END IF;
    RETURN QUERY SELECT fresh.seq, fresh.deposits, fresh.deposited::bigint, fresh.withdrawals, fresh.withdrawn::bigint,
                        fresh.bets, fresh.staked::bigint, fresh.payouts, fresh.won::bigint, fresh.refunds,
                        fresh.refunded::bigint, fresh.commission::bigint,
                        NOT EXISTS (SELECT FROM wallet_ledger l
                                     WHERE l.shard = shard_ AND l.user_id = p_user AND l.seq > fresh.seq);
END $$;

-- Rebuild the next page of a shard's projection from the ledger, in one transaction: readers see the old rows until
-- they see the new ones. `wrong` counts rows that were not what the ledger says at their seq, `last` whether the
-- shard is done.
CREATE FUNCTION projection_rebuild_page(p_shard smallint, p_limit integer)
RETURNS TABLE (rebuilt integer, wrong_rows integer, last boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    r     projection_rebuilds;
    users bigint[];
    upto  bigint;
BEGIN
    PERFORM shard_here(p_shard);
    -- Two rebuilds of one shard take turns.
    SELECT * INTO STRICT r FROM projection_rebuilds b WHERE b.shard = p_shard FOR UPDATE;
    -- From wallet to wallet along the primary key: a wallet costs the same whether it has one entry or a million.
    users := ARRAY(
        WITH RECURSIVE wallet (user_id) AS (
            (SELECT l.user_id FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id > r.after_user
              ORDER BY l.user_id LIMIT 1)
            UNION ALL
            SELECT (SELECT l.user_id FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id > w.user_id
                     ORDER BY l.user_id LIMIT 1)
              FROM wallet w WHERE w.user_id IS NOT NULL)
        SELECT w.user_id FROM wallet w WHERE w.user_id IS NOT NULL LIMIT p_limit);
    last := cardinality(users) < p_limit;
    upto := CASE WHEN last THEN 9223372036854775807 ELSE users[p_limit] END;
    -- Wait for the projector in the order in which it locks. Every statement after this one sees the entries that
    -- the locked rows tell of, so no row can be set back.
    PERFORM FROM wallet_balance_projection p
      WHERE p.shard = p_shard AND p.user_id > r.after_user AND p.user_id <= upto ORDER BY p.user_id FOR UPDATE;
    WITH wrong AS (
        DELETE FROM wallet_balance_projection p
         WHERE p.shard = p_shard AND p.user_id > r.after_user AND p.user_id <= upto
           AND NOT EXISTS (SELECT FROM wallet_ledger l
                            WHERE l.shard = p_shard AND l.user_id = p.user_id AND l.seq = p.seq
                              AND l.balance_snapshot = p.balance)
        RETURNING 1)
    SELECT count(*)::integer INTO wrong_rows FROM wrong;
    IF r.from_zero THEN
        DELETE FROM wallet_balance_projection p
         WHERE p.shard = p_shard AND p.user_id > r.after_user AND p.user_id <= upto;
    END IF;
    INSERT INTO wallet_balance_projection AS p (shard, user_id, balance, seq, updated_at)
    SELECT p_shard, u.user_id, h.balance_snapshot, h.seq, h.created_at
      FROM unnest(users) AS u (user_id)
     CROSS JOIN LATERAL (
          SELECT l.seq, l.balance_snapshot, l.created_at FROM wallet_ledger l
           WHERE l.shard = p_shard AND l.user_id = u.user_id ORDER BY l.seq DESC LIMIT 1) h
     ORDER BY u.user_id
        ON CONFLICT (shard, user_id) DO UPDATE
       SET balance = excluded.balance, seq = excluded.seq, updated_at = excluded.updated_at
     WHERE p.seq < excluded.seq;
    rebuilt := cardinality(users);
    UPDATE projection_rebuilds b
       SET after_user = upto, wallets = b.wallets + rebuilt, wrong = b.wrong + wrong_rows,
           finished_at = CASE WHEN last THEN clock_timestamp() END
     WHERE b.shard = p_shard;
    RETURN NEXT;
END $$;

-- name: grants
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO ledger_auditor;
GRANT SELECT ON wallet_ledger, bets, refusals, matches, orders, settlements, wallet_balance_projection,
    projection_progress TO ledger_api;
GRANT EXECUTE ON FUNCTION ledger_post, ledger_answers, match_create, match_transition, match_resettle, bet_cancel
    TO ledger_api;
GRANT EXECUTE ON FUNCTION bet_rollback, wallet_statistics TO ledger_api;
GRANT SELECT ON shard_routes TO ledger_api, ledger_relay, ledger_matcher, ledger_settler, ledger_projector,
    ledger_reconciler;
GRANT EXECUTE ON FUNCTION shard_here, shards_here TO ledger_api, ledger_settler, ledger_projector, ledger_auditor;
GRANT EXECUTE ON FUNCTION shard_accept, wallet_as_of TO ledger_api;
GRANT SELECT, UPDATE (published_to_kafka, published_at) ON events TO ledger_relay;
GRANT SELECT, UPDATE (complete_at_ms, offsets, broker_losses) ON relay_progress TO ledger_relay;
GRANT SELECT, UPDATE ON matches, orders, cancels TO ledger_matcher;
GRANT SELECT, INSERT ON orders, fills, events TO ledger_matcher;
GRANT SELECT, UPDATE ON matches, orders, settlements TO ledger_settler;
GRANT SELECT, INSERT ON match_transitions TO ledger_settler;
GRANT EXECUTE ON FUNCTION ledger_post, ledger_lock TO ledger_settler;
GRANT SELECT, INSERT, UPDATE ON wallet_balance_projection TO ledger_projector;
GRANT SELECT, UPDATE ON projection_progress TO ledger_projector;
GRANT SELECT ON relay_progress TO ledger_projector;
GRANT SELECT, INSERT, UPDATE ON projection_rebuilds TO ledger_projector;
GRANT EXECUTE ON FUNCTION projection_rebuild_page TO ledger_projector;
