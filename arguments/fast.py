"""For machines without a GPU: at most 20k surfels, a narrower network, one perceptual crop of the lips."""

iterations = 5_000
coarse_iterations = 1_200
batch_size = 4
max_points = 16_000
seed_points = 5_000
sh_degree = 0
net_width = 32
ffn_hidden = 64
xyz_lr = 4e-4
plane_lr = 5e-3
network_lr = 1.5e-3
feature_lr = 5e-3
lambda_perceptual = 0.05
perceptual_lips_only = True
densify_from = 200
densify_until = 3_000
checkpoint_interval = 250
