"""fx passes: a graph in, the same graph changed. They know nothing about models."""
