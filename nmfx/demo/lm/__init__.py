"""`python -m nmfx demo --task lm`: a byte-level GPT, trained on Python's own source.

options.py  the options, and the study that they ask for
text.py     the data: which files, which of them are held out, windows of bytes
model.py    the model, plain torch
training.py the training loop and what it measures
study.py    which runs are made
table.py    what is printed
figure.py   what is drawn
"""
