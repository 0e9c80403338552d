"""In: an h5ad file. Out: a study of many trainings: rows and tables."""
