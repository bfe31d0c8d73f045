"""RQ-KMeans, balanced k-means and RQ-VAE: what they minimise falls, and a file gives the same codes again."""

import pytest
import torch

from recllm.errors import UserError
from recllm.semantic_ids import rqkmeans, rqvae
from recllm.semantic_ids.quantizer import Quantizer
from recllm.semantic_ids.report import squared_spread

SMALL = rqvae.RQVAESettings(latent=8, hidden=(32,), epochs=30, batch=256, lr=3e-3)


def clustered(
    items: int = 2000, width: int = 16, clusters: int = 30, noise: float = 0.2, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    label = torch.randint(clusters, (items,), generator=generator)
    return centres[label] + noise * torch.randn(items, width, generator=generator)


def relative_error(quantizer: Quantizer, embeddings: torch.Tensor, codes: torch.Tensor | None = None) -> float:
    codes = rqkmeans.assign(quantizer, embeddings) if codes is None else codes
    return quantizer.squared_error(embeddings, codes) / squared_spread(embeddings)


def test_clear_clusters_are_found():
    embeddings = clustered(noise=0.01)
    quantizer = rqkmeans.fit(embeddings, (30,))
    assert relative_error(quantizer, embeddings) < 0.001  # the noise's share: 0.01² / 1²


def test_each_level_lowers_the_error_and_encode_is_the_nearest_centroid():
    embeddings = clustered()
    quantizer = rqkmeans.fit(embeddings, (16, 16, 16), sample=500)
    codes, left = quantizer.encode(embeddings)
    residual = quantizer.latent(embeddings)  # all 16 dimensions matter here, so nothing is lost
    assert residual.shape == (2000, 16)
    errors = [float(residual.square().sum())]
    for level, codebook in enumerate(quantizer.codebooks):
        nearest = torch.cdist(residual.double(), codebook.double()).argmin(dim=1)
        assert (nearest == codes[:, level]).float().mean() > 0.999  # but for ties in the last bit
        residual = residual - codebook[codes[:, level].long()]
        errors.append(float(residual.square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert torch.allclose(left, residual.square().sum(dim=1), atol=1e-4)
    assert quantizer.squared_error(embeddings, codes) == pytest.approx(errors[-1], rel=1e-4)


def test_centroids_are_the_means_of_their_points():
    embeddings = clustered(items=500)
    points = embeddings - embeddings.mean(dim=0)
    generator = torch.Generator().manual_seed(0)
    codebook, _ = rqkmeans.lloyd(points, rqkmeans.seed_centroids(points, 12, generator), 200, sample=500)
    label, _ = rqkmeans.nearest(points, codebook, torch.zeros(12))
    means = torch.stack([points[label == code].mean(dim=0) for code in range(12)])
    assert torch.allclose(codebook, means, atol=0.05)  # ends when the error changes by less than 1e-5


def test_no_worse_than_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    embeddings = clustered(items=3000, clusters=60, noise=0.5)
    theirs = cluster.KMeans(32, n_init=1, random_state=0).fit(embeddings.numpy()).inertia_ / squared_spread(embeddings)
    assert relative_error(rqkmeans.fit(embeddings, (32,)), embeddings) < 1.01 * theirs


def test_directions_without_variance_change_nothing():
    embeddings = clustered(width=8)
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1))).Q[:8]
    centre, basis = rqkmeans.principal_subspace(embeddings @ rotation, torch.arange(2000))
    assert basis.shape == (40, 8)
    assert torch.allclose(basis.T @ basis, torch.eye(8), atol=1e-5)
    assert torch.allclose(centre, (embeddings @ rotation).mean(dim=0), atol=1e-5)
    errors = [relative_error(rqkmeans.fit(e, (16, 16)), e) for e in (embeddings, embeddings @ rotation)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_samples_lose_little_against_all_points_at_once():
    embeddings = clustered(items=8000, clusters=200, noise=0.5)
    sampled, whole = (rqkmeans.fit(embeddings, (16, 16), sample=sample) for sample in (1000, 8000))
    assert relative_error(sampled, embeddings) < 1.02 * relative_error(whole, embeddings)


def test_a_code_that_nobody_chose_is_moved():
    points = clustered(items=300, clusters=4, noise=0.1)
    start = torch.cat([points[:3], torch.full((1, 16), 1e3)])
    codebook, _ = rqkmeans.lloyd(points, start, 20, sample=300)
    assert len(rqkmeans.nearest(points, codebook, torch.zeros(4))[0].unique()) == 4
    assert codebook.abs().max() < 10


def test_same_seed_same_bytes_and_files_round_trip(tmp_path):
    embeddings = clustered()
    first, second = (rqkmeans.fit(embeddings, (16, 16), seed=3, sample=700) for _ in range(2))
    first.save(tmp_path / "1.safetensors")
    second.save(tmp_path / "2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    loaded = Quantizer.load(tmp_path / "1.safetensors")
    assert loaded.method == "rqkmeans"
    assert (rqkmeans.assign(loaded, embeddings) == rqkmeans.assign(first, embeddings)).all()
    other = rqkmeans.fit(embeddings, (16, 16), seed=4, sample=700)
    assert not torch.equal(other.codebooks[0], first.codebooks[0])


def test_a_long_mean_does_not_drown_the_spread():
    embeddings = clustered()
    error = relative_error(rqkmeans.fit(embeddings, (16, 16)), embeddings)
    shifted = embeddings + 3000.0
    assert relative_error(rqkmeans.fit(shifted, (16, 16)), shifted) == pytest.approx(error, rel=0.1)


def test_fewer_distinct_items_than_codes_make_smaller_levels():
    embeddings = torch.eye(3).repeat(5, 1)
    quantizer = rqkmeans.fit(embeddings, (8, 8))
    assert quantizer.sizes[0] == 3
    assert quantizer.sizes[1] == 1
    assert relative_error(quantizer, embeddings) < 1e-6
    assert rqkmeans.fit(torch.ones(1, 4), (8, 8)).sizes == (1, 1)


def test_balanced_codes_are_used_about_equally():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4000, 8, generator=generator) * torch.rand(4000, 1, generator=generator) ** 2
    plain, balanced = (rqkmeans.fit(embeddings, (16, 16), balanced=flag) for flag in (False, True))
    loads = [
        torch.bincount(rqkmeans.assign(quantizer, embeddings)[:, 0], minlength=16).max() / 250
        for quantizer in (plain, balanced)
    ]
    assert loads[1] < 1.4
    assert loads[1] < 0.7 * loads[0]
    assert relative_error(balanced, embeddings) < 0.8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_embeddings(bad):
    embeddings = clustered(items=50)
    embeddings[17, 3] = bad
    with pytest.raises(UserError, match="row 17"):
        rqkmeans.fit(embeddings, (4,))
    with pytest.raises(UserError, match="shape"):
        rqkmeans.fit(torch.zeros(0, 4), (4,))
    with pytest.raises(UserError, match="do not fit a quantizer of width 16"):
        rqkmeans.assign(rqkmeans.fit(clustered(items=50), (4,)), torch.zeros(2, 5))


def test_files_that_are_no_quantizer(tmp_path):
    path = tmp_path / "quantizer.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        Quantizer.load(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        Quantizer.load(path)


@pytest.fixture(scope="module")
def trained() -> tuple[Quantizer, list[dict], torch.Tensor]:
    embeddings = clustered(items=1500, width=16, noise=0.3)
    quantizer, history = rqvae.fit(embeddings, (8, 8, 8), seed=0, settings=SMALL)
    return quantizer, history, embeddings


def test_rqvae_learns(trained):
    quantizer, history, embeddings = trained
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["relative_error"] < 0.7 * history[0]["relative_error"]
    error = relative_error(quantizer, embeddings)
    assert error == pytest.approx(history[-1]["relative_error"], rel=0.1)  # the exported layers are the trained ones
    random = torch.randint(8, (1500, 3), generator=torch.Generator().manual_seed(1))
    assert error < 0.5 * relative_error(quantizer, embeddings, random)
    assert history[-1]["used"] == [8, 8, 8]


def test_rqvae_is_deterministic_and_leaves_the_global_seed_alone(trained):
    _, history, embeddings = trained
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert rqvae.fit(embeddings, (8, 8, 8), seed=0, settings=SMALL)[1] == history
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rqvae_encodes_the_same_from_a_file(trained, tmp_path):
    quantizer, _, embeddings = trained
    quantizer.save(tmp_path / "q.safetensors")
    loaded = Quantizer.load(tmp_path / "q.safetensors")
    codes = loaded.encode(embeddings)[0]
    assert torch.equal(codes, quantizer.encode(embeddings)[0])
    assert torch.allclose(loaded.decode(codes), quantizer.decode(codes))


def test_straight_through_and_commitment_reach_the_encoder():
    torch.manual_seed(0)
    model = rqvae.RQVAE(4, rqvae.RQVAESettings(latent=2, hidden=(8,)))
    model.codebooks.append(torch.nn.Parameter(torch.randn(3, 2)))
    model.loss(torch.randn(10, 4), 0.25)[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.ndim == 2)


def test_dead_codes_are_revived():
    model = rqvae.RQVAE(4, rqvae.RQVAESettings(latent=2, hidden=(8,)))
    model.codebooks.append(torch.nn.Parameter(torch.tensor([[0.0, 0.0], [99.0, 99.0]])))
    seen = [torch.randn(10, 2)]
    moved = model.revive([torch.tensor([True, False])], seen, torch.Generator().manual_seed(0))
    assert moved == 1
    assert model.codebooks[0][0].tolist() == [0.0, 0.0]
    assert any(torch.equal(model.codebooks[0][1], row) for row in seen[0])
