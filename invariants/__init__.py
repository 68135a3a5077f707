"""The proof: history and timeline recorders, key fates, anomaly folds, and the verdict of a run."""
