"""Batch files: rows of a file -> answers in a file. A killed run goes on where it stopped."""
