"""From measurements and a deepinv physics to the data term that knows most about it."""

from __future__ import annotations

import deepinv
import torch
from deepinv.physics import MRI, Blur, BlurFFT, Denoising, Inpainting, LinearPhysics
from torch import Tensor

from bilevel_imaging.energies.circulant import CirculantTerm, circular_response
from bilevel_imaging.energies.data_terms import DataTerm, IdentityTerm, MaskTerm
from bilevel_imaging.energies.generic import generic_term
from bilevel_imaging.energies.mri import MRITerm
from bilevel_imaging.tensors import all_finite

# measured where the image lives, in 4 dimensions
IMAGE_TO_IMAGE = (Denoising, Inpainting, Blur, BlurFFT, MRI)


def data_term(y: Tensor, physics: deepinv.physics.Physics) -> DataTerm:
    """The least-squares term for y and physics: exact spectra for the operators that have one.

    Raises:
        ValueError: if the physics is not linear or has a mask or filter that is not real and finite, or y does not have
            the shape that the physics gives.
    """
    kind = type(physics)
    if kind in IMAGE_TO_IMAGE and y.dim() != 4:
        raise ValueError(
            f"Expected measurements of {kind.__name__} as a non-empty tensor (B, C, H, W). Got {tuple(y.shape)}."
        )
    if kind is Denoising:
        return IdentityTerm(y)
    if kind is Inpainting:
        _check_broadcast(physics.mask, y, "mask")
        _check_real(physics.mask, "mask")
        return MaskTerm(y, physics.mask)
    if kind is BlurFFT:
        _check_real(physics.filter, "filter")
        if tuple(physics.img_size[-2:]) != tuple(y.shape[-2:]):
            raise ValueError(
                f"Expected y of the physics' image size {tuple(physics.img_size)}. Got {tuple(y.shape[1:])}; "
                "build BlurFFT with img_size=y.shape[1:]."
            )
        transfer = deepinv.physics.functional.filter_fft(physics.filter.double(), tuple(y.shape[-2:]), real_fft=True)
        return _circulant(y, transfer)
    if kind is Blur and physics.padding == "circular":
        _check_real(physics.filter, "filter")
        return _circulant(y, torch.fft.rfft2(circular_response(physics.filter, y.shape[-2:])))
    if kind is MRI:
        return _mri(y, physics.mask)
    if isinstance(physics, LinearPhysics):
        return generic_term(y, physics)
    raise ValueError(f"Expected a linear deepinv physics. Got {kind.__name__}, which is not a LinearPhysics.")


def _circulant(y: Tensor, transfer: Tensor) -> CirculantTerm:
    _check_broadcast(transfer[..., :1, :1], y[..., :1, :1], "filter")
    return CirculantTerm(y, transfer)


def _mri(y: Tensor, mask: Tensor) -> MRITerm:
    if y.shape[1] != 2:
        raise ValueError(
            f"Expected measurements of MRI with 2 channels, real and imaginary part. Got y of shape {tuple(y.shape)}."
        )
    _check_broadcast(mask, y, "mask")
    _check_real(mask, "mask")
    return MRITerm(y, mask)


def _check_real(parameter: Tensor | None, name: str) -> None:
    if parameter is None:
        raise ValueError(f"Expected a physics with a {name}. Got None.")
    if parameter.is_complex():
        raise ValueError(f"Expected a real {name} of the physics. Got {parameter.dtype}; images are real.")
    if not all_finite(parameter):
        raise ValueError(f"Expected a {name} of the physics with finite entries. Got NaN or inf.")


def _check_broadcast(parameter: Tensor, y: Tensor, name: str) -> None:
    try:
        fits = torch.broadcast_shapes(parameter.shape, y.shape) == y.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"Expected a {name} of the physics that fits y of shape {tuple(y.shape)}. Got {tuple(parameter.shape)}."
        )
