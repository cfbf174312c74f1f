"""Parts for a run of hybrid_train: an objective, an edit, a hook, a row transform."""
