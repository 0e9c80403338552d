"""In: rows of scores, and the cells they compare. Out: results.json, tables, figures and one HTML page."""
