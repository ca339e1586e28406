"""ONNX files as `nmfx.check_onnx` reads them; the onnx package is imported when it is needed.

reading.py     the file, checked; its graphs, with their functions inlined
constants.py   what a name of a graph holds, through all that can be computed ahead
operands.py    which input of an operator is its weight, and the axis it is summed over
"""
