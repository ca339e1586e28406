"""`python -m nmfx demo`: dense, STE and SR-STE training side by side on tasks of minutes.

    command.py  the options and the steps of the command
    digits.py   the task: data, augmentation, model
    training.py the training loop and what it measures
    study.py    which runs are made, how lambda_W is chosen
    table.py    what is printed
    figure.py   what is drawn
    lm/         the same files for the task `--task lm`, a byte-level GPT

and what both tasks share:

    arguments.py values of options, checked as they are read
    meter.py    what is measured around a training loop: masks, packing
    rows.py     methods, and how their numbers are written
    numbers.py  the same numbers for `--json`
    drawing.py  the picture of two panels
    workers.py  how runs use several cores

Needs the extra `nmfx-torch[demo]`.
"""
