"""Compare generated with real cells: h5ad files or checkpoints in, scores beside the floor and baselines out."""
