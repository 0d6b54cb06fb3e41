"""Backdrops on the device are the ones of the disk, read once where they may stay; frames come down unchanged."""

import numpy as np
import torch

from gaussian_renderer.transfer import DeviceBackdrops, Download


class Disk:
    """Pictures that show their own id, and what was read."""

    def __init__(self):
        self.read = []

    def batch(self, ids):
        self.read += ids
        return np.stack([np.full((2, 3, 3), i, np.uint8) for i in ids])


def shown(held, ids):
    return held.batch(ids, held.decode(ids))[:, 0, 0, 0].tolist()


def test_a_cpu_reads_every_backdrop_when_it_is_needed():
    disk = Disk()
    held = DeviceBackdrops(disk, torch.device("cpu"))
    assert shown(held, [4, 5, 6]) == [4, 5, 6] and shown(held, [6, 5]) == [6, 5]
    assert disk.read == [4, 5, 6, 6, 5]


def test_what_fits_is_read_once_however_the_path_turns():
    disk = Disk()
    held = DeviceBackdrops(disk, torch.device("cpu"))
    held._budget = 3 * 2 * 3 * 3  # as a GPU with room for three pictures
    assert shown(held, [4, 5, 5, 4]) == [4, 5, 5, 4] and disk.read == [4, 5]
    assert shown(held, [6, 7, 4]) == [6, 7, 4] and disk.read == [4, 5, 6, 7]
    assert shown(held, [7, 6, 5]) == [7, 6, 5] and disk.read == [4, 5, 6, 7, 7]  # 7 found no room
    assert held._budget == 0


def test_a_batch_decoded_before_its_neighbour_was_held_is_right_all_the_same():
    held = DeviceBackdrops(Disk(), torch.device("cpu"))
    held._budget = 10**6
    ahead = held.decode([1, 2]), held.decode([2, 1])  # prefetch threads run ahead of the drawing
    assert held.batch([1, 2], ahead[0])[:, 0, 0, 0].tolist() == [1, 2]
    assert held.batch([2, 1], ahead[1])[:, 0, 0, 0].tolist() == [2, 1]
    assert held._budget == 10**6 - 2 * 18


def test_what_is_drawn_comes_to_the_host_as_it_is():
    frames = torch.arange(24, dtype=torch.uint8).view(2, 4, 3)
    there, maps = Download(frames, frames[:, :2]).arrays()
    np.testing.assert_array_equal(there, frames.numpy())
    np.testing.assert_array_equal(maps, frames[:, :2].numpy())
