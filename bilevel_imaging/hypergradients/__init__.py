"""Certified hypergradients: two solves, one estimate, its bound and its cost."""

from bilevel_imaging.hypergradients.distance_report import DISTANCE_CERTIFICATES, distance_certificates
from bilevel_imaging.hypergradients.implicit import hypergradient, loss_interval
from bilevel_imaging.hypergradients.inexact_ad import inexact_ad
from bilevel_imaging.hypergradients.layer import BilevelReconstructor, LayerCertificate
from bilevel_imaging.hypergradients.requests import CERTIFICATES, check_certificate, check_solvers
from bilevel_imaging.hypergradients.result import Hypergradient, average
from bilevel_imaging.hypergradients.unrolled import UNROLLED_METHODS, UnrolledHypergradient, unrolled

__all__ = [
    "CERTIFICATES",
    "check_certificate",
    "check_solvers",
    "DISTANCE_CERTIFICATES",
    "UNROLLED_METHODS",
    "BilevelReconstructor",
    "Hypergradient",
    "LayerCertificate",
    "UnrolledHypergradient",
    "average",
    "distance_certificates",
    "hypergradient",
    "inexact_ad",
    "loss_interval",
    "unrolled",
]
