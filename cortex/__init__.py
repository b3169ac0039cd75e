"""Cortex: one LLM service over a few mismatched GPU hosts."""
