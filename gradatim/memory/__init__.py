"""Memory that takes part in the next token's distribution, before any weight has changed."""
