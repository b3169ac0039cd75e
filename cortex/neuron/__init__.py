"""The neuron: one daemon per GPU host that loads, serves and unloads models."""
