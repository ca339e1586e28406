"""Modules to graphs and back: where sparsified weights live inside other people's models."""
