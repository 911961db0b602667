"""Experiments become run directories."""
