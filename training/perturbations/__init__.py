"""Vectors of perturbations: names, protein sequences or training controls come in; a table of vectors goes out."""
