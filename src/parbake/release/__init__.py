"""Release: what decides whether a new version stays."""
