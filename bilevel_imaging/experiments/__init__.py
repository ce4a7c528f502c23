"""Experiments that scripts and notebooks share: one file each."""
