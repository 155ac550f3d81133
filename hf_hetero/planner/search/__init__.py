"""The room of searches, which find drafts in a fixed number of tries: `fast` of many degrees, `homogeneous` of one."""
