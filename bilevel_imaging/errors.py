"""Exceptions. Misuse raises; a solve that stops early never does: it returns a wider certificate instead."""

from __future__ import annotations


class BilevelError(Exception):
    """Base class of every error of this package that is not a plain ``ValueError``."""


class NotStronglyConvexError(BilevelError, ValueError):
    """The lower-level energy has no positive strong convexity constant; the message says what to set."""


class DataError(BilevelError, ValueError):
    """Images, folders or measurements that cannot be used; the message names the file."""


class CheckpointError(BilevelError, ValueError):
    """A checkpoint or exported regularizer that cannot be read or does not fit; the message names the file."""


class NotCertifiedWarning(UserWarning):
    """A number was returned for which no certificate is available; the message says why."""
