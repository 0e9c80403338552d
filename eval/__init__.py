"""Checkpoints and files of cells come in; drawn, completed and scored cells, and numbers about them, go out."""
