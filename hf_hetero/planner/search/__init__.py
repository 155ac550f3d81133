"""Drafts of plans, found in a fixed number of tries: `fast` for groups of many degrees, `homogeneous` for one."""
