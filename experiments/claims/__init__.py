"""The claims on these networks, one launcher each: `python -m experiments.claims.NAME`."""
