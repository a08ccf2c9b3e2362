"""Helpers that ship with the package: a pool of gloo ranks, tiny models, priors whose answers are known."""
