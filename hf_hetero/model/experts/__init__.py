"""This folder watches mixtures of experts: how evenly a step uses its experts, and the loss of their routers."""
