"""Fits the transform of a cut: features → coefficients that are each worth the same to the answer (docs/codec.md).

Three linear steps. A cosine transform over rows and columns parts smooth from rough; its coefficients fall into bands
of like roughness. In each band the channels are turned to the principal components of the features in the metric of
the answer: with G the second moment of the answer's sensitivity (export.sensitivity) and x the features of the band,
the components of G^(1/2) x. An error of one step in any coefficient then costs the same, to second order in nats of
Kullback-Leibler divergence, so one step serves all (the classical argument for transform coding: Goyal, "Theoretical
foundations of transform coding", IEEE SPM 2001; the metric: Fisher information, as in "natural" coordinates of Amari).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.graph import Shape

BAND_EDGES = (1, 2, 4, 8, 14, 28)  # of row frequency + column frequency
# Of a band's own second moment; the rest is that of all bands together, of which there are more samples.
OWN_RATIO = 0.7
LEAST_RATIO = 1e-3  # of the largest sensitivity: no direction is taken for worth nothing
MAX_EXTRA = 2  # tokens before a square of patches: class and distillation

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the positions of features lie: `extra` tokens first, then rows x columns, row by row."""

    extra: int
    rows: int
    columns: int
    channels: int
    bands: NDArray[np.int64]  # (positions,): the band of each frequency; each extra token is one of its own

    @property
    def positions(self) -> int:
        """How many vectors of channels there are."""
        return self.extra + self.rows * self.columns

    @property
    def by_band(self) -> NDArray[np.int64]:
        """The positions in the order of their bands."""
        return np.argsort(self.bands, kind="stable")

    @property
    def band_sizes(self) -> list[int]:
        """Positions of each band."""
        return [int(size) for size in np.bincount(self.bands)]


def layout_of(shape: Shape) -> Layout:
    """The layout of features as they travel: (height, width, channels), (tokens, channels) or (channels,).

    Tokens of a square picture are laid out as the square, one or two tokens before it stand apart; other tokens are
    taken as a row.
    """
    if len(shape) == 3:
        extra, rows, columns = 0, shape[0], shape[1]
    elif len(shape) == 2:
        side = math.isqrt(shape[0])
        extra = shape[0] - side * side
        rows, columns = side, side
        if extra > MAX_EXTRA or side < 2:
            extra, rows, columns = 0, 1, shape[0]
    else:
        extra, rows, columns = 0, 1, 1
    frequency = np.add.outer(np.arange(rows), np.arange(columns)).reshape(-1)
    bands = np.searchsorted(BAND_EDGES, frequency, side="right") + extra
    _, bands = np.unique(np.concatenate([np.arange(extra), bands]), return_inverse=True)
    return Layout(extra, rows, columns, shape[-1], bands.astype(np.int64))


def cosines(count: int) -> Array:
    """The orthonormal DCT-II matrix: (frequencies, places)."""
    frequency, place = np.arange(count)[:, np.newaxis], np.arange(count)[np.newaxis]
    matrix = np.sqrt(2 / count) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * count))
    matrix[0] /= np.sqrt(2)
    cosine: Array = matrix.astype(np.float32)
    return cosine


def spectrum(features: Array, layout: Layout) -> Array:
    """Features (frames, positions, channels) by frequency instead of by place; extra tokens stay as they are."""
    grid = features[:, layout.extra :].reshape(-1, layout.rows, layout.columns, layout.channels)
    turned = np.einsum("uh,nhwc->nuwc", cosines(layout.rows), grid, optimize=True)
    turned = np.einsum("vw,nuwc->nuvc", cosines(layout.columns), turned, optimize=True)
    rest = turned.reshape(len(features), -1, layout.channels)
    return np.concatenate([features[:, : layout.extra], rest], axis=1)


def place(spectra: Array, layout: Layout) -> Array:
    """The way back from `spectrum`."""
    grid = spectra[:, layout.extra :].reshape(-1, layout.rows, layout.columns, layout.channels)
    turned = np.einsum("uh,nuvc->nhvc", cosines(layout.rows), grid, optimize=True)
    turned = np.einsum("vw,nhvc->nhwc", cosines(layout.columns), turned, optimize=True)
    rest = turned.reshape(len(spectra), -1, layout.channels)
    return np.concatenate([spectra[:, : layout.extra], rest], axis=1)


