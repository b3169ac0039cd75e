"""The gateway: one OpenAI and Anthropic API for the fleet; routes, cold-loads, evicts, meters."""
