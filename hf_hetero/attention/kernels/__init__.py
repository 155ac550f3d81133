"""This folder computes attention on one device: the kernels' contract, the kernels, and the choice of one."""
