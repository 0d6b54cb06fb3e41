"""The recipe that wins on held-out frames (docs/benchmarks.md), for a head at 512 pixels on one GPU: train.py's own.

Few and fast steps: beyond them the head is learned by heart, and held-out frames get worse.
"""

iterations = 4_800
coarse_iterations = 800
batch_size = 16
xyz_lr = 4e-4
plane_lr = 5e-3
network_lr = 1.5e-3
feature_lr = 5e-3
perceptual_on = ("lips", "square")
densify_from = 100
densify_until = 700
densify_fraction = 0.15
frame_code = "embedding"
