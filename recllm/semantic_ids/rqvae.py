"""RQ-VAE: an autoencoder whose latent is quantised by residuals; codebooks and networks are learnt together.   TIGER

    loss = ‖x − x̂‖² + Σ_h ‖sg(r_h) − C_h[c_h]‖² + β Σ_h ‖r_h − sg(C_h[c_h])‖²        (sg: no gradient)

Differences from RQ-KMeans: 1. codes live in the latent of an encoder; 2. the error counted is that of the decoder.
The decoder sees z + sg(Σ_h C_h[c_h] − z), so its gradient reaches the encoder (straight-through). Codebooks start from
RQ-KMeans on the first latents; a code that no item of a whole epoch chose is moved onto a random residual.
"""

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from recllm.errors import UserError
from recllm.launch import console
from recllm.progress import progress
from recllm.semantic_ids import rqkmeans
from recllm.semantic_ids.quantizer import Quantizer

START = 65_536  # items whose first latents the codebooks start from


@dataclasses.dataclass(frozen=True)
class RQVAESettings:
    latent: int = 64
    hidden: tuple[int, ...] = (512, 256)
    commitment: float = 0.25  # β
    epochs: int = 100
    batch: int = 1024
    lr: float = 1e-3
    early: int = 5  # epochs before the first line that says how it goes

    def __post_init__(self):
        for name in ("latent", "epochs", "batch", "lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} of the RQ-VAE must be positive, not {getattr(self, name)}")


class RQVAE(nn.Module):
    def __init__(self, width: int, settings: RQVAESettings):
        super().__init__()
        widths = (width, *settings.hidden, settings.latent)
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        self.codebooks = nn.ParameterList()  # filled from k-means before training

    def quantise(self, latent: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(B, Z) -> codes (B, L), Σ_h C_h[c_h] (B, Z), and the residual r_h (B, Z) that each level saw."""
        residual, codes, seen = latent, [], []
        for codebook in self.codebooks:
            code = (codebook.square().sum(dim=1) - 2 * residual @ codebook.T).argmin(dim=1)
            codes.append(code)
            seen.append(residual)
            residual = residual - codebook[code].detach()  # a level learns from its own loss alone
        return torch.stack(codes, dim=1), latent - residual, seen

    def loss(self, batch: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Loss, squared error (B,), codes (B, L) and the residuals of each level."""
        latent = self.encoder(batch)
        codes, quantised, seen = self.quantise(latent)
        decoded = self.decoder(latent + (quantised - latent).detach())
        error = (batch - decoded).square().sum(dim=1)  # (B,)
        fit = sum(
            (residual.detach() - codebook[code]).square().sum(dim=1)
            + commitment * (residual - codebook[code].detach()).square().sum(dim=1)
            for residual, codebook, code in zip(seen, self.codebooks, codes.T)
        )
        return (error + fit).mean(), error.detach(), codes, seen

    @torch.no_grad()
    def revive(self, used: list[Tensor], seen: list[Tensor], generator: torch.Generator) -> int:
        """Move codes that nobody used onto random residuals of their level. Returns how many."""
        moved = 0
        for codebook, alive, residual in zip(self.codebooks, used, seen):
            dead = (~alive).nonzero().flatten()
            rows = torch.randint(len(residual), (len(dead),), generator=generator)
            codebook[dead] = residual[rows.to(residual.device)]
            moved += len(dead)
        return moved


def fit(
    embeddings: Tensor,
    sizes: tuple[int, ...],
    seed: int = 0,
    settings: RQVAESettings | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Quantizer, list[dict]]:
    """The trained quantizer, and one dict an epoch: loss, relative error, codes in use. (N, D) -> L of (V_h, Z)

    Deterministic for a seed, on one device with one number of threads.
    """
    rqkmeans.check_embeddings(embeddings)
    settings = settings or RQVAESettings()
    generator = torch.Generator().manual_seed(seed)
    centre = embeddings.mean(dim=0)
    scale = float((embeddings - centre).square().sum(dim=1).mean().sqrt()) or 1.0  # inputs have a mean square of 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RQVAE(embeddings.shape[1], settings)

    def inputs(rows: Tensor) -> Tensor:
        return ((embeddings[rows] - centre) / scale).to(device)

    start = torch.randperm(len(embeddings), generator=generator)[:START]
    with torch.no_grad():
        latent = model.to(device).encoder(inputs(start))
        first = rqkmeans.fit(latent, sizes, seed, iterations=10, device=device)
        ((lift, _),) = first.decoder
        model.codebooks.extend(nn.Parameter(codebook @ lift.T) for codebook in first.codebooks)
        model.encoder[-1].bias -= first.centre  # k-means centred the latents: let the encoder do it
    history = _train(model, inputs, len(embeddings), settings, generator)
    quantizer = Quantizer(
        method="rqvae",
        codebooks=tuple(codebook.detach().cpu() for codebook in model.codebooks),
        centre=centre,
        encoder=_layers(model.encoder, divide_first=scale),
        decoder=_layers(model.decoder, multiply_last=scale),
    )
    return quantizer, history


def _train(model: RQVAE, inputs, count: int, settings: RQVAESettings, generator: torch.Generator) -> list[dict]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    batches = -(-count // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    history = []
    with progress("RQ-VAE", settings.epochs) as advance:
        for epoch in range(1, settings.epochs + 1):
            used = [
                torch.zeros(len(codebook), dtype=torch.bool, device=codebook.device) for codebook in model.codebooks
            ]
            total = error = 0.0
            for rows in torch.randperm(count, generator=generator).split(settings.batch):
                loss, squared, codes, seen = model.loss(inputs(rows), settings.commitment)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(rows)
                error += float(squared.sum())
                for alive, code in zip(used, codes.T):
                    alive[code] = True
            in_use = [int(alive.sum()) for alive in used]
            # Inputs have a mean square of 1, so the mean squared error is relative already.
            history.append({"loss": total / count, "relative_error": error / count, "used": in_use})
            if epoch in (settings.early, settings.epochs):
                console.print(
                    f"RQ-VAE epoch {epoch}: error {error / count:.4f}, codes in use {in_use}", highlight=False
                )
            if epoch < settings.epochs:  # nothing would learn what the last revival moved
                model.revive(used, [residual.detach() for residual in seen], generator)
            advance(1)
    return history


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _layers(network: nn.Sequential, divide_first: float = 1.0, multiply_last: float = 1.0):
    """Weights and biases with the scaling of inputs or outputs folded in."""
    linear = [(part.weight.detach().cpu(), part.bias.detach().cpu()) for part in network if isinstance(part, nn.Linear)]
    linear[0] = (linear[0][0] / divide_first, linear[0][1])
    linear[-1] = (linear[-1][0] * multiply_last, linear[-1][1] * multiply_last)
    return tuple(linear)
