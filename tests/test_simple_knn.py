"""distCUDA2: mean squared distance to the three nearest neighbours."""

import sys
from pathlib import Path

import pytest
import torch
from simple_knn import distCUDA2


def test_it_equals_the_brute_force_distances():
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    brute = torch.cdist(points, points).square().sort(1).values[:, 1:4].mean(1)
    torch.testing.assert_close(distCUDA2(points), brute)
    single = distCUDA2(points.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, brute.float(), rtol=1e-4, atol=1e-7)


def test_duplicates_count_as_neighbours_at_no_distance():
    points = torch.zeros(9, 3)
    points[5:] = torch.tensor([1.0, 0, 0])
    assert (distCUDA2(points) == 0).all()
    pair = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0]])
    torch.testing.assert_close(distCUDA2(pair), torch.tensor([5 / 3, 5 / 3, 1.0, 3.0]))


def test_the_import_path_of_gaussian_splatting_code_works():
    from simple_knn._C import distCUDA2 as other

    assert other is distCUDA2


@pytest.mark.parametrize(
    "points, message",
    [
        (torch.zeros(3, 3), "at least 4 points"),
        (torch.zeros(10, 2), r"shape \(N, 3\)"),
        (torch.zeros(10, 3, dtype=torch.int64), "floating-point"),
        ([[0, 0, 0]], "floating-point tensor"),
        (torch.full((5, 3), float("nan")), "NaN or infinity"),
    ],
)
def test_bad_points_are_refused_with_the_reason(points, message):
    with pytest.raises(ValueError, match=message):
        distCUDA2(points)


@pytest.fixture(scope="module")
def cuda_kernel(tmp_path_factory):
    """The CUDA kernel on the host (tests/cuda_emulation): points -> mean squared distances."""
    sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
    import build_for_host as build

    cuda = pytest.importorskip("simple_knn.cuda", reason="the installed simple-knn is older than the sources: reinstall it")
    if build.compiler() is None:
        pytest.skip("needs g++ to compile the CUDA kernel for the host")
    target = tmp_path_factory.mktemp("emulation") / "libknn_cuda.so"
    build.compile_for_the_host(build.KNN, target)
    return lambda points: cuda.mean_squared_distance(points, cuda.load(target), 0)


@pytest.mark.parametrize("count", [4, 5, 33, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cuda_kernel_equals_the_k_d_tree(count, dtype, cuda_kernel):
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)
    points[: count // 2] *= 0.01  # clusters
    torch.testing.assert_close(cuda_kernel(points), distCUDA2(points), rtol=1e-5, atol=0)


def test_the_cuda_kernel_counts_duplicates_and_takes_flat_clouds(cuda_kernel):
    points = torch.zeros(70, 3)
    points[:60, 0] = torch.arange(60)
    torch.testing.assert_close(cuda_kernel(points), distCUDA2(points))
