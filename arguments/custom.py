"""The README's default: head at 512 pixels on one GPU."""

batch_size = 16
