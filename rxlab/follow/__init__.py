"""Columns become one row per packet."""
