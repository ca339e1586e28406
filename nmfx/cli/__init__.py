"""`python -m nmfx`: one file per command, over safetensors files and over this machine.

    weights.py   which tensors of a file are weights of layers, without the model
    output.py    tables for people, JSON for programs
    report.py    check.py    convert.py    bench.py    doctor.py

The command `demo` is in `nmfx/demo/`.
"""
