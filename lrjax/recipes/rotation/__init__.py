"""Optimizers that work in the eigenbasis of their own statistics."""

from .soap import soap as soap
