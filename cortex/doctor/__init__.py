"""Looks at a host and says what would keep a gateway or neuron from serving, and the remedy."""
