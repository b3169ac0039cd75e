"""Fuzzing: a few rounds in the tests, many by hand."""
