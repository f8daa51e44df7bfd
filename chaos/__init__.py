"""Break a running server on purpose, and hold what its callers see against what is promised."""
