"""The catalogue: one row of data for each model, and the loaders that turn a row into a network."""
