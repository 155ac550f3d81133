"""This room says which models have classes or numbers for labels, and has their losses."""
