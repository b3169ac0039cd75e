"""Model families: configuration, weights and forward passes."""
