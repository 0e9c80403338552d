"""A checkpoint and a file of cells or options come in; cells drawn by the checkpoint go out, chunk by chunk."""
