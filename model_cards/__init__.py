"""In: a file of facts, a checkpoint, results.json. Out: the model card, and a page that draws cells."""
