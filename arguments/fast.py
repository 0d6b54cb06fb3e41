"""For machines without a GPU: few surfels, a narrower network, one perceptual crop of the lips."""

iterations = 4_500
coarse_iterations = 800
batch_size = 2
max_points = 12_000
seed_points = 5_000
sh_degree = 0
net_width = 32
ffn_hidden = 64
xyz_lr = 4e-4
plane_lr = 5e-3
network_lr = 1.5e-3
feature_lr = 5e-3
lambda_perceptual = 0.05
perceptual_on = ("lips",)
densify_from = 200
densify_until = 2_000
checkpoint_interval = 250
frame_code = "embedding"
