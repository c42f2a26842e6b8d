"""What came out of a run: rows, history, ranking, text."""
