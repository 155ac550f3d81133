"""This room learns from preferences: pairs of samples whose loss is one."""