@dataclass(frozen=True, slots=True)
class Transform:
    """A fitted transform: coefficients = (spectrum - centre) @ forward[band], in the order of their spread."""

    layout: Layout
    forward: Array  # (bands, channels, channels)
    backward: Array  # (bands, channels, channels), its inverse, or what refinement made of that
    centre: Array  # (positions, channels): the mean spectrum
    order: NDArray[np.int64]  # (n,): places by band, position and component, widest spread first

    def analyse(self, features: Array) -> Array:
        """Features (frames, positions, channels) as coefficients (frames, n); what the encoder's graph computes."""
        return _turn(spectrum(features, self.layout) - self.centre, self.forward, self.layout)[:, self.order]

    def synthesize(self, coefficients: Array) -> Array:
        """Coefficients (frames, n) as features (frames, positions, channels); what the decoder's graph computes."""
        by_band = np.empty_like(coefficients)
        by_band[:, self.order] = coefficients
        spectra = np.empty((len(coefficients), self.layout.positions, self.layout.channels), np.float32)
        start = 0
        for band, size in enumerate(self.layout.band_sizes):
            end = start + size * self.layout.channels
            part = by_band[:, start:end].reshape(-1, size, self.layout.channels)
            spectra[:, self.layout.bands == band] = part @ self.backward[band]
            start = end
        return place(spectra + self.centre, self.layout)


def fit(features: Array, sensitivity: Array, layout: Layout) -> Transform:
    """Fit a transform.

    Args:
        features: (frames, positions, channels), as they stand on the wire, in numbers of the source model.
        sensitivity: (bands, channels, channels), the mean over the positions of a band of the second moment of the
            gradient of the log-likelihood with respect to the spectrum.
        layout: of the features.
    """
    spectra = spectrum(features, layout)
    sizes = np.array(layout.band_sizes, np.float64)
    overall = np.tensordot(sizes, sensitivity.astype(np.float64), 1) / sizes.sum()
    overall /= max(float(np.trace(overall)), np.finfo(np.float64).tiny)
    average = spectra.mean(axis=0)
    forward = np.empty((len(sizes), layout.channels, layout.channels), np.float32)
    backward = np.empty_like(forward)
    for band in range(len(sizes)):
        own = sensitivity[band].astype(np.float64)
        # A band that no probe has moved the answer by is worth something all the same.
        trace = max(float(np.trace(own)), LEAST_RATIO * float(np.trace(sensitivity.mean(axis=0))))
        metric = OWN_RATIO * own + (1 - OWN_RATIO) * overall * trace
        values, vectors = np.linalg.eigh((metric + metric.T) / 2)
        roots = np.sqrt(np.maximum(values, max(values.max() * LEAST_RATIO, np.finfo(np.float64).tiny)))
        root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
        rows = layout.bands == band
        weighed = ((spectra[:, rows] - average[rows]).reshape(-1, layout.channels)) @ root
        _, components = np.linalg.eigh(weighed.T @ weighed)
        components = components[:, ::-1]
        forward[band] = root @ components
        backward[band] = components.T @ inverse
    return settle(layout, forward, backward, spectra)


def settle(layout: Layout, forward: Array, backward: Array, spectra: Array) -> Transform:
    """Put the coefficients of given matrices in order, by the spectra (frames, positions, channels) of the frames."""
    centre = spectra.mean(axis=0)
    spread = np.abs(_turn(spectra - centre, forward, layout)).mean(axis=0)
    return Transform(layout, forward, backward, centre, np.argsort(-spread, kind="stable"))


def _turn(spectra: Array, forward: Array, layout: Layout) -> Array:
    parts = [spectra[:, layout.bands == band] @ forward[band] for band in range(len(forward))]
    return np.concatenate([part.reshape(len(spectra), -1) for part in parts], axis=1)
