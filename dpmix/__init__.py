"""dpmix: differentially private image classification with views, a companion to DP-Mix (NeurIPS 2023)."""

__version__ = "0.1.0"
