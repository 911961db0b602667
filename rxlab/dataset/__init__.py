"""Rows become labelled N-dimensional data and what it says."""
