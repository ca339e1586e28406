"""What one layer costs on this machine: shapes seen, candidates, timings, cache, decision."""
