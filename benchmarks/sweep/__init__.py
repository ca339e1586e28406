"""The parts of benchmarks/coverage.py: model builders, checks, runner, table."""
