"""`python -m nmfx demo`: dense, STE and SR-STE training side by side on a task of two minutes.

    command.py  the options and the steps of the command
    digits.py   the task: data, augmentation, model
    training.py the training loop and what it measures
    study.py    which runs are made, how lambda_W is chosen, how runs use several cores
    table.py    what is printed
    figure.py   what is drawn

Needs the extra `nmfx-torch[demo]`.
"""
