"""Stand in for the runtime that ais_bench loads."""
