"""This folder refuses what could not be trained exactly, and says why."""
