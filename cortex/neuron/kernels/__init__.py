"""Operators: one wrapper per kernel name with a plain-torch reference beside it."""
