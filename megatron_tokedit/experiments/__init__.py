"""Experiments that drive the other rooms: the theory of model collapse in linear regression."""
