"""Applications: where extractors and helpers meet."""
