-- Functions of the write path. Owned by the schema's owner and SECURITY DEFINER: the service's roles may call
-- them but cannot write the tables behind them any other way.

-- name: functions
-- Post a batch of commands, all of wallets this server holds, in one transaction. Arrays run in parallel, one
-- element a command. Returns one row a command: its status (ACCEPTED, REPLAYED, a refusal, or NOT_HERE for a wallet
-- whose shard is being moved or is on another server: nothing happened to it) and, when accepted, the entry's seq and the balance after it. The caller never puts one (user, key) twice into one batch.
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
    p_command     text[],
    p_traceparent text[]
) RETURNS TABLE (command_no integer, status text, entry_seq bigint, entry_balance bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    wallets      bigint[];
    slots        integer[];
    head_seq     bigint[];
    head_balance bigint[];
    known        boolean[];
    statuses     text[] := array_fill(NULL::text, ARRAY[cardinality(p_user)]);
    seqs         bigint[] := array_fill(NULL::bigint, ARRAY[cardinality(p_user)]);
    balances     bigint[] := array_fill(NULL::bigint, ARRAY[cardinality(p_user)]);
    posted_at    timestamptz;
    slot         integer;
    shards       integer[];
    held         integer[];
    accepted     integer := 0;
    refused      integer := 0;
BEGIN
    -- A shard that is being moved is locked by its mover, and one that was moved is not here: its commands are not
    -- decided, not even refused, and their status is NOT_HERE. Neither lock waits, so that no other wallet does. The
    -- second statement begins under the locks: it sees a move that ended just before.
    shards := ARRAY(SELECT DISTINCT (u % 100)::integer FROM unnest(p_user) AS u);
    held := ARRAY(SELECT s FROM unnest(shards) AS s WHERE pg_try_advisory_xact_lock_shared(9, s));
    held := ARRAY(SELECT r.shard::integer FROM shard_routes r WHERE r.here AND r.shard = ANY (held));

    -- Lock the wallets in ascending order, so that no two batches can wait for each other.
    wallets := ARRAY(SELECT DISTINCT u FROM unnest(p_user) AS u ORDER BY u);
    PERFORM pg_advisory_xact_lock(u) FROM unnest(wallets) AS u;

    -- Only a statement begun after the locks were granted sees what the previous holders committed.
    SELECT array_agg(coalesce(h.seq, 0) ORDER BY w.slot), array_agg(coalesce(h.balance_snapshot, 0) ORDER BY w.slot)
      INTO head_seq, head_balance
      FROM unnest(wallets) WITH ORDINALITY AS w (user_id, slot)
      LEFT JOIN LATERAL (
          SELECT l.seq, l.balance_snapshot FROM wallet_ledger l
           WHERE l.shard = (w.user_id % 100)::smallint AND l.user_id = w.user_id
           ORDER BY l.seq DESC LIMIT 1) h ON true;
    SELECT array_agg(w.slot ORDER BY c.no),
           array_agg(EXISTS (SELECT FROM wallet_ledger l
                              WHERE l.shard = (c.user_id % 100)::smallint AND l.user_id = c.user_id
                                AND l.idempotent_key = c.key)
                  OR EXISTS (SELECT FROM refusals r
                              WHERE r.shard = (c.user_id % 100)::smallint AND r.user_id = c.user_id
                                AND r.idempotent_key = c.key)
                     ORDER BY c.no)
      INTO slots, known
      FROM unnest(p_user, p_key) WITH ORDINALITY AS c (user_id, key, no)
      JOIN unnest(wallets) WITH ORDINALITY AS w (user_id, slot) USING (user_id);

    -- Decide one command after the other: a command sees the funds that those before it left.
    FOR i IN 1 .. cardinality(p_user) LOOP
        slot := slots[i];
        IF cardinality(held) < cardinality(shards) AND NOT (p_user[i] % 100)::integer = ANY (held) THEN
            statuses[i] := 'NOT_HERE';
        ELSIF known[i] THEN
            statuses[i] := 'REPLAYED';
        ELSIF p_refusal[i] IS NOT NULL THEN
            statuses[i] := p_refusal[i];
            refused := refused + 1;
        ELSIF head_balance[slot] + p_amount[i] < 0 THEN
            statuses[i] := 'INSUFFICIENT_FUNDS';
            refused := refused + 1;
        ELSE
            head_seq[slot] := head_seq[slot] + 1;
            head_balance[slot] := head_balance[slot] + p_amount[i];
            statuses[i] := 'ACCEPTED';
            seqs[i] := head_seq[slot];
            balances[i] := head_balance[slot];
            accepted := accepted + 1;
        END IF;
    END LOOP;

    posted_at := clock_timestamp();
    IF accepted > 0 THEN
        INSERT INTO wallet_ledger (shard, user_id, seq, type, amount, contra, match_id, bet_id, settlement_version,
                                   balance_snapshot, idempotent_key, created_by, created_at)
        SELECT (c.user_id % 100)::smallint, c.user_id, c.seq, c.type, c.amount, c.contra, c.match_id, c.bet_id,
               c.version, c.balance, c.key, p_created_by, posted_at
          FROM unnest(p_user, seqs, p_type, p_amount, p_contra, p_match, p_bet, p_version, balances, p_key, statuses)
               AS c (user_id, seq, type, amount, contra, match_id, bet_id, version, balance, key, status)
         WHERE c.status = 'ACCEPTED';
        INSERT INTO bets (shard, user_id, bet_id, seq, match_id, outcome, side, odds, stake, reserve, placed_at)
        SELECT (c.user_id % 100)::smallint, c.user_id, c.bet_id, c.seq, c.match_id, c.outcome, c.side, c.odds,
               c.stake, -c.amount, posted_at
          FROM unnest(p_user, p_bet, seqs, p_match, p_outcome, p_side, p_odds, p_stake, p_amount, statuses)
               AS c (user_id, bet_id, seq, match_id, outcome, side, odds, stake, amount, status)
         WHERE c.status = 'ACCEPTED' AND c.side IS NOT NULL;
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
                      p_side, p_odds, p_stake, p_traceparent, statuses) WITH ORDINALITY
               AS c (user_id, seq, type, amount, contra, match_id, bet_id, version, balance, outcome, side, odds,
                     stake, traceparent, status, no)
         WHERE c.status = 'ACCEPTED'
         ORDER BY c.no;
    END IF;
    IF refused > 0 THEN
        INSERT INTO refusals (shard, user_id, idempotent_key, outcome, command, created_at)
        SELECT (c.user_id % 100)::smallint, c.user_id, c.key, c.status, c.command::jsonb, posted_at
          FROM unnest(p_user, p_key, statuses, p_command) AS c (user_id, key, status, command)
         WHERE c.status NOT IN ('ACCEPTED', 'REPLAYED', 'NOT_HERE');
    END IF;
    RETURN QUERY SELECT c.no::integer, c.status, c.seq, c.balance
                   FROM unnest(statuses, seqs, balances) WITH ORDINALITY AS c (status, seq, balance, no);
