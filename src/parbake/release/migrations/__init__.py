"""The schema of the state store, step by step."""
