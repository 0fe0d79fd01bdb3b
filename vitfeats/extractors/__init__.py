"""Extractors: one for each kind of network, all with the same call and the same Descriptor."""
