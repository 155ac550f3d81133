"""Better drafts and bounds, given time. `improve` is the door; only `program` knows a solver."""
