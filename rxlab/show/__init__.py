"""For people: plots, exports, the report."""
