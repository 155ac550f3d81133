"""Attention on one device: what a kernel is given and gives back, the kernels there are, and the choice of one."""
