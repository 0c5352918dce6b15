"""Density-peak clustering with nearest neighbours (DPC-kNN), as several video methods use it.

Source    Du, Ding and Jia, "Study on density peaks clustering based on k-nearest neighbors and principal component
          analysis", 2016. Ties go to the lowest index, where published codes add random noise to the densities.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-13
"""Of the longest row's square: what is below it is zero."""


def dpc_knn(rows: Tensor, num_clusters: int, num_neighbours: int) -> tuple[Tensor, Tensor]:
    """The centres (c,) int64, most central first, and the cluster (M,) int64 of each of `rows` (M, D).

    With d_ij = |x_i - x_j| / sqrt(D): density rho_i = exp(-mean of the `num_neighbours` smallest d_ij^2, itself among
    them); delta_i = smallest distance to a denser row, for the densest the largest distance there is. Centres are the
    rows with the largest rho * delta; each row joins the nearest centre. Memory O(M^2 + M D).
    """
    distances = distances_between(rows)
    peaks = density_peaks(distances, num_neighbours)
    centres = torch.sort(peaks, descending=True, stable=True).indices[:num_clusters]
    labels = torch.argmin(distances.index_select(1, centres), dim=1)
    labels[centres] = torch.arange(len(centres), device=rows.device)
    return centres, labels


def density_peaks(distances: Tensor, num_neighbours: int) -> Tensor:
    """(M,) float32: rho * delta of rows with these `distances` (M, M); see `dpc_knn`."""
    nearest = distances.topk(min(num_neighbours, len(distances)), dim=1, largest=False).values
    density = torch.exp(-nearest.square().mean(dim=1))
    return density * _isolation(distances, density)


def distances_between(rows: Tensor) -> Tensor:
    """(M, M) float32: |x_i - x_j| / sqrt(D), exactly 0 for equal rows.

    From products in float64, which lose nothing that float32 would show and take a sixth of the time of differences.
    """
    wide = rows.double()
    products = wide @ wide.T
    lengths = products.diagonal()
    squares = lengths.unsqueeze(0) + lengths.unsqueeze(1) - 2 * products
    longest = torch.where(torch.isfinite(lengths), lengths, 0).max()
    squares = squares.masked_fill_(squares < ROUNDING * longest, 0)
    return squares.div_(rows.shape[1]).sqrt_().float()


def _isolation(distances: Tensor, density: Tensor) -> Tensor:
    order = torch.sort(density, descending=True, stable=True).indices
    rank = torch.argsort(order)
    denser = rank.unsqueeze(0) < rank.unsqueeze(1)
    isolation = distances.masked_fill(~denser, torch.inf).amin(dim=1)
    return torch.where(rank == 0, distances.max(), isolation)
