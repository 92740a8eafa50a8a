"""What the book shows: published numbers, claims, grids of runs, tables, plots, distances, diagnostics."""
