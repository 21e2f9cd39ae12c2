"""Plans with given marginals."""
