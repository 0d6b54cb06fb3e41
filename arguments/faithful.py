"""The published recipe (GaussianTalker and SyncTalk, read at lineage.md 3 and 4) as far as our settings express it.

Where it departs. Surfels: their opacity starts at 0.5, not 0.1, their colour at the face's own, not mid-grey, and they lie along
its surface, not along an axis; all SH degrees learn from the first step, where the published one rises by one every 1000; they
grow by rank, not by a threshold of their gradient. Network: in the coarse stage the decoder of the tri-plane is added to stored
opacity and colour, where the published one overwrites them; the last layers of the heads start at zero; the planes span the
silhouettes of the part, not the first points; the frame code takes the place of the null token (lineage.md 6.1). Rates are not
scaled by the camera's extent (lineage.md 2.6), and fall over the length of a stage. Losses: what lies behind the head is a random
colour a frame, not the torso; the mask is compared with alpha, whose gradient exists; the perceptual distance is ST-LPIPS, not
VGG-16 features.
"""

coarse_iterations = 8_000  # published: 7999 and batch 1; ours is a quarter of batch_size
iterations = 18_000
batch_size = 32
sh_degree = 3
seed_points = 0  # published: the 34 650 vertices of the face model alone
max_points = 50_000
xyz_lr = 1.6e-4
plane_lr = 1.6e-3
network_lr = 1e-4
feature_lr = 2.5e-3
opacity_lr = 0.05
scaling_lr = 5e-3
rotation_lr = 1e-3
lambda_ssim = 0.2
lambda_lips = 0.4
lambda_eyes = 0.0
lambda_mask = 0.4
lambda_perceptual = 0.01
perceptual_net = "vgg"
perceptual_on = ("window",)
lambda_attention = 1e-4  # SyncTalk's weight, on its own quantity
densify_from = 1_000
densify_until = 7_000
densify_interval = 100
min_opacity = 0.005
plane_resolution = 64
plane_multires = (1, 2)
plane_channels = 32
tokens = ("audio", "expression", "camera", "frame")
heads = 2
layers = 1
ffn_hidden = 128
net_width = 128
dropout = 0.2
condition_noise = 0.0
blink_share = 0.0
