"""The page of a run: one file that loads nothing, with charts as SVG and a small script."""
