"""nmfx in other people's training loops: a thin module for each, imported when you ask for it.

    nmfx.trainers.hugging_face   a callback for `transformers.Trainer`
    nmfx.trainers.lightning      a callback for `lightning.Trainer`
    nmfx.trainers.accelerate     an object to register with an `accelerate.Accelerator`

None is needed to train: a model that `nmfx.sparsify` returned can be handed to any of them as it
is. They add what a plain model does not ask for: the decay once per optimizer step, schedules of
lambda and pattern, the masks in the logs, and fixed masks and schedules that survive a restart.
"""
