"""Parts of the loop in `training/train.py`: shards and options come in; a checkpoint, states and a log go out."""