END $$;

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
      LEFT JOIN wallet_ledger l
        ON l.shard = (c.user_id % 100)::smallint AND l.user_id = c.user_id AND l.idempotent_key = c.key
      LEFT JOIN bets b ON b.shard = l.shard AND b.user_id = l.user_id AND b.bet_id = l.bet_id AND b.seq = l.seq
      LEFT JOIN refusals r
        ON r.shard = (c.user_id % 100)::smallint AND r.user_id = c.user_id AND r.idempotent_key = c.key
$$;

-- True, or the error LP001: a read of a wallet whose shard is not here must not look like a wallet without entries.
-- It stands first in the WHERE of every such read; being STABLE, it is asked once, before a row is looked for.
CREATE FUNCTION shard_here(p_shard smallint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM shard_routes r WHERE r.shard = p_shard AND r.here) THEN
        RAISE EXCEPTION 'shard % is not on this server', p_shard USING ERRCODE = 'LP001';
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
        RAISE EXCEPTION 'shard % is not on this server', missing USING ERRCODE = 'LP001';
    END IF;
    RETURN true;
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
    SELECT min(l.seq), max(l.seq) INTO first_seq, high
      FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id = p_user;
    seq := 0;
    balance := 0;
    WHILE low < coalesce(high, 0) LOOP
        half := (low + high + 1) / 2;
        SELECT (extract(epoch FROM l.created_at) * 1000)::bigint INTO at_ms
          FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id = p_user AND l.seq = half;
        IF at_ms <= p_at_ms THEN
            low := half;
        ELSE
            high := half - 1;
        END IF;
    END LOOP;
    IF low > 0 THEN
        SELECT l.seq, l.balance_snapshot, (extract(epoch FROM l.created_at) * 1000)::bigint
          INTO seq, balance, updated_at_ms
          FROM wallet_ledger l WHERE l.shard = p_shard AND l.user_id = p_user AND l.seq = low;
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
BEGIN
    SELECT * INTO m FROM matches WHERE match_id = p_match FOR UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'UNKNOWN_MATCH', NULL::text, NULL::text;
        RETURN;
    END IF;
    IF m.state = p_to OR (p_to = 'CLOSED' AND m.state IN ('SETTLING', 'SETTLED'))
       OR (p_to = 'SETTLING' AND m.state = 'SETTLED') THEN
        RETURN QUERY SELECT
            CASE WHEN p_to = 'SETTLING' AND m.result <> p_result THEN 'REPLAYED_DIFFERENTLY' ELSE 'REPLAYED' END,
            m.state, CASE WHEN p_to = 'SETTLING' AND m.result <> p_result THEN 'result' END;
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

-- name: grants
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO ledger_auditor;
GRANT SELECT ON shard_routes TO ledger_api, ledger_relay, ledger_matcher, ledger_settler, ledger_projector;
GRANT EXECUTE ON FUNCTION shard_here, shards_here TO ledger_api, ledger_settler, ledger_projector, ledger_auditor;
GRANT EXECUTE ON FUNCTION shard_accept, wallet_as_of TO ledger_api;
GRANT SELECT ON wallet_ledger, bets, refusals, matches, orders, settlements, wallet_balance_projection TO ledger_api;
GRANT EXECUTE ON FUNCTION ledger_post, ledger_answers, match_create, match_transition, bet_cancel TO ledger_api;
GRANT SELECT, UPDATE (published_to_kafka, published_at) ON events TO ledger_relay;
GRANT SELECT, UPDATE ON matches, orders, cancels TO ledger_matcher;
GRANT SELECT, INSERT ON orders, fills, events TO ledger_matcher;
GRANT SELECT, UPDATE ON matches, orders, settlements TO ledger_settler;
GRANT SELECT, INSERT ON match_transitions TO ledger_settler;
GRANT EXECUTE ON FUNCTION ledger_post TO ledger_settler;
GRANT SELECT, INSERT, UPDATE ON wallet_balance_projection TO ledger_projector;
