"""The README's default: head at 512 pixels on one GPU."""

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
