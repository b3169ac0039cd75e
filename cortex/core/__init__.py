"""What gateway and neuron share: wire structs, dialects, errors, configuration and web plumbing."""
