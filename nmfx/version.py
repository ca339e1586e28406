"""The version, in a module that imports nothing."""

NMFX = "0.1.0.dev0"
