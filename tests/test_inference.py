"""The deformation for rendering gives what the trained one gives, and draws nothing from the layout it computes in."""

import argparse

import pytest
import torch
from test_model import cloud, conditions

import arguments
import scene.inference
from scene import TalkingHead, embedding_width
from scene.gaussian_model import GaussianModel

NAMES = ("xyz", "scaling", "rotation", "opacity", "sh", "attention")


def head(layers=1, degree=1, count=203, **settings):
    """A head whose every layer does something; `count` is no multiple of a piece."""
    small = {"plane_resolution": 8, "plane_channels": 8, "net_width": 16, "ffn_hidden": 24} | settings | settings
    config = arguments.merge(argparse.Namespace(sh_degree=degree, layers=layers, **small))
    config.audio_features, config.frames = 12, 30
    torch.manual_seed(1)
    made = TalkingHead(config, GaussianModel.from_points(cloud(count), degree, embedding_width(config)))
    for parameter in made.deformation.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize(
    "layers, degree, settings",
    [(1, 0, {}), (2, 1, {"surfel_features": "embedding"}), (1, 1, {"surfel_features": "both", "deform": ("xyz", "opacity")})],
)
def test_the_frozen_head_deforms_as_the_trained_one_does(monkeypatch, layers, degree, settings):
    made, driving = head(layers, degree, **settings), conditions(batch=3)
    monkeypatch.setattr(scene.inference, "ROWS", 150)  # 50 surfels a piece and a rest
    with torch.no_grad():
        expected = made.eval()(driving)  # in training, noise on the conditions
        frozen = made.freeze()(driving)
    for name in NAMES:
        a, b = getattr(frozen, name), getattr(expected, name)
        assert a.shape == b.shape and len(a) == (3 if name in settings.get("deform", NAMES) or name == "attention" else 1), name
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4, msg=name)
    assert expected.xyz.std(0).max() > 1e-3  # the frames do differ


def test_a_frame_does_not_depend_on_the_batch_it_is_drawn_in():
    made = head().freeze()
    batch = conditions(batch=4)
    alone = type(batch)(*(getattr(batch, name)[2:3] for name in ("audio", "expression", "view", "intrinsics", "frame")))
    for name in NAMES:
        torch.testing.assert_close(getattr(made(batch), name)[2:3], getattr(made(alone), name), atol=1e-5, rtol=1e-5)
