"""The folds of the anomaly catalogue, incremental: the same rows fed in pieces give what the whole gives at once.

`ledger` replays entries by wallet, `flow` follows events from the outbox to Kafka, `readmodel` compares balances that
were told with the ledger. Nothing here reads a store; who feeds says in which order rows were read.
"""
