"""The `keepwarm` command: thin, one module a verb."""
