"""Sensitivity and privacy audits of a step."""
