"""Fast versions of the definitions in `mask.py` and `packing.py`, equal to them bit for bit."""
