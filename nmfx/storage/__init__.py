"""Files: what a model is besides its tensors, written down, checked and put back."""
