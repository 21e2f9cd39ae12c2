"""Coding rates and the losses made of them (MCR², MLC)."""
