"""Trains the model that ships with the package, which reads signs on photographs."""
