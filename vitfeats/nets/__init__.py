"""Trainable networks on plain tensors. They know nothing of descriptors or extractors."""
