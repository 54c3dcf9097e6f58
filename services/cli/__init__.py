"""The `keepwarm` command: thin, one module per verb."""
