"""The custom operators of nmfx, one file each: schema, fake, autograd, dispatch."""
